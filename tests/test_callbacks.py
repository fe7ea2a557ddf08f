import copy
import json
import os
import signal

import pytest
import torch
import torch.nn as nn
from helpers import MODEL, batches, noise, same_weights, train_small
from test_runner import Calls, still_runner, stop_at, vit_runner

from network import FeedForward, Model
from runner import Runner
from support.files import read_file, write_file
from training.callbacks import EarlyStopping, WeightAverage
from training.checkpoints import restore_runner, runner_state
from training.live import Frames, LiveResults

# ------------------------------------------------------------------------------------------------- averaged weights


def weights_after_each_step(runner):
    """A list that the weights and buffers at the start and after each step are put into."""
    history = []

    def remember(runner):
        history.append(copy.deepcopy(runner.model.state_dict()))

    runner.callbacks.append(Calls(train_start=remember, step_end=remember))
    return history


@pytest.mark.parametrize("tokenizer", ["patch", "conv"])
def test_the_average_is_the_exponential_one_of_weights_and_buffers(digits, tokenizer):
    runner, train_loader, val_loader = vit_runner(digits, tokenizer=tokenizer)
    runner.callbacks.append(WeightAverage(runner, 0.5))
    history = weights_after_each_step(runner)
    runner.train(train_loader, val_loader, epochs=3)
    assert len(history) == 13
    expected = {name: value.double() for name, value in history[0].items()}
    for n, weights in enumerate(history[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        assert (decay < 0.5) == (n < 8)
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    averaged = runner.eval_model.state_dict()
    assert averaged.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point() and not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(averaged[name].double(), value, rtol=1e-4, atol=1e-6)
    assert any("running_var" in name for name in averaged) == (tokenizer == "conv")


def test_tables_of_indices_are_no_averages():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.register_buffer("places", torch.arange(2401) % 97)

    runner = Runner(Shifted(), None, None, "cpu")
    average = WeightAverage(runner, 0.999)
    for _ in range(50):
        average.step_end(runner)
    assert torch.equal(runner.eval_model.places, runner.model.places)


def test_validation_and_test_are_of_the_average_and_training_is_not_touched(digits):
    plain, train_loader, val_loader = vit_runner(digits)
    plain.train(train_loader, val_loader, epochs=2)
    runner, train_loader, val_loader = vit_runner(digits)
    runner.callbacks.append(WeightAverage(runner, 0.9))
    runner.train(train_loader, val_loader, epochs=2)
    assert same_weights(runner.model, plain.model)
    assert not same_weights(runner.eval_model, plain.model)
    assert runner.metrics["train_loss"] == plain.metrics["train_loss"]
    assert runner.metrics["val_loss"] != plain.metrics["val_loss"]
    with torch.no_grad():
        right = [(runner.eval_model.eval()(x).argmax(dim=1) == y).float() for x, y in val_loader]
    accuracy = torch.cat(right).mean().item()
    assert runner.metrics["val_accuracy"][-1] == pytest.approx(accuracy)
    assert runner.test(val_loader)[1] == pytest.approx(accuracy)


def test_an_average_taken_up_again_in_the_middle_of_an_epoch_is_the_same_bit_for_bit(digits, tmp_path):
    whole, train_loader, val_loader = vit_runner(digits, tokenizer="conv")
    whole.callbacks.append(WeightAverage(whole, 0.99))
    whole.train(train_loader, val_loader, epochs=3)
    first, train_loader, val_loader = vit_runner(digits, tokenizer="conv")
    first.callbacks.append(WeightAverage(first, 0.99))
    first.callbacks.append(stop_at(6))
    first.train(train_loader, val_loader, epochs=3)
    write_file(tmp_path / "state", runner_state(first))
    second, train_loader, val_loader = vit_runner(digits, seed=1, tokenizer="conv")
    second.callbacks.append(WeightAverage(second, 0.99))
    restore_runner(second, read_file(tmp_path / "state"))
    train_loader.seed = 0
    second.train(train_loader, val_loader, epochs=3 - second.epoch)
    assert same_weights(second.eval_model, whole.eval_model)
    assert second.metrics == whole.metrics


def test_an_average_that_begins_in_a_resumed_run_begins_with_its_weights(digits):
    first, train_loader, val_loader = vit_runner(digits)
    first.train(train_loader, val_loader, epochs=1)
    second, train_loader, val_loader = vit_runner(digits, seed=1)
    second.callbacks.append(WeightAverage(second, 0.999))
    restore_runner(second, runner_state(first))
    second.callbacks.append(stop_at(4))
    at_start = []
    second.callbacks.append(Calls(train_start=lambda runner: at_start.append(copy.deepcopy(runner.eval_model))))
    second.train(train_loader, val_loader, epochs=1)
    assert same_weights(at_start[0], first.model)


# --------------------------------------------------------------------------------------------------- early stopping


class ScriptedRunner(Runner):
    """Its validation gives what the script says, and its model changes all the time."""

    def __init__(self, losses, accuracies=None):
        torch.manual_seed(0)
        model = FeedForward(48, 8, 3)
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), "cpu")
        self.script = list(zip(losses, accuracies or [0.5] * len(losses), strict=True))
        self.history = {}
        remember = lambda _: self.history.update({self.epoch: copy.deepcopy(self.model)})  # noqa: E731
        self.callbacks.append(Calls(epoch_end=remember))

    def test(self, loader):
        return self.script[self.epoch]

    def train_on_noise(self):
        loader = [noise(4)]
        self.train(loader, loader, len(self.script) - self.epoch)
        return self.epoch


