"""What a run is called, that nothing is lost under a name, and what of an earlier run is taken up again."""

import csv
import json
import re
import shutil
import signal
import time
from unittest import mock

import pytest
import torch
from filelock import FileLock
from helpers import ROOT, SMALL, outcome, refused, run_main, same_weights, start, train_small

import train
from images.loader import Dataset
from network import Model
from runner import choose_precision
from support import cli
from support.report import read_json, write_json
from training.options import check, drop_without_effect, name_of, stored_values
from training.run import Run

TINY = "--dataset digits --model mlp --hidden_size 8 --epochs 1 --batch_size 200 --gif_frames 0 --device cpu".split()


def parsed(*args):
    return cli.parse(train.Config, list(args), train.dependent_defaults)


def named(data: Dataset, *args) -> str:
    config = parsed(*args)
    title = {"vit": "VisionTransformer", "cnn": "CNN", "mlp": "MLP"}[config.model]
    return name_of(title, data, config, train.dependent_defaults(config))


# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "VisionTransformer"),
        ("--preset quick", "VisionTransformer_quick"),
        ("--preset quick --epochs 3", "VisionTransformer_quick_epochs3"),
        ("--model cnn --epochs 5 --lr 2e-3", "CNN_epochs5_lr0.002"),
        ("--model mlp", "MLP"),
        ("--patch_size 8 --num_heads 2", "VisionTransformer_heads2_patch8"),
        ("--optimizer sgd", "VisionTransformer_sgd"),  # and not its rate, which comes with it
        ("--augment none --seed 1", "VisionTransformer_seed1_augment_none"),
        ("--epochs 20 --lr 6e-3", "VisionTransformer"),  # as by default
        ("--fold 0/5", "VisionTransformer_fold_0of5"),
        ("--no_whiten --skip_nonfinite", "VisionTransformer_no_whiten_skip_nonfinite"),
        ("--val_fraction 0", "VisionTransformer_all"),
        ("--preset quick --model mlp", "MLP_quick"),  # and not its tokenizer, which an MLP does not have
        ("--preset best --fold 0/5", "VisionTransformer_best_fold_0of5"),
        ("--init_from saved/CNN.pt", "VisionTransformer_from_CNN"),
        ("--gif_frames 3 --checkpoint_minutes 1 --threads 1", "VisionTransformer"),  # nothing else is learned
    ],
)
def test_a_name_says_what_is_not_default(flags, name, digits):
    digits = Dataset("cifar10", digits.classes, digits.train, digits.val, digits.test, flip=True)
    assert named(digits, *flags.split()) == name


def test_a_slash_at_the_end_makes_no_other_folder():
    config = cli.parse(train.Config, ["--dataset", "some/pets/"], train.dependent_defaults)
    check(config)
    assert config.dataset == "some/pets"


def test_other_data_are_in_the_name_but_not_the_values_that_come_with_them(digits):
    assert named(digits, "--dataset", "digits") == "VisionTransformer_digits"


def test_the_name_in_the_page_on_data_is_the_one_that_is_given(digits):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    command = re.search(r"^python train.py (--dataset pets .*)$", page, re.MULTILINE)[1]
    pets = Dataset("pets", digits.classes, digits.train, digits.val, digits.test, flip=True)
    assert f"`saved/{named(pets, *command.split())}.pt`" in page


def test_the_names_in_the_page_on_runs_are_those_that_are_given(digits):
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `python train.py(.*?)` \| `saved/(.*?).pt`", page, re.MULTILINE)
    data = Dataset("cifar10", ["cat", "dog"], digits.train, digits.val, digits.test, flip=True)
    for flags, name in table:
        assert name == (flags.partition("--name ")[2] or named(data, *flags.split()))
    assert len(table) == 5


def test_a_long_name_is_cut_and_still_another_for_another_run(digits):
    flags = "--hidden_size 16 --num_heads 2 --num_blocks 2 --patch_size 8 --mlp_ratio 2 --drop_path 0.1 --warmup 0.2"
    flags += " --label_smoothing 0.05 --ema 0.99 --grad_clip 1 --patience 3 --optimizer adamw --schedule linear"
    names = [named(digits, "--dataset", "digits", *flags.split(), "--seed", seed) for seed in "12"]
    assert len(set(names)) == 2 and max(map(len, names)) <= 100


