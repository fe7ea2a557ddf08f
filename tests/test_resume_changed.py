"""Resumed with other hyperparameters, a run is at the same part of its schedule, and ends where that ends."""

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from network import FeedForward
from runner import Runner
from support.files import CheckpointError
from training.checkpoints import Checkpoints
from training.optim import SCHEDULES, build_optimizer, build_schedule

DATA = tiny_dataset(48, 4)


@dataclass
class Settings:
    batch_size: int
    grad_accum: int
    epochs: int
    warmup: float
    schedule: str
    lr: float = 0.01
    optimizer: str = "adamw"

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.grad_accum

    @property
    def steps(self) -> int:
        return self.epochs * math.ceil(len(DATA.train) / self.images_per_step)


def rates_of_a_run(folder: Path, chosen: Settings, stop_after: int | None = None, resume: bool = False) -> list[float]:
    """The learning rate of each step, until the end or until `stop_after` steps, where a checkpoint is written."""
    torch.manual_seed(0)
    model = FeedForward(48, 2, 10)
    loader = DATA.loader("train", chosen.images_per_step, shuffle=True)
    optimizer = build_optimizer(model, chosen.optimizer, chosen.lr)
    schedule = build_schedule(optimizer, chosen.epochs * len(loader), chosen.warmup, chosen.schedule)
    runner = Runner(model, optimizer, torch.nn.CrossEntropyLoss(), "cpu", schedule, verbose=False)
    checkpoints, rates = Checkpoints(folder / "checkpoint", dataclasses.asdict(chosen), data=DATA), []

    def note(runner):
        rates.append(optimizer.param_groups[0]["lr"])
        runner.stop = len(rates) == stop_after

    runner.callbacks.append(SimpleNamespace(step_start=note))
    if resume:
        checkpoints.resume(runner, loader, images=set(), free=set(), changes_allowed=True, defaults={})
    if runner.epoch < chosen.epochs:
        runner.train(loader, DATA.loader("val", 8), chosen.epochs - runner.epoch)
    checkpoints.write(runner)
    return rates


sizes = {"batch_size": st.integers(1, 24), "grad_accum": st.integers(1, 2)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    before=st.builds(
        Settings,
        **sizes,
        epochs=st.integers(1, 5),
        warmup=st.sampled_from([0.0, 0.1, 0.5]),
        schedule=st.sampled_from(list(SCHEDULES)),
    ),
    done=st.floats(0.01, 0.99),
    changed=st.fixed_dictionaries(sizes),
)
def test_the_rate_goes_on_where_it_was_and_ends_where_it_should(before, done, changed):
    after = dataclasses.replace(before, **changed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stop = max(1, int(done * before.steps))
        first = rates_of_a_run(folder, before, stop)
        second = rates_of_a_run(folder, after, resume=True)
        undisturbed, alone = (rates_of_a_run(folder, chosen) for chosen in (before, after))
    assert first == undisturbed[: len(first)] and len(undisturbed) == before.steps
    if not second:  # the last step had been made
        assert stop == before.steps
        return
    # to the end it is the schedule of a run with the new settings, from the same part of it on, to the last step
    assert second == alone[len(alone) - len(second) :]
    part_before, part_after = stop / before.steps, 1 - len(second) / after.steps
    a_step = 2 / after.steps  # images of a broken step come again, and the last step of an epoch has fewer
    assert abs(part_after - part_before) <= a_step + 1e-9
    # and the rate is one that the run before had about where it was stopped
    near = [
        rate
        for step, rate in enumerate(undisturbed)
        if abs(step / before.steps - part_before) <= a_step + 1 / before.steps + 1e-9
    ]
    assert min(near) * 0.99 <= second[0] <= max(near) * 1.01


@pytest.mark.parametrize("before, after", [(8, 16), (16, 8)])
def test_batches_of_another_size_cool_down_as_well(tmp_path, before, after):
    """64 to 128 had rate zero at the resume and rose until the end; 128 to 64 never cooled down."""
    chosen = Settings(before, 1, 12, 0.1, "cosine")
    first = rates_of_a_run(tmp_path, chosen, stop_after=chosen.steps // 2)
    second = rates_of_a_run(tmp_path, dataclasses.replace(chosen, batch_size=after), resume=True)
    assert len(second) == dataclasses.replace(chosen, batch_size=after).steps // 2
    assert first[-1] == pytest.approx(0.006, rel=0.1) and second[0] == pytest.approx(first[-1], rel=0.15)
    assert second == sorted(second, reverse=True) and second[-1] < 1e-4


def test_a_changed_rate_or_length_holds_from_the_resume_on(tmp_path):
    before = Settings(8, 1, 4, 0.0, "linear")
    rates_of_a_run(tmp_path, before, stop_after=12)
    twice = rates_of_a_run(tmp_path, dataclasses.replace(before, lr=0.02), resume=True)
    assert twice == [pytest.approx(0.02 * (1 - step / 24), rel=0.1) for step in range(12, 24)]
    rates_of_a_run(tmp_path, before, stop_after=12)
    longer = rates_of_a_run(tmp_path, dataclasses.replace(before, epochs=8), resume=True)
    assert len(longer) == 36 and longer[0] == pytest.approx(0.01 * 36 / 48, rel=0.05) and longer[-1] < 5e-4


def test_a_hyperparameter_that_is_newer_than_the_checkpoint_is_as_by_default(tmp_path):
    loader = DATA.loader("train", 8)

    def checkpoints(**hyperparameters):
        chosen = {"batch_size": 8, "epochs": 2, "optimizer": "sgd", **hyperparameters}
        model = FeedForward(48, 2, 10)
        runner = Runner(model, build_optimizer(model, "sgd", 0.1), torch.nn.CrossEntropyLoss(), "cpu", verbose=False)
        return runner, Checkpoints(tmp_path / "checkpoint", chosen, data=DATA)

    runner, before = checkpoints()
    runner.train(loader, DATA.loader("val", 8), 1)
    before.write(runner)
    resumed, now = checkpoints(gamma=2.0)
    now.resume(resumed, loader, set(), set(), changes_allowed=False, defaults={"gamma": 2.0})
    assert resumed.epoch == 1
    resumed, now = checkpoints(gamma=3.0)
    with pytest.raises(CheckpointError, match="gamma was 2.0 and is 3.0"):
        now.resume(resumed, loader, set(), set(), changes_allowed=False, defaults={"gamma": 2.0})
