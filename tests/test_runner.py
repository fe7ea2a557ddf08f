import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import batches, noise, same_weights
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from network import CNN, FeedForward, VisionTransformer
from runner import NonFiniteLoss, Runner, choose_device, choose_precision
from support.files import read_file, write_file
from training.callbacks import Clock, ProgressBar
from training.checkpoints import device_random_state, restore_runner, runner_state, set_device_random_state
from training.optim import (
    OPTIMIZERS,
    SCHEDULES,
    Muon,
    MuonAndAdamW,
    build_optimizer,
    build_schedule,
    orthogonalize,
    schedule_factor,
)

METRICS = {f"{split}_{name}" for split in ("train", "val") for name in ("loss", "accuracy", "step")}


def still_runner(**options):
    """A runner whose model never changes, so that its metrics can be computed by hand."""
    torch.manual_seed(0)
    model = FeedForward(48, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return Runner(model, optimizer, options.pop("criterion", nn.CrossEntropyLoss()), "cpu", **options)


def by_hand(model, images, labels, smoothing=0.0):
    """Loss and accuracy, image by image."""
    losses, right = [], 0
    for image, label in zip(images, labels, strict=True):
        log_p = model(image[None])[0].double().log_softmax(dim=0)
        losses.append(-((1 - smoothing) * log_p[label] + smoothing * log_p.mean()).item())
        right += int(log_p.argmax() == label)
    return pytest.approx(sum(losses) / len(losses), rel=1e-5), pytest.approx(right / len(labels))


def vit_runner(data, optimizer="muon", seed=0, epochs=3, batch_size=300, augment="crop_flip", **options):
    """A small Vision Transformer with everything that is random in training."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_heads": 2, "num_blocks": 2, "patch_size": 8, "drop_path": 0.3}
    model = VisionTransformer(**{**sizes, **options})
    loader = data.loader("train", batch_size, shuffle=True, augment=augment, flip=data.flip, seed=seed)
    optimizer = build_optimizer(model, optimizer, 3e-3)
    schedule = build_schedule(optimizer, epochs * len(loader))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    runner = Runner(model, optimizer, criterion, "cpu", schedule, nn.CrossEntropyLoss())
    return runner, loader, data.loader("val", 200)


class Calls:
    """A callback made of functions of the runner: `Calls(step_end=function)`."""

    def __init__(self, **functions):
        vars(self).update(functions)


def stop_at(step):
    def stop(runner):
        runner.stop = runner.step == step

    return Calls(step_end=stop)


# ------------------------------------------------------------------------------------------------------- metrics


def test_metrics_are_averages_over_images_not_batches():
    runner = still_runner()
    images, labels = noise()
    metrics = runner.train(batches(), batches(), epochs=1)
    loss, accuracy = by_hand(runner.model, images, labels)
    assert (metrics["val_loss"], metrics["val_accuracy"]) == ([loss], [accuracy])
    summed, correct, count = runner.totals.tolist()  # of the epoch in training
    assert (summed / count, correct / count) == (loss, accuracy)
    over_batches = sum(metrics["train_loss"]) / 3
    assert over_batches != loss  # the last batch is smaller, so a mistake would show


def test_training_metrics_have_an_entry_for_every_step_of_its_own_images():
    runner = still_runner()
    images, labels = noise()
    metrics = runner.train(batches(), epochs=2)
    assert metrics["train_step"] == [1, 2, 3, 4, 5, 6]
    expected = [by_hand(runner.model, images[part], labels[part]) for part in (slice(4), slice(4, 8), slice(8, 10))]
    assert list(zip(metrics["train_loss"], metrics["train_accuracy"], strict=True)) == 2 * expected


def test_where_reading_makes_an_accelerator_wait_the_same_metrics_are_read_later(digits, monkeypatch):
    """Here a CPU is taken for an accelerator: steps are read a few at a time."""
    metrics = []
    for device in ("cpu", "accelerator"):
        runner, train_loader, val_loader = vit_runner(digits, batch_size=100)
        reads, read = [], runner.read_steps
        if device == "accelerator":
            monkeypatch.setattr("runner.READ_EVERY", 5)
            runner.device = SimpleNamespace(type="cpu_that_waits")
            runner.logits = lambda model, images: model(images)
            runner._to_device = lambda *tensors: tensors
            runner.test = lambda loader: (0.0, 0.0)
        runner.read_steps = lambda reads=reads, read=read: reads.append(1) or read()
        unread = []
        runner.callbacks.append(Calls(step_end=lambda runner, unread=unread: unread.append(len(runner._unread))))
        runner.train(train_loader, val_loader, epochs=1)
        # a clock that stops after each step has counted all that was waited for when the epoch ends
        assert unread == ([0] * 12 if device == "cpu" else [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 0])
        metrics.append({name: values for name, values in runner.metrics.items() if name.startswith("train")})
        assert len(reads) == (13 if device == "cpu" else 4)  # of 12 steps, and once more after them
    assert metrics[0] == metrics[1] and metrics[0]["train_step"] == list(range(1, 13))


def test_what_is_printed_of_an_epoch_are_its_means(capsys):
    runner = still_runner()
    runner.verbose = True
    runner.train(batches(), batches(6), epochs=1)
    loss, accuracy = (np.average(runner.metrics[f"train_{name}"], weights=[4, 4, 2]) for name in ("loss", "accuracy"))
    val = [runner.metrics[f"val_{name}"][0] for name in ("loss", "accuracy")]
    train_words, val_words = (f"loss {a:.4f} accuracy {b:.2%}" for a, b in ((loss, accuracy), val))
    assert capsys.readouterr().out == f"epoch 1/1: train {train_words}, val {val_words}\n"


def test_a_runner_that_is_asked_to_stop_before_it_trains_does_not_train(capsys):
    runner = still_runner()
    runner.stop = True
    assert runner.train(batches(), epochs=1)["train_step"] == [] and not runner.stop
    assert runner.train(batches(), epochs=1)["train_step"] == [1, 2, 3]


def test_metrics_are_the_six_lists():
    runner = still_runner()
    assert runner.metrics == {name: [] for name in METRICS}
    assert runner.train(batches(), batches(6), epochs=2) is runner.metrics
    assert runner.metrics["val_step"] == [3, 6]
    assert runner.metrics["train_step"] == [1, 2, 3, 4, 5, 6]
    assert all(len(values) == (2 if name.startswith("val") else 6) for name, values in runner.metrics.items())


def test_without_a_validation_loader_there_are_no_validation_metrics():
    metrics = still_runner().train(batches(), epochs=1)
    assert metrics["val_loss"] == metrics["val_step"] == []


def test_test_gives_loss_and_accuracy():
    runner = still_runner()
    loss, accuracy = runner.test(batches(7, seed=1))
    assert (type(loss), type(accuracy)) == (float, float)
    assert (loss, accuracy) == by_hand(runner.model, *noise(7, seed=1))
    assert all(not values for values in runner.metrics.values())


def test_label_smoothing_is_for_training_alone():
    runner = still_runner(criterion=nn.CrossEntropyLoss(label_smoothing=0.2), eval_criterion=nn.CrossEntropyLoss())
    metrics = runner.train(batches(10, 10), batches(), epochs=1)
    assert metrics["train_loss"] == [by_hand(runner.model, *noise(), smoothing=0.2)[0]]
    assert metrics["val_loss"] == [by_hand(runner.model, *noise())[0]]
    assert runner.test(batches())[0] == metrics["val_loss"][0]


def test_the_criterion_serves_for_evaluation_where_no_other_is_given():
    runner = still_runner(criterion=nn.CrossEntropyLoss(label_smoothing=0.2))
    assert runner.test(batches())[0] == by_hand(runner.model, *noise(), smoothing=0.2)[0]


def test_empty_loaders_are_value_errors():
    nothing = DataLoader(TensorDataset(*noise(3)), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="no images"):
        still_runner().test(nothing)
    with pytest.raises(ValueError, match="0 batches"):
        still_runner().train(nothing, epochs=1)


def test_epochs_below_one_are_refused():
    for epochs in (0, -1):
        with pytest.raises(ValueError, match="epochs"):
            still_runner().train(batches(), epochs=epochs)


# ------------------------------------------------------------------------------------------- modes and gradients


@pytest.mark.parametrize("augment", ["crop_flip", "cutmix"])
def test_gradients_added_up_are_those_of_the_larger_batch(digits, augment):
    """In float64, to rounding; 1150 images make an uneven last batch of 100, whose parts are uneven too."""
    losses, weights = [], []
    for grad_accum in (1, 3):
        torch.manual_seed(0)
        model = VisionTransformer(32, 16, 10, num_heads=2, num_blocks=1, patch_size=8).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        schedule = build_schedule(optimizer, 8)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        runner = Runner(model, optimizer, criterion, "cpu", schedule, grad_clip=0.5, grad_accum=grad_accum)
        loader = digits.loader("train", 150, shuffle=True, augment=augment)
        loader.scale, loader.shift = loader.scale.double(), loader.shift.double()
        runner.train(loader, epochs=1)
        assert runner.step == 8
        losses.append(runner.metrics["train_loss"])
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert torch.allclose(*weights, atol=1e-6)


def test_modes_are_right_in_training_validation_and_plots():
    runner = still_runner()
    modes = []
    runner.model.register_forward_hook(lambda model, *_: modes.append(model.training))
    runner.callbacks.append(Calls(epoch_end=lambda runner: runner.plot(batches())))
    runner.train(batches(), batches(6), epochs=2)
    assert modes == 2 * ([True] * 3 + [False] * 2 + [False])
    assert runner.model.training


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_and_plots_leave_mode_and_gradients_as_they_were(training):
    runner = still_runner()
    runner.model.train(training)
    runner.test(batches())
    runner.plot(batches())
    assert runner.model.training is training
    assert all(p.grad is None for p in runner.model.parameters())


def test_plot_saves_a_picture_and_leaves_the_random_state_alone(digits, tmp_path):
    runner, train_loader, val_loader = vit_runner(digits)
    runner.train(train_loader, val_loader, epochs=1)
    state = torch.get_rng_state()
    figure = runner.plot(val_loader, save_path=tmp_path / "folder" / "plot.png", classes=digits.classes, title="digits")
    assert figure is not None
    assert (tmp_path / "folder" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_vision_transformer_learns_the_digits(digits, optimizer):
    runner, train_loader, val_loader = vit_runner(
        digits, optimizer, epochs=12, batch_size=32, augment="none", hidden_size=32, drop_path=0.0
    )
    metrics = runner.train(train_loader, val_loader, epochs=12)
    assert metrics["train_loss"][-1] < 0.6 * metrics["train_loss"][0]
    assert metrics["val_accuracy"][-1] > 0.75
    assert runner.test(digits.loader("test", 100))[1] > 0.7


def test_a_plain_data_loader_trains_as_well(digits):
    pixels = digits.train.images.float() / 255
    loader = DataLoader(TensorDataset(pixels, digits.train.labels), batch_size=64, shuffle=True)
    torch.manual_seed(0)
    model = CNN()
    runner = Runner(model, torch.optim.AdamW(model.parameters(), lr=3e-3), nn.CrossEntropyLoss(), "cpu")
    runner.train(loader, loader, epochs=2)
    assert runner.metrics["val_accuracy"][-1] > 0.7
    assert runner.plot(loader) is not None


def test_progress_says_what_users_want_to_know(digits, capsys):
    runner, train_loader, val_loader = vit_runner(digits)
    clock = Clock()
    runner.callbacks, runner.verbose = [clock, ProgressBar(clock)], False
    runner.train(train_loader, val_loader, epochs=2)
    captured = capsys.readouterr()
    lines = captured.out.strip().splitlines()
    assert len(lines) == 2
    pattern = r"epoch 2/2 .*val accuracy \d.*loss \d.*train accuracy \d.*loss \d.*0:00 left .*images/s"
    assert re.search(pattern, lines[1])
    assert captured.err == ""  # no bar where nobody looks at a terminal


def test_same_seed_same_weights_bit_for_bit(digits):
    models = []
    for seed in (0, 0, 1):
        runner, train_loader, _ = vit_runner(digits, seed=seed)
        runner.train(train_loader, epochs=1)
        models.append(runner.model)
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


def test_long_gradients_are_clipped_and_short_ones_left_alone():
    changes = []
    for grad_clip in (None, 1e9, 0.001):
        torch.manual_seed(0)
        model = FeedForward(48, 8, 3)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        Runner(model, optimizer, nn.CrossEntropyLoss(), "cpu", grad_clip=grad_clip).train(batches(4), epochs=1)
        changes.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    assert torch.equal(changes[0], changes[1])
    assert changes[2].norm().item() == pytest.approx(0.001, rel=1e-2)
    torch.testing.assert_close(changes[2] / changes[2].norm(), changes[0] / changes[0].norm(), rtol=0.01, atol=1e-3)


def test_labels_in_training_may_be_probabilities():
    """As mixup and cutmix give them: the loss is the cross-entropy against them, the likeliest class the right one."""
    runner = still_runner()
    images, labels = noise(50)
    targets = 0.7 * F.one_hot(labels, 3) + 0.3 * F.one_hot(labels.roll(1), 3)
    metrics = runner.train(DataLoader(TensorDataset(images, targets), batch_size=50), epochs=1)
    log_p = runner.model(images).detach().double().log_softmax(dim=1)
    assert metrics["train_loss"] == [pytest.approx(-(targets * log_p).sum(dim=1).mean().item(), rel=1e-5)]
    assert metrics["train_accuracy"] == [by_hand(runner.model, images, labels)[1]]


# ------------------------------------------------------------------------------------------------------ callbacks


def test_callbacks_are_called_once_for_each_thing_they_wait_for():
    runner = still_runner()
    calls = []
    for event in ("train_start", "step_start", "step_end", "epoch_end"):  # each in an object that has nothing else
        call = lambda r, event=event: calls.append((event, r.step, len(r.metrics["val_loss"])))  # noqa: E731
        runner.callbacks.append(Calls(**{event: call}))
    runner.train(batches(), batches(), epochs=2)
    steps = [
        (event, step + (event == "step_end"), step > 2) for step in range(6) for event in ("step_start", "step_end")
    ]
    assert calls == [("train_start", 0, 0), *steps[:6], ("epoch_end", 3, 1), *steps[6:], ("epoch_end", 6, 2)]


@pytest.mark.parametrize("step, epoch, batch, validations", [(1, 0, 1, 0), (3, 1, 0, 1), (5, 1, 2, 1)])
def test_stop_ends_training_after_the_step(step, epoch, batch, validations):
    runner = still_runner()
    runner.callbacks.append(stop_at(step))
    runner.train(batches(), batches(), epochs=4)
    assert (runner.step, runner.epoch, runner.batch) == (step, epoch, batch)
    assert len(runner.metrics["val_loss"]) == validations


def test_training_goes_on_after_a_stop_or_an_end():
    runner = still_runner()
    runner.callbacks.append(stop_at(5))
    runner.train(batches(), batches(), epochs=2)
    runner.train(batches(), batches(), epochs=1)  # the rest of the second epoch
    assert (runner.step, runner.epoch, runner.total_steps) == (6, 2, 6)
    runner.train(batches(), batches(), epochs=1)
    assert runner.metrics["val_step"] == [3, 6, 9]
    assert runner.metrics["train_loss"][6:] == pytest.approx(runner.metrics["train_loss"][:3])


# ------------------------------------------------------------------------------------------------ non-finite losses


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_stops_before_it_spoils_the_weights(bad):
    losses = iter([1.0, 1.0, 1.0, 1.0, bad])

    def criterion(logits, labels):
        return F.cross_entropy(logits, labels) * next(losses)

    model = FeedForward(48, 8, 3)
    runner = Runner(model, torch.optim.SGD(model.parameters(), lr=0.1), criterion, "cpu")
    with pytest.raises(NonFiniteLoss, match="step 5 .*epoch 2.*learning rate") as error:
        runner.train(batches(), epochs=3)
    assert "\n" not in str(error.value)
    assert all(p.isfinite().all() for p in model.parameters())


def test_non_finite_batches_can_be_skipped_and_counted():
    losses = iter([1.0, math.nan, 1.0])
    runner = still_runner(criterion=lambda x, y: F.cross_entropy(x, y) * next(losses), skip_nonfinite=True)
    metrics = runner.train(batches(), epochs=1)
    assert runner.skipped == 1
    assert runner.step == 3
    assert metrics["train_step"] == [1, 3]
    first, last = (slice(4), slice(8, 10))
    images, labels = noise()
    assert metrics["train_loss"] == [by_hand(runner.model, images[part], labels[part])[0] for part in (first, last)]
    assert all(p.isfinite().all() for p in runner.model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_skipped_batch_leaves_nothing_behind(precision):
    """Not in BatchNorm's statistics, nor in the scaler, which could not go on."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3))
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    runner = Runner(model, optimizer, criterion, "cpu", skip_nonfinite=True, precision=precision, verbose=False)
    images, labels = noise()
    runner.train_step(images, labels)
    before = copy.deepcopy(model.state_dict())
    runner.train_step(images * math.nan, labels)
    assert runner.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    runner.train_step(images, labels)
    assert runner.skipped == 1 and math.isfinite(runner.test([(images, labels)])[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_non_finite_loss_is_found_on_an_accelerator_too():
    model = FeedForward(48, 8, 3)
    runner = Runner(model, torch.optim.SGD(model.parameters(), lr=math.nan), nn.CrossEntropyLoss(), "cuda")
    with pytest.raises(NonFiniteLoss, match="step"):
        runner.train(batches(), epochs=1)  # three steps, fewer than between two looks at the loss


# ---------------------------------------------------------------------------------------------- taking up again


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_training_is_near_that_of_fp32(digits, precision):
    runners = []
    for name in ("fp32", precision):
        runner, loader, val_loader = vit_runner(digits, augment="none")
        runner = Runner(runner.model, runner.optimizer, runner.criterion, "cpu", runner.scheduler, precision=name)
        runner.train(loader, val_loader, epochs=3)
        runners.append(runner)
    exact, low = (runner.metrics["val_loss"][-1] for runner in runners)
    assert low != exact and low == pytest.approx(exact, rel=0.05)
    assert all(p.dtype == torch.float32 for p in runners[1].model.parameters())


def test_the_fp16_scaler_leaves_out_steps_whose_scaled_gradients_overflow():
    torch.manual_seed(0)
    model = FeedForward(48, 8, 3)
    runner = Runner(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), "cpu", precision="fp16")
    runner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    before = copy.deepcopy(model)
    runner.train(batches(4), epochs=1)
    assert same_weights(model, before) and runner.scaler.get_scale() == 2.0**29
    runner.train(batches(4), epochs=25)
    assert not same_weights(model, before) and runner.scaler.get_scale() < 2.0**29


@pytest.mark.parametrize(
    ("device", "has", "precision"),
    [
        ("cuda", "cuda", "bf16"),
        ("cuda", "", "fp32"),
        ("cpu", "AVX512 avx512_bf16", "bf16"),
        ("cpu", "AVX512 amx_tile", "bf16"),
        ("cpu", "AVX512 cuda", "fp32"),
        ("cpu", "AVX2 avx512_bf16", "fp32"),  # ATEN_CPU_CAPABILITY=avx2: torch does not use what the CPU has
        ("cpu", "DEFAULT", "fp32"),
        ("mps", "AVX512 avx512_bf16", "fp32"),
    ],
)
def test_precision_is_bf16_where_the_device_computes_in_it(monkeypatch, device, has, precision):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: "cuda" in has)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: has.split()[0] if has else "DEFAULT")
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in has)
    assert choose_precision("auto", torch.device(device)) == precision
    assert choose_precision("fp16", torch.device(device)) == "fp16"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="fp8"):
        still_runner(precision="fp8")


