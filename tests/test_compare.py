"""The study: the whole command on digits, its statistics on known cases, and results made up to try the rest."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from filelock import FileLock
from helpers import outcome, run_main, start
from PIL import Image
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

import train
from network import CNN, FeedForward, Model, VisionTransformer
from studies import compare, comparison, runs
from support import cli
from support.significance import holm, interval_text, mcnemar_p, paired_bootstrap, points, wilson
from training.models import build_model

FIGURES = ("curves", "time", "bootstrap", "classes")


def run_study(*args):
    run_main("studies.compare", *args)


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def even(table):
    """A Markdown table without the spaces that make its columns even."""
    return re.sub(" +", " ", table)


# ------------------------------------------------------------------------------------------------ the whole command

DIGITS = "--dataset digits --epochs 1 --seeds 1 --only cnn vit_patch8 --output_dir".split()
NAMES = [f"study_digits_{recipe}_{model}_seed0" for recipe in ("plain", "default") for model in ("cnn", "vit_patch8")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two models under both recipes, two trainings at a time."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        run_study(*DIGITS, folder, "--jobs", 2)
    study = json.loads((folder / "figures/model_comparison_digits.json").read_text(encoding="utf-8"))
    return SimpleNamespace(folder=folder, printed=printed.getvalue(), study=study)


def test_the_command_trains_tests_and_draws(finished):
    for name in NAMES:
        for ending in (".pt", ".json", ".npz"):
            assert (finished.folder / "saved" / "studies" / (name + ending)).exists()
    for what in FIGURES:
        with Image.open(finished.folder / f"figures/model_comparison_digits_{what}.png") as picture:
            assert picture.width >= 1200
    table = (finished.folder / "figures/model_comparison_digits.md").read_text(encoding="utf-8")
    assert table in finished.printed
    assert "4 runs asked for, 0 of them stored, 4 to train" in finished.printed
    assert (
        "ViT (patch=2), plain" in table.split("**Missing:**")[1] and "CNN, plain" not in table.split("**Missing:**")[1]
    )
    assert "digits" in table and "earlier code" not in table  # which was measured on CIFAR-10
    assert [(row["model"], row["recipe"]) for row in finished.study["differences"]] == [
        ("vit_patch8", "plain"),
        ("vit_patch8", "default"),
    ]


def test_which_test_images_are_right_is_what_the_stored_model_says(finished, digits):
    for name, row in zip(NAMES, finished.study["rows"], strict=True):
        model = Model.load(finished.folder / f"saved/studies/{name}.pt")
        report = json.loads((finished.folder / f"saved/studies/{name}.json").read_text(encoding="utf-8"))
        mean, std = (torch.tensor(model.metadata[what]).view(1, 3, 1, 1) for what in ("mean", "std"))
        with torch.no_grad():
            logits = model((digits.test.images / 255 - mean) / std).double()
        with np.load(finished.folder / f"saved/studies/{name}.npz") as stored:
            answers = dict(stored)
        assert (answers["correct"] == (logits.argmax(dim=1) == digits.test.labels).numpy()).all()
        assert (answers["labels"] == digits.test.labels.numpy()).all() and list(answers["classes"]) == digits.classes
        assert row["test_accuracy"] == pytest.approx(report["results"]["test_accuracy"], rel=1e-5)  # six digits
        assert row["parameters"] == sum(p.numel() for p in model.parameters())


def test_recipes_are_what_they_are_called(finished):
    reports = [
        json.loads((finished.folder / f"saved/studies/{name}.json").read_text(encoding="utf-8")) for name in NAMES
    ]
    plain = {"optimizer": "adam", "lr": 5e-4, "schedule": "constant", "warmup": 0.0, "augment": "none"}
    plain |= {"label_smoothing": 0.0, "weight_decay": 0.0}
    sizes = {"hidden_size": 64, "num_heads": 4, "num_blocks": 4, "epochs": 1}
    for report, pooling in zip(reports[:2], ("mean", "cls"), strict=True):  # of the CNN it is no hyperparameter
        assert (plain | sizes | {"pooling": pooling}).items() <= report["config"].items()
    for report, model in zip(reports[2:], ("cnn", "vit"), strict=True):
        flags = {word for word in report["provenance"]["command"].split() if word.startswith("--")}
        free = {"--model"} if model == "cnn" else {"--patch_size"}
        own = {"--dataset", "--epochs", "--seed", "--name", "--output_dir", "--gif_frames"}
        assert flags - free == own  # and nothing of the recipe
        assert report["config"]["model"] == model


def test_seconds_of_each_validation_are_stored(finished):
    for name in NAMES:
        report = json.loads((finished.folder / f"saved/studies/{name}.json").read_text(encoding="utf-8"))
        assert len(report["val_seconds"]) == 1
        assert report["val_seconds"][0] == pytest.approx(report["results"]["training_seconds"], abs=0.051)


def test_run_again_it_only_draws(finished, tmp_path, capsys):
    shutil.copytree(finished.folder, tmp_path / "copy")
    before = files_in(tmp_path / "copy" / "saved" / "studies")
    for path in before:
        if path.suffix in (".pt", ".checkpoint"):
            path.unlink()  # not needed for that
            before = {other: data for other, data in before.items() if other != path}
    with mock.patch.object(subprocess, "Popen", side_effect=AssertionError("something is trained")):
        run_study(*DIGITS, tmp_path / "copy")
    assert "4 of them stored, 0 to train" in capsys.readouterr().out
    assert files_in(tmp_path / "copy" / "saved" / "studies") == before
    figures = [f"figures/model_comparison_digits_{what}.png" for what in FIGURES]
    for path in figures:
        assert (tmp_path / "copy" / path).read_bytes() == (finished.folder / path).read_bytes()
    again = json.loads((tmp_path / "copy/figures/model_comparison_digits.json").read_text(encoding="utf-8"))
    other = {"provenance": None, "sha256": None}
    assert {**again, **other} == {**finished.study, **other}


def test_every_row_of_the_study_can_be_trained(digits, tmp_path):
    commands = {}
    with mock.patch.object(runs, "run_all", lambda found, config: commands.update(found)):
        config = compare.Config(dataset="digits", output_dir=str(tmp_path))
        runs.train_missing(compare.plan(config), config)
    assert len(commands) == 2 * (8 * 3 + 1)  # two recipes; three seeds of all but patch 2
    parameters = {}
    for name, command in commands.items():
        config = cli.parse(train.Config, command[2:])
        assert config.name == f"studies/{name}" and name.endswith(f"seed{config.seed}")
        model = build_model(config.model, dataclasses.asdict(config), digits.image_size, 10)
        parameters[name] = sum(p.numel() for p in model.parameters())
    assert parameters["study_digits_plain_vit_patch4_seed0"] == 205_770  # with a CLS token
    for vit, cnn in (("vit_small", "cnn"), ("vit_wide", "resnet20")):
        assert (
            abs(parameters[f"study_digits_default_{vit}_seed2"] / parameters[f"study_digits_default_{cnn}_seed2"] - 1)
            < 0.1
        )


def test_data_dir_reaches_the_training_but_not_its_report(tmp_path):
    seen = []

    def popen(command, env, **options):
        seen.append((command, env["DATA_DIR"]))
        return SimpleNamespace(poll=lambda: 1, returncode=1)

    config = compare.Config(data_dir="/some/where", only=("cnn",), recipe="plain", seeds=1, output_dir=str(tmp_path))
    with mock.patch.object(subprocess, "Popen", popen):
        assert runs.train_missing(compare.plan(config), config) == ["study_plain_cnn_seed0"]
    ((command, folder),) = seen
    assert folder == "/some/where" and "/some/where" not in " ".join(command)


@pytest.mark.skipif(os.name != "posix", reason="Windows ends processes without asking them")
def test_an_interrupted_study_goes_on(tmp_path, capfd):
    flags = "--dataset digits --epochs 8 --seeds 1 --only cnn --recipe plain --output_dir".split()
    checkpoint, report = (
        tmp_path / f"saved/studies/study_digits_plain_cnn_seed0.{ending}" for ending in ("checkpoint", "json")
    )
    process = start("studies.compare", *flags, tmp_path)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, complaints = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in complaints
    assert "interrupted after step" in printed and not report.exists()

    run_study(*flags, tmp_path)
    assert "resuming after epoch" in capfd.readouterr().out
    report = json.loads(report.read_text(encoding="utf-8"))
    assert len(report["val_seconds"]) == len(report["metrics"]["val_step"]) == 8
    assert report["val_seconds"] == sorted(report["val_seconds"])


def test_a_training_that_fails_is_named_and_the_rest_is_drawn(finished, tmp_path, capfd):
    shutil.copytree(finished.folder, tmp_path / "copy")
    saved = tmp_path / "copy" / "saved" / "studies"
    (saved / f"{NAMES[3]}.json").unlink()
    with FileLock(saved / f"{NAMES[3]}.lock"), pytest.raises(SystemExit) as stop:  # as if it were under way elsewhere
        run_study(*DIGITS, tmp_path / "copy", "--jobs", 2)
    captured = capfd.readouterr()
    assert stop.value.code == 1
    assert f"not trained: {NAMES[3]}" in captured.err.splitlines()[-1]
    assert f"FAILED {NAMES[3]}: train.py: error: " in captured.out + captured.err
    study = json.loads((tmp_path / "copy/figures/model_comparison_digits.json").read_text(encoding="utf-8"))
    assert "ViT (patch=8), default" in study["missing"] and len(study["rows"]) == 3


# ------------------------------------------------------------------------------------------------ made-up results


def made_up(
    folder,
    recipe,
    model,
    seed=0,
    correct=None,
    images=300,
    epochs=3,
    seconds=60.0,
    accuracies=None,
    settings=None,
    **changes,
):
    """Files of a run on CIFAR-10 such as train.py and compare.py store them."""
    labels = np.arange(images) % 3
    correct = np.random.default_rng(seed).random(images) < 0.7 if correct is None else np.asarray(correct, bool)
    accuracies = accuracies or [0.4, 0.5, 0.6][:epochs]
    report = {
        "results": {
            "parameters": 25_578,
            "val_accuracy": accuracies[-1],
            "val_loss": 1.0,
            "test_loss": 1.0,
            "test_accuracy": float(correct.mean()),
            "training_seconds": seconds,
        }
        | changes,
        "config": {"epochs": epochs, "seed": seed, **(settings or {})},
        "provenance": {"machine": "Linux x86_64, 2 cores", "threads": 1, "accelerator": None, "torch": "2.13.0"},
        "metrics": {
            "train_loss": [1.0] * 99,
            "val_loss": [1.5, 1.2, 1.0][:epochs],
            "val_accuracy": accuracies,
            "val_step": [10 * (i + 1) for i in range(epochs)],
        },
        "val_seconds": [seconds * (i + 1) / epochs for i in range(epochs)],
    }
    path = folder / "saved" / "studies" / f"study_{recipe}_{model}_seed{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report), encoding="utf-8")
    np.savez(
        path.with_suffix(".npz"), correct=correct, labels=labels, classes=np.array(["cat", "dog", "ship"]), flops=10**7
    )
    return path


def drawn(folder, *flags):
    run_study("--no-train", "--epochs", 3, "--output_dir", folder, *flags)
    return json.loads((folder / "figures/model_comparison.json").read_text(encoding="utf-8"))


def test_rows_average_seeds_and_keep_the_two_kinds_of_chance_apart(tmp_path):
    for seed, right in enumerate((150, 180, 210)):
        made_up(tmp_path, "plain", "cnn", seed, correct=np.arange(300) < right, seconds=10.0 * (seed + 1))
        made_up(tmp_path, "plain", "mlp", seed, correct=np.arange(300) >= right)
    row = drawn(tmp_path)["rows"][0]
    assert row["seeds"] == [0, 1, 2] and row["training_seconds"] == pytest.approx(20)
    assert row["test_accuracy"] == pytest.approx(0.6) and row["test_accuracies"] == pytest.approx([0.5, 0.6, 0.7])
    assert row["seed_deviation"] == pytest.approx(0.1)
    low, high = scipy.stats.binomtest(180, 300).proportion_ci(method="wilson")
    assert row["interval"] == pytest.approx([low, high])
    difference = drawn(tmp_path)["differences"][0]  # the accuracies of the MLP are 0.5, 0.4 and 0.3
    assert difference["by_seed"] == pytest.approx([0, -0.2, -0.4])
    assert difference["difference"] == pytest.approx(-0.2) and difference["seed_deviation"] == pytest.approx(0.2)
    assert difference["mcnemar_p"][0] == difference["p"] == 1  # right on as many images, only others
    table = even((tmp_path / "figures/model_comparison.md").read_text(encoding="utf-8"))
    assert "| CNN | plain | 3 | 25,578 | 10.0 | 20 | 1.000 | **60.0 %** | 54.4 to 65.4 | 10.00 | 67.0 |" in table


def test_runs_are_compared_with_those_of_their_seed(tmp_path):
    for seed, right in enumerate((150, 30, 210)):
        made_up(tmp_path, "plain", "cnn", seed, correct=np.arange(300) < right)
    for seed in (0, 2):
        made_up(tmp_path, "plain", "mlp", seed, correct=np.arange(300) < 150)
    difference = drawn(tmp_path)["differences"][0]
    assert difference["by_seed"] == pytest.approx([0, -0.2])  # 150 minus 150 and 210
    assert difference["difference"] == pytest.approx(-0.1) and difference["seeds"] == [0, 2]
    for seed in (0, 2):
        (tmp_path / f"saved/studies/study_plain_cnn_seed{seed}.json").unlink()
    code, line = outcome("studies.compare", "--no-train", "--epochs", "3", "--output_dir", str(tmp_path))
    assert code == 2 and "no run of MLP has the seed of a run of CNN" in line


def test_seeds_that_contradict_each_other_are_no_difference(tmp_path):
    for seed, right in enumerate((200, 100)):
        made_up(tmp_path, "plain", "cnn", seed, correct=np.arange(300) < 150)
        made_up(tmp_path, "plain", "mlp", seed, correct=np.arange(300) < right)
    row = drawn(tmp_path)["differences"][0]
    assert max(row["mcnemar_p"]) < 1e-9 and row["p"] == row["p_holm"] == 1


def test_patches_of_2_are_compared_with_patches_of_4_by_their_seeds(tmp_path):
    for seed, right in enumerate((150, 180)):
        made_up(tmp_path, "plain", "vit_patch4", seed, correct=np.arange(300) < right)
    made_up(tmp_path, "plain", "vit_patch2", 0, correct=np.arange(300) < 180)
    (row,) = drawn(tmp_path)["smaller_patches"]
    assert (row["recipe"], row["seeds"]) == ("plain", [0]) and row["difference"] == pytest.approx(0.1)
    assert row["by_seed"] == [pytest.approx(0.1)] and row["bca"][0] > 0.05


@pytest.mark.parametrize(
    ("bca", "t", "word"),
    [
        ([0.01, 0.02], [0.001, 0.03], "above"),
        ([0.01, 0.02], [-0.001, 0.03], "cannot be told apart from"),
        ([-0.02, -0.01], None, "below"),
    ],
)
def test_models_of_equal_size_differ_where_images_and_seeds_say_so(bca, t, word):
    assert comparison.judge_twice({"bca": bca, "t": t}) == word


def test_a_difference_that_would_be_0_has_a_digit_more():
    assert [points(x) for x in (0.0, -0.0004, 0.0006, -0.012)] == ["+0.0", "-0.04", "+0.1", "-1.2"]
    assert interval_text([-0.013, -0.0004]) == "-1.3 to -0.04"


def test_what_is_trained_does_not_stand_beside_runs_of_another_recipe(tmp_path):
    made_up(tmp_path, "default", "cnn", epochs=3, settings={"lr": 0.5, "momentum": 0.95, "whiten": True})
    flags = ["--only", "mlp", "--recipe", "default", "--epochs", "3", "--output_dir", str(tmp_path)]
    code, line = outcome("studies.compare", *flags)
    assert code == 2 and "was trained with lr 0.5 and not 0.006" in line


def test_answers_of_a_model_that_is_trained_anew_are_not_kept(tmp_path):
    path = made_up(tmp_path, "plain", "cnn")
    path.with_suffix(".json").unlink()
    config = compare.Config(only=("cnn",), recipe="plain", seeds=1, epochs=3, output_dir=str(tmp_path))
    with mock.patch.object(runs, "run_all", lambda found, config: []):
        runs.train_missing(compare.plan(config), config)
    assert not path.with_suffix(".npz").exists()


def test_identical_models_and_one_that_is_always_wrong(tmp_path):
    correct = np.arange(300) % 2
    for model, answers in (("cnn", correct), ("vit_patch4", correct), ("mlp", np.zeros(300))):
        made_up(tmp_path, "default", model, correct=answers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same, wrong = drawn(tmp_path)["differences"]
    assert same["difference"] == 0 and same["bca"] == same["percentile"] == [0, 0] and same["p_holm"] == 1
    assert wrong["difference"] == -0.5 and wrong["bca"][1] < -0.4 and wrong["p_holm"] < 1e-30
    text = (tmp_path / "figures/model_comparison.md").read_text(encoding="utf-8")
    assert "below the CNN: MLP (-50.0)" in text and "cannot be told apart from the CNN: ViT (patch=4) (+0.0)" in text


def test_classes_that_one_gets_and_the_other_does_not(tmp_path):
    labels = np.arange(300) % 3
    made_up(tmp_path, "plain", "cnn", 0, correct=labels < 2)  # cats and dogs
    made_up(tmp_path, "plain", "cnn", 1, correct=labels < 1)  # cats
    for seed in (0, 1):
        made_up(tmp_path, "plain", "vit_patch4", seed, correct=labels > 0)  # dogs and ships
    row = drawn(tmp_path)["differences"][0]
    assert row["only_model"] == {"cat": 0, "dog": 0.5, "ship": 1}
    assert row["only_reference"] == {"cat": 1, "dog": 0, "ship": 0}


def test_equal_time_equal_parameters_and_turned_round(tmp_path):
    half, most, few = (np.arange(300) < count for count in (150, 250, 50))
    for recipe, answers in (("plain", few), ("default", most)):
        made_up(tmp_path, recipe, "cnn", correct=half, seconds=45.0, accuracies=[0.2, 0.5, 0.8])
        made_up(tmp_path, recipe, "vit_small", correct=answers, seconds=90.0, parameters=24_682)
        made_up(tmp_path, recipe, "mlp", correct=half, seconds=15.0, parameters=197_322)
    study = drawn(tmp_path)
    # half of its time: half-way between its first and its second epoch, of 0.4 and 0.5
    assert study["differences"][0]["equal_time"] == pytest.approx(
        {"seconds": 45.0, "accuracy": 0.45, "reference_accuracy": 0.8}
    )
    # the MLP ends with the CNN's first epoch
    assert study["differences"][1]["equal_time"] == pytest.approx(
        {"seconds": 15.0, "accuracy": 0.6, "reference_accuracy": 0.2}
    )
    text = "\n".join(study["answers"])
    assert "small ViT (patch=4) -35.0 at 45.0 s, MLP +40.0 at 15.0 s" in text
    assert text.count("with 0.96 times the CNN's parameters") == 2 and "7.71 times" not in text
    assert "small ViT (patch=4) -33.3 and +33.3, yes" in text


def test_at_equal_parameters_both_kinds_of_chance_count(tmp_path):
    """Two of 300 answers more with every seed, of 22 that differ: other seeds would say the same, other images not."""
    right = np.arange(300)
    for seed, count in enumerate((180, 190, 200)):
        made_up(tmp_path, "plain", "resnet20", seed, correct=right < count, parameters=269_722)
        made_up(tmp_path, "plain", "vit_wide", seed, correct=(right >= 10) & (right < count + 12), parameters=258_994)
        made_up(tmp_path, "plain", "vit_patch4", seed, correct=right < (150, 100, 150)[seed], parameters=205_642)
    fewer, equal = drawn(tmp_path)["equal_parameters"]
    assert equal["t"] == pytest.approx([2 / 300] * 2, rel=1e-5) and equal["bca"][0] < 0 < equal["bca"][1]
    by_seed = np.array([-30, -90, -50]) / 300
    expected = scipy.stats.ttest_1samp(by_seed, 0).confidence_interval()
    assert fewer["by_seed"] == pytest.approx(by_seed.tolist(), rel=1e-5) and fewer["t"] == pytest.approx(
        list(expected), rel=1e-5
    )
    assert fewer["bca"][1] < 0 < fewer["t"][1]
    text = (tmp_path / "figures/model_comparison.md").read_text(encoding="utf-8")
    assert "**Equal parameters, plain:** wide ViT (patch=4), with 0.96 times ResNet-20's parameters: cannot be" in text
    assert "**Fewer parameters, plain:** ViT (patch=4), with 0.76 times ResNet-20's parameters: cannot be" in text
    made_up(tmp_path, "plain", "vit_patch4", 1, correct=right < 150, parameters=205_642)
    assert "-13.3; 95 % intervals" in (text := drawn(tmp_path)["answers"][0]) and "below ResNet-20" in text


def test_what_is_missing_has_its_command(tmp_path):
    for model in compare.MODELS:
        for recipe in compare.RECIPES:
            if (recipe, model) != ("default", "resnet20"):
                made_up(tmp_path, recipe, model)
    drawn(tmp_path)
    (line,) = [
        line
        for line in (tmp_path / "figures/model_comparison.md").read_text(encoding="utf-8").splitlines()
        if "**Missing:**" in line
    ]
    command = "python -m studies.compare --only resnet20 --recipe default --epochs 3"
    assert line == f"* **Missing:** ResNet-20, default: `{command}`"
    config = cli.parse(compare.Config, command.split()[3:])
    assert list(compare.plan(config)) == [f"study_default_resnet20_seed{seed}" for seed in range(3)]
    made_up(tmp_path, "default", "resnet20")
    assert drawn(tmp_path)["missing_command"] == ""


def test_before_its_first_validation_nothing_is_known(tmp_path):
    made_up(tmp_path, "plain", "cnn", seconds=3.0)
    made_up(tmp_path, "plain", "vit_patch2", seconds=18.0, accuracies=[0.5, 0.6, 0.7])
    study = drawn(tmp_path)
    assert study["differences"][0]["equal_time"] == {"seconds": 3.0, "accuracy": None, "reference_accuracy": 0.6}
    assert "ViT (patch=2) (no epoch of the slower one done) at 3.0 s" in "\n".join(study["answers"])


def test_the_quicker_ones_accuracy_is_its_last_though_its_seeds_took_unequal_time(tmp_path):
    for seed, seconds in enumerate((10.0, 50.0)):
        made_up(tmp_path, "plain", "cnn", seed, seconds=seconds, accuracies=[0.2, 0.5, 0.8])
    made_up(tmp_path, "plain", "mlp", seconds=90.0)
    assert drawn(tmp_path)["differences"][0]["equal_time"]["reference_accuracy"] == pytest.approx(0.8)


def test_a_study_of_another_length_is_refused_before_anything_is_trained(tmp_path, capsys):
    made_up(tmp_path, "plain", "cnn")
    with mock.patch.object(runs, "train_missing", side_effect=AssertionError), pytest.raises(SystemExit) as stop:
        run_study("--epochs", 5, "--output_dir", tmp_path)
    assert stop.value.code == 2 and "say --epochs 3" in capsys.readouterr().err


def test_answers_of_another_model_are_noticed(tmp_path, capsys):
    path = made_up(tmp_path, "plain", "cnn", correct=np.arange(300) < 150)
    other = made_up(tmp_path, "plain", "mlp", correct=np.arange(300) < 160)
    shutil.copy(other.with_suffix(".npz"), path.with_suffix(".npz"))
    with pytest.raises(SystemExit):
        drawn(tmp_path)
    assert f"{path}.npz is of another model" in capsys.readouterr().err


def test_a_damaged_report_of_a_finished_run_can_be_trained_again(finished, tmp_path, capfd):
    """Its checkpoint, which has nothing to go on with, is not resumed."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    report = tmp_path / "copy" / "saved" / "studies" / f"{NAMES[0]}.json"
    report.unlink()
    run_study(*DIGITS, tmp_path / "copy")
    assert report.exists() and "1 to train" in capfd.readouterr().out


