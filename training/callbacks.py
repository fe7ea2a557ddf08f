"""What hangs on a Runner, in its list of callbacks: clock, progress bar, averaged weights, early stopping, the GIF's
frames, TensorBoard. And a compiled model."""

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import utils
from network import VisionTransformer
from runner import Runner
from support import distributed, schema


class Clock:
    """Counts the seconds of training steps alone, without loading, validation and other callbacks.

    `seconds` until now, and `val_seconds`, what that was at each validation.
    """

    def __init__(self):
        self.seconds, self.val_seconds, self._started = 0.0, [], 0.0

    def step_start(self, runner: Runner) -> None:
        self._started = time.perf_counter()

    def step_end(self, runner: Runner) -> None:
        self.seconds += time.perf_counter() - self._started

    def epoch_end(self, runner: Runner) -> None:
        self.val_seconds.append(self.seconds)

    def state_dict(self) -> dict:
        return {"seconds": self.seconds, "val_seconds": self.val_seconds}

    def load_state_dict(self, state: dict) -> None:
        schema.check(state, {"seconds": schema.NOT_NEGATIVE, "val_seconds": [schema.NOT_NEGATIVE]}, "Clock")
        self.seconds, self.val_seconds = state["seconds"], state["val_seconds"]


# ---------------------------------------------------------------------------------------------------- progress


class ProgressBar:
    """A bar while an epoch runs, with loss and accuracy so far and the time left; then a line that stays.

    Args:
        clock: whose seconds `images/s` is of, so that pictures and validation do not count.
    """

    def __init__(self, clock: Clock):
        self.clock, self.bar = clock, None

    def train_start(self, runner: Runner) -> None:
        self._began, self._first_step = time.perf_counter(), runner.step
        self._note_start(runner)

    def _note_start(self, runner: Runner) -> None:
        """Of an epoch, or of what is left of it."""
        self._seconds, self._images = self.clock.seconds, runner.totals[2].item() if runner.batch else 0

    def step_start(self, runner: Runner) -> None:
        if self.bar is None:
            self._note_start(runner)
            options = {"leave": False, "mininterval": 0.5, "dynamic_ncols": True, "disable": distributed.rank() > 0}
            title = f"epoch {runner.epoch + 1}/{runner.total_epochs}"
            self.bar = tqdm(desc=title, total=runner.epoch_steps, initial=runner.batch, unit="step", **options)

    def step_end(self, runner: Runner) -> None:
        if self.bar.update():  # it is time to redraw the bar
            loss, correct, images = runner.totals.tolist()
            skipped = f", {runner.skipped} steps skipped" if runner.skipped else ""
            text = f"loss {loss / images:.3f}, accuracy {correct / images:.1%}, " if images else ""
            self.bar.set_postfix_str(f"{text}{self._left(runner)} left in all{skipped}", refresh=False)
        if runner.batch >= runner.epoch_steps:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def epoch_end(self, runner: Runner) -> None:
        loss, correct, images = runner.totals.tolist()
        images = max(images, 1)  # none where all steps were skipped
        rate = (images - self._images) / max(self.clock.seconds - self._seconds, 1e-9)
        line = f"epoch {runner.epoch:3d}/{runner.total_epochs}  train loss {loss / images:.4f} "
        line += f"accuracy {correct / images:6.2%}"
        if runner.metrics["val_step"][-1:] == [runner.step]:
            line += f"  val loss {runner.metrics['val_loss'][-1]:.4f} "
            line += f"accuracy {runner.metrics['val_accuracy'][-1]:6.2%}"
        print(f"{line}  {rate:,.0f} images/s  {self._left(runner)} left", flush=True)

    def _left(self, runner: Runner) -> str:
        """Time until the end, if it goes on as it did since training began, all that comes between included."""
        done = max(1, runner.step - self._first_step)
        return clock_time((runner.total_steps - runner.step) * (time.perf_counter() - self._began) / done)


class WithProgress:
    """A loader that shows a bar while it is read, and is else as it was."""

    def __init__(self, loader: Iterable, title: str):
        self.loader, self.title = loader, title

    def __iter__(self) -> Iterator:
        return iter(tqdm(self.loader, self.title, unit="batch", leave=False, disable=distributed.rank() > 0))

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)


def clock_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


# ------------------------------------------------------------------------------- what changes the training


