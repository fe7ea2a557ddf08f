import contextlib
import io
import json
import math
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn as nn
from helpers import SMALL, batches, outcome, run_main, same_weights, tiny_dataset

import train
from network import Model
from runner import Runner, steps_in
from setup_cifar import load_data
from support import cli
from support.files import read_file
from training import plan as planning
from training.checkpoints import restore_runner, runner_state
from training.optim import build_schedule
from training.plan import Costs, Deadline, epochs_of, guess_accuracy, measure, whole

COSTS = Costs(step=0.1, validation=2.0, frame=0.5, finish=10.0)

# ------------------------------------------------------------------------------------------------- arithmetic


def test_seconds_are_those_of_steps_validations_frames_and_the_end():
    assert COSTS.seconds(150, 0, 100, frames=4) == pytest.approx(15 + 2 * 2 + 4 * 0.5 + 10)
    assert COSTS.seconds(150, 100, 100, frames=0) == pytest.approx(5 + 2 + 10)
    assert COSTS.seconds(150, 120, 100, frames=0) == pytest.approx(3 + 2 + 10)


@pytest.mark.parametrize("seconds", [30, 61.7, 180, 600])
@pytest.mark.parametrize("done", [0, 50, 100])
def test_one_step_more_would_not_fit(seconds, done):
    steps = COSTS.steps_that_fit(seconds, done, 100, frames=40)
    assert COSTS.seconds(steps, done, 100, 40) <= seconds
    larger = [steps + 1] if steps % 100 else [steps + 20]  # a rest shorter than its validation is left out
    assert all(COSTS.seconds(more, done, 100, 40) > seconds for more in larger)


def test_nothing_fits_in_less_than_the_end_takes():
    assert COSTS.steps_that_fit(9, 0, 100, 0) == 0
    assert COSTS.steps_that_fit(9, 30, 100, 0) == 30


@pytest.mark.parametrize("per_epoch", [1, 7, 8, 313, 625, 20_000])
def test_epochs_are_easily_typed_and_give_the_steps_that_fit(per_epoch):
    for steps in (20, per_epoch, 3 * per_epoch - 1, 12 * per_epoch + 5):
        epochs = epochs_of(steps, per_epoch)
        assert len(str(epochs)) <= 8
        assert -5 <= steps_in(epochs, per_epoch) - steps <= (0 if steps >= per_epoch == 1 else 1)
    assert type(epochs_of(2 * per_epoch, per_epoch)) is int


def test_the_same_steps_are_left_after_whole_epochs():
    for per_epoch in (5, 8, 313):
        for hundredths in range(101, 400):
            epochs = hundredths / 100
            assert steps_in(epochs, per_epoch) == per_epoch + steps_in(epochs - 1, per_epoch) or epochs - 1 < 0.5 / 5


def test_a_guess_lies_on_the_stored_curve():
    assert guess_accuracy([0.5, 0.7], 0.5) == pytest.approx(0.3)
    assert guess_accuracy([0.5, 0.7], 1.5) == pytest.approx(0.6)
    assert guess_accuracy([0.5, 0.7], 9) == pytest.approx(0.7)
    assert [type(whole(x)) for x in (2.0, 2, 1.5, None)] == [int, int, float, type(None)]
    assert all(planning.stored_curve(name) for name in ("default", "accurate", "small"))


# -------------------------------------------------------------------------------------------- part of an epoch


