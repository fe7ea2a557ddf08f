"""Runner: the train / validate / test loop, its metrics, and the choice of device.

The Runner knows nothing of GIFs, plots or schedules' shapes: such things hang on its callbacks.
"""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn as nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

import utils
from support import distributed


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
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not to be had on this machine: choose auto, cpu, cuda or mps") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision by name; "auto" takes bf16 on a GPU that computes in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROGRESS = ("epoch", "batch", "step", "seconds", "val_seconds", "last_loss", "skipped")  # what a checkpoint holds


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient became infinite or not a number; the message says at which step and what to try."""


class Runner:
    """Trains, validates and tests a model.

    Args:
        model: gives logits `(batch, classes)` for images; moved to `device`.
        optimizer: over the model's parameters.
        criterion: loss of (logits, labels), averaged over the batch; used in training.
        device: None chooses MPS, CUDA or CPU, whichever is there.
        scheduler: stepped after every optimiser step.
        eval_criterion: loss reported for validation and test; None means `criterion`. (Training with label smoothing,
            one wants plain cross-entropy here.)
        log_every: steps between two entries in the training metrics; the last step makes one too.
        grad_clip: largest norm of all gradients together; longer ones are scaled down to it. None leaves them alone.
        skip_nonfinite: step over batches whose loss or gradient is infinite or not a number, counting them in
            `skipped`, where otherwise training stops.
        precision: "fp32", or "bf16" or "fp16": what `torch.autocast` computes in where that is safe; weights stay in
            fp32. fp16 comes with a gradient scaler (Micikevicius et al. 2018), whose left-out steps are its own affair.
        grad_accum: even parts that a batch is cut into, whose gradients are added up before the optimiser steps: the
            step is that of the whole batch, in the memory of a part. Only BatchNorm sees each part on its own.

    `metrics` holds lists: `train_loss`, `train_accuracy` (averages over the images since the entry before) at
    `train_step`, and `val_loss`, `val_accuracy` at `val_step`. Steps are optimiser steps from the start; accuracies are
    fractions. All are averages over images, so that a smaller last batch counts for what it is.

    `callbacks` holds lists of functions of the runner, called at "train_start", "step_end" and "epoch_end" (after
    validation). A callback that sets `runner.stop = True` ends training after the current step.

    `eval_model` is what `test` and `plot` use: `model`, unless something puts another in its place (an average of the
    weights, say), and `training_model` what training steps call (`model` compiled, or in DistributedDataParallel).
    `stateful` names objects with a `state_dict` that belongs to the runner's.

    In several processes (see distributed.py) each has a runner and a loader of its part of every batch, and all count
    every image once: losses, accuracies and gradients are those of the whole batch, and all stop together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        device: torch.device | str | None = None,
        scheduler: LRScheduler | None = None,
        eval_criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        log_every: int = 50,
        grad_clip: float | None = None,
        skip_nonfinite: bool = False,
        precision: str = "fp32",
        grad_accum: int = 1,
    ):
        if precision not in DTYPES:
            raise ValueError(f"unknown precision {precision!r}: choose {', '.join(DTYPES)}")
        self.device = choose_device("auto") if device is None else torch.device(device)
        self.model = self.eval_model = self.training_model = model.to(self.device)
        self.optimizer = optimizer
        self.criterion = criterion
        self.eval_criterion = eval_criterion or criterion
        self.scheduler = scheduler
        self.log_every = log_every
        self.grad_clip = grad_clip
        self.skip_nonfinite = skip_nonfinite
        self.precision = precision
        self.grad_accum = grad_accum
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.callbacks = {"train_start": [], "step_end": [], "epoch_end": []}
        self.stateful = {}
        self.metrics = {
            f"{split}_{quantity}": [] for split in ("train", "val") for quantity in ("loss", "accuracy", "step")
        }
        self.epoch = 0  # epochs completed
        self.batch = 0  # batches done of the epoch that runs
        self.step = 0  # optimiser steps made
        self.total_steps = None  # of the training that runs
        self.seconds = 0.0  # spent in training steps, without validation
        self.val_seconds = []  # what `seconds` was at each validation: an entry for each in `metrics["val_step"]`
        self.last_loss = None  # the last that was read, and finite
        self.skipped = 0  # steps left out because of a loss or gradient that is not finite
        self.stop = False
        self._unread = torch.zeros((), device=self.device)  # sum of losses and gradient norms not looked at yet
        self.epoch_totals = Totals(self.device)
        self.log_totals = Totals(self.device)  # since the last entry in the training metrics

    # -------------------------------------------------------------------------------------------------- training

    def train(self, train_loader: Iterable, val_loader: Iterable | None = None, epochs: int = 20) -> dict[str, list]:
        """Train for `epochs` more epochs, with validation after each; returns `metrics`.

        Loaders give `(images, labels)` batches: the project's ImageLoader or a torch DataLoader. Labels in training may
        also be probabilities `(batch, classes)`: in the accuracy the likeliest class then counts as the right one.

        Raises:
            NonFiniteLoss: the training or validation loss, or a gradient, is infinite or not a number.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {epochs}")
        if not len(train_loader):
            raise ValueError("the loader has no images")
        last_epoch = self.epoch + epochs
        self.total_steps = self.step - self.batch + epochs * len(train_loader)
        self.stop = False
        self._call("train_start")
        stopped = self._asked_to_stop()
        while self.epoch < last_epoch and not stopped:
            started, first_batch = time.perf_counter(), self.batch
            stopped = self._train_epoch(train_loader, last_epoch)
            if stopped and self.batch < len(train_loader):
                break
            seconds = time.perf_counter() - started
            rate = self.epoch_totals.images * (1 - first_batch / len(train_loader)) / seconds
            line = f"epoch {self.epoch + 1:3d}/{last_epoch}  train loss {self.epoch_totals.loss:.4f} accuracy "
            line += f"{self.epoch_totals.accuracy:6.2%}"
            if val_loader is not None:
                loss, accuracy = self.test(val_loader, description="validating")
                if not math.isfinite(loss):
                    raise NonFiniteLoss(
                        f"the validation loss is {loss} after epoch {self.epoch + 1}, step {self.step}, with "
                        f"{self.skipped} steps skipped: the weights are of no use any more. Try a lower learning rate"
                    )
                self._record("val", loss, accuracy)
                self.val_seconds.append(self.seconds)
                line += f"  val loss {loss:.4f} accuracy {accuracy:6.2%}"
            self.epoch += 1
            self.batch = 0
            self.epoch_totals = Totals(self.device)
            left = (last_epoch - self.epoch) * (time.perf_counter() - started)
            tqdm.write(f"{line}  {rate:,.0f} images/s  {_clock(left)} left", file=sys.stdout)
            sys.stdout.flush()
            self._call("epoch_end")
            stopped = self._asked_to_stop()
        return self.metrics

    def _asked_to_stop(self) -> bool:
        """Whether any process has been: they decide together, as a signal may reach them at different steps."""
        return distributed.add_up(self.stop) > 0

    def _train_epoch(self, loader: Iterable, last_epoch: int) -> bool:
        """The rest of the epoch, from batch `self.batch` on; returns whether to stop."""
        self.model.train()
        stopped = False
        batches = self._remaining_batches(loader)
        with _progress_bar(loader, f"epoch {self.epoch + 1}/{last_epoch}", self.epoch_totals.images) as bar:
            for images, labels in batches:
                started = time.perf_counter()
                due = self.step + 1 == self.total_steps or (self.step + 1) % self.log_every == 0
                num_images = self._train_step(*self._to_device(images, labels), due)
                self.seconds += time.perf_counter() - started
                if due and self.log_totals.images:
                    self._record("train", self.log_totals.loss, self.log_totals.accuracy)
                    self.log_totals = Totals(self.device)
                if bar.update(num_images):  # it is time to redraw the bar
                    bar.set_postfix_str(self._progress(bar), refresh=False)
                self._call("step_end")
                stopped = self._asked_to_stop()
                if stopped:
                    break
        return stopped

    def _to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """From pinned memory (a DataLoader's `pin_memory`) to a GPU without waiting."""
        return [tensor.to(self.device, non_blocking=self.device.type == "cuda") for tensor in tensors]

    def _remaining_batches(self, loader: Iterable) -> Iterable:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.epoch, self.batch)
            return loader
        return itertools.islice(loader, self.batch, None)

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor, read_loss: bool = False) -> int:
        """Take a step with this process's images; returns how many the whole batch has."""
        self.optimizer.zero_grad()
        batch = self._add_gradients(images, labels)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip or math.inf)
        if self.scaler.is_enabled():
            norm = torch.zeros_like(norm)  # the scaler looks for infinite gradients itself, and leaves such steps out
        if self._is_finite(batch.mean_loss, norm, read_loss):
            for totals in (self.epoch_totals, self.log_totals):
                totals.add_totals(batch)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.skipped += 1
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        self.batch += 1
        return batch.images

    def _add_gradients(self, images: torch.Tensor, labels: torch.Tensor) -> "Totals":
        """Go forward and back through this process's images, part by part; returns the whole batch's totals."""
        batch = Totals(self.device)
        processes = distributed.world_size()
        num_images = distributed.add_up(len(labels))
        parts = min(self.grad_accum, -(-num_images // processes))  # as many in each process, though one may be empty
        for part, (x, y) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
            last = part == parts - 1  # the gradients travel once
            with contextlib.nullcontext() if last or processes == 1 else self.training_model.no_sync():
                logits = self._logits(self.training_model, x)
                loss = self.criterion(logits, y) if len(y) else logits.sum()  # of nothing, which is zero
                # DistributedDataParallel will divide by the number of processes
                self.scaler.scale(loss * (len(y) * processes / num_images)).backward()
            batch.add(loss, logits, y)
        batch.add_up_processes()
        return batch

    def _logits(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            return model(images).float()

    def _is_finite(self, loss: torch.Tensor, norm: torch.Tensor, read: bool) -> bool:
        """Whether loss and gradients are finite, as far as is known: where reading makes an accelerator wait, they are
        added up and read only when `read` is set.

        Raises:
            NonFiniteLoss: they are not, and `skip_nonfinite` is not set or can no longer help.
        """
        self._unread += loss + norm  # stays infinite or not a number once it is
        if not (read or self.skip_nonfinite or self.device.type == "cpu"):
            return True
        finite = math.isfinite(self._unread.item())
        self._unread.zero_()
        if finite:
            self.last_loss = loss.item()
        elif not self.skip_nonfinite or not all(p.isfinite().all() for p in self.model.parameters()):
            last = "there was no finite loss before" if self.last_loss is None else f"the last was {self.last_loss:.4f}"
            raise NonFiniteLoss(
                f"the loss is {loss.item()} and the gradient's norm {norm.item()} at step {self.step + 1} (epoch "
                f"{self.epoch + 1}); {last}. Likely causes: the learning rate is too high or its warm-up too short, or "
                "the images or labels are broken. --skip_nonfinite steps over such batches while the weights are finite"
            )
        return finite

    def _progress(self, bar: tqdm) -> str:
        totals = self.epoch_totals
        rate = bar.format_dict["rate"] or bar.n / max(bar.format_dict["elapsed"], 1e-9)
        left = (self.total_steps - self.step) * (bar.n / self.batch) / rate
        text = f"step {self.step}/{self.total_steps} loss {totals.loss:.4f} accuracy {totals.accuracy:.2%}, "
        if self.skipped:
            text += f"{self.skipped} steps skipped, "
        return f"{text}{_clock(left)} left in all"

    def _record(self, split: str, loss: float, accuracy: float) -> None:
        self.metrics[f"{split}_loss"].append(loss)
        self.metrics[f"{split}_accuracy"].append(accuracy)
        self.metrics[f"{split}_step"].append(self.step)

    def _call(self, event: str) -> None:
        for callback in self.callbacks[event]:
            callback(self)

    # ---------------------------------------------------------------------------------------------- taking up again

    def state_dict(self) -> dict:
        """All that the rest of the training depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stateful": {name: part.state_dict() for name, part in self.stateful.items()},
            "metrics": self.metrics,
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "epoch_totals": vars(self.epoch_totals),
            "log_totals": vars(self.log_totals),
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from where `state_dict` was taken: `train` continues in the middle of the epoch, bit for bit.

        Raises:
            KeyError, ValueError, RuntimeError: the state is not of such a runner.
        """
        for name in self.metrics:
            if not all(isinstance(value, int | float) for value in state["metrics"][name]):
                raise ValueError(f"its metrics' {name} are not numbers")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        for name in self.stateful.keys() & state["stateful"].keys():  # what was not there before begins now
            self.stateful[name].load_state_dict(state["stateful"][name])
        self.metrics = state["metrics"]
        for name in PROGRESS:
            setattr(self, name, state["progress"][name])
        for totals, sums in ((self.epoch_totals, state["epoch_totals"]), (self.log_totals, state["log_totals"])):
            for name, value in sums.items():
                setattr(totals, name, value.to(self.device) if torch.is_tensor(value) else value)
        torch.set_rng_state(state["random_state"])
        if len(state["cuda_random_state"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_random_state"])

    # ------------------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def test(self, loader: Iterable, description: str = "testing") -> tuple[float, float]:
        """Loss and accuracy (a fraction), averaged over the images of `loader`; the model's mode is left as it was."""
        totals = Totals(self.device)
        was_training = self.eval_model.training
        self.eval_model.eval()
        with _progress_bar(loader, description) as bar:
            for images, labels in loader:
                images, labels = self._to_device(images, labels)
                if len(labels):
                    logits = self._logits(self.eval_model, images)
                    totals.add(self.eval_criterion(logits, labels), logits, labels)
                bar.update(len(labels) * distributed.world_size())
        totals.add_up_processes()
        self.eval_model.train(was_training)
        if not totals.images:
            raise ValueError("the loader has no images")
        return totals.loss, totals.accuracy

    @torch.no_grad()
    def plot(self, val_loader: Iterable, save_path: str | Path | None = None, classes=None, title: str = ""):
        """The metrics so far, and the first images of `val_loader` with their top-3 predictions; returns the figure."""
        images, labels = next(iter(val_loader))
        was_training = self.eval_model.training
        self.eval_model.eval()
        probabilities = self.eval_model(images[:6].to(self.device)).softmax(dim=1).cpu()
        self.eval_model.train(was_training)
        if classes is None:
            classes = [str(label) for label in range(probabilities.shape[1])]
        mean, std = getattr(val_loader, "mean", None), getattr(val_loader, "std", None)
        return utils.draw_progress(
            self.metrics,
            utils.to_pixels(images[:6].cpu(), mean, std),
            labels[:6].cpu(),
            probabilities,
            classes,
            title=title,
            path=save_path,
            total_steps=self.total_steps,
        )


class Totals:
    """Sums over images of loss and right answers, kept on the device until they are read."""

    def __init__(self, device: torch.device):
        self.images = 0
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), device=device, dtype=torch.long)

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """`loss` is the mean over this batch."""
        self.images += len(labels)
        self._loss += loss.detach() * len(labels)
        if labels.ndim == 2:
            labels = labels.argmax(dim=1)
        self._correct += (logits.detach().argmax(dim=1) == labels).sum()

    def add_totals(self, other: "Totals") -> None:
        self.images += other.images
        self._loss += other._loss
        self._correct += other._correct

    def add_up_processes(self) -> None:
        self.images = distributed.add_up(self.images)
        distributed.add_up_on_device(self._loss, self._correct)

    @property
    def mean_loss(self) -> torch.Tensor:
        """`loss` where it lies: reading it would make an accelerator wait."""
        return self._loss / self.images

    @property
    def loss(self) -> float:
        return self._loss.item() / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        return self._correct.item() / self.images if self.images else math.nan


def _progress_bar(loader: Iterable, description: str, initial: int = 0) -> tqdm:
    images = getattr(loader, "num_images", None) or len(getattr(loader, "dataset", ())) or None
    options = {"leave": False, "mininterval": 0.5, "dynamic_ncols": True, "disable": distributed.rank() > 0}
    return tqdm(desc=description, total=images, initial=initial, unit="img", **options)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
