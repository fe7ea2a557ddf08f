"""Checkpoints: a run's state, written so that it can be taken up again, and taken up."""

import time
from pathlib import Path

import torch

from runner import Runner
from support import distributed
from support.files import CheckpointError, read_file, write_file
from training.optim import rates_and_decays, set_rates_and_decays

PROGRESS = ("epoch", "batch", "step", "skipped")  # of the Runner's attributes


class Checkpoints:
    """The checkpoint of one run: model, optimiser, schedule, random state, place in the epoch, metrics, callbacks.

    As a callback it is written after every epoch, and every few minutes within one; it has to be the last in the list,
    so that what the others did in that step is in it.

    Args:
        path: the file, which is written anew each time.
        hyperparameters: the run's, by name.
        minutes: after which one is written within an epoch.
    """

    def __init__(self, path: Path, hyperparameters: dict, minutes: float = 5.0):
        self.path, self.hyperparameters, self.minutes = path, hyperparameters, minutes
        self._written = time.monotonic()

    def step_end(self, runner: Runner) -> None:
        if time.monotonic() - self._written > 60 * self.minutes:
            self.write(runner)

    def epoch_end(self, runner: Runner) -> None:
        self.write(runner)

    def write(self, runner: Runner, results: dict | None = None) -> None:
        """All that is needed to go on; `results` are the figures of a run that has ended."""
        contents = {"runner": runner_state(runner), "config": self.hyperparameters, "results": results}
        write_file(self.path, contents)
        self._written = time.monotonic()

    def resume(self, runner: Runner, images: set[str], free: set[str], changes_allowed: bool) -> dict | None:
        """Bring the runner to where the checkpoint was written; of a run that has ended return its results instead.

        Args:
            images: hyperparameters that may never differ from the checkpoint's: what was trained on could become what
                is validated on.
            free: those that may always differ, as they change nothing of what is learned.
            changes_allowed: whether the others may.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to a run with other hyperparameters.
        """
        checkpoint = distributed.broadcast(self._read)
        before = checkpoint["config"]
        changed = {
            name: f"{name} was {before.get(name)!r} and is {now!r}"
            for name, now in self.hyperparameters.items()
            if before.get(name) != now and name not in free
        }
        if other_images := [changed[name] for name in changed if name in images]:
            raise CheckpointError(
                f"{'; '.join(other_images)}: a run goes on with its images; choose another --name for others"
            )
        if changed and not changes_allowed:
            raise CheckpointError(f"{'; '.join(changed.values())}: --resume_changed goes on with the change")
        if checkpoint["results"] is not None and not changed:
            return checkpoint["results"]
        if before.get("optimizer") != self.hyperparameters["optimizer"]:
            raise CheckpointError(f"{self.path} does not fit: it holds the state of another optimizer")
        wanted = rates_and_decays(runner.optimizer)
        try:
            restore_runner(runner, checkpoint["runner"])
            differ = checkpoint["runner"]["callbacks"].keys() ^ _stateful(runner).keys()
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.path} does not fit this model: {reason}") from None
        if changed:  # the checkpoint brought its learning rate and decay along: what was asked for now is to hold
            set_rates_and_decays(runner.optimizer, runner.scheduler, wanted)
        print(f"resuming after epoch {runner.epoch}, step {runner.step}")
        if differ:
            print(f"only on one side, and beginning or ending here: {', '.join(sorted(differ))}")
        return None

    def _read(self) -> dict:
        if not self.path.exists():
            raise CheckpointError(f"there is no {self.path} to resume from: run without --resume")
        checkpoint = read_file(self.path)
        if not {"runner", "config", "results"} <= checkpoint.keys() or not isinstance(checkpoint["config"], dict):
            raise CheckpointError(f"{self.path} is not a checkpoint of a run")
        return checkpoint

    def set_interrupted_run_aside(self) -> None:
        """Rename the checkpoint of an interrupted run, rather than have the new run of that name overwrite it."""
        if is_of_interrupted_run(self.path):
            aside = self.path.with_name(self.path.name + ".previous")
            self.path.replace(aside)
            print(f"an interrupted run of this name is now {aside}; to go on with it, rename it back and use --resume")


def is_of_interrupted_run(path: Path) -> bool:
    """Whether there is a whole checkpoint at `path`, of a run that has not ended."""
    try:
        return path.exists() and read_file(path).get("results") is None
    except CheckpointError:
        return False


def runner_state(runner: Runner) -> dict:
    """All that the rest of the training depends on, as tensors and plain values."""
    runner.read_steps()
    return {
        **{name: part.state_dict() for name, part in _parts(runner).items()},
        "callbacks": {name: callback.state_dict() for name, callback in _stateful(runner).items()},
        "metrics": {name: torch.tensor(values, dtype=_dtype(name)) for name, values in runner.metrics.items()},
        "progress": {name: getattr(runner, name) for name in PROGRESS},
        "totals": runner.totals,
        "random_state": torch.get_rng_state(),
        "cuda_random_state": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_runner(runner: Runner, state: dict) -> None:
    """Bring a runner to where `runner_state` was taken: `train` continues in the middle of the epoch, bit for bit. A
    callback that was not there then begins now.

    Raises:
        KeyError, ValueError, RuntimeError: the state is not of such a runner.
    """
    metrics = {name: state["metrics"][name].to(_dtype(name)).flatten().tolist() for name in runner.metrics}
    for name, part in _parts(runner).items():
        part.load_state_dict(state[name])
    for name, callback in _stateful(runner).items():
        if name in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][name])
    runner.metrics = metrics
    for name in PROGRESS:
        setattr(runner, name, state["progress"][name])
    runner.totals = state["totals"].to(runner.device)
    torch.set_rng_state(state["random_state"])
    if len(state["cuda_random_state"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_random_state"])


def _dtype(metric: str) -> torch.dtype:
    return torch.int64 if metric.endswith("step") else torch.float64


def _parts(runner: Runner) -> dict[str, object]:
    parts = {"model": runner.model, "optimizer": runner.optimizer, "scaler": runner.scaler}
    return parts if runner.scheduler is None else {**parts, "scheduler": runner.scheduler}


def _stateful(runner: Runner) -> dict[str, object]:
    return {type(callback).__name__: callback for callback in runner.callbacks if hasattr(callback, "state_dict")}