def make_runner(epochs=2.0, n=40, **options) -> tuple[Runner, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = batches(n)
    schedule = build_schedule(optimizer, steps_in(epochs, len(loader)))
    return Runner(model, optimizer, nn.CrossEntropyLoss(), "cpu", schedule, verbose=False, **options), loader


@pytest.mark.parametrize(("epochs", "validated"), [(1.6, [10, 16]), (0.3, [3]), (2.05, [10, 20, 21]), (2, [10, 20])])
def test_the_last_epoch_ends_early_and_is_validated(epochs, validated):
    runner, loader = make_runner(epochs)
    rates = []
    runner.callbacks.append(SimpleNamespace(step_start=lambda r: rates.append(r.optimizer.param_groups[0]["lr"])))
    runner.train(loader, batches(), epochs)
    assert runner.metrics["val_step"] == validated
    assert runner.epoch == runner.total_epochs == len(validated)
    assert runner.step == runner.total_steps == validated[-1] == len(rates)
    assert runner.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert max(rates) == pytest.approx(0.1)


@pytest.mark.parametrize("stop_at", [3, 9, 10, 12, 15, 16])
def test_a_part_of_an_epoch_resumed_is_that_left_alone(stop_at):
    left_alone, loader = make_runner(1.6)
    left_alone.train(loader, batches(), 1.6)

    def stop(runner):
        runner.stop = runner.step == stop_at

    first, loader = make_runner(1.6, callbacks=[SimpleNamespace(step_end=stop)])
    first.train(loader, batches(), 1.6)
    second, loader = make_runner(1.6)
    restore_runner(second, runner_state(first))
    if second.epoch < 1.6:
        second.train(loader, batches(), 1.6 - second.epoch)
    assert second.metrics == left_alone.metrics
    assert same_weights(second.model, left_alone.model)


# ------------------------------------------------------------------------------------------ keeping the time


class Machine:
    """A clock that steps, validations and the end move on; `speed(step)` divides what they take."""

    def __init__(self, speed=lambda step: 1.0, start=10.0):
        self.time, self.speed, self.rates = start, speed, []

    def now(self):
        return self.time

    def spend(self, seconds, runner):
        self.time += seconds / self.speed(runner.step)

    def step_start(self, runner):
        self.rates.append(runner.optimizer.param_groups[0]["lr"])

    def loader(self, loader, runner):
        """Its batches take a step's time."""
        machine = self

        class Slow:
            def __len__(self):
                return len(loader)

            def __iter__(self):
                for batch in loader:
                    machine.spend(COSTS.step, runner)
                    yield batch

        return Slow()


def timed_run(speed, minutes=2.0, stop_at=None, before=None, epochs=None):
    """A run of 100 steps an epoch on a fake machine: its runner, machine, deadline."""
    machine = before[1] if before else Machine(speed)
    limit = planning.AIM * 60 * minutes - 10
    epochs = epochs or epochs_of(COSTS.steps_that_fit(limit, 0, 100, 0), 100)
    config = SimpleNamespace(minutes=minutes, epochs=epochs, gif_frames=0, warmup=0.1, schedule="cosine")
    run = SimpleNamespace(config=config, checkpoints=SimpleNamespace(hyperparameters={"epochs": epochs}))
    costs = None if before else COSTS.scaled(COSTS.step)
    runner, loader = make_runner(epochs, n=400)
    deadline = Deadline(run, machine.now() if before else 0.0, costs, machine.now)

    def validate(runner):
        machine.spend(COSTS.validation, runner)

    def stop(runner):
        runner.stop = runner.step == stop_at

    runner.callbacks = [machine, deadline, SimpleNamespace(epoch_end=validate, step_end=stop)]
    if before:
        restore_runner(runner, runner_state(before[0]))
    runner.train(machine.loader(loader, runner), batches(), config.epochs - runner.epoch)
    if runner.step == runner.total_steps:
        machine.spend(COSTS.finish, runner)
    return runner, machine, deadline


def test_a_machine_that_stays_as_it_was_needs_no_correction(capsys):
    runner, machine, deadline = timed_run(lambda step: 1.0)
    assert machine.time == pytest.approx(planning.AIM * 120, rel=0.03)
    assert not deadline.knots
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5, 2.0])
@pytest.mark.parametrize("change", [0, 300, 500])
def test_a_change_of_speed_is_made_up_for(factor, change, capsys):
    runner, machine, deadline = timed_run(lambda step: factor if step >= change else 1.0)
    assert machine.time == pytest.approx(120, rel=0.1)
    assert runner.step == runner.total_steps == steps_in(deadline.config.epochs, 100)
    assert deadline.run.checkpoints.hyperparameters["epochs"] == deadline.config.epochs
    assert runner.epoch == math.ceil(deadline.config.epochs) == len(runner.metrics["val_step"])
    assert f"{deadline.config.epochs} epochs in place of" in capsys.readouterr().out
    peak = machine.rates.index(max(machine.rates))
    assert machine.rates[: peak + 1] == sorted(machine.rates[: peak + 1])
    assert machine.rates[peak:] == sorted(machine.rates[peak:], reverse=True)
    assert machine.rates[-1] < 0.001 * 100 / 16 and runner.optimizer.param_groups[0]["lr"] < 1e-9
    assert max(abs(a - b) for a, b in zip(machine.rates, machine.rates[1:], strict=False)) < 0.05 * max(machine.rates)


@pytest.mark.parametrize("slow", [(0, 30), (0, 100), (300, 330)])
def test_a_machine_that_is_very_slow_for_a_while_is_given_time_to_recover(slow, capsys):
    runner, machine, deadline = timed_run(lambda step: 0.1 if slow[0] <= step < slow[1] else 1.0)
    assert machine.time == pytest.approx(120, rel=0.1)
    assert runner.optimizer.param_groups[0]["lr"] < 1e-9


