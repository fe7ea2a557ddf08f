"""What hangs on a Runner, in its list of callbacks: clock, progress bar, averaged weights, early stopping. And a
compiled model."""

import copy
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch._functorch.config
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from runner import Runner
from support import cli, distributed, schema
from support.files import first_line


class Clock:
    """Counts the seconds of training steps alone, without loading, validation and what callbacks after it do.

    An accelerator's steps take as long as one waits for their results, which the Runner does in some of them, and the
    progress bar where it is drawn: that comes before the clock in the list.

    `seconds` by the clock until the last step, and `val_seconds`, what that was at each validation.
    `processor_seconds` are those that the processor spent in this process, all threads together, which other work on
    the machine hardly changes; None where a part is not known, because an earlier version trained it.
    """

    def __init__(self):
        self.seconds, self.val_seconds, self._started = 0.0, [], None
        self.processor_seconds, self._processor_started = 0.0, 0.0

    def step_start(self, runner: Runner) -> None:
        self._started, self._processor_started = time.perf_counter(), time.process_time()

    def step_end(self, runner: Runner) -> None:
        self.seconds, self._started = self.until_now(), None
        if self.processor_seconds is not None:
            self.processor_seconds += time.process_time() - self._processor_started

    def epoch_end(self, runner: Runner) -> None:
        self.val_seconds.append(self.seconds)

    def until_now(self) -> float:
        """The seconds with those of the step that runs."""
        return self.seconds + (0.0 if self._started is None else time.perf_counter() - self._started)

    def state_dict(self) -> dict:
        times = {"seconds": self.seconds, "val_seconds": self.val_seconds}
        return times | {"processor_seconds": self.processor_seconds}

    def load_state_dict(self, state: dict) -> None:
        known = {"seconds": schema.NOT_NEGATIVE, "val_seconds": [schema.NOT_NEGATIVE]}
        schema.check(state, schema.optional(known, processor_seconds=schema.maybe(schema.NOT_NEGATIVE)), "Clock")
        self.seconds, self.val_seconds = state["seconds"], state["val_seconds"]
        self.processor_seconds = state.get("processor_seconds")


# ---------------------------------------------------------------------------------------------------- progress


class ProgressBar:
    """A bar while an epoch runs, with accuracy and loss so far and the time left; then a line that stays.

    Both are as wide as the terminal: what matters least is left out. A log file gets no bar, but a line each minute.

    Args:
        clock: whose seconds `images/s` is of, so that pictures and validation do not count.
    """

    def __init__(self, clock: Clock):
        self.clock, self.bar = clock, None

    def train_start(self, runner: Runner) -> None:
        self._began = self._said = time.perf_counter()
        self._first_step = runner.step
        self._note_start(runner)

    def _note_start(self, runner: Runner) -> None:
        """Of an epoch, or of what is left of it."""
        self._seconds, self._images = self.clock.seconds, runner.totals[2].item() if runner.batch else 0

    def step_start(self, runner: Runner) -> None:
        if self.bar is None:
            self._note_start(runner)
            self.bar = new_bar(self._title(runner), runner.epoch_steps, runner.batch)

    def step_end(self, runner: Runner) -> None:
        if self.bar.update():  # it is time to redraw the bar
            show(self.bar, self._parts(runner))
        elif self.bar.disable and distributed.rank() == 0 and time.perf_counter() - self._said > 60:
            self._said = time.perf_counter()
            done = runner.batch / runner.epoch_steps
            print("  ".join([self._title(runner), f"{done:4.0%}", *self._parts(runner)]), flush=True)
        if runner.batch >= runner.epoch_steps:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def epoch_end(self, runner: Runner) -> None:
        self.close()
        self._said = time.perf_counter()
        loss, correct, images = runner.totals.tolist()
        images = max(images, 1)  # none where all steps were skipped
        title = f"epoch {runner.epoch:{len(str(runner.total_epochs))}d}/{runner.total_epochs}"
        short = [title, f"train {correct / images:.2%} {loss / images:.4f}"]
        long = [title, f"train accuracy {correct / images:.2%} loss {loss / images:.4f}"]
        if runner.metrics["val_step"][-1:] == [runner.step]:
            loss, accuracy = (runner.metrics[f"val_{what}"][-1] for what in ("loss", "accuracy"))
            short.insert(1, f"val {accuracy:.2%} {loss:.4f}")
            long.insert(1, f"val accuracy {accuracy:.2%} loss {loss:.4f}")
        rest = [f"{self._left(runner)} left", self._rate(runner)]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
        line = "  ".join(long + rest)
        print(line if len(line) < width else fitted(short + rest, width - 1), flush=True)

    def _title(self, runner: Runner) -> str:
        return f"epoch {runner.epoch + 1}/{runner.total_epochs}"

    def _parts(self, runner: Runner) -> list[str]:
        """What the bar says, the most important first."""
        loss, correct, images = runner.totals.tolist()
        measured = [f"accuracy {correct / images:.1%}", f"loss {loss / images:.3f}"] if images else []
        skipped = [f"{runner.skipped} steps skipped"] if runner.skipped else []
        return [*measured[:1], f"{self._left(runner)} left", *skipped, *measured[1:], self._rate(runner)]

    def _rate(self, runner: Runner) -> str:
        images = runner.totals[2].item() - self._images
        return f"{images / max(self.clock.until_now() - self._seconds, 1e-9):,.0f} images/s"

    def _left(self, runner: Runner) -> str:
        """Time until the end, if it goes on as it did since training began, all that comes between included."""
        done = max(1, runner.step - self._first_step)
        return clock_time((runner.total_steps - runner.step) * (time.perf_counter() - self._began) / done)