def test_another_preset_leaves_the_committed_model_alone(tmp_path):
    (tmp_path / "saved").mkdir()
    for ending in ("pt", "json"):
        shutil.copy(ROOT / "saved" / f"VisionTransformer.{ending}", tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    run_main("train.py", "--preset", "quick", *TINY[:2], *"--gif_frames 0 --device cpu --output_dir".split(), tmp_path)
    assert (tmp_path / "saved" / "VisionTransformer_digits_quick.pt").exists()
    assert {path: path.read_bytes() for path in before} == before


# ------------------------------------------------------------------------------------------- nothing is overwritten


def test_a_finished_run_with_other_hyperparameters_is_set_aside(tmp_path, capsys):
    flags = [*TINY, "--output_dir", tmp_path, "--name", "mine"]
    run_main("train.py", *flags)
    first = (tmp_path / "saved" / "mine.pt").read_bytes()
    run_main("train.py", *flags)  # the same again takes its place
    assert not list((tmp_path / "saved").glob("*_old*"))
    capsys.readouterr()
    run_main("train.py", *flags, "--lr", "0.5")
    said = capsys.readouterr().out.splitlines()
    assert "and is now called mine_old1 in " in said[2] and max(map(len, said[:2])) <= 80
    run_main("train.py", *flags, "--lr", "0.25")
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert saved == {f"mine{old}.{ending}" for old in ("", "_old1", "_old2") for ending in ("pt", "json", "csv")}
    assert (tmp_path / "saved" / "mine_old1.pt").read_bytes() == first
    curves = {path.name for path in (tmp_path / "figures").iterdir()}
    assert curves == {f"mine{old}_curves.png" for old in ("", "_old1", "_old2")}


def test_a_run_on_other_images_is_set_aside(tmp_path):
    flags = [*TINY, "--output_dir", tmp_path, "--name", "mine"]
    run_main("train.py", *flags, "--classes", "1,2")
    run_main("train.py", *flags, "--classes", "1,3")
    assert Model.load(tmp_path / "saved" / "mine_old1.pt").metadata["classes"] == ["1", "2"]


def test_a_model_without_a_report_is_set_aside(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.pt").write_bytes(b"precious")
    run_main("train.py", *TINY, "--output_dir", tmp_path, "--name", "mine")
    assert (tmp_path / "saved" / "mine_old1.pt").read_bytes() == b"precious"


def test_a_finished_run_leaves_neither_lock_nor_checkpoint(tmp_path, capsys):
    run_main("train.py", *TINY, "--output_dir", tmp_path, "--name", "mine")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".pt", ".json", ".csv"}
    capsys.readouterr()
    run_main("train.py", "--resume", "--name", "mine", "--output_dir", tmp_path)
    assert "this run has finished: test accuracy" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- runs taken up again


def interrupt(tmp_path, *args):
    """Send SIGINT once there is a checkpoint; what the run printed."""
    process = start("train.py", *SMALL, "--output_dir", tmp_path, "--name", "mine", *args)
    deadline = time.monotonic() + 120
    while not (tmp_path / "saved" / "mine.checkpoint").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "saved" / "mine.checkpoint").exists(), "no checkpoint within the limit"
    process.send_signal(signal.SIGINT)
    printed, complaints = process.communicate(timeout=60)
    assert process.returncode == 130, complaints
    return printed


def test_resume_with_a_name_alone_goes_on_with_its_own_hyperparameters(tmp_path):
    flags = "--epochs 30 --lr 0.003 --augment none --seed 3 --gif_frames 0".split()
    printed = interrupt(tmp_path, *flags)
    assert f"--output_dir {tmp_path} --resume --name mine" in printed
    with open(tmp_path / "saved" / "mine.csv", encoding="utf-8") as file:  # whole after Ctrl-C, each step in a line
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows if row["train_loss"]]
    assert steps == list(range(1, len(steps) + 1)) and any(row["val_accuracy"] for row in rows)
    run_main("train.py", "--resume", "--name", "mine", "--output_dir", tmp_path)
    run_main("train.py", *SMALL, *flags, "--name", "whole", "--output_dir", tmp_path)
    assert same_weights(*(Model.load(tmp_path / "saved" / f"{name}.pt") for name in ("mine", "whole")))
    tables = [(tmp_path / "saved" / f"{name}.csv").read_text(encoding="utf-8") for name in ("mine", "whole")]
    assert tables[0] == tables[1]