def test_a_machine_that_stays_three_times_slower_does_not_come_too_late(capsys):
    runner, machine, deadline = timed_run(lambda step: 0.3 if step >= 100 else 1.0, minutes=6)
    assert machine.time == pytest.approx(360, rel=0.1)


@pytest.mark.parametrize("stop_at", [250, 400, 550])
def test_a_resumed_run_counts_the_time_that_was_used(stop_at, capsys):
    def speed(step):
        return 0.6 if step >= 300 else 1.0

    first = timed_run(speed, stop_at=stop_at)
    assert first[0].step == stop_at < first[0].total_steps
    runner, machine, deadline = timed_run(speed, before=first, epochs=first[2].config.epochs)
    assert machine.time == pytest.approx(120, rel=0.1)
    assert machine.rates[-1] < 0.01 * max(machine.rates)
    places = machine.rates[stop_at - 1 : stop_at + 1]
    assert abs(places[0] - places[1]) < 0.05 * max(machine.rates)


def test_a_run_that_had_no_plan_can_be_resumed_twice():
    """It knows what a step costs, and not yet what a picture does."""
    run = SimpleNamespace(config=SimpleNamespace(minutes=2, epochs=1.5))
    deadline = Deadline(run, 0.0, now=lambda: 1.0)
    deadline.costs = Costs(0.1, 2.0, 0.0, 1.0)
    again = Deadline(run, 0.0, now=lambda: 1.0)
    again.load_state_dict(deadline.state_dict())
    assert again.costs == deadline.costs


@pytest.mark.parametrize(
    "state",
    [
        {"seconds": -1.0},
        {"knots": [[1.0]]},
        {"knots": [["a", 1.0]]},
        {"costs": {"step": 1.0}},
        {"costs": dict.fromkeys(vars(Costs(1, 1, 1, 1)), 0.0)},
        {"planned": 0},
    ],
)
def test_a_damaged_state_is_refused(state):
    run = SimpleNamespace(config=SimpleNamespace(minutes=2, epochs=1.5))
    deadline = Deadline(run, 0.0, now=lambda: 1.0)
    whole_state = deadline.state_dict()
    deadline.load_state_dict(whole_state)
    with pytest.raises(ValueError, match="Deadline"):
        deadline.load_state_dict({**whole_state, **state})


# ------------------------------------------------------------------------------------------------ the whole run


@pytest.fixture
def quick(monkeypatch):
    """No time is measured: a plan of given costs, whatever the machine."""
    monkeypatch.setattr(planning, "measure", lambda config, *rest: Costs(4.0, 1.0, 0.1, 1.0))
    monkeypatch.setattr(Deadline, "correct", lambda self, runner: None)


def report_of(folder) -> dict:
    return json.loads((folder / "saved/x.json").read_text(encoding="utf-8"))


def test_a_plan_that_is_not_corrected_is_the_run_of_its_epochs(tmp_path, quick, capsys):
    options = [*SMALL, "--gif_frames", "0", "--name", "x", "--batch_size", "100"]
    run_main("train.py", *options, "--minutes", "2", "--output_dir", tmp_path / "planned")
    planned = report_of(tmp_path / "planned")
    epochs = planned["config"]["epochs"]
    assert f"--minutes 2 is --epochs {epochs} at 4000 ms a step here" in capsys.readouterr().out
    assert planned["config"]["minutes"] == 2 and planned["results"]["epochs"] == epochs != int(epochs)
    run_main("train.py", *options, "--epochs", epochs, "--output_dir", tmp_path / "typed")
    assert report_of(tmp_path / "typed")["metrics"] == planned["metrics"]
    assert same_weights(*(Model.load(tmp_path / folder / "saved/x.pt") for folder in ("planned", "typed")))
    capsys.readouterr()
    for arguments in (["--minutes", "2"], []):
        run_main("train.py", *options, *arguments, "--resume", "--output_dir", tmp_path / "planned")
        assert "this run has finished" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--minutes", "2"], []])