class WeightAverage:
    """Has the runner validate and test an exponential moving average of its weights (Polyak & Juditsky 1992).

    After step n the average becomes d * average + (1 - d) * weights, where d is `decay`, or (1 + n) / (10 + n) while
    that is less: what came first is soon forgotten in short runs too. Buffers (BatchNorm's running mean and variance)
    are averaged in the same way. The average is `runner.eval_model`.
    """

    def __init__(self, runner: Runner, decay: float):
        def move(averaged, weights, count):
            n = self.average.n_averaged.item()
            get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, weights, count)

        self.average = AveragedModel(runner.model, multi_avg_fn=move, use_buffers=True)
        runner.eval_model = self.average.module

    def train_start(self, runner: Runner) -> None:
        if self.average.n_averaged == 0:  # also where a run that had no average is resumed with one
            self.step_end(runner)  # the first update copies

    def step_end(self, runner: Runner) -> None:
        self.average.update_parameters(runner.model)

    def state_dict(self) -> dict:
        return self.average.state_dict()

    def load_state_dict(self, state: dict) -> None:
        schema.require_like(state, dict(self.average.state_dict()), "average")
        self.average.load_state_dict(state)


class EarlyStopping:
    """Ends training once validation "loss" or "accuracy" stops improving for `patience` epochs; keeps the best weights.

    Only a change by more than `min_improvement` (of the loss in nats, of the accuracy as a fraction) is an improvement.
    `epoch` is the one whose weights are kept, counted from 1; after each improvement `on_best(runner)` is called.
    """

    def __init__(
        self,
        quantity: str,
        patience: int,
        min_improvement: float = 0.0,
        on_best: Callable[[Runner], None] = lambda runner: None,
    ):
        self.quantity, self.patience, self.min_improvement, self.on_best = quantity, patience, min_improvement, on_best
        self.epoch, self.best, self.weights = 0, None, None

    def train_start(self, runner: Runner) -> None:
        if self.weights is not None and runner.epoch - self.epoch >= self.patience:
            runner.stop = True

    def epoch_end(self, runner: Runner) -> None:
        value = runner.metrics[f"val_{self.quantity}"][-1]
        if self.weights is None or self._improvement(value) > self.min_improvement:
            self.epoch, self.best = runner.epoch, value
            self.weights = {name: tensor.clone() for name, tensor in runner.eval_model.state_dict().items()}
            self.on_best(runner)
        self.train_start(runner)

    def _improvement(self, value: float) -> float:
        return self.best - value if self.quantity == "loss" else value - self.best

    def use_best(self, runner: Runner) -> None:
        """Have the runner test the best weights; those that it would train further are left as they are."""
        runner.eval_model = copy.deepcopy(runner.eval_model)
        runner.eval_model.load_state_dict(self.weights)

    def state_dict(self) -> dict:
        return {"quantity": self.quantity, "epoch": self.epoch, "best": self.best, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        table = {"quantity": schema.TEXT, "epoch": schema.COUNT, "best": schema.maybe(schema.NUMBER)}
        schema.check(state, {**table, "weights": schema.ANYTHING}, "EarlyStopping")
        if (state["best"] is None) != (state["weights"] is None):
            raise ValueError("EarlyStopping has a best epoch without weights, or weights without an epoch")
        if state["quantity"] == self.quantity:  # else the search for the best begins anew
            self.epoch, self.best, self.weights = state["epoch"], state["best"], state["weights"]


def compile_training(runner: Runner, loader: Iterable) -> None:
    """Have a runner's training steps call its model through `torch.compile`, or say in one line why that cannot be.

    It is tried, forward and back, with the first batch of `loader`; what that does to statistics, gradients and random
    state is undone. A smaller last batch is compiled when it comes.
    """
    model, device = runner.model.train(), runner.device
    before = copy.deepcopy(model.state_dict())
    compiled, reason = torch.compile(model), None
    images = next(iter(loader))[0].tensor_split(runner.grad_accum)[0].to(device)
    try:
        # each process tries for itself: one that fails would leave the others waiting for its part of a BatchNorm
        with distributed.apart(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            runner.logits(compiled, images).sum().backward()
    except Exception as error:  # compilers, code generators and drivers fail in many ways
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    model.zero_grad()
    model.load_state_dict(before)
    if distributed.all_reduce(reason is not None) == 0:
        runner.training_model = compiled
    else:
        print(f"--compile does not work here, going on without: {reason or 'it failed in another process'}")


# --------------------------------------------------------------------------------------------------------- pictures


class Frames:
    """Draws `count` frames of a GIF into `folder`, spread over all steps, besides those of the beginning and the end:
    curves, and what the model says of six images of `loader`."""

    def __init__(self, loader: Iterable, classes: list[str], folder: Path, count: int, title: str):
        self.loader, self.classes, self.folder, self.count, self.title = loader, classes, folder, count, title

    def train_start(self, runner: Runner) -> None:
        if runner.step == 0:
            for frame in self.folder.glob("frame_*.png"):
                frame.unlink()
            self._draw(runner)

    def step_end(self, runner: Runner) -> None:
        if runner.step % -(-runner.total_steps // self.count) == 0:
            self._draw(runner)

    def epoch_end(self, runner: Runner) -> None:
        if runner.step == runner.total_steps:  # once more, now that the last validation is in
            self._draw(runner)

    def _draw(self, runner: Runner) -> None:
        epoch, epochs = min(runner.epoch + 1, runner.total_epochs), runner.total_epochs
        path = self.folder / f"frame_{runner.step:07d}.png"
        runner.plot(self.loader, path, self.classes, f"{self.title}, epoch {epoch} of {epochs}")


class TensorBoard:
    """Writes for TensorBoard what a runner measures, and after each epoch its pictures: progress and attention.

    Args:
        folder: where; `tensorboard --logdir runs` shows it, or all that are in a folder above. A run that begins
            empties it, one that is resumed strikes out what came after its checkpoint, and writes it again.
        loader: of the images shown.
        classes: class names.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, loader, classes: list[str]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        self.make_writer, self.folder, self.loader, self.classes = SummaryWriter, folder, loader, classes
        self.rate = 0.0  # of the last step
        threading.excepthook = self._thread_failed  # TensorBoard writes in a thread of its own

    def _thread_failed(self, failure) -> None:
        """A disk that is full is no traceback of the thread: the writer's next call raises the same error."""
        if isinstance(failure.exc_value, OSError):
            failure.exc_value.filename = str(self.folder)
        else:
            threading.__excepthook__(failure)

    def train_start(self, runner: Runner) -> None:
        if runner.step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = self.make_writer(str(self.folder), purge_step=runner.step or None)
        self.entries = sum(step < runner.step for step in runner.metrics["train_step"])
        if runner.step:
            self._write_training(runner)
            if runner.metrics["val_step"][-1:] == [runner.step]:
                self.epoch_end(runner)
        self.next_rate = learning_rate(runner)

    def step_end(self, runner: Runner) -> None:
        # the schedule has moved on: what it says now is the next step's
        self.rate, self.next_rate = self.next_rate, learning_rate(runner)
        self._write_training(runner)

    def _write_training(self, runner: Runner) -> None:
        new = (runner.metrics[f"train_{what}"][self.entries :] for what in ("step", "loss", "accuracy"))
        for step, loss, accuracy in zip(*new, strict=True):
            self.writer.add_scalar("loss/train", loss, step)
            self.writer.add_scalar("accuracy/train", accuracy, step)
        self.entries = len(runner.metrics["train_step"])
        self.writer.add_scalar("learning_rate", self.rate, runner.step)

    def epoch_end(self, runner: Runner) -> None:
        for quantity in ("loss", "accuracy"):
            if values := runner.metrics[f"val_{quantity}"]:
                self.writer.add_scalar(f"{quantity}/val", values[-1], runner.step)
        progress = runner.plot(self.loader, classes=self.classes)
        self.writer.add_figure("progress", progress, runner.step, close=False)
        if isinstance(runner.eval_model, VisionTransformer):
            attention = utils.draw_attention(runner.eval_model, self.loader, self.classes)
            self.writer.add_figure("attention", attention, runner.step, close=False)
        self.writer.flush()

    def state_dict(self) -> dict:
        self.writer.flush()  # what a checkpoint holds is not written again
        return {"rate": self.rate}

    def load_state_dict(self, state: dict) -> None:
        schema.check(state, {"rate": schema.NUMBER}, "TensorBoard")
        self.rate = state["rate"]


def learning_rate(runner: Runner) -> float:
    return max(group["lr"] for group in runner.optimizer.param_groups)