def test_flags_beside_resume_are_compared(tmp_path, capfd):
    interrupt(tmp_path, "--epochs", "200", "--gif_frames", "0")
    with refused(capfd, tmp_path, "epochs was 200 and is 300", "leave the flag out"):
        run_main("train.py", "--resume", "--name", "mine", "--output_dir", tmp_path, "--epochs", "300")


def test_an_interrupted_run_is_set_aside_and_can_go_on_under_its_new_name(tmp_path, capsys):
    interrupt(tmp_path, "--epochs", "12", "--gif_frames", "4")
    run_main("train.py", *TINY, "--output_dir", tmp_path, "--name", "mine")
    assert "--resume --name mine_old1" in capsys.readouterr().out
    run_main("train.py", "--resume", "--name", "mine_old1", "--output_dir", tmp_path)
    report = json.loads((tmp_path / "saved" / "mine_old1.json").read_text(encoding="utf-8"))
    assert report["results"]["epochs"] == 12 and (tmp_path / "figures" / "mine_old1_animation.gif").exists()


def test_an_interrupted_run_does_not_take_a_finished_one_along(tmp_path, capsys, monkeypatch):
    """A model that a run of the same name made before stays until another run ends and takes its place."""
    flags = [*SMALL, "--name", "mine", "--epochs", "12", "--gif_frames", "0", "--output_dir", tmp_path]
    run_main("train.py", *flags)
    (tmp_path / "saved" / "mine.checkpoint").unlink()
    before = [(tmp_path / "saved" / f"mine.{ending}").read_bytes() for ending in ("pt", "json")]
    interrupt(tmp_path, "--epochs", "12", "--gif_frames", "0")
    monkeypatch.setattr("runner.Runner.train", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_main("train.py", *flags)
    assert [(tmp_path / "saved" / f"mine.{ending}").read_bytes() for ending in ("pt", "json")] == before
    assert (tmp_path / "saved" / "mine_old1.checkpoint").exists()
    assert not (tmp_path / "saved" / "mine_old1.pt").exists()


def test_what_begins_or_ends_where_a_run_goes_on_is_said_by_its_flag(tmp_path, capsys):
    interrupt(tmp_path, "--epochs", "12", "--gif_frames", "0", "--patience", "50")
    flags = ["--resume", "--resume_changed", "--name", "mine", "--output_dir", tmp_path]
    run_main("train.py", *flags, "--patience", "0", "--ema", "0.9")
    said = capsys.readouterr().out.splitlines()
    assert "from here on with --ema" in said and "from here on without --patience" in said


@pytest.mark.parametrize(
    ("first", "flags", "said"),
    [
        ("--epochs 0.5", "--epochs 2", "ended within its last epoch, after 0.5"),
        ("--epochs 1", "--lr 0.5", "nothing is left to train with lr was 0.006 and is 0.5: raise --epochs"),
        ("--epochs 1", "--epochs 2 --layer_decay 0.5", "layer_decay cannot change from 1"),
    ],
)
def test_a_run_that_has_ended_does_not_go_on_where_that_would_be_false(tmp_path, capsys, first, flags, said):
    train_small(tmp_path, "--name", "mine", "--keep_checkpoint", *first.split())
    report = (tmp_path / "saved" / "mine.json").read_bytes()
    with pytest.raises(SystemExit):
        train_small(tmp_path, "--name", "mine", *flags.split(), "--resume", "--resume_changed")
    assert said in capsys.readouterr().err and (tmp_path / "saved" / "mine.json").read_bytes() == report


def test_a_run_with_minutes_goes_on_with_epochs(tmp_path, capsys):
    interrupt(tmp_path, "--minutes", "60", "--gif_frames", "0")
    flags = ["--resume", "--resume_changed", "--name", "mine", "--output_dir", tmp_path]
    run_main("train.py", *flags, "--epochs", "40")
    report = json.loads((tmp_path / "saved" / "mine.json").read_text(encoding="utf-8"))
    assert "from here on without --minutes" in capsys.readouterr().out
    assert (report["config"]["epochs"], report["config"]["minutes"]) == (40, None)


def test_another_optimizer_than_the_stored_runs_has_rates_of_its_own(tmp_path):
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({"results": {}, "config": {"optimizer": "muon", "lr": 6e-3, "batch_size": 32}}))
    options = (train.dependent_defaults, stored_values)
    config = cli.parse(train.Config, ["--config", str(stored), "--optimizer", "adamw"], *options, remember=False)
    assert (config.lr, config.momentum, config.batch_size) == (train.RATES["adamw"]["lr"], 0.9, 32)
    again = cli.parse(train.Config, ["--config", str(stored)], *options, remember=False)
    assert (again.lr, again.momentum) == (6e-3, 0.95)
    # ... and those that belong to the stored preset, or to trained weights
    for values, optimizer, lr in (
        ({"preset": "accurate", "optimizer": "adamw", "lr": 1e-3}, "muon", 9e-3),
        ({"model": "timm:resnet18", "pretrained": True, "optimizer": "sgd", "lr": 0.1}, "adamw", 5e-4),
    ):
        stored.write_text(json.dumps({"results": {}, "config": values}))
        typed = ["--config", str(stored), "--optimizer", optimizer]
        assert train.with_defaults(cli.parse(train.Config, typed, *options, remember=False)).lr == lr