def test_a_planned_run_that_was_interrupted_goes_on_with_its_epochs(tmp_path, quick, monkeypatch, capsys, arguments):
    options = [*SMALL, "--gif_frames", "0", "--name", "x", "--batch_size", "100"]
    run_main("train.py", *options, "--minutes", "2", "--output_dir", tmp_path / "whole")

    def interrupt(self, runner):
        if runner.step == 10:
            self.run.signals.append(2)
            runner.stop = True

    with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
        patched.setattr(Deadline, "step_end", interrupt)
        run_main("train.py", *options, "--minutes", "2", "--output_dir", tmp_path / "parts")
    state = read_file(tmp_path / "parts/saved/x.checkpoint")
    assert state["runner"]["callbacks"]["Deadline"]["seconds"] > 0
    monkeypatch.setattr(planning, "measure", None)  # nothing is measured again
    run_main("train.py", *options, *arguments, "--resume", "--output_dir", tmp_path / "parts")
    assert report_of(tmp_path / "parts")["metrics"] == report_of(tmp_path / "whole")["metrics"]
    assert same_weights(*(Model.load(tmp_path / folder / "saved/x.pt") for folder in ("parts", "whole")))


def test_auto_takes_the_preset_with_the_highest_guess(tmp_path, monkeypatch):
    speeds = {4: 10.0, 8: 0.01}  # by patch size: default, and the others
    monkeypatch.setattr(planning, "measure", lambda c, *rest: Costs(speeds[c.patch_size], 1.0, 0.1, 1.0))
    curves = {"default": [0.9], "accurate": [0.5] * 20, "small": [0.6] * 20}
    monkeypatch.setattr(planning, "stored_curve", curves.get)
    arguments = ["--preset", "auto", "--minutes", "2", "--lr", "0.001"]
    config = cli.parse(train.Config, arguments, train.dependent_defaults, remember=False)
    run = SimpleNamespace(config=config, device=torch.device("cpu"))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        planning.plan(run, tiny_dataset(2000), lambda preset: train.with_defaults(config, preset=preset))
    assert config.preset == "small" and config.hidden_size == 104
    assert config.lr == 0.001  # typed
    assert "takes small. A guess, from stored runs on CIFAR-10" in output.getvalue()


def test_measuring_leaves_random_state_and_data_alone(digits):
    config = cli.parse(train.Config, SMALL, train.dependent_defaults, remember=False)
    config.precision = "fp32"
    torch.manual_seed(3)
    before, images = torch.get_rng_state(), digits.train.images.clone()
    costs = measure(config, digits, torch.device("cpu"), seconds=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(digits.train.images, images)
    assert all(0 < value < 60 for value in vars(costs).values())


def test_a_model_is_measured_with_the_arguments_that_it_is_trained_with(digits, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch.nn as nn\n\nclass Mine(nn.Module):\n"
        "    def __init__(self, output_size, device='cpu'):\n        super().__init__()\n"
        "        self.head = nn.Linear(3072, output_size, device=device)\n"
        "    def forward(self, x):\n        return self.head(x.flatten(1))\n"
    )
    flags = ["--model", f"{tmp_path / 'mine.py'}:Mine", "--optimizer", "adamw", "--precision", "fp32"]
    config = cli.parse(train.Config, flags, train.dependent_defaults, remember=False)
    assert measure(config, digits, torch.device("cpu"), seconds=0.1).step > 0


def test_a_plan_without_validation_images_has_none_to_wait_for(digits):
    config = cli.parse(train.Config, [*SMALL, "--val_fraction", "0"], train.dependent_defaults, remember=False)
    config.precision = "fp32"
    costs = measure(config, load_data("digits", val_fraction=0), torch.device("cpu"), seconds=0.1)
    assert costs.validation == costs.frame


def test_the_age_of_another_program_does_not_count(monkeypatch):
    assert planning.seconds_since_start() == 0
    monkeypatch.setattr("sys.argv", ["somewhere/train.py"])
    assert planning.seconds_since_start() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--minutes 3 --epochs 20", "--minutes and --epochs both say how long to train: choose one"),
        ("--preset auto", "say --minutes too"),
        ("--preset auto --minutes 3 --model cnn", "is for the ViT"),
        ("--minutes 0.4", "too short for anything: give at least --minutes 0.5"),
        ("--minutes -1", "must be positive"),
        ("--minutes nan", "must be positive"),
        ("--minutes 1e300", "minutes 1e+300 is too large"),
        ("--split_seed 99999999999999999999", "split_seed 99999999999999999999 must be in"),
        ("--name saved.best", "files that end so belong to runs with --patience"),
        ("--minutes 0.6", "start, a few steps, validation, test and pictures take about 1.8"),
        ("--epochs 0", "must be positive"),
    ],
)
def test_refusals_are_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(planning, "measure", lambda config, *rest: Costs(1.0, 1.0, 0.1, 80.0))
    code, line = outcome("train.py", "--dataset", "digits", "--output_dir", tmp_path, *arguments.split())
    assert code == 2 and words in line and line.count("\n") == 0, line
    assert not list(tmp_path.iterdir())
