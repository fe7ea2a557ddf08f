"""Runner: the loop that trains, validates and tests a model, its metrics, and the choice of device and precision."""

import contextlib
import ctypes
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
READ_EVERY = 50  # steps after which an accelerator is waited for, to read the losses that lie there


def choose_device(name: str = "auto") -> torch.device:
    """The device by name; "auto" takes MPS (Apple silicon), else CUDA, else the CPU.

    Raises:
        ValueError: a name that is not known, or a device that this machine does not have.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"device {name!r} is not available on this machine: choose auto, cpu, cuda or mps") from None
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 by itself. Others get there by way of fp32, many times slower: of CPUs all
    but those with AMX (Intel, from 2023) or AVX-512 BF16 (AMD, from 2022)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(name: str, device: torch.device) -> str:
    """The precision by name; "auto" takes bf16 where the device computes in it, else fp32."""
    return name if name != "auto" else "bf16" if has_bf16(device) else "fp32"


def keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that are gone for those of the next step, as on a GPU.

    As a rule glibc, the C library of most Linux systems, returns it to the system after each use, and a training step
    on the CPU gets it anew, page by page (docs/speed.md). The process then needs what it needed at its peak until it
    ends. Does nothing on other systems.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: no tensor has pages of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: what is free at the end of the heap stays


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No stochastic depth and no batch statistics; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient became infinite or not a number; the message says at which step and what to try."""


