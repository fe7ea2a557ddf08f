"""A plan for the time one has: `python train.py --minutes 10`.

Before training `plan` measures for a few seconds how fast this machine trains, validates and draws, and chooses the
epochs that fit. While training `Deadline` corrects the number of steps where the machine's speed has changed.
"""

import dataclasses
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from images.loader import Dataset
from runner import Runner, steps_in
from support import schema
from support.files import ROOT, CheckpointError
from support.report import read_json
from training.live import draws_frame, num_frames
from training.models import build_model, freeze_backbone
from training.optim import build_optimizer, schedule_factor, set_position
from training.options import hyperparameters, whole
from training.presets import PRESETS

FEWEST_STEPS = 20
AIM = 0.98  # part of the time that a plan fills
CHECK = 0.25  # part of the time that is left after which the end is foreseen again, from the speed until then
TOLERANCE = 0.03  # of the time: an end that is foreseen further than this from the aim is corrected
UNSURE = 0.1  # of the time that is left: nor is one corrected that is closer than this, as speeds go up and down
LATE = 0.15  # of the time: with less than this left, a slow machine is not expected to recover
LAST_STEPS = 10  # at least so many follow a correction, in which the learning rate comes down
# Drawings that the curves and the attention maps take as long as, and the part of one that a picture in the GIF does.
PICTURES, GIF_PART = 6, 0.25
# Runs of the presets on CIFAR-10, with the validation accuracy after each epoch
STORED = {
    "default": "saved/VisionTransformer.json",
    "quick": "saved/studies/quick_12epochs.json",
    "accurate": "saved/studies/accurate_seed0.json",
    "small": "saved/studies/small_seed0.json",
}


def seconds_since_start() -> float:
    """Since this process began, if it is train.py's own; in a notebook or another program, 0."""
    if Path(sys.argv[0]).stem != "train":
        return 0.0
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):  # not on Linux: imports keep one core busy
        return time.monotonic() - _imported


_imported = time.monotonic() - time.process_time()


# ------------------------------------------------------------------------------------------------- arithmetic