def new_bar(title: str, total: int, initial: int = 0) -> tqdm:
    """A bar of tqdm on a terminal; in a log file, and in all processes but the first, one that shows nothing."""
    disable = True if distributed.rank() > 0 else None
    options = {"leave": False, "mininterval": 0.5, "dynamic_ncols": True, "disable": disable}
    return tqdm(desc=title, total=total, initial=initial, bar_format="{desc} {percentage:3.0f}% |{bar}|", **options)


def show(bar: tqdm, parts: list[str], least: int = 8) -> None:
    """Write behind the bar what fits of `parts`, with `least` characters for the bar itself."""
    width = getattr(bar, "ncols", None) or shutil.get_terminal_size().columns
    room = width - len(bar.desc) - len(" 100% || ") - least - 1
    text = fitted(parts, room).replace("{", "{{").replace("}", "}}")
    bar.bar_format = "{desc} {percentage:3.0f}% |{bar}| " + text


def fitted(parts: list[str], width: int) -> str:
    """The parts, two spaces between them, as far as they fit into `width` characters; the first ones come first."""
    text = ""
    for part in parts:
        longer = f"{text}  {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text


class WithProgress:
    """A loader that shows a bar while it is read, and is else as it was."""

    def __init__(self, loader: Iterable, title: str):
        self.loader, self.title = loader, title

    def __iter__(self) -> Iterator:
        return iter(cli.progress(self.loader, self.title, "batch"))

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
    are averaged in the same way; those of whole numbers, a table of indices say, are the model's own. The average is
    `runner.eval_model`.
    """

    def __init__(self, runner: Runner, decay: float):
        def move(averaged, weights, count):
            if not averaged[0].is_floating_point():  # all are of one kind
                torch._foreach_copy_(averaged, weights)
                return
            n = self.average.n_averaged.item()
            get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, weights, count)

        self.average = AveragedModel(runner.model, multi_avg_fn=move, use_buffers=True)
        runner.eval_model = self.average.module

    @property
    def has_begun(self) -> bool:
        return self.average.n_averaged > 0

    def train_start(self, runner: Runner) -> None:
        if not self.has_begun:  # also where a run that had no average is resumed with one
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

    @property
    def has_begun(self) -> bool:
        return self.weights is not None

    def train_start(self, runner: Runner) -> None:
        if self.has_begun and runner.epoch - self.epoch >= self.patience:
            runner.stop = True

    def epoch_end(self, runner: Runner) -> None:
        value = runner.metrics[f"val_{self.quantity}"][-1]
        if not self.has_begun or self._improvement(value) > self.min_improvement:
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
    compiled, reason = CompiledModel(runner), None
    images = next(iter(loader))[0].tensor_split(runner.grad_accum)[0].to(device)
    try:
        # each process tries for itself: one that fails would leave the others waiting for its part of a BatchNorm
        with distributed.apart(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            runner.logits(compiled.call, images).sum().backward()
    except Exception as error:  # compilers, code generators and drivers fail in many ways
        reason = first_line(error)
    model.zero_grad()
    model.load_state_dict(before)
    if distributed.all_reduce(reason is not None) == 0:
        runner.training_model = compiled
    elif not runner.stop:
        print(f"--compile does not work here, going on without: {reason or 'it failed in another process'}")


class CompiledModel(nn.Module):
    """A runner's model through `torch.compile`; as it is, from the first batch on that cannot be compiled.

    A signal that stops a run reaches all its processes (Ctrl-C does), the compilers too, if one is at work: the step is
    then taken without it, and the run ends with its checkpoint.
    """

    def __init__(self, runner: Runner):
        super().__init__()
        self.model = runner.model
        self.runner = [runner]  # in a list: not a part of the model, nor is what follows
        self.call = torch.compile(self.model).__call__
        # the backward pass is compiled with the forward pass, whose failure is caught below
        if hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
            torch._functorch.config.force_non_lazy_backward_lowering = True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.call is not None:
            try:
                return self.call(images)
            except Exception as error:  # one of the model itself comes again below
                self.call = None
                if not self.runner[0].stop:
                    print(f"--compile does not work for {tuple(images.shape)}, going on without: {first_line(error)}")
        return self.model(images)
