"""--tensorboard, read back by TensorBoard's own reader."""

import copy
import os
import sys

import pytest
from helpers import MODEL, outcome, same_weights, train_small
from test_runner import Calls, stop_at, vit_runner

from support.files import short
from training.checkpoints import restore_runner, runner_state
from training.live import TensorBoard

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402


def read(folder):
    """Scalars as {tag: [(step, value)]} and pictures as {tag: [(step, width)]}."""
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, {tag: [(e.step, e.width) for e in events.Images(tag)] for tag in events.Tags()["images"]}


def logged(folder, digits, state=None):
    """A runner after two epochs, or the rest of them from `state` on, that wrote to `folder`."""
    runner, train_loader, val_loader = vit_runner(digits, epochs=2)
    used = []  # the rate that each step was made with
    runner.callbacks.append(Calls(step_start=lambda runner: used.append(runner.optimizer.param_groups[0]["lr"])))
    runner.callbacks.append(TensorBoard(folder, val_loader, digits.classes))
    if state:
        restore_runner(runner, state)
    runner.train(train_loader, val_loader, epochs=2 - runner.epoch)
    return runner, used


def assert_written(folder, runner, used):
    scalars, pictures = read(folder)
    for split in ("train", "val"):
        for quantity in ("loss", "accuracy"):
            steps, values = zip(*scalars[f"{quantity}/{split}"], strict=True)
            assert list(steps) == runner.metrics[f"{split}_step"]
            assert list(values) == pytest.approx(runner.metrics[f"{split}_{quantity}"])
    assert [step for step, _ in scalars["learning_rate"]] == runner.metrics["train_step"]
    assert [rate for _, rate in scalars["learning_rate"]][-len(used) :] == pytest.approx(used)
    assert {tag: [step for step, _ in entries] for tag, entries in pictures.items()} == {
        "progress": runner.metrics["val_step"],
        "attention": runner.metrics["val_step"],
    }
    assert min(width for entries in pictures.values() for _, width in entries) > 400


def test_it_holds_what_the_runner_measured_and_training_is_not_touched(tmp_path, digits):
    runner, used = logged(tmp_path, digits)
    assert_written(tmp_path, runner, used)
    plain, train_loader, val_loader = vit_runner(digits, epochs=2)
    plain.train(train_loader, val_loader, epochs=2)
    assert same_weights(plain.model, runner.model) and plain.metrics == runner.metrics


@pytest.mark.parametrize("event", ["step_end", "epoch_end"])  # before and after the validation at step 4
def test_a_resumed_run_goes_on_in_the_same_curves_without_what_was_lost(tmp_path, digits, event):
    """Killed at step 7, resumed from the checkpoint of step 4; a run before had written to the same place."""
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss/val", 9.0, 99)
    state = {}
    first, train_loader, val_loader = vit_runner(digits, epochs=2)
    first.callbacks.append(TensorBoard(tmp_path, val_loader, digits.classes))
    save = lambda runner: runner.step == 4 and state.update(copy.deepcopy(runner_state(runner)))  # noqa: E731
    first.callbacks += [Calls(**{event: save}), stop_at(7)]
    first.train(train_loader, val_loader, epochs=2)
    assert_written(tmp_path, *logged(tmp_path, digits, state=state))


def test_the_flag_writes_to_runs_and_only_the_flag(tmp_path, capsys):
    train_small(tmp_path / "with", "--tensorboard")
    folder = str(short(tmp_path / "with" / "runs" / MODEL))
    assert f"  {folder}" in capsys.readouterr().out.partition("wrote\n")[2].splitlines()
    scalars, _ = read(tmp_path / "with" / "runs" / MODEL)
    assert len(scalars["loss/val"]) == 1
    train_small(tmp_path / "without")
    assert f"{os.sep}runs{os.sep}" not in capsys.readouterr().out
    assert not (tmp_path / "without" / "runs").exists()


def test_without_tensorboard_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, errors = outcome("train.py", *"--dataset digits --tensorboard --output_dir".split(), tmp_path)
    assert code == 2 and "pip install tensorboard" in errors and len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