@dataclass
class Costs:
    """What things take on this machine, in seconds: one training step, the validation of an epoch with what else comes
    after it, one frame of the GIF, and all that follows training."""

    step: float
    validation: float
    frame: float
    finish: float

    def seconds(self, total: int, done: int, steps_per_epoch: int, frames: int) -> float:
        """From step `done` to the end of a run of `total` steps."""
        validations = -(-total // steps_per_epoch) - done // steps_per_epoch
        frames_left = num_frames(frames, -(-total // steps_per_epoch)) * (total - done) / total
        return self.step * (total - done) + self.validation * validations + self.frame * frames_left + self.finish

    def steps_that_fit(self, seconds: float, done: int, steps_per_epoch: int, frames: int) -> int:
        """The largest number of steps in all that ends within `seconds` from step `done`; `done` where none does. A
        last epoch that is shorter than its validation is left out."""
        low, high = done, done + max(0, int(seconds / self.step)) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.seconds(middle, done, steps_per_epoch, frames) <= seconds:
                low = middle
            else:
                high = middle
        rest = low % steps_per_epoch
        return low - rest if low - rest > done and rest * self.step < self.validation else low

    def scaled(self, step: float) -> "Costs":
        """On a machine whose speed has changed: everything takes so much longer as a step does."""
        return Costs(*(value * step / self.step for value in dataclasses.astuple(self)))


def epochs_of(steps: int, steps_per_epoch: int) -> float:
    """In epochs, rounded down to a hundredth, or as much finer as epochs are long, so that it is easily typed."""
    digits = max(2, len(str(2 * steps_per_epoch)) - 1)  # no coarser than five steps
    return whole(max(1, math.floor(steps * 10**digits / steps_per_epoch + 1e-6)) / 10**digits)


def guess_accuracy(curve: list[float], epochs: float) -> float:
    """On a stored curve of validation accuracy, one value an epoch: after so many epochs, at most its last."""
    return float(np.interp(epochs, range(len(curve) + 1), [0.1, *curve]))


def stored_curve(preset: str) -> list[float] | None:
    try:
        return read_json(ROOT / STORED[preset])["metrics"]["val_accuracy"]
    except (CheckpointError, KeyError):
        return None


# -------------------------------------------------------------------------------------------------- measuring


def measure(config, data: Dataset, device: torch.device, seconds: float = 4.0) -> Costs:
    """How long a training step, a validation and a drawing take with this config, measured on a model of its own for
    about `seconds`; random state is left as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), tempfile.TemporaryDirectory() as folder:
        model = build_model(config.model, hyperparameters(config), data.image_size, len(data.classes))
        if config.freeze == "backbone":
            freeze_backbone(model)
        options = {"shuffle": True, "augment": config.augment, "seed": config.seed}
        train_loader = data.loader("train", config.batch_size * config.grad_accum, device, **options)
        runner = Runner(
            model,
            build_optimizer(model, config.optimizer, 0.0, 0.0, config.layer_decay),  # a rate of 0: nothing diverges
            nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
            device,
            eval_criterion=nn.CrossEntropyLoss(),
            skip_nonfinite=True,
            precision=config.precision,
            grad_accum=config.grad_accum,
        )
        val_loader = data.loader("val" if len(data.val) else "train", 500, device)  # for pictures alone, of the latter

        def train() -> None:  # one batch after another, epoch after epoch, until the time is over
            nonlocal count
            while True:
                for images, labels in train_loader:
                    runner.train_step(*runner._to_device(images, labels))
                    count += 1
                    if count >= 3 and time.perf_counter() - began > limit:
                        return

        def clock() -> float:
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            return time.perf_counter()

        model.train()
        count, limit, began = 0, 0.2 * seconds, clock()
        train()  # the first steps are slow
        count, limit, began = 0, 0.8 * seconds, clock()
        train()
        step = (clock() - began) / count

        batches = list(islice(val_loader, 2))
        testing = dict.fromkeys((config.precision, "fp32"), math.inf)  # a batch, in training and at the end
        for runner.precision in testing:
            runner.test(batches[:1])
            for batch in batches:  # what interrupts for a moment only is not counted: the shortest of two
                began = clock()
                runner.test([batch])
                testing[runner.precision] = min(testing[runner.precision], clock() - began)
        validation = testing[config.precision]

        runner.total_steps = runner.step
        runner.plot(val_loader, Path(folder) / "frame.png", data.classes)  # the first one looks for fonts
        frame = math.inf
        for _ in range(2):
            began = clock()
            runner.plot(val_loader, Path(folder) / "frame.png", data.classes)
            frame = min(frame, clock() - began)
    test = testing["fp32"] * len(data.test) / 500
    finish = test + frame * (PICTURES + GIF_PART * config.gif_frames) + 0.5  # half a second in which Python ends
    return Costs(step, validation * math.ceil(len(data.val) / 500) + frame, frame, finish)


# --------------------------------------------------------------------------------------------------- the plan


def plan(run, data: Dataset, with_preset: Callable[[str], Any]) -> "Deadline | None":
    """Choose the config's epochs, and its preset if that is "auto", for `--minutes`; the callback that keeps the time.

    With --resume both are those of the checkpoint, and nothing is measured.

    Args:
        with_preset: gives the config that a preset would make.

    Raises:
        ValueError: the time is too short.
    """
    config = run.config
    if config.minutes is None:
        return None
    began = time.monotonic() - seconds_since_start()
    costs = None if config.resume else choose(run, data, with_preset, began)
    return Deadline(run, began, costs)


def choose(run, data: Dataset, with_preset: Callable[[str], Any], began: float) -> Costs:
    """Measure, set the config's preset and epochs, and say so; returns what was measured."""
    config, limit = run.config, 60 * run.config.minutes
    candidates, curves = {config.preset: config}, {}
    if config.preset == "auto":
        print("measuring each preset on this machine", flush=True)
        curves = {name: curve for name in PRESETS if (curve := stored_curve(name)) is not None}
        candidates = {name: with_preset(name) for name in curves}
    seconds = min(4.0, max(1.0, limit / 60)) / (1 if len(candidates) == 1 else 2)
    costs = {name: measure(candidate, data, run.device, seconds) for name, candidate in candidates.items()}
    left = AIM * limit - (time.monotonic() - began)
    fits, guesses = {}, {}
    for name, candidate in candidates.items():
        steps_per_epoch = -(-len(data.train) // (candidate.batch_size * candidate.grad_accum))
        steps = costs[name].steps_that_fit(left, 0, steps_per_epoch, candidate.gif_frames)
        fits[name] = epochs_of(steps, steps_per_epoch) if steps >= min(FEWEST_STEPS, steps_per_epoch) else 0
        if name in curves and fits[name]:
            guesses[name] = guess_accuracy(curves[name], fits[name])
    if not any(fits.values()):
        cheapest = min(costs.values(), key=lambda costs: costs.finish)
        needed = limit - left + cheapest.seconds(FEWEST_STEPS, 0, FEWEST_STEPS, config.gif_frames)
        needed = math.ceil(10 * needed / 60 / AIM) / 10
        raise ValueError(
            f"minutes {config.minutes} is too short here: start, a few steps, validation, test and pictures take "
            f"about {needed:g}{'; --gif_frames 0 needs less' if config.gif_frames else ''}"
        )
    name = max(guesses, key=guesses.get) if guesses else config.preset
    if guesses:
        print(f"--preset auto takes {name}. A guess, from stored runs on CIFAR-10, of the validation accuracy:")
        for other, guess in guesses.items():
            print(f"  {other:8} {guess:.0%} after {fits[other]} epochs")
        vars(config).update(vars(candidates[name]))
    config.epochs = fits[name]
    print(
        f"--minutes {config.minutes:g} is --epochs {config.epochs} at {1000 * costs[name].step:.0f} ms a step here\n"
        f"(start and measuring: {time.monotonic() - began:.0f} s; test and pictures: {costs[name].finish:.0f} s)",
        flush=True,
    )
    return costs[name]


# ------------------------------------------------------------------------------------------ keeping the time


class Deadline:
    """Corrects the number of steps of a run with `--minutes` where its end would come too early or too late.

    It measures steps, frames and what follows an epoch as they happen. After a correction the learning rate goes on
    from where it is and still comes down to its end: each step takes the rate of a place of the schedule as it was
    planned, with larger or smaller distances between these places.

    Args:
        run: its config and checkpoints are told the new number of epochs.
        began: when the process began, in the seconds of `now`.
        costs: what was measured before.
        now: a clock.
    """

    def __init__(self, run, began: float, costs: Costs | None = None, now: Callable[[], float] = time.monotonic):
        self.run, self.config, self.began, self.now = run, run.config, began, now
        self.used = 0.0  # seconds, by the earlier parts of a run that is resumed
        self.costs = costs
        self.planned = self.config.epochs  # that the schedule was made for
        self.knots = []  # after corrections: pairs of epochs done and of places in the schedule, in epochs
        self.seconds, self.steps = 0.0, 0  # since the end was foreseen last
        self.all_seconds, self.all_steps = 0.0, 0  # since training began: what comes last is as fast as that was
        self.finish = self.costs.finish / self.costs.step if self.costs else 40.0  # in steps
        self.fastest = self.costs.step if self.costs else math.inf  # seconds of a step
        self.ended, self.drew, self.checked, self.epoch = None, False, None, 0

    @property
    def limit(self) -> float:
        return 60 * self.config.minutes

    def elapsed(self) -> float:
        return self.used + self.now() - self.began

    def train_start(self, runner: Runner) -> None:
        self.epoch, self.ended, self.checked = runner.epoch, None, self.now()
        if self.knots:
            self._bend(runner)

    def step_start(self, runner: Runner) -> None:
        self.started = self.now()
        if self.ended is None:
            return
        between = self.started - self.ended  # loading, and whatever the callbacks did
        if runner.epoch > self.epoch:
            self.epoch, self.ended = runner.epoch, self.started
            if self.costs:
                self.costs.validation += 0.5 * (between - self.costs.validation)
        elif self.drew:
            if self.costs:
                self.costs.frame += 0.2 * (between - self.costs.frame)
        else:
            self._count(between, 0)

    def step_end(self, runner: Runner) -> None:
        self.ended = self.now()
        self._count(self.ended - self.started, 1)
        left = self.limit - self.elapsed()
        if self.steps >= 5 and self.ended - self.checked >= max(3.0, CHECK / (1 - CHECK) * left):
            self.correct(runner)
            self.checked, self.seconds, self.steps = self.ended, 0.0, 0
        frames = self.config.gif_frames
        self.drew = frames > 0 and draws_frame(runner.step, runner.total_steps, runner.total_epochs, frames)

    def _count(self, seconds: float, steps: int) -> None:
        self.all_seconds, self.all_steps = self.all_seconds + seconds, self.all_steps + steps
        self.seconds, self.steps = self.seconds + seconds, self.steps + steps

    def correct(self, runner: Runner) -> None:
        """Change the number of steps if the run would end too early or too late."""
        step = self.seconds / self.steps
        self.fastest = min(self.fastest, step)
        if self.costs is None:  # a run without a plan is resumed with one
            self.costs = Costs(step, 20 * step, 0.0, self.finish * step)
        self.costs = costs = self.costs.scaled(step)
        costs.finish = self.finish * self.all_seconds / self.all_steps
        per_epoch, frames = runner.steps_per_epoch, self.config.gif_frames
        done = runner.epoch * per_epoch + runner.batch
        total = runner.total_steps - runner.step + done
        left = AIM * self.limit - self.elapsed()
        missed = costs.seconds(total, done, per_epoch, frames) - left
        allowed = max(TOLERANCE * self.limit, UNSURE * (self.limit - self.elapsed()))
        if abs(missed) <= allowed or total - done <= LAST_STEPS:
            return
        wanted = max(done + LAST_STEPS, costs.steps_that_fit(left, done, per_epoch, frames))
        if left > LATE * self.limit:  # so many that another look comes first, if the machine is soon as fast as before
            wanted = max(wanted, min(total, done + int(0.5 * left / self.fastest)))
        epochs = epochs_of(wanted, per_epoch)
        new = steps_in(epochs, per_epoch)
        if new <= done or new == total:
            return
        late = "late" if missed > 0 else "early"
        tqdm.write(  # which takes the progress bar away before
            f"the end would come {abs(missed):.0f} s too {late} at {1000 * step:.0f} ms a step: "
            f"{epochs} epochs in place of {self.config.epochs}"
        )
        here = self.place(done / per_epoch)
        self.knots = [*(knot for knot in self.knots if knot[0] < done / per_epoch), [done / per_epoch, here]]
        self.knots.append([epochs, self.planned])
        if len(self.knots) == 2:
            self.knots.insert(0, [0.0, 0.0])
        runner.total_steps += new - total
        self.config.epochs = epochs
        self.run.checkpoints.hyperparameters["epochs"] = epochs
        self._bend(runner)

    def place(self, epochs: float) -> float:
        """In the schedule as it was planned, in epochs, of what comes after so many."""
        return float(np.interp(epochs, *zip(*self.knots, strict=True))) if self.knots else epochs

    def _bend(self, runner: Runner) -> None:
        """Have the runner's schedule go through these places."""
        if runner.scheduler is None:
            return
        per_epoch = runner.steps_per_epoch
        factor = schedule_factor(steps_in(self.planned, per_epoch), self.config.warmup, self.config.schedule)
        lambdas = [lambda step: factor(self.place(step / per_epoch) * per_epoch)]
        runner.scheduler.lr_lambdas = lambdas * len(runner.scheduler.lr_lambdas)
        set_position(runner.scheduler, runner.scheduler.last_epoch)

    def state_dict(self) -> dict:
        costs = dataclasses.asdict(self.costs) if self.costs else {}
        return {"seconds": self.elapsed(), "planned": self.planned, "knots": self.knots, "costs": costs}

    def load_state_dict(self, state: dict) -> None:
        table = {"seconds": schema.NOT_NEGATIVE, "planned": schema.POSITIVE, "costs": {...: schema.NOT_NEGATIVE}}
        schema.check(state, {**table, "knots": [[schema.NOT_NEGATIVE]]}, "Deadline")
        if state["costs"] and state["costs"].keys() != {field.name for field in dataclasses.fields(Costs)}:
            raise ValueError("Deadline has other costs than a plan's")
        if state["costs"] and not state["costs"]["step"]:
            raise ValueError("Deadline has steps that take no time")
        if any(len(knot) != 2 for knot in state["knots"]):
            raise ValueError("Deadline has places in the schedule that are no pairs")
        self.used, self.planned, self.knots = state["seconds"], state["planned"], state["knots"]
        if state["costs"]:
            self.costs = Costs(**state["costs"])
            self.fastest = self.costs.step
            self.finish = self.costs.finish / self.costs.step
