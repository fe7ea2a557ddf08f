"""What can be looked at while a run trains: a table of every step, curves, the GIF's frames, TensorBoard."""

import shutil
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

import utils
from network import VisionTransformer
from runner import Runner
from support import schema
from support.files import write_bytes


class LiveResults:
    """Writes `table`, a CSV file with a line for each step and, where there is validation, each epoch; and draws the
    curves after each epoch. Both are whole at any time, and after Ctrl-C.

    Columns: epoch, step, train_loss, train_accuracy, val_loss, val_accuracy; those that a line does not have are empty.
    """

    COLUMNS = ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy")

    def __init__(self, table: Path, curves: Path, title: str):
        self.table, self.curves, self.title = table, curves, title
        self._drawn, self._cost = 0.0, 0.0  # when the curves were drawn, and how long that took
        self.steps = None  # that are in the table; None before it is begun

    def train_start(self, runner: Runner) -> None:
        """What an earlier part of the run wrote after its last checkpoint is written again."""
        self.steps, self.epochs, self._written = 0, 0, 0.0
        write_bytes(self.table, (",".join(self.COLUMNS) + "\n").encode())
        self.append(runner)

    def step_end(self, runner: Runner) -> None:
        if time.monotonic() - self._written > 1:
            self.append(runner)

    def epoch_end(self, runner: Runner) -> None:
        self.append(runner)
        if time.monotonic() - self._drawn > 20 * self._cost:  # where epochs take no longer than a picture, not each
            began = time.monotonic()
            utils.draw_curves(runner.metrics, self.curves, self.title)
            self._drawn = time.monotonic()
            self._cost = self._drawn - began

    def append(self, runner: Runner) -> None:
        """Write what is new."""
        if self.steps is None or not self.table.exists():  # stopped before training, or somebody has taken it away
            self.train_start(runner)
            return
        metrics = runner.metrics
        rows = [
            (step, 0, self._epoch(runner, step), step, loss, accuracy, "", "")
            for step, loss, accuracy in zip(
                *(metrics[f"train_{what}"][self.steps :] for what in ("step", "loss", "accuracy")), strict=True
            )
        ]
        rows += [
            (step, 1, self.epochs + i + 1, step, "", "", loss, accuracy)
            for i, (step, loss, accuracy) in enumerate(
                zip(*(metrics[f"val_{what}"][self.epochs :] for what in ("step", "loss", "accuracy")), strict=True)
            )
        ]
        text = "".join(",".join(map(str, row[2:])) + "\n" for row in sorted(rows, key=lambda row: row[:2]))
        try:
            with open(self.table, "a", encoding="utf-8", newline="") as file:
                file.write(text)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.table}: {error.strerror or error}") from None
        self.steps, self.epochs = len(metrics["train_step"]), len(metrics["val_step"])
        self._written = time.monotonic()

    @staticmethod
    def _epoch(runner: Runner, step: int) -> int:
        ends = runner.metrics["val_step"]
        if ends and step <= ends[-1]:
            return bisect_left(ends, step) + 1
        return len(ends) + 1 if ends else (step - 1) // runner.steps_per_epoch + 1


class Frames:
    """Draws at most `count` frames of a GIF into `folder`, spread over all steps, besides those of the beginning and
    the end: curves, and what the model says of six images of `loader`. Short runs have fewer: eight for one epoch and
    two for each further one, as a frame takes as long as dozens of steps."""

    def __init__(self, loader: Iterable, classes: list[str], folder: Path, count: int, title: str):
        self.loader, self.classes, self.folder, self.count, self.title = loader, classes, folder, count, title

    def train_start(self, runner: Runner) -> None:
        if runner.step == 0:
            for frame in self.folder.glob("frame_*.png"):
                frame.unlink()
            self._draw(runner)

    def step_end(self, runner: Runner) -> None:
        if draws_frame(runner.step, runner.total_steps, runner.total_epochs, self.count):
            self._draw(runner)

    def epoch_end(self, runner: Runner) -> None:
        if runner.step == runner.total_steps:  # once more, now that the last validation is in
            self._draw(runner)

    def draw_end(self, runner: Runner) -> None:
        """The last frame, where training has ended before its time."""
        if runner.total_steps and runner.step < runner.total_steps:
            self._draw(runner, epoch=runner.epoch)

    def _draw(self, runner: Runner, epoch: int | None = None) -> None:
        epoch, epochs = epoch or min(runner.epoch + 1, runner.total_epochs), runner.total_epochs
        path = self.folder / f"frame_{runner.step:07d}.png"
        runner.plot(self.loader, path, self.classes, f"{self.title}, epoch {epoch} of {epochs}")


def num_frames(count: int, epochs: int) -> int:
    return min(count, 6 + 2 * epochs)


def draws_frame(step: int, total_steps: int, epochs: int, count: int) -> bool:
    """Whether a frame is drawn after this step."""
    return step % -(-total_steps // num_frames(count, epochs)) == 0


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
        self.writer = None  # not before training goes on
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
        if self.writer:
            self.writer.flush()  # what a checkpoint holds is not written again
        return {"rate": self.rate}

    def load_state_dict(self, state: dict) -> None:
        schema.check(state, {"rate": schema.NUMBER}, "TensorBoard")
        self.rate = state["rate"]


def learning_rate(runner: Runner) -> float:
    return max(group["lr"] for group in runner.optimizer.param_groups)