def test_holms_correction_is_over_both_recipes(tmp_path):
    rng = np.random.default_rng(0)
    for recipe in ("plain", "default"):
        for model in ("cnn", "vit_patch4", "mlp"):
            made_up(tmp_path, recipe, model, correct=rng.random(300) < {"cnn": 0.7, "mlp": 0.6}.get(model, 0.68))
    rows = drawn(tmp_path)["differences"]
    expected = multipletests([row["p"] for row in rows], method="holm")[1]
    assert len(rows) == 4 and [row["p_holm"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)


def test_without_the_cnn_the_rest_is_drawn(tmp_path):
    made_up(tmp_path, "plain", "vit_patch2")
    study = drawn(tmp_path)
    assert study["differences"] == study["answers"] == [] and "CNN, plain" in study["missing"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "model_comparison_curves.png",
        "model_comparison_time.png",
        "model_comparison.md",
        "model_comparison.json",
    }


def test_stored_runs_leave_out_what_is_long_and_needed_nowhere(tmp_path):
    made_up(tmp_path, "default", "cnn", correct=[1, 0, 1], images=3)
    (run,) = drawn(tmp_path)["runs"]
    assert run["correct"] == "101" and run["name"] == "CNN" and run["recipe"] == "default"
    assert set(run["metrics"]) == {"val_loss", "val_accuracy", "val_step"}


# ------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(tmp_path, capsys):
    made_up(tmp_path, "plain", "cnn")
    (tmp_path / "broken").mkdir()
    broken = made_up(tmp_path / "broken", "plain", "cnn")
    answers = broken.with_suffix(".npz").read_bytes()
    broken.with_suffix(".npz").write_bytes(answers[: len(answers) // 2])
    (tmp_path / "other").mkdir()
    made_up(tmp_path / "other", "plain", "cnn")
    made_up(tmp_path / "other", "plain", "mlp", images=200)
    (tmp_path / "report").mkdir()
    made_up(tmp_path / "report", "plain", "cnn").with_suffix(".json").write_text("{}", encoding="utf-8")
    for folder, flags, words in (
        ("", ["--only", "resnet"], "only: invalid choice: 'resnet'"),
        ("", ["--jobs", "0"], "jobs must be at least 1"),
        ("", ["--seeds", "0"], "seeds must be at least 1"),
        ("", ["--recipe", "cake"], "cake"),
        ("", ["--epochs", "20"], "was trained for 3 epochs, not 20"),
        ("none", [], "no run of the study on cifar10 is stored"),
        ("broken", [], "npz is damaged: delete it"),
        ("report", [], "results is missing; delete it"),
        ("other", [], "was tested on other images"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_study("--no-train", "--epochs", 3, "--output_dir", tmp_path / folder, *flags)
        lines = [line for line in capsys.readouterr().err.splitlines() if "studies.compare: error: " in line]
        assert stop.value.code == 2 and len(lines) == 1 and words in lines[0], lines
    assert not list(tmp_path.rglob("figures"))


# ---------------------------------------------------------------------------------------------------- statistics


def two_models(images=2000, first=0.75, second=0.7, seed=0):
    """Right answers of two models that find the same images hard."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=images)
    return [
        difficulty + 0.7 * rng.normal(size=images) < scipy.stats.norm.ppf(accuracy, scale=np.hypot(1, 0.7))
        for accuracy in (first, second)
    ]


def test_bootstrap_is_scipys_of_pairs():
    first, second = two_models()
    found = paired_bootstrap(first, second)
    for method in ("percentile", "bca"):
        expected = scipy.stats.bootstrap(
            (first.astype(float), second.astype(float)),
            lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
            n_resamples=10_000,
            paired=True,
            vectorized=True,
            method=method,
            batch=500,
            rng=1,
        ).confidence_interval
        assert found[method] == pytest.approx(list(expected), abs=1.5e-3)  # another 10,000 draws
    assert found["difference"] == pytest.approx(first.mean() - second.mean())


def test_bootstrap_pairs_the_images():
    first, second = two_models()
    differences = first.astype(float) - second
    deviation = differences.std() / np.sqrt(len(first))
    found = paired_bootstrap(first, second)
    assert len(found["resampled"]) == 10_000
    assert found["resampled"].std() == pytest.approx(deviation, rel=0.03)
    for method in ("percentile", "bca"):
        low, high = found[method]
        assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.05)
    unpaired = np.sqrt((first.var() + second.var()) / len(first))
    assert deviation < 0.8 * unpaired
    assert paired_bootstrap(first, second)["bca"] == found["bca"]  # the same every time


def test_bootstrap_of_a_rare_difference():
    """Models that differ on one image of 1,000: a draw has it k times with a probability that Poisson's law knows."""
    first, second = np.ones(1000), np.ones(1000)
    first[3] = 0
    found = paired_bootstrap(first, second)
    most = scipy.stats.poisson(1).ppf(0.975)
    assert found["percentile"] == pytest.approx([-most / 1000, 0])
    assert found["bca"][0] <= -most / 1000 and found["bca"][1] == 0  # leans the way of the skew


def test_bootstrap_of_means_over_seeds():
    """Differences that are not just -1, 0 and 1."""
    runs = [two_models(seed=seed) for seed in range(3)]
    first, second = (np.mean([pair[i] for pair in runs], axis=0) for i in range(2))
    drawn = np.random.default_rng(5).integers(0, len(first), (4000, len(first)))
    means = (first - second)[drawn].mean(axis=1)
    assert paired_bootstrap(first, second)["percentile"] == pytest.approx(
        np.quantile(means, [0.025, 0.975]).tolist(), abs=1.5e-3
    )


@pytest.mark.parametrize("first, second, difference", [(0, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, -1)])
def test_models_that_are_always_right_or_always_wrong(first, second, difference):
    first, second = np.full(500, first), np.full(500, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = paired_bootstrap(first, second)
        p = mcnemar_p(first, second)
    assert found["difference"] == difference
    assert found["bca"] == found["percentile"] == [difference, difference]
    assert p == pytest.approx(1 if difference == 0 else 2 * 0.5**500)


def test_ties_are_not_evidence():
    """Images on which both are right, or both are wrong, change no p value; as many each way are no difference."""
    some, none = np.array([1] * 12), np.array([0] * 12)
    decided = mcnemar_p(some, none)
    tied = mcnemar_p(np.concatenate([some, [1] * 500, [0] * 300]), np.concatenate([none, [1] * 500, [0] * 300]))
    assert tied == decided == pytest.approx(2 * 0.5**12)
    first = np.array([1, 0] * 50)
    assert mcnemar_p(first, 1 - first) == 1
    low, high = paired_bootstrap(first, 1 - first)["bca"]
    assert low < 0 < high and low == pytest.approx(-high, abs=0.03)


def test_mcnemar_is_the_binomial_test_of_scipy_and_statsmodels_exact_test():
    first, second = two_models(images=400)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    assert min(only_first, only_second) > 10
    found = mcnemar_p(first, second)
    assert found == pytest.approx(scipy.stats.binomtest(only_first, only_first + only_second).pvalue)
    assert found == pytest.approx(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)
    assert found == mcnemar_p(second, first)


def test_holm_by_hand():
    # 3 x 0.01; 2 x 0.03; 0.04, but not below the one before
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("right", [0, 7, 350, 500])
def test_wilson_is_scipys(right):
    low, high = scipy.stats.binomtest(right, 500).proportion_ci(method="wilson")
    assert wilson(right / 500, 500) == pytest.approx([low, high], abs=1e-12)


@pytest.mark.parametrize("second", [np.ones(4), np.ones((5, 1)), np.ones(0)])
def test_other_images_cannot_be_paired(second):
    with pytest.raises(ValueError, match="same images"):
        paired_bootstrap(np.ones(5) if len(second) else second, second)


# --------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_by_hand():
    conv = 2 * (16 * 27 * 32**2 + 32 * 16 * 9 * 16**2)
    assert compare.forward_flops(CNN(), 32) == conv + 2 * 2048 * 10
    assert compare.forward_flops(FeedForward(hidden_size=64), 32) == 2 * (3072 * 64 + 64 * 10)

    def block(tokens: int, of: int) -> int:
        """Query, key and value of all, and the rest of so many tokens: attention, output and MLP."""
        return of * 64 * 3 * 64 + tokens * (2 * of * 64 + 64 * (64 + 2 * 256))

    model = VisionTransformer(patch_size=4, pooling="mean").eval()
    assert compare.forward_flops(model, 32) == 2 * (64 * 48 * 64 + 4 * block(64, 64) + 64 * 10)
    model = VisionTransformer(patch_size=4, pooling="cls").eval()
    assert compare.forward_flops(model, 32) == 2 * (64 * 48 * 64 + 3 * block(65, 65) + block(1, 65) + 64 * 10)


def test_the_reference_is_in_the_study():
    assert comparison.REFERENCE in compare.MODELS and comparison.EARLIER.keys() <= compare.MODELS.keys()


def test_the_studys_flags_are_those_of_its_stored_runs():
    """Of the committed ones, which `python -m studies.compare` therefore does not refuse."""
    config = compare.Config()
    with mock.patch.object(runs, "run_all", lambda found, config: list(found)):
        missing = runs.train_missing(compare.plan(config), config)
    study = json.loads((compare.Config().figures / "model_comparison.json").read_text(encoding="utf-8"))
    titles = {
        f"{model.title}, {recipe}": f"study_{recipe}_{key}_"
        for recipe in compare.RECIPES
        for key, model in compare.MODELS.items()
    }
    assert {name[: -len("seed0")] for name in missing} == {titles[title] for title in study["missing"]}