@pytest.fixture(scope="module", params=[("muon", "crop_flip"), ("adamw", "randaugment+random_erasing+mixup+cutmix")])
def uninterrupted(request, digits):
    """The optimiser's name, the augmentation's, and a runner that has trained for 3 epochs of 4 steps."""
    optimizer, augment = request.param
    runner, train_loader, val_loader = vit_runner(digits, optimizer, augment=augment, tokenizer="conv")
    assert len(train_loader) == 4
    runner.train(train_loader, val_loader, epochs=3)
    return optimizer, augment, runner


@pytest.mark.parametrize("step", [2, 4, 11])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(digits, tmp_path, uninterrupted, step):
    optimizer, augment, whole = uninterrupted
    first, train_loader, val_loader = vit_runner(digits, optimizer, augment=augment, tokenizer="conv")
    first.callbacks.append(stop_at(step))
    first.train(train_loader, val_loader, epochs=3)
    assert first.step == step
    write_file(tmp_path / "checkpoint", runner_state(first))

    second, _, val_loader = vit_runner(digits, optimizer, seed=9, tokenizer="conv")
    _, train_loader, _ = vit_runner(digits, optimizer, augment=augment)
    torch.manual_seed(9)
    restore_runner(second, read_file(tmp_path / "checkpoint"))
    assert not same_weights(second.model, whole.model)
    second.train(train_loader, val_loader, epochs=3 - second.epoch)
    assert second.metrics == whole.metrics
    assert same_weights(second.model, whole.model)
    assert (
        (second.step, second.epoch, second.total_steps) == (whole.step, whole.epoch, whole.total_steps) == (12, 3, 12)
    )
    assert [g["lr"] for g in second.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]