def test_a_stored_runs_values_hold_where_the_data_set_brings_others(tmp_path):
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({"results": {}, "config": {"dataset": "auto", "epochs": 7}}))
    options = (train.dependent_defaults, stored_values)
    config = cli.parse(train.Config, ["--config", str(stored)], *options, remember=False)
    digits = train.with_defaults(config, dataset="digits")
    assert (digits.epochs, digits.batch_size) == (7, train.DIGITS["batch_size"])


def test_the_precision_that_another_machine_chose_is_not_taken_where_it_is_slow(tmp_path, monkeypatch, capsys):
    train_small(tmp_path, "--name", "first", "--precision", "bf16")
    monkeypatch.setattr("training.run.has_bf16", lambda device: False)
    stored = tmp_path / "saved" / "first.json"
    for flags, precision in (([], "fp32"), (["--precision", "bf16"], "bf16")):
        train_small(tmp_path, "--name", "again", "--config", stored, *flags)
        report = json.loads((tmp_path / "saved" / "again.json").read_text(encoding="utf-8"))
        assert report["config"]["precision"] == precision
        assert ("precision is fp32 here" in capsys.readouterr().out) == (precision == "fp32")


def test_signals_are_as_before_when_a_run_is_over(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_small(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_is_under_way_is_not_said_to_be_resumed(tmp_path, capsys):
    interrupt(tmp_path, "--epochs", "200", "--gif_frames", "0")
    with FileLock(tmp_path / "saved" / "mine.lock"), pytest.raises(SystemExit) as stop:
        run_main("train.py", "--resume", "--name", "mine", "--output_dir", tmp_path)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "another run named mine is under way" in said.err and "resuming" not in said.out


def test_resume_without_a_checkpoint_names_those_that_there_are(tmp_path, capfd):
    interrupt(tmp_path, "--epochs", "200", "--gif_frames", "0")
    with refused(capfd, tmp_path, "no ", "--name mine"):
        run_main("train.py", "--resume", *TINY, "--output_dir", tmp_path)
    (tmp_path / "saved" / "group").mkdir()
    (tmp_path / "saved" / "mine.checkpoint").rename(tmp_path / "saved" / "group" / "mine.checkpoint")
    with refused(capfd, tmp_path, "no ", "--name group/mine"):
        run_main("train.py", "--resume", "--name", "group/other", "--output_dir", tmp_path)


def test_config_repeats_a_stored_run(tmp_path):
    run_main("train.py", *TINY, "--lr", "0.01", "--output_dir", tmp_path, "--name", "mine")
    again = ["--config", tmp_path / "saved" / "mine.json", "--output_dir", tmp_path / "again", "--gif_frames", 0]
    run_main("train.py", *again)
    name = "MLP_digits_hidden8_epochs1_batch200_lr0.01"
    first, second = Model.load(tmp_path / "saved/mine.pt"), Model.load(tmp_path / f"again/saved/{name}.pt")
    assert same_weights(first, second)
    run_main("train.py", *again, "--seed", 7)
    assert not same_weights(first, Model.load(tmp_path / f"again/saved/{name.replace('_epochs', '_seed7_epochs')}.pt"))


def test_config_takes_the_report_of_an_earlier_version():
    config = cli.parse(
        train.Config,
        ["--config", str(ROOT / "saved" / "VisionTransformer.json"), "--seed", "1"],
        train.dependent_defaults,
        train.stored_values,
    )
    assert config.augment == "crop_flip" and config.epochs == 20 and config.seed == 1 and config.name is None


def test_config_that_no_flag_could_give_is_one_line(tmp_path, capfd):
    report = json.loads((ROOT / "saved" / "CNN.json").read_text(encoding="utf-8"))
    report["config"]["pooling"] = "maximum"
    del report["sha256"]
    (tmp_path / "x.json").write_text(json.dumps(report), encoding="utf-8")
    with refused(capfd, tmp_path, "x.json", "pooling cannot be 'maximum'"):
        run_main("train.py", "--config", tmp_path / "x.json", "--output_dir", tmp_path)


def test_what_is_typed_beside_config_is_not_blamed_on_the_file(capfd):
    stored = str(ROOT / "saved" / "VisionTransformer.json")
    for flags, words in ((["--lr", "-1"], "lr"), (["--preset", "quick"], "hyperparameters of --preset default")):
        code, line = outcome("train.py", "--config", stored, *flags)
        assert code == 2 and words in line and "cannot be used" not in line, line


# ------------------------------------------------------------------------------------------- what has no effect


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model cnn --patch_size 2 --num_heads 5", "--num_heads, --patch_size have no effect on a CNN"),
        ("--monitor accuracy", "--monitor has no effect without --patience"),
        ("--tokenizer_depth 2", "--tokenizer_depth has no effect with --tokenizer patch"),
        ("--preset quick --model cnn", "what --preset quick says of"),
        ("--model mlp --no_whiten", "--no_whiten has no effect on an MLP"),
        ("--tokenizer conv --no_whiten", "--no_whiten has no effect with --tokenizer conv"),
        ("--fold 0/5 --val_fraction 0.3", "--val_fraction has no effect with --fold"),
        ("--model mlp --pooling cls", "--pooling has no effect on an MLP"),
        ("--model mlp --momentum 0.5", "--momentum has no effect on an MLP, which has no matrix for Muon"),
        ("--freeze backbone --drop_path 0.5", "--drop_path has no effect with --freeze backbone"),
        ("--freeze backbone --momentum 0.5", "--momentum has no effect with --freeze backbone, as Muon has no matrix"),
        ("--tokenizer conv --tokenizer_depth 2 --patience 3 --monitor accuracy", ""),
        ("--model cnn", ""),
        ("", ""),
    ],
)
def test_flags_without_effect_are_said(flags, said, digits, capsys):
    config = parsed(*flags.split(), "--dataset", "digits")
    drop_without_effect(config, digits)
    printed = capsys.readouterr().out
    assert said in printed and (printed == "") == (said == "") and printed.count("\n") <= 1


