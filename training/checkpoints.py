"""Checkpoints: a run's state, written so that it can be taken up again, and taken up."""

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import torch

from images.loader import Dataset, ImageLoader
from runner import Runner
from support import distributed, schema
from support.files import CheckpointError, first_line, read_file, write_file
from training.optim import checked_state, set_position

PROGRESS = ("epoch", "batch", "step", "skipped")  # of the Runner's attributes
# by which a user knows a callback
FLAGS = {
    "WeightAverage": "--ema",
    "EarlyStopping": "--patience",
    "TensorBoard": "--tensorboard",
    "Deadline": "--minutes",
}


class Checkpoints:
    """The checkpoint of one run: model, optimiser, schedule, random state, place in the epoch, metrics, callbacks.

    As a callback it is written after every epoch, and every few minutes within one; it has to be the last in the list,
    so that what the others did in that step is in it.

    Args:
        path: the file, which is written anew each time.
        hyperparameters: the run's, by name.
        minutes: after which one is written within an epoch.
        data: what is trained on; a run goes on with these images alone.
    """

    def __init__(self, path: Path, hyperparameters: dict, minutes: float = 5.0, data: Dataset | None = None):
        self.path, self.hyperparameters, self.minutes, self.data = path, hyperparameters, minutes, data
        # of what is trained on, which does not change; hashed once and not with every checkpoint
        self.images = {"fingerprints": data.fingerprints, "before": hash_of_seen(data)} if data else {}
        self._written = time.monotonic()

    def step_end(self, runner: Runner) -> None:
        if time.monotonic() - self._written > 60 * self.minutes:
            self.write(runner)

    def epoch_end(self, runner: Runner) -> None:
        self.write(runner)

    def write(self, runner: Runner, results: dict | None = None) -> None:
        """All that is needed to go on; `results` are the figures of a run that has ended."""
        contents = {"runner": runner_state(runner), "config": self.hyperparameters, "results": results}
        write_file(self.path, contents | self.images)
        self._written = time.monotonic()

    def resume(
        self,
        runner: Runner,
        train_loader: ImageLoader,
        images: set[str],
        free: set[str],
        changes_allowed: bool,
        defaults: dict,
    ) -> dict | None:
        """Bring the runner to where the checkpoint was written; returns the results of a run that has ended.

        Where hyperparameters have changed, those asked for now hold from here on. The place in the epoch and in the
        schedule is then the same part of the whole: after half of the images, half of the steps are done.

        Args:
            images: hyperparameters that may never differ from the checkpoint's: what was trained on could become what
                is validated on.
            free: those that may always differ, as they change nothing of what is learned.
            changes_allowed: whether the others may.
            defaults: of hyperparameters that are newer than the checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to a run with other hyperparameters or images.
        """
        checkpoint = distributed.broadcast(read_checkpoint, self.path)
        before, now = {**defaults, **in_todays_words(checkpoint["config"])}, self.hyperparameters
        if self.data and self.data.is_folder:
            free = {*free, "dataset"}  # the pictures themselves are compared, wherever they lie now
        changed = {
            name: f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in now.items()
            if before.get(name) != value and name not in free
        }
        self._require_possible(before, checkpoint["runner"]["progress"], changed, images, changes_allowed)
        self._require_same_images(checkpoint)
        try:
            restore_runner(runner, checkpoint["runner"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} does not fit this model: {first_line(error)}") from None
        sizes = [config["batch_size"] * config.get("grad_accum", 1) for config in (before, now)]
        if sizes[0] != sizes[1]:
            done = runner.batch * sizes[0]  # images of this epoch
            runner.batch = len(train_loader) if done >= train_loader.num_images else done // sizes[1]
        if runner.batch > len(train_loader):
            raise CheckpointError(f"{self.path} does not fit: batch {runner.batch} of {len(train_loader)} in an epoch")
        if runner.scheduler is not None:
            set_position(runner.scheduler, runner.epoch * len(train_loader) + runner.batch)
        if checkpoint["results"] is not None and not changed:
            return checkpoint["results"]
        self.resumed = checkpoint["runner"]["callbacks"].keys()
        return None

    def say_resumed(self, runner: Runner) -> None:
        """Where the run goes on, and what begins or ends there."""
        print(f"resuming after epoch {runner.epoch}, step {runner.step}")
        before, now = self.resumed, _stateful(runner).keys()
        for word, names in (("with", now - before), ("without", before - now)):
            if names:
                print(f"from here on {word} {', '.join(sorted(FLAGS.get(name, name) for name in names))}")

    def _require_possible(
        self, before: dict, progress: dict, changed: dict[str, str], images: set[str], changes_allowed: bool
    ) -> None:
        """Refuse a run that cannot go on with what has changed: by name, what it was and is."""
        now = self.hyperparameters
        if other_images := [changed[name] for name in changed if name in images]:
            raise CheckpointError(
                f"{'; '.join(other_images)}: a run goes on with its images; choose another --name for others"
            )
        if changed and not changes_allowed:
            raise CheckpointError(
                f"{'; '.join(changed.values())}: leave the flag out to go on as before (--resume with --name alone), "
                "or go on with the change by --resume_changed"
            )
        if progress["epoch"] + (progress["batch"] > 0) > math.ceil(now["epochs"]):
            raise CheckpointError(
                f"the run has begun its epoch {progress['epoch'] + (progress['batch'] > 0)}: it cannot end after "
                f"{now['epochs']}; --epochs must be at least that many, or choose another --name for a new run"
            )
        if changed and progress["epoch"] > before["epochs"]:
            raise CheckpointError(
                f"the run ended within its last epoch, after {before['epochs']}: it cannot go on; choose "
                "another --name for a new run"
            )
        if changed.keys() - {"epochs"} and progress["epoch"] >= now["epochs"]:
            raise CheckpointError(
                f"nothing is left to train with {'; '.join(changed.values())}: raise --epochs, or leave the flag out"
            )
        if before["optimizer"] != now["optimizer"]:
            raise CheckpointError(f"{self.path} does not fit: it holds the state of another optimizer")
        if (before.get("layer_decay", 1) == 1) != (now.get("layer_decay", 1) == 1):
            raise CheckpointError("layer_decay cannot change from 1 or to 1: the optimizer's state is in another order")

    def _require_same_images(self, checkpoint: dict) -> None:
        done, validations = checkpoint["runner"]["progress"]["epoch"], len(checkpoint["runner"]["metrics"]["val_step"])
        if self.data and validations != (done if len(self.data.val) else 0):
            raise CheckpointError(f"{self.path} does not fit: {validations} validations in {done} epochs")
        if self.data is None or ("fingerprints" not in checkpoint and not self.data.is_folder):
            return  # what earlier versions wrote; the other data sets never change
        before = checkpoint.get("fingerprints")
        for part, now in self.images["fingerprints"].items():
            if before is None or before.get(part, now) != now:
                then = f"{before[part].partition(' ')[0]} images" if before else "nothing known of them"
                raise CheckpointError(
                    f"the {part} images in {self.data.source} are not those that this run began with ({then} then, "
                    f"{now.partition(' ')[0]} now), or have other classes: put them back as they were, or choose "
                    "another --name for a new run"
                )
        if checkpoint.get("before", self.images["before"]) != self.images["before"]:
            raise CheckpointError(
                "--init_from names another model than the one that this run started from, or that file has changed: "
                "put it back, or choose another --name for a new run"
            )


def read_checkpoint(path: Path) -> dict:
    """
    Raises:
        CheckpointError: there is none, or it is damaged or something else.
    """
    return read_file(path, schema.CHECKPOINT, "is no whole checkpoint of a run")


def nothing_to_resume(path: Path, name: str) -> CheckpointError:
    """There is no such checkpoint of the run of that name; which there are."""
    found = [other for other in path.parent.glob("*.checkpoint") if is_checkpoint(other, interrupted=True)]
    others = sorted(Path(name).with_name(other.stem).as_posix() for other in found)
    listed = "; interrupted runs are there of --name " + ", ".join(others) if others else ""
    return CheckpointError(f"there is no {path} to resume from: run without --resume for a new run{listed}")


def is_checkpoint(path: Path, interrupted: bool = False) -> bool:
    """Whether there is a whole checkpoint at `path`; with `interrupted`, of a run that has not ended."""
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError:
        return False
    return not (interrupted and checkpoint["results"])


def in_todays_words(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config as it would be stored today: earlier versions had other words for some values, began with random
    filters, and left the momentum as each optimiser has it."""
    stored = {name: value for name, value in stored.items() if not isinstance(value, list | dict)}
    stored = {"whiten": False, "momentum": 0.95 if stored.get("optimizer") == "muon" else 0.9, **stored}
    if folds := stored.pop("folds", None):
        stored["fold"] = f"{stored.get('fold')}/{folds}"
    words = {"augment": {True: "crop_flip", False: "none"}, "patience": {None: 0}, "ema": {None: 0.0}}
    words |= {"grad_clip": {None: 0.0}, "fold": {0: None}, "classes": {"": None}}
    return {
        name: words[name][value] if name in words and value in words[name] else value for name, value in stored.items()
    }


def hash_of_seen(data: Dataset) -> str:
    """Of what the model had been trained on before this run, and of the normalisation that comes with it."""
    known = [(data.mean, data.std), data.metadata["seen"]] if data.before else []
    return hashlib.sha256(repr(known).encode()).hexdigest()


def runner_state(runner: Runner) -> dict:
    """All that the rest of the training depends on, as tensors and plain values."""
    runner.read_steps()
    return {
        **{name: getattr(runner, name).state_dict() for name in ("model", "optimizer", "scaler")},
        "callbacks": {name: callback.state_dict() for name, callback in _stateful(runner).items()},
        "metrics": {name: torch.tensor(values, dtype=_dtype(name)) for name, values in runner.metrics.items()},
        "progress": {name: getattr(runner, name) for name in PROGRESS},
        "totals": runner.totals,
        "random_state": torch.get_rng_state(),
        "cuda_random_state": device_random_state(runner.device),
    }


def device_random_state(device: torch.device) -> list[torch.Tensor]:
    """Of the generators of all CUDA devices, or of MPS; the CPU's is stored by itself."""
    if device.type == "mps":
        return [torch.mps.get_rng_state()]
    return torch.cuda.get_rng_state_all() if device.type == "cuda" else []


def set_device_random_state(device: torch.device, states: list[torch.Tensor]) -> None:
    """Of as many generators of one kind as there are; those of another machine's devices are left alone."""
    if [state.shape for state in states] != [state.shape for state in device_random_state(device)]:
        return
    if device.type == "mps":
        torch.mps.set_rng_state(states[0])
    elif device.type == "cuda":
        torch.cuda.set_rng_state_all(states)


def restore_runner(runner: Runner, state: dict) -> None:
    """Bring a runner to where `runner_state` was taken: `train` continues in the middle of the epoch, bit for bit. A
    callback that was not there then begins now.

    Raises:
        ValueError, RuntimeError: the state is not of such a runner; it is as it was then, but for its callbacks.
    """
    schema.check(state, schema.CHECKPOINT["runner"])
    metrics, progress, callbacks = state["metrics"], state["progress"], state["callbacks"]
    for part in ("train", "val"):
        if len({len(metrics[f"{part}_{what}"]) for what in ("loss", "accuracy", "step")}) > 1:
            raise ValueError(f"metrics of {part} have different lengths")
        if not all(0 <= value <= 1 for value in metrics[f"{part}_accuracy"]):
            raise ValueError(f"{part}_accuracy is not from 0 to 1")
    if len(metrics["val_step"]) not in (0, progress["epoch"]):  # 0 where nothing is validated
        raise ValueError(f"{len(metrics['val_step'])} validations after {progress['epoch']} epochs")
    schema.require_like(state["model"], dict(runner.model.state_dict()), "model")
    schema.require_like(state["totals"], runner.totals.cpu(), "totals")
    schema.require_like(state["random_state"], torch.get_rng_state(), "random_state")
    if (best := callbacks.get("EarlyStopping", {}).get("weights")) is not None:
        schema.require_like(best, dict(runner.eval_model.state_dict()), "the best weights")
    optimizer_state = checked_state(runner.optimizer, state["optimizer"])
    for name, callback in _stateful(runner).items():
        if name in callbacks:
            callback.load_state_dict(callbacks[name])
    torch.set_rng_state(state["random_state"])
    set_device_random_state(runner.device, state["cuda_random_state"])
    runner.model.load_state_dict(state["model"])
    runner.optimizer.load_state_dict(optimizer_state)
    if state["scaler"].keys() == runner.scaler.state_dict().keys():  # else the precision has changed
        runner.scaler.load_state_dict(state["scaler"])
    runner.metrics = {name: metrics[name].to(_dtype(name)).tolist() for name in runner.metrics}
    for name in PROGRESS:
        setattr(runner, name, progress[name])
    runner.totals = state["totals"].to(runner.device)
    if runner.scheduler is not None:
        set_position(runner.scheduler, runner.step)


def _dtype(metric: str) -> torch.dtype:
    return torch.int64 if metric.endswith("step") else torch.float64


def _stateful(runner: Runner) -> dict[str, object]:
    """Callbacks that have something to remember, by their class; a second one of a class has a number."""
    found = {}
    for callback in runner.callbacks:
        if hasattr(callback, "state_dict"):
            name = type(callback).__name__
            number = sum(other.partition(" ")[0] == name for other in found) + 1
            found[f"{name} {number}" if number > 1 else name] = callback
    return found
