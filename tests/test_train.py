import dataclasses
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints
from unittest import mock

import pytest
import torch
import torch.nn as nn
from filelock import FileLock
from helpers import MODEL, SMALL, contents, refused, run_main, same_weights, start, train_small
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import setup_cifar
import train
from images.loader import unpack_ids
from network import CNN, FeedForward, Model, ResNet20, VisionTransformer, whitening_filters
from support import cli
from support.files import read_file
from training.checkpoints import Checkpoints
from training.optim import OPTIMIZERS, SCHEDULES
from training.options import check
from training.presets import PRESETS
from training.run import Run

FIELDS = {field.name: field.default for field in dataclasses.fields(train.Config)}

# ---------------------------------------------------------------------------------------------- a run, end to end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    output = folder / "new" / "folder"
    process = start("train.py", *SMALL, *"--epochs 2 --gif_frames 5 --output_dir".split(), str(output), cwd=folder)
    printed, complaints = process.communicate(timeout=120)
    assert process.returncode == 0, complaints
    assert [path.name for path in folder.iterdir()] == ["new"]
    return SimpleNamespace(
        output=output, printed=printed, report=json.loads((output / f"saved/{MODEL}.json").read_text(encoding="utf-8"))
    )


def test_a_run_writes_model_figures_and_gif_and_leaves_nothing_else(finished):
    written = {str(path.relative_to(finished.output)) for path in finished.output.rglob("*") if path.is_file()}
    assert written == {
        f"saved/{MODEL}.pt",
        f"saved/{MODEL}.json",
        f"saved/{MODEL}.csv",
        f"saved/{MODEL}.checkpoint",  # --keep_checkpoint
        f"figures/{MODEL}_curves.png",
        "figures/VisionTransformer_digits_attention_maps.png",
        "figures/VisionTransformer_digits_animation.gif",
    }


