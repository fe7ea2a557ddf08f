"""What hangs on the Runner: averaged weights, early stopping, frames, TensorBoard; and a compiled model."""

import copy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import utils
from network import VisionTransformer
from runner import Runner
from support import distributed


class WeightAverage:
    """Has a runner validate and test an exponential moving average of its weights (Polyak & Juditsky 1992).

    After step n the average becomes d * average + (1 - d) * weights, where d is `decay`, or (1 + n) / (10 + n) while
    that is less: what came first is soon forgotten in short runs too. Buffers (BatchNorm's running mean and variance)
    are averaged in the same way. The average is `runner.eval_model`, and part of the runner's state.
    """

    def __init__(self, runner: Runner, decay: float):
        def move(averaged, weights, count):
            n = self.average.n_averaged.item()
            get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, weights, count)

        self.average = AveragedModel(runner.model, multi_avg_fn=move, use_buffers=True)
        runner.eval_model = self.average.module
        runner.callbacks["train_start"].append(self._start)
        runner.callbacks["step_end"].append(self._update)
        runner.stateful["weight_average"] = self.average

    def _start(self, runner: Runner) -> None:
        if self.average.n_averaged == 0:  # also where a run that had no average is resumed with one
            self._update(runner)  # the first update copies

    def _update(self, runner: Runner) -> None:
        self.average.update_parameters(runner.model)


class EarlyStopping:
    """Ends training once validation "loss" or "accuracy" stops improving for `patience` epochs; keeps the best weights.

    Only a change by more than `min_improvement` (of the loss in nats, of the accuracy as a fraction) is an improvement.
    `epoch` is the one whose weights are kept, counted from 1; after each improvement `on_best` is called. All of it is
    part of the runner's state.
    """

    def __init__(
        self,
        runner: Runner,
        quantity: str,
        patience: int,
        min_improvement: float = 0.0,
        on_best: Callable[[Runner], None] | None = None,
    ):
        self.quantity, self.patience, self.min_improvement, self.on_best = quantity, patience, min_improvement, on_best
        self.epoch, self.best, self.weights = 0, None, None
        runner.callbacks["train_start"].append(self._stop_when_due)
        runner.callbacks["epoch_end"].append(self._compare)
        runner.stateful["early_stopping"] = self

    def _compare(self, runner: Runner) -> None:
        value = runner.metrics[f"val_{self.quantity}"][-1]
        if self.weights is None or self._improvement(value) > self.min_improvement:
            self.epoch, self.best = runner.epoch, value
            self.weights = {name: tensor.clone() for name, tensor in runner.eval_model.state_dict().items()}
            if self.on_best is not None:
                self.on_best(runner)
        self._stop_when_due(runner)

    def _improvement(self, value: float) -> float:
        return self.best - value if self.quantity == "loss" else value - self.best

    def _stop_when_due(self, runner: Runner) -> None:
        if self.weights is not None and runner.epoch - self.epoch >= self.patience:
            runner.stop = True

    def use_best(self, runner: Runner) -> None:
        """Have the runner test the best weights; those that it would train further are left as they are."""
        runner.eval_model = copy.deepcopy(runner.eval_model)
        runner.eval_model.load_state_dict(self.weights)

    def state_dict(self) -> dict:
        return {"quantity": self.quantity, "epoch": self.epoch, "best": self.best, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        if state["quantity"] == self.quantity:  # else the search for the best begins anew
            self.epoch, self.best, self.weights = state["epoch"], state["best"], state["weights"]


def draw_frames(
    runner: Runner, loader: Iterable, classes: list[str], folder: Path, count: int, epochs: int, title: str
) -> None:
    """Have a runner draw `count` frames of a GIF into `folder` while it trains, spread over all its steps, besides
    those of the beginning and the end: curves, and what it says of six images of `loader`."""

    def draw(runner: Runner) -> None:
        epoch = min(runner.epoch + 1, epochs)
        runner.plot(loader, folder / f"frame_{runner.step:07d}.png", classes, f"{title}, epoch {epoch} of {epochs}")

    def draw_when_due(runner: Runner) -> None:
        if runner.step % -(-runner.total_steps // count) == 0:
            draw(runner)

    def draw_last(runner: Runner) -> None:
        if runner.step == runner.total_steps:  # once more, now that the last validation is in
            draw(runner)

    if runner.step == 0:
        for frame in folder.glob("frame_*.png"):
            frame.unlink()
        runner.callbacks["train_start"].append(draw)
    runner.callbacks["step_end"].append(draw_when_due)
    runner.callbacks["epoch_end"].append(draw_last)


class TensorBoard:
    """Writes for TensorBoard what a runner measures, and after each epoch its pictures: progress and attention.

    Args:
        folder: where; `tensorboard --logdir` shows it, or all that are in a folder above. A run that begins empties it,
            one that is resumed strikes out what came from its checkpoint on, and writes it again.
        loader: of the images shown.
        classes: class names.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, runner: Runner, folder: Path, loader, classes: list[str]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
        self.make_writer, self.folder, self.loader, self.classes = SummaryWriter, folder, loader, classes
        runner.callbacks["train_start"].append(self._start)
        runner.callbacks["step_end"].append(self._write_training)
        runner.callbacks["epoch_end"].append(self._write_validation)

    def _start(self, runner: Runner) -> None:
        if runner.step == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.writer = self.make_writer(str(self.folder), purge_step=runner.step or None)
        self.entries = sum(step < runner.step for step in runner.metrics["train_step"])
        self._write_training(runner)
        if runner.metrics["val_step"][-1:] == [runner.step]:
            self._write_validation(runner)

    def _write_training(self, runner: Runner) -> None:
        if len(runner.metrics["train_step"]) > self.entries:
            self.entries += 1
            self._write_scalars(runner, "train")
            rate = max(group["lr"] for group in runner.optimizer.param_groups)
            self.writer.add_scalar("learning_rate", rate, runner.step)

    def _write_validation(self, runner: Runner) -> None:
        self._write_scalars(runner, "val")
        progress = runner.plot(self.loader, classes=self.classes)
        self.writer.add_figure("progress", progress, runner.step, close=False)
        if isinstance(runner.eval_model, VisionTransformer):
            attention = utils.draw_attention(runner.eval_model, self.loader, self.classes)
            self.writer.add_figure("attention", attention, runner.step, close=False)
        self.writer.flush()

    def _write_scalars(self, runner: Runner, split: str) -> None:
        for quantity in ("loss", "accuracy"):
            self.writer.add_scalar(f"{quantity}/{split}", runner.metrics[f"{split}_{quantity}"][-1], runner.step)


def compile_training(runner: Runner, images: torch.Tensor) -> None:
    """Have a runner's training steps call its model through `torch.compile`, or say in one line why that cannot be.

    It is tried, forward and back, with `images` `(batch, 3, height, width)`; what that does to statistics, gradients
    and random state is undone. A smaller last batch is compiled when it comes.
    """
    model, device = runner.model.train(), runner.device
    before = copy.deepcopy(model.state_dict())
    compiled, reason = torch.compile(model), None
    try:
        # each process tries for itself: one that fails would leave the others waiting for its part of a BatchNorm
        with distributed.apart(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            runner._logits(compiled, images.to(device)).sum().backward()
    except Exception as error:  # of compilers, code generators and drivers there is no end of kinds
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    model.zero_grad()
    model.load_state_dict(before)
    if distributed.add_up(reason is not None) == 0:
        runner.training_model = compiled
    else:
        print(f"--compile does not work here, going on without: {reason or 'it failed in another process'}")