class Runner:
    """Trains, validates and tests a model.

    Args:
        model: gives logits `(batch, classes)` for images; moved to `device`.
        criterion: loss of (logits, labels), averaged over the batch. In validation and test `eval_criterion` takes its
            place where it is given: plain cross-entropy, say, where training smooths the labels.
        device: None chooses MPS, CUDA or CPU, whichever is there.
        scheduler: stepped after every optimiser step.
        grad_clip: largest norm of all gradients together; longer ones are scaled down to it. None leaves them alone.
        skip_nonfinite: where training would stop because a batch's loss or gradient is infinite or not a number, step
            over that batch and count it in `skipped`.
        precision: "fp32", or "bf16" or "fp16" for what `torch.autocast` may compute in it; weights stay in fp32. fp16
            comes with a gradient scaler (Micikevicius et al. 2018), which leaves out steps of its own.
        grad_accum: parts that a batch is cut into for less memory; their gradients are summed before the step.
        callbacks: objects with any of the methods `train_start`, `step_start`, `step_end` and `epoch_end` (after
            validation), called with the runner in the order of the list; `runner.stop = True` ends training after the
            current step. Their `state_dict`, if any, belongs to a checkpoint.
        verbose: print a line for each epoch.

    `metrics` holds the lists `train_loss`, `train_accuracy`, `train_step`, with an entry for every optimiser step, and
    `val_loss`, `val_accuracy`, `val_step`, with one for every validation: averages over images; accuracy is a fraction.
    `eval_model` is what `test` uses, `training_model` what training steps call: `model`, or its average, or compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Criterion,
        device: torch.device | str | None = None,
        scheduler: LRScheduler | None = None,
        eval_criterion: Criterion | None = None,
        grad_clip: float | None = None,
        skip_nonfinite: bool = False,
        precision: str = "fp32",
        grad_accum: int = 1,
        callbacks: Iterable[object] = (),
        verbose: bool = True,
    ):
        if precision not in DTYPES:
            raise ValueError(f"unknown precision {precision!r}: choose {', '.join(DTYPES)}")
        self.device = choose_device() if device is None else torch.device(device)
        self.model = self.eval_model = self.training_model = model.to(self.device)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.criterion, self.eval_criterion = criterion, eval_criterion or criterion
        self.grad_clip, self.skip_nonfinite = grad_clip, skip_nonfinite
        self.precision, self.grad_accum = precision, grad_accum
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.callbacks, self.verbose, self.stop = list(callbacks), verbose, False
        self.metrics = {f"{part}_{what}": [] for part in ("train", "val") for what in ("loss", "accuracy", "step")}
        self.epoch = 0  # epochs completed
        self.batch = 0  # batches done of the epoch that runs
        self.step = 0  # optimiser steps made
        self.skipped = 0  # of these, steps left out because of a loss or gradient that is not finite
        self.totals = torch.zeros(3, device=self.device)  # see `totals_of`: of the epoch that runs, or has just ended
        # of the training that runs; a callback may change `total_steps`
        self.total_steps = self.steps_per_epoch = None
        self._unread = []  # of steps not yet in `metrics`: step, and `totals_of` it with the gradients' norm

    def train(self, train_loader: Iterable, val_loader: Iterable | None = None, epochs: float = 20) -> dict[str, list]:
        """Train for `epochs` more epochs, with validation after each; returns `metrics`. Of 1.6 epochs the second ends
        after 0.6 of its steps; it is validated and counted like the first.

        Loaders give `(images, labels)` batches: the project's ImageLoader or a torch DataLoader. Labels in training may
        be probabilities `(batch, classes)`, of which accuracy takes the likeliest class for the right one.

        Raises:
            NonFiniteLoss: the training or validation loss, or a gradient, is infinite or not a number.
        """
        if epochs <= 0 or not len(train_loader):
            raise ValueError(f"nothing to train: {epochs} epochs of {len(train_loader)} batches")
        self.steps_per_epoch = len(train_loader)
        self.total_steps = self.step - self.batch + steps_in(epochs, self.steps_per_epoch)
        self._call("train_start")
        while (self.batch or self.step < self.total_steps) and not self.should_stop():
            self.model.train()
            if self.batch == 0:
                self.totals.zero_()
            for images, labels in self._remaining_batches(train_loader) if self.batch < self.epoch_steps else ():
                self._call("step_start")
                self.train_step(*self._to_device(images, labels))
                self._call("step_end")
                if self.should_stop() or self.batch >= self.epoch_steps:
                    break
            self.read_steps()
            if self.batch < self.epoch_steps:
                break
            if val_loader is not None:
                self._record("val", *self.test(val_loader), self.step)
            self.epoch, self.batch = self.epoch + 1, 0
            if self.verbose:
                self._print_epoch()
            self._call("epoch_end")
        self.stop = False
        return self.metrics

    @property
    def epoch_steps(self) -> int:
        """Steps of the epoch that runs: the last one may be cut short."""
        return min(self.steps_per_epoch, self.total_steps - self.step + self.batch)

    @property
    def total_epochs(self) -> int:
        """Of the training that runs, one that is cut short included."""
        return self.epoch - (-(self.total_steps - self.step + self.batch) // self.steps_per_epoch)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One optimiser step with a batch that lies on the device."""
        self.optimizer.zero_grad()
        # BatchNorm takes its statistics of a batch that is then left out
        before = [buffer.clone() for buffer in self.model.buffers()] if self.skip_nonfinite else []
        totals = self.add_gradients(images, labels)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        # fp16's scaler looks for infinite gradients itself, and leaves such steps out
        norm = torch.zeros_like(norm) if self.scaler.is_enabled() else norm
        if self.skip_nonfinite and self._is_lost(totals, norm):
            self.skipped += 1
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)
        else:
            self._unread.append((self.step + 1, torch.cat([totals, norm[None]])))
            last = self.steps_per_epoch is not None and self.batch + 1 >= self.epoch_steps
            if self.skip_nonfinite or self.device.type == "cpu" or last or len(self._unread) >= READ_EVERY:
                self.read_steps()  # before the weights move: what is not finite raises
            self.totals += totals
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self.batch += 1

    def _is_lost(self, totals: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether this batch, and not the weights, is to blame for a loss or gradient that is not finite."""
        finite = math.isfinite((totals[0] + norm).item())
        return not finite and all(p.isfinite().all() for p in self.model.parameters())

    def add_gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Forward and backward through the batch, part by part; returns its `totals_of`."""
        totals, parts = 0, min(self.grad_accum, len(labels))
        for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            logits = self.logits(self.training_model, x)
            loss = self.criterion(logits, y)
            self.scaler.scale(loss * (len(y) / len(labels))).backward()
            totals += totals_of(loss, logits, y)
        return totals

    def logits(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """`model(images)` in the runner's precision, as fp32 `(batch, classes)`."""
        with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return model(images).float()

    @torch.no_grad()
    def test(self, loader: Iterable) -> tuple[float, float]:
        """Loss and accuracy (a fraction), averaged over the images of `loader`; the model's mode is left as it was."""
        totals = torch.zeros(3, device=self.device)
        with eval_mode(self.eval_model):
            for images, labels in loader:
                images, labels = self._to_device(images, labels)
                if len(labels):
                    logits = self.logits(self.eval_model, images)
                    totals += totals_of(self.eval_criterion(logits, labels), logits, labels)
        loss, correct, images = self.whole(totals).tolist()
        if not images:
            raise ValueError("the loader has no images")
        return loss / images, correct / images

    def whole(self, totals: torch.Tensor) -> torch.Tensor:  # of all processes: see training/parallel.py
        return totals

    def should_stop(self) -> bool:
        return self.stop

    def plot(self, val_loader: Iterable, save_path: str | Path | None = None, classes=None, title: str = ""):
        """A figure of the metrics so far and of what the model says of the first images; a PNG at `save_path`."""
        from utils import plot_progress  # pictures lie there; the method is here because people call it so

        return plot_progress(self, val_loader, save_path, classes, title)

    def read_steps(self) -> None:
        """Put the steps that are not there yet into `metrics`."""
        steps, self._unread = self._unread, []
        values = torch.stack([value for _, value in steps]).tolist() if steps else []
        for (step, _), (loss, correct, images, norm) in zip(steps, values, strict=True):
            self._record("train", loss / images, correct / images, step, norm)

    def _record(self, part: str, loss: float, accuracy: float, step: int, norm: float = 0.0) -> None:
        if not math.isfinite(loss + norm):
            raise NonFiniteLoss(
                f"{part} loss {loss}, gradient norm {norm} at step {step} (epoch {self.epoch + 1}); {self.skipped} "
                f"steps skipped, last losses {self.metrics['train_loss'][-3:]}. Likely causes: a learning rate too "
                "high, a warm-up too short, broken images or labels. --skip_nonfinite steps over single bad batches"
            )
        for what, value in (("loss", loss), ("accuracy", accuracy), ("step", step)):
            self.metrics[f"{part}_{what}"].append(value)

    def _print_epoch(self) -> None:
        """Averages over the images of the epoch that has just ended, and over those of its validation."""
        loss, correct, images = self.totals.tolist()
        parts = [("train", loss / max(images, 1), correct / max(images, 1))]  # none where all steps were skipped
        if self.metrics["val_step"][-1:] == [self.step]:
            parts.append(("val", self.metrics["val_loss"][-1], self.metrics["val_accuracy"][-1]))
        texts = (f"{part} loss {loss:.4f} accuracy {accuracy:.2%}" for part, loss, accuracy in parts)
        print(f"epoch {self.epoch}/{self.total_epochs}: {', '.join(texts)}", flush=True)

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event, lambda runner: None)(self)

    def _to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self.device, non_blocking=self.device.type == "cuda") for tensor in tensors]

    def _remaining_batches(self, loader: Iterable) -> Iterable:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.epoch, self.batch)
            return loader
        return itertools.islice(loader, self.batch, None)


def steps_in(epochs: float, steps_per_epoch: int) -> int:
    """Steps in so many epochs, at least one; what is added to whole epochs adds the same number of steps to theirs."""
    return max(1, math.floor(epochs * steps_per_epoch + 0.5 + 1e-6))


def totals_of(loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over a batch, `(3,)` on its device: of the loss (given as the batch's mean), of right answers, of images."""
    classes = labels.argmax(dim=1) if labels.ndim == 2 else labels
    correct = (logits.detach().argmax(dim=1) == classes).sum()
    return torch.stack([loss.detach() * len(labels), correct, torch.full_like(correct, len(labels))])