def test_reported_accuracy_is_that_of_the_saved_model(finished, digits):
    model = VisionTransformer.load(finished.output / f"saved/{MODEL}.pt")
    mean, std = (torch.tensor(model.metadata[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((digits.test.images / 255 - mean) / std)
    accuracy = (logits.argmax(dim=1) == digits.test.labels).double().mean().item()
    loss = nn.functional.cross_entropy(logits, digits.test.labels).item()
    results = finished.report["results"]
    assert results["test_accuracy"] == pytest.approx(accuracy)
    assert results["test_loss"] == pytest.approx(loss, rel=1e-4)
    assert finished.printed.count("test accuracy") == 1
    assert f"test loss {loss:.4f}  test accuracy {accuracy:.2%}" in finished.printed.splitlines()[-1]


def test_the_model_file_carries_what_is_needed_to_use_it(finished, digits):
    metadata = VisionTransformer.load(finished.output / f"saved/{MODEL}.pt").metadata
    names = {"dataset": "digits", "source": "digits", "classes": digits.classes, "image_size": 32}
    assert {key: metadata[key] for key in names} == names
    assert (metadata["mean"], metadata["std"]) == (digits.mean, digits.std)
    assert metadata["fingerprints"] == digits.fingerprints
    assert torch.equal(unpack_ids(metadata["seen"]["digits"]["train"]), digits.train.ids.sort().values)
    assert torch.equal(unpack_ids(metadata["seen"]["digits"]["val"]), digits.val.ids.sort().values)


def test_the_report_says_how_the_figures_came_about(finished):
    report = finished.report
    assert {name: report["config"][name] for name in ("epochs", "hidden_size", "seed")} == {
        "epochs": 2,
        "hidden_size": 16,
        "seed": 0,
    }
    assert report["config"].keys() == FIELDS.keys()
    assert report["provenance"]["command"].startswith("python train.py --dataset digits")
    assert report["provenance"]["torch"] == torch.__version__
    assert report["metrics"]["val_step"] == [6, 12]
    assert report["results"]["val_accuracy"] == report["metrics"]["val_accuracy"][-1]


def test_progress_is_shown_for_every_epoch(finished):
    for epoch in (1, 2):
        pattern = rf"epoch +{epoch}/2 .*val accuracy .*loss .*train accuracy .*loss .* left .*images/s"
        assert re.search(pattern, finished.printed)
    assert "VisionTransformer on digits" in finished.printed


def test_the_gif_has_the_frames_asked_for(finished):
    with Image.open(finished.output / "figures/VisionTransformer_digits_animation.gif") as gif:
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
    assert len(durations) == 5
    assert set(durations[1:-1]) == {FIELDS["gif_frame_duration"]}
    assert min(durations[0], durations[-1]) > FIELDS["gif_frame_duration"]


def test_gif_options_and_names_of_cifar10(tmp_path, digits):
    """The names in the user's document are those of CIFAR-10; here digits stand in for it."""
    data = dataclasses.replace(digits, name="cifar10")
    with mock.patch.object(train, "load_data", return_value=data):
        options = "--epochs 1 --gif_frames 3 --gif_frame_duration 120 --output_dir"
        run_main("train.py", *SMALL, *options.split(), str(tmp_path), "--name", "VisionTransformer")
    for name in ("saved/VisionTransformer.pt", "figures/attention_maps.png", "animation_vit.gif"):
        assert (tmp_path / name).exists()
    with Image.open(tmp_path / "animation_vit.gif") as gif:
        assert gif.n_frames == 3
        gif.seek(1)
        assert gif.info["duration"] == 120


def test_same_seed_same_weights_bit_for_bit_in_another_process(finished, tmp_path):
    model = VisionTransformer.load(finished.output / f"saved/{MODEL}.pt")
    assert same_weights(train_small(tmp_path, "--epochs", "2"), model)


def test_the_test_images_decide_nothing(finished, tmp_path, digits):
    blank = setup_cifar.Split(torch.zeros_like(digits.test.images), torch.zeros_like(digits.test.labels))
    with mock.patch.object(train, "load_data", return_value=dataclasses.replace(digits, test=blank)):
        model = train_small(tmp_path, "--epochs", "2")
    assert same_weights(model, VisionTransformer.load(finished.output / f"saved/{MODEL}.pt"))
    report = json.loads((tmp_path / f"saved/{MODEL}.json").read_text(encoding="utf-8"))
    assert report["metrics"] == finished.report["metrics"]
    assert report["results"]["test_accuracy"] != finished.report["results"]["test_accuracy"]


def test_auto_without_cifar10_says_digits_everywhere(tmp_path, capsys):
    model = train_small(tmp_path, "--dataset", "auto", "--data_dir", str(tmp_path / "empty"))
    captured = capsys.readouterr()
    assert "NOT CIFAR-10" in captured.err
    assert "VisionTransformer on digits" in captured.out
    assert model.metadata["dataset"] == "digits"
    assert (tmp_path / f"saved/{MODEL}.pt").exists()


# ---------------------------------------------------------------------------------------------------------- flags


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("plain"))


CHANGES_THE_WEIGHTS = {
    "momentum": "0.5",
    "val_fraction": "0.3",
    "split_seed": "1",
    "fold": "1/4",
    "classes": "1,2,3",
    "label_fraction": "0.9",
    "augment": "none",
    "hidden_size": "24",
    "num_heads": "4",
    "num_blocks": "1",
    "patch_size": "6",
    "mlp_ratio": "2",
    "pooling": "cls",
    "tokenizer": "conv",
    "drop_path": "0.5",
    "epochs": "2",
    "batch_size": "150",
    "grad_accum": "2",
    "optimizer": "adamw",
    "lr": "0.001",
    "schedule": "linear",
    "warmup": "0.5",
    "weight_decay": "0.5",
    "layer_decay": "0.5",
    "freeze": "backbone",
    "label_smoothing": "0.3",
    "ema": "0.9",
    "grad_clip": "0.01",
    "seed": "1",
    "precision": "fp16",  # auto is one of the two others
}
TESTED_ELSEWHERE = {
    "config",
    "keep_checkpoint",
    "minutes",
    "compile",
    "init_from",
    "pretrained",
    "pretrained_file",
    "preset",
    "tokenizer_depth",
    "whiten",
    "dataset",
    "data_dir",
    "img_size",
    "model",
    "device",
    "name",
    "output_dir",
    "gif_frames",
    "gif_frame_duration",
    "tensorboard",
    "patience",
    "monitor",
    "min_improvement",
    "skip_nonfinite",
    "resume",
    "resume_changed",
    "checkpoint_minutes",
    "test",
    "threads",
}


def typed(name, value):
    """The flag's text as the field holds it."""
    return value if FIELDS[name] is None else type(FIELDS[name])(value)


def test_every_flag_is_tested():
    assert CHANGES_THE_WEIGHTS.keys() | TESTED_ELSEWHERE == FIELDS.keys()


@pytest.mark.parametrize("name", CHANGES_THE_WEIGHTS)
def test_flags_are_not_parsed_and_ignored(tmp_path, plain, name):
    value = CHANGES_THE_WEIGHTS[name]
    plain.save(tmp_path / "plain.pt")
    start = ["--init_from", str(tmp_path / "plain.pt")] if name == "freeze" else []  # of which there must be something
    model = train_small(tmp_path, f"--{name}", value, *start)
    assert not same_weights(model, plain)
    assert name != "freeze" or same_weights(model.blocks, plain.blocks)
    parsed = typed(name, value)
    assert model.config.get(name, parsed) == parsed
    (report,) = (tmp_path / "saved").glob("*.json")
    assert json.loads(report.read_text(encoding="utf-8"))["config"][name] == parsed


def test_tokenizer_depth_flag_reaches_the_tokenizer(tmp_path):
    model = train_small(tmp_path, *"--tokenizer conv --tokenizer_depth 2".split())
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 6  # three halvings to patches of 8


@pytest.mark.parametrize("model", ["vit", "cnn", "resnet20"])
def test_no_whiten_flag_begins_with_random_filters(tmp_path, model, digits):
    first = {"vit": "embedding.project.weight", "cnn": "conv1.weight", "resnet20": "conv1.weight"}[model]
    flags = ["--lr", 1e-12, "--model", model]  # which leaves weights as they began
    whitened, random = (
        train_small(tmp_path / name, *flags, *more).state_dict()[first]
        for name, more in (("whitened", []), ("random", ["--no_whiten"]))
    )
    size, stride = {"vit": (8, 8), "cnn": (3, 1), "resnet20": (3, 1)}[model]
    images = next(iter(digits.loader("train", 5000)))[0]
    filters = whitening_filters(images, size, stride)[: len(whitened)]
    torch.testing.assert_close(whitened, filters, rtol=0, atol=1e-4)
    assert not torch.allclose(random, filters, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("size", "images"), [(16, 5000), (32, 5000), (128, 312), (4096, 1)])
def test_filters_that_whiten_take_no_more_memory_on_large_pictures(size, images):
    asked = []
    data = SimpleNamespace(image_size=size, loader=lambda part, count: asked.append(count) or [("images", "labels")])
    train.set_first_weights(SimpleNamespace(whiten=asked.append), data, train.Config())
    assert asked == [images, "images"]


@pytest.mark.parametrize("name", ["muon", "adamw", "adam", "sgd"])
def test_an_optimizer_has_a_learning_rate_and_a_decay_of_its_own_and_the_report_says_so(tmp_path, plain, name):
    model = train_small(tmp_path, "--optimizer", name)
    config = json.loads((tmp_path / f"saved/{MODEL}.json").read_text(encoding="utf-8"))["config"]
    muon = {key: getattr(train.Config, key) for key in ("lr", "weight_decay", "momentum")}
    assert {key: config[key] for key in muon} == train.RATES.get(name, muon)
    assert same_weights(model, plain) == (name == "muon")


@pytest.mark.parametrize(
    "model, cls, config",
    [
        ("vit", VisionTransformer, {"img_size": 32, "hidden_size": 16, "output_size": 10, "patch_size": 8}),
        ("cnn", CNN, {"img_size": 32, "output_size": 10, "in_channels": 3}),
        ("resnet20", ResNet20, {"img_size": 32, "output_size": 10, "in_channels": 3}),
        ("mlp", FeedForward, {"input_size": 3072, "hidden_size": 16, "output_size": 10}),
    ],
)
def test_model_flag_chooses_class_and_name(tmp_path, model, cls, config):
    trained = train_small(tmp_path, "--model", model)
    assert type(trained) is cls
    assert config.items() <= trained.config.items()
    assert trained.title == ("MLP" if model == "mlp" else cls.__name__)


def test_models_without_attention_draw_their_other_pictures(tmp_path):
    run_main(
        "train.py", *SMALL, *"--model cnn --epochs 1 --gif_frames 2 --name CNN --output_dir".split(), str(tmp_path)
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"CNN_curves.png", "CNN_animation.gif"}


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_chosen_by_device(tmp_path, monkeypatch, has_bf16, chosen):
    monkeypatch.setattr("runner.has_bf16", lambda device: has_bf16)
    flags = {"auto": [], "typed": ["--precision", chosen]}
    models = [train_small(tmp_path / name, *more) for name, more in flags.items()]
    assert same_weights(*models)
    report = json.loads((tmp_path / f"auto/saved/{MODEL}.json").read_text(encoding="utf-8"))
    assert report["config"]["precision"] == chosen


def test_threads_are_as_many_as_are_asked_for(tmp_path):
    with mock.patch.object(torch, "set_num_threads") as asked:
        train_small(tmp_path, "--threads", 3)
    asked.assert_called_once_with(3)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_training_is_that_of_the_plain_model_and_saved_like_it(tmp_path, capfd):
    options = "--model mlp --optimizer sgd --drop_path 0.1".split()
    plain, compiled = (
        train_small(tmp_path / "plain", *options),
        train_small(tmp_path / "compiled", *options, "--compile"),
    )
    assert "--compile does not work" not in capfd.readouterr().out
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for name, weights in plain.state_dict().items():
        assert torch.allclose(weights, compiled.state_dict()[name], atol=1e-5)


def test_without_a_compiler_training_goes_on_as_without_the_flag_and_says_why(tmp_path, capfd, monkeypatch):
    from torch._inductor import config

    options = "--tokenizer conv --drop_path 0.5".split()  # BatchNorm's statistics and chance must not notice
    plain = train_small(tmp_path / "plain", *options)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with config.patch({"cpp.cxx": (None, "no_such_compiler"), "force_disable_caches": True}):
        assert same_weights(train_small(tmp_path / "compiled", *options, "--compile"), plain)
    lines = [line for line in capfd.readouterr().out.splitlines() if "--compile" in line]
    assert len(lines) == 1 and "no_such_compiler" in lines[0]


def test_name_flag_names_the_files(tmp_path, plain):
    assert same_weights(train_small(tmp_path, "--name", "mine"), plain)
    endings = ("pt", "json", "csv", "checkpoint")  # --keep_checkpoint
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {f"mine.{ending}" for ending in endings}


def test_device_flag_names_the_device(tmp_path, capsys, plain):
    assert same_weights(train_small(tmp_path, "--device", "cpu"), plain)
    assert "on cpu in " in capsys.readouterr().out


def test_checkpoints_are_written_as_often_as_asked(tmp_path):
    steps = []
    with mock.patch.object(Checkpoints, "write", lambda checkpoints, runner, *results: steps.append(runner.step)):
        train_small(tmp_path / "rarely")
        assert steps == [6, 6]  # after the epoch, and with the results
        steps.clear()
        train_small(tmp_path / "often", "--checkpoint_minutes", "1e-9")
        assert steps == [1, 2, 3, 4, 5, 6, 6, 6]


def test_flags_may_have_dashes_or_underscores():
    for name, value in CHANGES_THE_WEIGHTS.items():
        with_dashes = cli.parse(train.Config, [f"--{name.replace('_', '-')}", value])
        assert with_dashes == cli.parse(train.Config, [f"--{name}", value])
        assert getattr(with_dashes, name) == typed(name, value)


def test_help_shows_every_field_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stop:
        cli.parse(train.Config, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.partition("\n\n")[2].split())  # below the usage
    for name, default in FIELDS.items():
        flag = f"no_{name}" if default is True else name
        explained = re.search(rf" --{flag} (.*?)(?= --\w|$)", text).group(1)
        assert len(explained) > 30, f"{name} is not explained"
        if default not in (None, False, True):
            assert f"(default: {default})" in explained, name
    titles = [text.index(f" {title}: --") for title in ("data", "model", "optimisation", "the run")]
    assert titles == sorted(titles)  # in the order of the source, what concerns the run last


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_the_place_of_defaults_and_flags_go_before_it(name):
    changed = PRESETS[name]
    config = cli.parse(train.Config, [f"--preset={name}", "--num-heads", "2"], train.dependent_defaults)
    for field, default in FIELDS.items():
        expected = {"preset": name, "num_heads": 2}.get(field, changed.get(field, default))
        assert getattr(config, field) == expected
    check(config)


@pytest.mark.parametrize("name", PRESETS)
def test_the_digits_are_trained_as_long_with_every_preset(name):
    flags = ["--preset", name, "--dataset", "digits"]
    config = cli.parse(train.Config, flags, train.dependent_defaults)
    assert (config.epochs, config.batch_size) == (12, 16)
    assert cli.parse(train.Config, [*flags, "--epochs", "3"], train.dependent_defaults).epochs == 3


@pytest.mark.parametrize(
    "flags, lr, weight_decay",
    [
        ("", 6e-3, 0.05),
        ("--lr 0.01", 0.01, 0.05),
        ("--optimizer sgd", 0.1, 5e-4),
        ("--optimizer adamw --lr 6e-3", 6e-3, 0.05),  # given, though it is the default
        ("--preset accurate --optimizer sgd", 0.1, 5e-4),  # the preset's are Muon's
        ("--preset accurate --weight_decay 0.1", 9e-3, 0.1),
        ("--model timm:resnet18", 2e-3, 0.05),
        ("--model timm:resnet18 --pretrained", 5e-4, 0.05),
    ],
)
def test_rate_and_decay_are_the_optimisers_unless_they_are_given(flags, lr, weight_decay):
    config = cli.parse(train.Config, flags.split(), train.dependent_defaults)
    assert (config.lr, config.weight_decay) == (lr, weight_decay)


def test_what_is_turned_off_can_be_turned_on_again(capsys):
    assert cli.parse(train.Config, ["--no_test", "--test", "--tensorboard", "--no-tensorboard"]).test
    assert not cli.parse(train.Config, ["--tensorboard", "--no-tensorboard"]).tensorboard
    with pytest.raises(SystemExit):
        cli.parse(train.Config, ["--help"])
    assert "--no_tensorboard" not in capsys.readouterr().out


def test_presets_name_fields_and_are_all_offered():
    assert get_args(get_type_hints(train.Config)["preset"]) == (*PRESETS, "auto")
    assert all(changed.keys() <= FIELDS.keys() for changed in PRESETS.values())


def test_optimizers_and_schedules_are_all_offered_and_have_their_rates():
    hints = get_type_hints(train.Config)
    assert get_args(hints["optimizer"]) == tuple(OPTIMIZERS) and train.RATES.keys() <= OPTIMIZERS.keys()
    assert get_args(hints["schedule"]) == tuple(SCHEDULES)


@pytest.mark.parametrize("args", [["--preset", "huge"], ["--preset"]])
def test_presets_that_are_not_known_are_refused_in_one_line(capsys, args):
    with pytest.raises(SystemExit) as stop:
        cli.parse(train.Config, args, train.dependent_defaults)
    complaint = capsys.readouterr().err
    assert stop.value.code == 2 and complaint.count("\n") == 1 and "preset" in complaint


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "args, words",
    [
        ("--model resnet", "model vit cnn resnet20 mlp mean"),
        ("--dataset minst", "dataset minst auto cifar10 cifar100 mnist fashionmnist svhn digits folder"),
        ("--dataset .", "folder train"),
        ("--img_size 64", "img_size 64 digits"),
        ("--augment rotate", "augment rotate crop_flip cutmix"),
        ("--augment none+mixup", "augment none+mixup"),
        ("--augment randaugment,mixup", "augment randaugment,mixup"),
        ("--optimizer lion", "optimizer muon adamw adam sgd"),
        ("--schedule stairs", "schedule cosine constant linear step one_cycle"),
        ("--pooling max", "pooling mean cls"),
        ("--no_such_flag 3", "flag"),
        ("--epochs two", "epochs two"),
        ("stray", "stray"),
        ("--num_heads 5", "num_heads 5 hidden_size 16"),
        ("--num_heads 0", "num_heads"),
        ("--hidden_size 0", "hidden_size"),
        ("--model mlp --hidden_size -1", "hidden_size"),
        ("--num_blocks 0", "num_blocks"),
        ("--patch_size 33", "33 32"),
        ("--patch_size 0", "patch_size"),
        ("--tokenizer conv --patch_size 6", "patch_size 6"),
        ("--mlp_ratio 0", "mlp_ratio"),
        ("--mlp_ratio inf", "mlp_ratio"),
        ("--epochs 0", "epochs"),
        ("--epochs -1", "epochs"),
        ("--batch_size 0", "batch_size"),
        ("--batch_size -8", "batch_size"),
        ("--grad_accum 0", "grad_accum"),
        ("--lr 0", "lr"),
        ("--lr -0.1", "lr"),
        ("--lr nan", "lr"),
        ("--weight_decay -1", "weight_decay"),
        ("--grad_clip -1", "grad_clip"),
        ("--warmup 1", "warmup"),
        ("--label_fraction 0", "label_fraction"),
        ("--label_fraction 2", "label_fraction"),
        ("--classes 1,cat", "class cat 0, 1, 2"),
        ("--classes 1", "two"),
        ("--layer_decay 0", "layer_decay"),
        ("--layer_decay 1.1", "layer_decay"),
        ("--freeze head", "freeze none backbone"),
        ("--ema 1", "ema"),
        ("--patience -1", "patience"),
        ("--min_improvement -0.1", "min_improvement"),
        ("--monitor f1", "monitor loss accuracy"),
        ("--label_smoothing -0.1", "label_smoothing"),
        ("--drop_path 1", "drop_path"),
        ("--val_fraction 1", "val_fraction"),
        ("--val_fraction 0 --patience 2", "--patience validation"),
        ("--minutes 3 --epochs 2", "--minutes --epochs"),
        ("--preset auto", "--preset auto --minutes"),
        ("--config saved/CNN.json --resume", "--config --resume"),
        ("--gif_frames -1", "gif_frames"),
        ("--gif_frame_duration -1", "gif_frame_duration"),
        ("--checkpoint_minutes 0", "checkpoint_minutes"),
        ("--seed 99999999999999999999", "seed"),
        ("--seed 99999999999999", "seed"),
        ("--device tpu", "tpu cuda mps"),
        ("--name a//b", "name a//b"),
        ("--name .", "name '.'"),
        ("--name /tmp/b", "name /tmp/b"),
        ("--name ../b", "name ../b"),
        ("--name ..", "name .."),
        ("--fold 1", "fold 1 0/5"),
        ("--fold 5/5", "fold 4 5"),
        ("--epoch 2", "--epoch mean --epochs"),
        ("--model my_model.py:MyNet", "my_model.py:MyNet no file"),
        ("--model timm:resnet18 --optimizer muon", "muon adamw timm"),
        ("--resume", "VisionTransformer_digits.checkpoint --resume"),
    ],
)
def test_bad_flags_are_refused_in_one_line_before_anything_is_written(tmp_path, monkeypatch, capfd, args, words):
    monkeypatch.chdir(tmp_path)
    with refused(capfd, tmp_path, *words.split()):
        run_main("train.py", *SMALL, "--output_dir", tmp_path, "--epochs", "1", *args.split())


@pytest.mark.parametrize("args", ["--model resnet", "--dataset digits --num_heads 5"])
def test_bad_flags_end_the_process_with_code_2_and_one_line(tmp_path, args):
    process = start("train.py", *args.split(), cwd=tmp_path)
    printed, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaint.startswith("train.py: error: ")
    assert complaint.count("\n") == 1
    assert printed == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_damaged_data_files_are_named_with_what_to_do(tmp_path, monkeypatch, capfd, dataset):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere" / setup_cifar.CIFAR["cifar10"].folder
    folder.mkdir(parents=True)
    for name in setup_cifar.CIFAR["cifar10"].files:
        (folder / name).write_bytes(b"truncated")
    with refused(capfd, tmp_path, "data_batch_1", "damaged", "delete it"):
        run_main("train.py", "--dataset", dataset, "--data_dir", "elsewhere")
    (folder / "data_batch_2").unlink()
    with refused(capfd, tmp_path, "lacks data_batch_2"):
        run_main("train.py", "--dataset", dataset, "--data_dir", "elsewhere")


def test_cifar10_that_cannot_be_had_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with refused(capfd, tmp_path, "could not be downloaded", "DATA_DIR", "--dataset digits"):
        run_main("train.py", "--dataset", "cifar10")


@pytest.mark.parametrize("output_dir", ["file", "file/folder"])
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capfd, output_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with refused(capfd, tmp_path, "cannot write", str(Path(output_dir) / "saved")):
        run_main("train.py", "--dataset", "digits", "--output_dir", output_dir)


def test_two_runs_of_one_name_do_not_mix(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "figures").mkdir()
    with FileLock(tmp_path / "saved" / f"{MODEL}.lock"), refused(capfd, tmp_path, MODEL, "--name"):
        run_main("train.py", "--dataset", "digits")


# ------------------------------------------------------------------------- non-finite losses, Ctrl-C, taking up again


def test_a_non_finite_loss_ends_the_run_unless_it_may_be_skipped(tmp_path, capsys):
    build = train.build_model

    def build_model(*args):
        """Its second batch in training has no finite logits."""
        model, calls = build(*args), []

        def spoil(model, inputs, logits):
            calls.extend([1] * model.training)
            return logits * torch.nan if model.training and len(calls) == 2 else logits

        model.register_forward_hook(spoil)
        return model

    with mock.patch.object(train, "build_model", build_model):
        with pytest.raises(SystemExit) as stop:
            train_small(tmp_path / "stops")
        assert stop.value.code == 1
        assert re.search(r"train.py: error: .* at step 2 .*learning rate", capsys.readouterr().err)
        assert not (tmp_path / "stops" / f"saved/{MODEL}.pt").exists()
        model = train_small(tmp_path / "skips", "--skip_nonfinite")
    assert all(p.isfinite().all() for p in model.parameters())


def test_ctrl_c_before_training_ends_cleanly_too(tmp_path, capfd):
    with mock.patch.object(train, "load_data", side_effect=KeyboardInterrupt):
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            train_small(tmp_path)
    assert stop.type is SystemExit
    assert stop.value.code == 130
    assert contents(tmp_path) == {}


def test_ctrl_c_while_the_model_is_compiled_leaves_a_checkpoint(tmp_path, capfd):
    def interrupted(runner, loader):
        os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(train, "compile_training", interrupted), pytest.raises(SystemExit) as stop:
        train_small(tmp_path, "--compile")
    assert stop.value.code == 130 and "interrupted after step 0; to go on" in capfd.readouterr().out
    assert (tmp_path / f"saved/{MODEL}.checkpoint").exists()
    assert (tmp_path / f"saved/{MODEL}.csv").read_text().count("\n") == 1
    train_small(tmp_path, "--resume")
    assert (tmp_path / f"saved/{MODEL}.pt").exists()


@pytest.mark.parametrize("flags", [["--ema", "0.9"], ["--patience", "2"]])
def test_what_a_finished_run_cannot_begin_any_more_is_refused_and_its_model_is_kept(tmp_path, capfd, flags):
    train_small(tmp_path)
    model, report = ((tmp_path / f"saved/{MODEL}{end}").read_bytes() for end in (".pt", ".json"))
    with pytest.raises(SystemExit) as stop:
        train_small(tmp_path, "--resume", "--resume_changed", *flags)
    assert stop.value.code == 2 and "raise --epochs" in capfd.readouterr().err
    assert model == (tmp_path / f"saved/{MODEL}.pt").read_bytes()
    assert report == (tmp_path / f"saved/{MODEL}.json").read_bytes()


def test_a_run_killed_after_its_last_epoch_can_end_with_tensorboard_too(tmp_path):
    pytest.importorskip("tensorboard")
    with mock.patch.object(Run, "finish", side_effect=KeyboardInterrupt), pytest.raises(SystemExit):
        train_small(tmp_path, "--tensorboard")
    model = train_small(tmp_path, "--tensorboard", "--resume")
    assert same_weights(model, train_small(tmp_path / "whole"))
    assert (tmp_path / f"saved/{MODEL}.json").exists()


def test_folds_do_not_depend_on_what_has_no_effect_on_them():
    def held_out(*flags):
        return train.load_images(cli.parse(train.Config, ["--dataset", "digits", "--fold", "0/5", *flags])).val.ids

    assert torch.equal(held_out(), held_out("--val_fraction", "0.3"))


LONG = [*SMALL, *"--epochs 12 --gif_frames 4 --drop_path 0.2 --output_dir out".split()]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that got Ctrl-C after its first epoch: its folder, what it printed, and how it ended."""
    if os.name == "nt":
        pytest.skip("sends SIGINT")
    folder = tmp_path_factory.mktemp("interrupted")
    process = start("train.py", *LONG, cwd=folder)
    printed = ""
    while "epoch  1/12" not in printed:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        printed += line
    process.send_signal(signal.SIGINT)
    rest, complaints = process.communicate(timeout=60)
    return SimpleNamespace(folder=folder, printed=printed + rest, complaints=complaints, code=process.returncode)


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(interrupted):
    assert interrupted.code == 130
    assert "interrupted after step" in interrupted.printed
    assert "Traceback" not in interrupted.complaints
    saved = interrupted.folder / "out" / "saved"
    step = read_file(saved / f"{MODEL}.checkpoint")["runner"]["progress"]["step"]
    assert 6 <= step < 72
    assert f"interrupted after step {step};" in interrupted.printed
    assert not (saved / f"{MODEL}.pt").exists()


def resume(interrupted, folder, monkeypatch, *args):
    """Go on with a copy of the interrupted run, by the command that it printed."""
    out = folder / "out" / "saved"
    out.mkdir(parents=True)
    checkpoint = interrupted.folder / "out" / "saved" / f"{MODEL}.checkpoint"
    (out / checkpoint.name).write_bytes(checkpoint.read_bytes())
    monkeypatch.chdir(folder)
    command = shlex.split(interrupted.printed[interrupted.printed.index("to go on: ") :])[3:]
    assert command[0] == sys.executable
    return [*command[2:], *args]


def test_resume_continues_to_the_weights_of_an_uninterrupted_run(interrupted, tmp_path, monkeypatch, capsys):
    args = resume(interrupted, tmp_path, monkeypatch)
    run_main("train.py", *args)
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    run_main("train.py", *LONG)
    resumed, whole = (folder / "out" / "saved" / MODEL for folder in (tmp_path, tmp_path / "whole"))
    assert same_weights(*(Model.load(path.with_suffix(".pt")) for path in (resumed, whole)))
    reports = [json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) for path in (resumed, whole)]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert reports[0]["results"]["test_loss"] == reports[1]["results"]["test_loss"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    before = contents(tmp_path / "out")
    run_main("train.py", *args)
    assert "this run has finished" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_resume_with_other_hyperparameters_is_refused_by_name(interrupted, tmp_path, monkeypatch, capfd):
    args = resume(interrupted, tmp_path, monkeypatch)
    with refused(capfd, tmp_path, "lr", "0.5", "--resume_changed"):
        run_main("train.py", *args, "--lr", "0.5")
    for flag, value in (("split_seed", "7"), ("fold", "0/3"), ("label_fraction", "0.5")):
        with refused(capfd, tmp_path, flag, "goes on with its images"):  # which may be validated on then
            run_main("train.py", *args, f"--{flag}", value, "--batch_size", "50", "--resume_changed")
    with refused(capfd, tmp_path, "does not fit", "optimizer"):  # its state is another's, even where it would load
        run_main("train.py", *args, "--optimizer", "adamw", "--resume_changed")
    with mock.patch.object(Run, "draw_pictures", return_value=[]):
        run_main("train.py", *args, *"--weight_decay 0.5 --schedule linear --resume_changed".split())
    assert (tmp_path / "out" / "saved" / f"{MODEL}.pt").exists()


def test_a_checkpoint_of_another_model_is_refused(interrupted, tmp_path, monkeypatch, capfd):
    args = resume(interrupted, tmp_path, monkeypatch, "--name", "mine", "--resume_changed", "--model", "cnn")
    saved = tmp_path / "out" / "saved"
    (saved / f"{MODEL}.checkpoint").rename(saved / "mine.checkpoint")
    with refused(capfd, tmp_path, "mine.checkpoint", "does not fit"):
        run_main("train.py", *args)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"hello"],
    ids=["truncated", "empty", "text"],
)
def test_a_damaged_checkpoint_is_refused(interrupted, tmp_path, monkeypatch, capfd, damage):
    args = resume(interrupted, tmp_path, monkeypatch)
    path = tmp_path / "out" / "saved" / f"{MODEL}.checkpoint"
    path.write_bytes(damage(path.read_bytes()))
    with refused(capfd, tmp_path, path.name):
        run_main("train.py", *args)


def test_a_name_that_no_run_has_is_said_before_any_data_are_loaded(tmp_path, capsys):
    flags = ("--resume", "--name", "wrong", "--data_dir", tmp_path / "nothing", "--output_dir", tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main("train.py", "--dataset", "cifar10", *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "wrong.checkpoint to resume from" in error and len(error.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_model_file_is_no_checkpoint(interrupted, tmp_path, monkeypatch, capfd):
    args = resume(interrupted, tmp_path, monkeypatch)
    CNN().save(tmp_path / "out" / "saved" / f"{MODEL}.checkpoint")
    with refused(capfd, tmp_path, "is no whole checkpoint of a run"):
        run_main("train.py", *args)


def test_a_checkpoint_with_code_is_refused_in_one_line_and_does_not_run(interrupted, tmp_path, monkeypatch, trap):
    args = resume(interrupted, tmp_path, monkeypatch)
    (tmp_path / "out" / "saved" / f"{MODEL}.checkpoint").write_bytes(pickle.dumps(trap))
    process = start("train.py", *args)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaint.startswith("train.py: error: ")
    assert complaint.count("\n") == 1
    assert not trap.sprung


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_the_runner_and_the_second_the_program(number):
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    runner = SimpleNamespace(stop=False)
    try:
        run = Run(train.Config())
        run.stop_on_signals(runner)
        assert not runner.stop
        signal.raise_signal(number)
        assert runner.stop
        assert run.signals == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


# ---------------------------------------------------------------------------------------------------- the interface

DOCUMENT = """
from images.loader import unpack_ids
from network import VisionTransformer
model = VisionTransformer(img_size=32, hidden_size=64, output_size=10, num_heads=4, num_blocks=4)
optimizer = torch.optim.AdamW(model.parameters())
runner = Runner(model, optimizer, criterion, device)
runner.train(train_loader, val_loader, epochs=20)
loss, accuracy = runner.test(val_loader)
runner.plot(val_loader, save_path="frames/frame_1.png")
dir = "frames"
write_to_gif(dir)
model.save("saved/VisionTransformer.pt")
model = VisionTransformer.load("saved/VisionTransformer.pt")
output = model(images, return_attention=True)
attention_weights = output['attention_weights']
visualize_attention_maps(images, attention_weights)
"""


def test_the_lines_of_the_users_document_run_as_written(tmp_path, monkeypatch):
    from runner import Runner, choose_device
    from utils import visualize_attention_maps, write_to_gif

    monkeypatch.chdir(tmp_path)
    images = torch.randn(4, 3, 32, 32)
    loader = DataLoader(TensorDataset(images, torch.tensor([1, 2, 3, 4])), batch_size=4)
    names = {
        "torch": torch,
        "Runner": Runner,
        "visualize_attention_maps": visualize_attention_maps,
        "write_to_gif": write_to_gif,
        "device": choose_device("cpu"),
        "criterion": nn.CrossEntropyLoss(),
        "images": images,
        "train_loader": loader,
        "val_loader": loader,
    }
    exec(DOCUMENT, names)
    assert {"train_loss", "train_accuracy", "train_step", "val_loss", "val_accuracy", "val_step"} <= set(
        names["runner"].metrics
    )
    assert names["accuracy"] == 1.0  # four images in twenty epochs
    assert names["attention_weights"].shape == (4, 4, 4, 65, 65)
    assert (tmp_path / "animation.gif").exists()


MEMORY = """
import resource, sys, torch, train

def fetched_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = fetched_pages()
train.main(sys.argv[1:])
fetched_pages()
print("pages:", before, fetched_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage memory in their own ways")
def test_memory_of_one_step_is_kept_for_the_next(tmp_path):
    arguments = ["--dataset", "digits", *SMALL, "--device", "cpu", "--output_dir", tmp_path]
    command = [sys.executable, "-c", MEMORY, *map(str, arguments)]
    # another allocator, or settings of glibc's, would decide
    theirs = ("MALLOC", "GLIBC", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    options = {"check": True, "capture_output": True, "text": True, "cwd": cli.ROOT}
    output = subprocess.run(command, env=environment, **options)
    before, after = map(int, output.stdout.rpartition("pages:")[2].split())
    assert after < before / 10