def test_a_checkpoint_of_another_model_is_refused(digits):
    state = runner_state(vit_runner(digits)[0])
    runner = vit_runner(digits, num_blocks=1)[0]
    with pytest.raises(ValueError, match="blocks.1"):
        restore_runner(runner, state)


# --------------------------------------------------------------------------------------------------------- devices


def test_the_devices_random_numbers_are_stored_and_come_back(monkeypatch):
    """There is no such device here: its generator is a list."""
    state = [torch.arange(5, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", state.append)
    stored = device_random_state(torch.device("mps"))
    state.append(torch.zeros(5, dtype=torch.uint8))
    set_device_random_state(torch.device("mps"), stored)
    assert torch.equal(state[-1], torch.arange(5, dtype=torch.uint8))
    set_device_random_state(torch.device("mps"), [torch.zeros(16, dtype=torch.uint8)])  # of a CUDA device
    assert torch.equal(state[-1], torch.arange(5, dtype=torch.uint8))
    assert device_random_state(torch.device("cpu")) == []


@pytest.mark.parametrize(
    "mps, cuda, device", [(True, True, "mps"), (False, True, "cuda"), (True, False, "mps"), (False, False, "cpu")]
)
def test_the_device_is_mps_else_cuda_else_cpu(monkeypatch, mps, cuda, device):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: None)
    assert choose_device("auto").type == choose_device().type == device


def test_a_device_can_be_named():
    assert choose_device("cpu") == torch.device("cpu")
    assert still_runner().device == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu9", "", "cuda:99", "cpu0", "meta"])
def test_devices_that_are_not_there_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match="choose auto, cpu, cuda or mps") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- schedule