@pytest.mark.parametrize(
    "quantity, patience, min_improvement, losses, epochs, best",
    [
        ("loss", 1, 0.0, [3, 2, 2, 1], 3, 2),  # the same is no improvement
        ("loss", 2, 0.0, [3, 2, 2.5, 1, 4, 5, 6], 6, 4),  # an improvement begins the wait anew
        ("loss", 3, 0.0, [5, 4, 3, 2, 1], 5, 5),  # never due
        ("loss", 2, 0.5, [3, 2.6, 2.4, 2.0, 2.0, 2.0], 5, 3),  # by 0.6 from the best, not by 0.2 from the one before
        ("accuracy", 2, 0.0, [0.1, 0.3, 0.2, 0.3, 0.9], 4, 2),
        ("accuracy", 1, 0.01, [0.1, 0.2, 0.205, 0.9], 3, 2),
    ],
)
def test_training_stops_after_patience_and_the_best_weights_are_used(
    quantity, patience, min_improvement, losses, epochs, best
):
    runner = ScriptedRunner(*([losses] if quantity == "loss" else [losses[::-1], losses]))
    saved = []
    stopping = EarlyStopping(quantity, patience, min_improvement, on_best=lambda r: saved.append(r.epoch))
    runner.callbacks.append(stopping)
    assert runner.train_on_noise() == epochs
    assert stopping.epoch == saved[-1] == best
    last = copy.deepcopy(runner.model)
    stopping.use_best(runner)
    assert same_weights(runner.eval_model, runner.history[best])
    assert same_weights(runner.model, last)


@pytest.mark.parametrize("interrupted", range(1, 7))
def test_stopping_taken_up_again_is_the_same(interrupted, tmp_path):
    losses = [3, 2, 2.5, 1, 4, 5, 6, 0]
    runner = ScriptedRunner(losses)
    runner.callbacks.append(EarlyStopping("loss", 2))
    runner.callbacks.append(Calls(epoch_end=lambda runner: setattr(runner, "stop", runner.epoch == interrupted)))
    runner.train_on_noise()
    write_file(tmp_path / "state", runner_state(runner))
    resumed = ScriptedRunner(losses)
    stopping = EarlyStopping("loss", 2)
    resumed.callbacks.append(stopping)
    restore_runner(resumed, read_file(tmp_path / "state"))
    assert resumed.train_on_noise() == 6  # also if it was interrupted when it had just been told to stop
    assert stopping.epoch == 4
    stopping.use_best(resumed)
    assert same_weights(resumed.eval_model, {**runner.history, **resumed.history}[4])


def test_another_quantity_or_stopping_itself_can_begin_in_a_resumed_run():
    for before in (None, "accuracy"):
        runner = ScriptedRunner([3, 2, 3, 3, 3], [0.1, 0.2, 0.3, 0.4, 0.5])
        if before:
            runner.callbacks.append(EarlyStopping(before, 2))
        runner.callbacks.append(Calls(epoch_end=lambda runner: setattr(runner, "stop", runner.epoch == 2)))
        runner.train_on_noise()
        resumed = ScriptedRunner([3, 2, 3, 3, 3], [0.1, 0.2, 0.3, 0.4, 0.5])
        stopping = EarlyStopping("loss", 1)
        resumed.callbacks.append(stopping)
        restore_runner(resumed, runner_state(runner))
        assert resumed.train_on_noise() == 4
        assert stopping.epoch == 3