def test_what_has_no_effect_is_neither_in_the_name_nor_in_the_report(tmp_path):
    run_main("train.py", *TINY, "--output_dir", tmp_path, "--num_heads", 7, "--patch_size", 2)
    (path,) = (tmp_path / "saved").glob("*.json")
    assert path.stem == "MLP_digits_hidden8_epochs1_batch200"
    assert json.loads(path.read_text(encoding="utf-8"))["config"]["num_heads"] == train.Config.num_heads


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("--optimizer adm", "did you mean adam"),
        ("--schedule cosin", "did you mean cosine"),
        ("--modl cnn", "did you mean --model"),
        ("--model vitt", "did you mean vit"),
        ("--augment randaug", "did you mean randaugment"),
        ("--dataset cifar", "did you mean cifar10"),
        ("--preset quik", "did you mean quick"),
        ("--preset fast", "accurate"),  # none is like it: all are listed
    ],
)
def test_what_is_misspelled_gets_a_suggestion(flags, hint, tmp_path, capfd):
    with refused(capfd, tmp_path, hint):
        run_main("train.py", *flags.split(), "--output_dir", tmp_path)


# -------------------------------------------------------------------------------------------- all images, few images


def test_without_validation_all_images_are_trained_on_and_it_is_said(tmp_path, capsys):
    flags = [*TINY, "--output_dir", tmp_path, "--val_fraction", 0, "--gif_frames", 2, "--epochs", 2]
    run_main("train.py", *flags)
    printed = capsys.readouterr().out
    assert "1,437 images" in printed and "nothing is validated" in printed and "images; no validation)" in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80
    (path,) = (tmp_path / "saved").glob("*.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["results"]["val_accuracy"] is None and not report["results"]["validated"]
    assert report["metrics"]["val_loss"] == [] and path.stem.startswith("MLP_digits_all")
    model = Model.load(path.with_suffix(".pt"))
    assert model.metadata["fingerprints"]["train"].startswith("1437 images")


def test_early_stopping_without_validation_is_refused(tmp_path, capfd):
    with refused(capfd, tmp_path, "--patience needs validation images"):
        run_main("train.py", *TINY, "--output_dir", tmp_path, "--val_fraction", 0, "--patience", 2)


def test_a_batch_larger_than_the_training_set_shrinks_with_a_line(tmp_path, capsys):
    few = ["--label_fraction", 0.05, "--batch_size", 128]  # five or six images of each digit
    run_main("train.py", *TINY, *few, "--output_dir", tmp_path)
    assert "batch_size is 14 here, as there are only 5" in capsys.readouterr().out


def test_few_validation_images_are_said_to_say_little(tmp_path, capsys):
    few = "only 25 validation images, 4 points of accuracy each: they say little"
    run_main("train.py", *TINY, "--output_dir", tmp_path, "--classes", "1,2", "--val_fraction", "0.1")
    assert few in capsys.readouterr().out.splitlines()
    run_main("train.py", *TINY, "--output_dir", tmp_path)  # 287
    assert "validation images" not in capsys.readouterr().out


def test_the_defaults_for_digits_say_so(digits):
    config = parsed("--dataset", "digits")
    assert (config.epochs, config.batch_size) == (12, 16)
    assert parsed("--dataset", "digits", "--epochs", "5").epochs == 5


def test_auto_that_finds_digits_takes_their_defaults_too(tmp_path, monkeypatch):
    config = parsed("--data_dir", str(tmp_path), "--lr", "0.001")
    with Run(config):
        data = train.load_images(config)
    assert (data.name, config.dataset, config.epochs, config.batch_size, config.lr) == (
        "digits",
        "digits",
        12,
        16,
        0.001,
    )
    torch.manual_seed(0)


def test_plain_training_leaves_the_committed_model_alone_until_it_ends(tmp_path, digits):
    """Its report says the same hyperparameters, whatever precision this machine would choose."""
    shutil.copytree(ROOT / "saved", tmp_path / "saved", ignore=shutil.ignore_patterns("studies"))
    report = read_json(tmp_path / "saved" / "VisionTransformer.json")
    report["images"] = Dataset("cifar10", digits.classes, digits.train, digits.val, digits.test, True).fingerprint()
    report["config"]["precision"] = {"bf16": "fp32", "fp32": "bf16"}[choose_precision("auto", torch.device("cpu"))]
    write_json(tmp_path / "saved" / "VisionTransformer.json", report)
    before = (tmp_path / "saved" / "VisionTransformer.pt").read_bytes()
    config = parsed("--output_dir", str(tmp_path), "--dataset", "cifar10")
    data = Dataset("cifar10", digits.classes, digits.train, digits.val, digits.test, flip=True)
    with Run(config) as run:
        run.describe(Model.load(tmp_path / "saved" / "VisionTransformer.pt"), data, train.dependent_defaults(config))
        run.checkpoints = None
        run.set_aside()
    assert (tmp_path / "saved" / "VisionTransformer.pt").read_bytes() == before
    assert not list((tmp_path / "saved").glob("*_old*"))