def rates(steps, warmup, name="cosine", scheduler=None):
    """The learning rate of each step, by our schedule of that name or by torch's `scheduler`; its peak is 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = scheduler(optimizer) if scheduler else build_schedule(optimizer, steps, warmup, name)
    rates = []
    for _ in range(steps + (scheduler is None)):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < steps + (scheduler is None):
            schedule.step()
    return rates


def test_schedule_warms_up_and_then_falls_to_zero_along_a_cosine():
    lr = rates(100, warmup=0.1)
    assert lr[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert lr[10:] == pytest.approx([1 + math.cos(math.pi * step / 90) for step in range(91)])
    assert max(lr) == lr[10] == 2.0
    assert lr[55] == pytest.approx(1.0)
    assert lr[100] == pytest.approx(0.0)
    assert lr[99] > 0


@pytest.mark.parametrize(
    "name, warmup, scheduler",
    [
        ("constant", 0.0, lambda o: lr_scheduler.ConstantLR(o, factor=1)),
        ("linear", 0.0, lambda o: delayed(o, lr_scheduler.LinearLR(o, 1, 0, total_iters=99))),
        ("cosine", 0.0, lambda o: delayed(o, lr_scheduler.CosineAnnealingLR(o, 99))),
        ("step", 0.0, lambda o: lr_scheduler.MultiStepLR(o, [50, 75])),
        ("one_cycle", 0.3, lambda o: lr_scheduler.OneCycleLR(o, 2.0, 100, cycle_momentum=False)),
        ("one_cycle", 0.1, lambda o: lr_scheduler.OneCycleLR(o, 2.0, 100, pct_start=0.1, cycle_momentum=False)),
    ],
)
def test_schedules_are_those_of_torch(name, warmup, scheduler):
    assert rates(100, warmup, name)[:100] == pytest.approx(rates(100, None, scheduler=scheduler))


def delayed(optimizer, schedule):
    """One step at the peak, which is the warm-up, and then `schedule`."""
    constant = lr_scheduler.ConstantLR(optimizer, factor=1)
    return lr_scheduler.SequentialLR(optimizer, [constant, schedule], milestones=[1])


@pytest.mark.parametrize("name", ["cosine", "constant", "linear", "step"])
def test_schedules_warm_up(name):
    assert rates(100, 0.1, name)[:11] == pytest.approx([*(0.2 * (step + 1) for step in range(10)), 2.0])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1, 0.1), (3, 0.0), (2, 0.99), (7, 0.5)])
def test_schedule_of_short_trainings(name, steps, warmup):
    lr = rates(steps, warmup, name)[:steps]
    assert all(0 < rate <= 2.0 for rate in lr)
    assert max(lr) == 2.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_beyond_the_end_of_the_schedule_the_rate_stays_as_it_was_at_the_end(name):
    factor = schedule_factor(100, 0.1, name)
    assert [factor(step) for step in (101, 150, 250)] == pytest.approx([factor(100)] * 3)


def test_runner_steps_the_schedule_once_for_each_step(digits):
    runner, train_loader, _ = vit_runner(digits, epochs=1)
    lr = []
    runner.callbacks.append(Calls(step_end=lambda runner: lr.append(runner.optimizer.param_groups[-1]["lr"])))
    runner.train(train_loader, epochs=1)
    assert lr == pytest.approx([0.003 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(4)])


# ------------------------------------------------------------------------------------------------------ optimisers


def names_in(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def matrices_of(model):
    return {
        f"blocks.{i}.{name}.weight"
        for i in range(len(model.blocks))
        for name in ("attention.query_key_value", "attention.output", "mlp.0", "mlp.2")
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tokenizer", ["patch", "conv"])
def test_norms_biases_cls_token_and_positions_are_not_decayed(name, tokenizer):
    model = VisionTransformer(num_blocks=2, tokenizer=tokenizer)
    optimizer = build_optimizer(model, name, lr=0.01, weight_decay=0.3)
    decayed = set().union(*(names_in(model, g) for g in optimizer.param_groups if g["weight_decay"] == 0.3))
    spared = set().union(*(names_in(model, g) for g in optimizer.param_groups if g["weight_decay"] == 0.0))
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert decayed == matrices_of(model) | {"head.weight"} | {f"{n}.weight" for n in convolutions}
    assert spared == {n for n, _ in model.named_parameters()} - decayed
    assert {"embedding.cls_token", "embedding.position", "norm.weight", "blocks.0.norm1.weight", "head.bias"} <= spared
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)


def test_every_parameter_is_in_one_group():
    for model in (VisionTransformer(), CNN(), FeedForward()):
        for name in OPTIMIZERS:
            params = [id(p) for group in build_optimizer(model, name).param_groups for p in group["params"]]
            assert sorted(params) == sorted(id(p) for p in model.parameters())


def test_muon_takes_what_lies_between_the_first_layer_and_the_last():
    patches, convolutions = (VisionTransformer(num_blocks=2, tokenizer=t, tokenizer_depth=2) for t in ("patch", "conv"))
    for model, expected in (
        (patches, matrices_of(patches)),
        (convolutions, matrices_of(convolutions) | {f"embedding.project.{layer}.weight" for layer in (4, 7, 11)}),
        (CNN(), {"conv2.weight"}),
    ):
        optimizer = build_optimizer(model, "muon")
        assert [type(part) for part in optimizer.parts] == [Muon, torch.optim.AdamW]
        assert names_in(model, optimizer.param_groups[0]) == expected
    assert type(build_optimizer(FeedForward(), "muon")) is torch.optim.AdamW  # nothing lies between its two layers
    assert type(build_optimizer(VisionTransformer(), "adamw")) is torch.optim.AdamW


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="lion.*muon, adamw, adam, sgd"):
        build_optimizer(CNN(), "lion")
    with pytest.raises(ValueError, match="stairs.*cosine.*one_cycle"):
        build_schedule(build_optimizer(CNN()), 10, name="stairs")


def test_sgd_and_adam_are_those_of_torch_with_the_decay_added_to_the_gradient():
    torch.manual_seed(0)
    weight, grad, lr, decay = torch.randn(8, 8), torch.randn(8, 8), 0.1, 0.01
    for name in ("sgd", "adam"):
        model = FeedForward(8, 8, 8)
        model.hidden.weight.data.copy_(weight)
        optimizer = build_optimizer(model, name, lr, decay, momentum=0.9)
        for _ in range(3):
            model.hidden.weight.grad = grad.clone()
            optimizer.step()
        expected, velocity, square = weight.clone(), torch.zeros(8, 8), torch.zeros(8, 8)
        for step in range(1, 4):
            change = grad + decay * expected
            if name == "sgd":  # Nesterov: one look ahead along the velocity
                velocity = 0.9 * velocity + change
                expected -= lr * (change + 0.9 * velocity)
            else:
                velocity = 0.9 * velocity + 0.1 * change
                square = 0.999 * square + 0.001 * change**2
                expected -= lr * velocity / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(model.hidden.weight.data, expected)


@pytest.mark.parametrize("shape", [(5, 6, 20), (3, 20, 6), (1, 8, 8)])
def test_matrices_orthogonalised_together_have_singular_values_near_one(shape, monkeypatch):
    monkeypatch.setattr("training.optim.has_bf16", lambda device: False)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    together = orthogonalize(matrices)
    assert together.shape == shape and together.dtype == torch.float32
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalize(1000 * matrix[None])[0], result, rtol=1e-3, atol=1e-4)  # any scale
        left, values, right = torch.linalg.svd(result)
        assert values.min() > 0.3 and values.max() < 1.3
        # the same directions: what is left of the matrix between them is diagonal
        k = len(values)
        inner = left[:, :k].T @ matrix @ right[:k].T
        assert (inner - inner.diag().diag()).abs().max() < 0.02 * inner.abs().max()


@pytest.mark.parametrize("tokenizer", ["patch", "conv"])
def test_muon_and_adamw_together_step_as_each_of_them_alone(tokenizer, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("training.optim.has_bf16", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon, too, computes in fp32
    model = VisionTransformer(hidden_size=16, num_heads=2, num_blocks=2, patch_size=4, tokenizer=tokenizer)
    alone = copy.deepcopy(model)
    together = build_optimizer(model, "muon", lr=0.01, weight_decay=0.1)
    assert isinstance(together, MuonAndAdamW)
    named = dict(alone.named_parameters())
    hidden = matrices_of(alone) | ({"embedding.project.4.weight"} if tokenizer == "conv" else set())
    first = "embedding.project.0.weight" if tokenizer == "conv" else "embedding.project.weight"
    matrices = {name: nn.Parameter(named[name].detach().reshape(len(named[name]), -1).clone()) for name in hidden}
    rest = {name: p for name, p in named.items() if name not in hidden}
    separate = [
        torch.optim.Muon(matrices.values(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([rest.pop(name) for name in (first, "head.weight")], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(rest.values(), lr=0.01, weight_decay=0.0),
    ]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for name, ours in model.named_parameters():
            ours.grad = torch.empty_like(ours).copy_(
                torch.randn(ours.shape, generator=generator)
            )  # laid out as autograd's
            theirs = matrices.get(name, named[name])
            theirs.grad = ours.grad.clone().reshape(theirs.shape)
        for optimizer in (together, *separate):
            optimizer.step()
    for name, ours in model.named_parameters():
        expected = matrices.get(name, named[name])
        torch.testing.assert_close(ours, expected.reshape(ours.shape), rtol=1e-5, atol=1e-6)


def test_zero_grad_clears_every_gradient():
    model = VisionTransformer(num_blocks=1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    build_optimizer(model, "muon").zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_rate_set_from_outside_reaches_both_parts_also_after_loading():
    model = VisionTransformer(num_blocks=1)
    optimizer = build_optimizer(model, "muon", lr=1.0)
    fresh = build_optimizer(copy.deepcopy(model), "muon", lr=1.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, fresh):
        schedule = build_schedule(each, 10, 0.5)
        for rate in (0.2, 0.4):
            each.step()
            assert {g["lr"] for part in each.parts for g in part.param_groups} == {rate}
            schedule.step()