# ------------------------------------------------------------------------------------------------------- as a whole


def test_a_run_keeps_its_best_and_its_last_weights_and_tests_the_best(tmp_path, digits):
    # it learns too slowly to improve by a half
    flags = "--epochs 9 --lr 0.0001 --patience 2 --monitor accuracy --min_improvement 0.5 --ema 0.5"
    flags += " --precision fp32"  # as is computed below
    train_small(tmp_path, *flags.split())
    callbacks = read_file(tmp_path / f"saved/{MODEL}.checkpoint")["runner"]["callbacks"]
    assert callbacks["EarlyStopping"]["quantity"] == "accuracy"
    report = json.loads((tmp_path / f"saved/{MODEL}.json").read_text(encoding="utf-8"))
    results, accuracies = report["results"], report["metrics"]["val_accuracy"]
    assert (results["epochs"], len(accuracies), results["tested_epoch"]) == (3, 3, 1)
    assert results["val_accuracy"] == accuracies[0] != accuracies[2]
    tested, best, last = (Model.load(tmp_path / "saved" / f"{MODEL}{kind}.pt") for kind in ("", ".best", ".last"))
    assert same_weights(tested, best) and not same_weights(tested, last)
    assert tested.metadata == best.metadata == last.metadata == digits.metadata
    for model, accuracy in ((tested, results["val_accuracy"]), (last, accuracies[-1])):
        with torch.no_grad():
            right = [(model(x).argmax(dim=1) == y).float() for x, y in digits.loader("val", 500)]
        assert torch.cat(right).mean().item() == pytest.approx(accuracy)
    train_small(tmp_path)
    names = {path.name for path in (tmp_path / "saved").glob("*.pt") if "_old" not in path.name}
    assert names == {f"{MODEL}.pt"}


def test_the_gif_of_a_run_that_stops_early_ends_with_it(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Frames, "_draw", lambda self, runner, **options: drawn.append((runner.step, options)))
    flags = "--epochs 9 --lr 0.0001 --patience 1 --monitor accuracy --min_improvement 0.5 --gif_frames 4"
    train_small(tmp_path, *flags.split())
    report = json.loads((tmp_path / f"saved/{MODEL}.json").read_text(encoding="utf-8"))
    assert report["results"]["epochs"] == 2 and drawn[-1] == (report["metrics"]["val_step"][-1], {"epoch": 2})


def test_steps_and_curves_can_be_looked_at_while_the_run_goes_on(tmp_path):
    table, curves, seen = tmp_path / "a.csv", tmp_path / "a.png", []
    runner = still_runner()

    def look(runner):
        seen.append((table.read_text(encoding="utf-8").count("\n"), curves.exists()))

    runner.callbacks += [LiveResults(table, curves, "a"), Calls(epoch_end=look)]
    runner.train(batches(), batches(), epochs=2)
    assert seen == [(5, True), (9, True)]  # a heading, three steps and a validation for each epoch


# ------------------------------------------------------------------------------------------------------- compilation


class FailsAtTheLastBatch:
    """In the place of what torch.compile makes: compiles full batches, and fails as a compiler does that is killed."""

    def __init__(self, model, number=None):
        self.model, self.number = model, number

    def __call__(self, images):
        if len(images) == 200:
            return self.model(images)
        if self.number:
            os.kill(os.getpid(), self.number)
        raise RuntimeError("CppCompileError: C++ compile error\n" + 1000 * "a warning of the compiler\n")


def test_a_batch_that_cannot_be_compiled_is_trained_as_it_is(tmp_path, capfd, monkeypatch):
    plain = train_small(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", FailsAtTheLastBatch)
    assert same_weights(train_small(tmp_path / "compiled", "--compile"), plain)
    said = [line for line in capfd.readouterr().out.splitlines() if "--compile" in line]
    assert said == [
        "--compile does not work for (150, 3, 32, 32), going on without: CppCompileError: C++ compile error"
    ]


@pytest.mark.skipif(os.name != "posix", reason="signals are sent in other ways")
def test_a_signal_that_kills_the_compiler_too_ends_with_a_checkpoint(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: FailsAtTheLastBatch(model, signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train_small(tmp_path, "--compile")
    output = capfd.readouterr()
    assert stop.value.code == 128 + signal.SIGTERM and "interrupted after step 6" in output.out
    assert "does not work" not in output.out and "compiler" not in output.err
    assert (tmp_path / "saved" / f"{MODEL}.checkpoint").exists()
