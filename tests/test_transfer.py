"""Some of the classes, some of the labels, and what transfer.py makes of them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import run_main, same_weights, train_small
from PIL import Image

from images.loader import DataError
from network import Model
from studies import runs, transfer

# ------------------------------------------------------------------------------------------------ classes and labels


def test_some_classes_are_their_images_with_labels_in_the_order_given(digits):
    part = digits.select(["7", "2", "4"])
    assert part.classes == ["7", "2", "4"] and part.name == "digits"
    for name in ("train", "val", "test"):
        split, whole = getattr(part, name), getattr(digits, name)
        of_them = [
            (image, label)
            for image, label in zip(whole.images, whole.labels.tolist(), strict=True)
            if label in (7, 2, 4)
        ]
        assert torch.equal(split.images, torch.stack([image for image, _ in of_them]))
        assert split.labels.tolist() == [[7, 2, 4].index(label) for _, label in of_them]
    pixels = part.train.images.float() / 255
    assert part.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())


@pytest.mark.parametrize("names, words", [(["7", "cat"], "no class cat"), (["7"], "two"), (["7", "7"], "twice")])
def test_classes_that_are_not_there_or_too_few_are_refused(digits, names, words):
    with pytest.raises(DataError, match=words):
        digits.select(names)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.5, 1.0])
def test_a_part_of_the_labels_has_the_same_share_of_each_class(digits, fraction):
    part = digits.part_of_labels(fraction, seed=3)
    before = torch.bincount(digits.train.labels).tolist()
    assert torch.bincount(part.train.labels).tolist() == [max(1, round(fraction * count)) for count in before]
    assert part.val is digits.val and part.test is digits.test


def test_the_part_is_seeded_and_a_smaller_one_is_part_of_a_larger(digits):
    def images(fraction, seed):
        split = digits.part_of_labels(fraction, seed).train
        return {
            (image.numpy().tobytes(), label) for image, label in zip(split.images, split.labels.tolist(), strict=True)
        }

    assert images(0.1, 0) == images(0.1, 0) != images(0.1, 1)
    assert images(0.1, 0) < images(0.3, 0)


def test_a_model_of_some_classes_says_so_and_is_evaluated_on_these(tmp_path, capsys):
    model = train_small(tmp_path, *"--classes 3,1,5 --label_fraction 0.5 --batch_size 50 --epochs 2".split())
    assert "on digits, 3, 1, 5:" in capsys.readouterr().out
    path = tmp_path / "saved/VisionTransformer_digits.pt"
    assert model.metadata["classes"] == ["3", "1", "5"] and model.config["output_size"] == 3
    run_main("evaluate.py", path, "--output_dir", tmp_path)
    evaluated = json.loads((tmp_path / f"{path.stem}_evaluation.json").read_text(encoding="utf-8"))
    trained = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["results"]
    assert evaluated["images"] < 150
    assert evaluated["accuracy"] == pytest.approx(trained["test_accuracy"], rel=1e-5)  # six digits
    assert [row["class"] for row in evaluated["classes"]] == ["3", "1", "5"]


# ---------------------------------------------------------------------------------------------------------- transfer


@pytest.fixture
def processes(monkeypatch):
    """Has train.py run in this process instead of one of its own, which saves importing torch; lists its flags."""
    started = []

    def run(command, env):
        started.append(command[2:])
        code = 0
        try:
            run_main("train.py", *command[2:])
        except SystemExit as stop:
            code = stop.code or 0
        return SimpleNamespace(returncode=code, poll=lambda: code, wait=lambda: code, terminate=lambda: None)

    monkeypatch.setattr(runs.subprocess, "Popen", run)
    return started


def run_transfer(folder):
    flags = "--hidden_size 16 --num_heads 2 --num_blocks 1 --patch_size 8"
    small = ["--dataset", "digits", "--epochs", "1", "--fractions", "0.1", "1.0", f"--flags={flags}"]
    run_main("studies.transfer", *small, "--output_dir", folder)


def test_transfer_trains_everything_and_does_not_do_it_again(tmp_path, processes, capsys):
    run_transfer(tmp_path)
    assert len(processes) == 1 + 2 * 3
    saved = tmp_path / "saved" / "studies"
    source = Model.load(saved / "transfer_digits_source_seed0.pt")
    assert source.metadata["classes"] == ["0", "1", "2", "3", "4", "5"]
    models = {start: Model.load(saved / f"transfer_digits_{start}_10percent_seed0.pt") for start in transfer.STARTS}
    assert all(model.metadata["classes"] == ["6", "7", "8", "9"] for model in models.values())
    assert same_weights(models["frozen"].blocks, source.blocks)
    assert not same_weights(models["transfer"].blocks, source.blocks)
    assert not same_weights(models["scratch"].blocks, models["transfer"].blocks)
    assert models["scratch"].metadata["mean"] != source.metadata["mean"] == models["transfer"].metadata["mean"]
    report = json.loads((tmp_path / "figures/transfer_digits.json").read_text(encoding="utf-8"))
    assert [(row["images"], row["start"]) for row in report["table"]] == [
        (images, start) for images in (46, 456) for start in transfer.STARTS
    ]
    for row in report["table"]:
        percent = {46: 10, 456: 100}[row["images"]]
        stored = json.loads(
            (saved / f"transfer_digits_{row['start']}_{percent}percent_seed0.json").read_text(encoding="utf-8")
        )
        assert row["accuracy"] == pytest.approx(stored["results"]["test_accuracy"], rel=1e-5)
    with Image.open(tmp_path / "figures/transfer_digits.png") as picture:
        assert picture.width > 1000
    weights = {path: path.read_bytes() for path in saved.glob("*.pt")}
    processes.clear()
    run_transfer(tmp_path)
    assert processes == []
    assert "0 to train" in capsys.readouterr().out
    assert weights == {path: path.read_bytes() for path in saved.glob("*.pt")}


def test_without_the_source_nothing_else_is_trained(tmp_path, processes, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main("studies.transfer", "--dataset", "digits", "--flags=--num_heads 5", "--output_dir", tmp_path)
    assert stop.value.code == 2 and len(processes) == 1
    error = capsys.readouterr().err
    assert "num_heads 5" in error and "no run of this study is stored" in error


def test_summaries_are_means_over_seeds():
    stored = [
        {"start": start, "images": 10, "accuracy": accuracy}
        for start, accuracies in {"scratch": (0.5, 0.7), "transfer": (0.8, 0.8), "frozen": (0.1, 0.2)}.items()
        for accuracy in accuracies
    ]
    table = transfer.summarise(stored)
    assert [(row.start, row.accuracy, row.runs) for row in table.itertuples()] == [
        ("scratch", pytest.approx(0.6), 2),
        ("transfer", pytest.approx(0.8), 2),
        ("frozen", pytest.approx(0.15), 2),
    ]
    assert table["std"][0] == pytest.approx(0.02**0.5)
    assert "from scratch | 60.0% ± 14.1 |" in re.sub(" +", " ", transfer.as_markdown(table))


@pytest.mark.parametrize(
    "images, fraction, expected",
    [(16_000, 1.0, (20, 128)), (1_600, 0.1, (45, 128)), (160, 0.01, (100, 32)), (4, 0.01, (100, 1))],
)
def test_fewer_images_get_more_epochs_and_smaller_batches(images, fraction, expected):
    assert transfer.effort(20, fraction, images) == expected


EQUAL = "--dataset digits --fractions 0.001 0.005"  # an image of each class


@pytest.mark.parametrize(
    "flags", ["--fractions 0", "--fractions 2", "--epochs 0", "--seeds 0", "--dataset mnist", EQUAL]
)
def test_bad_flags_are_refused_in_one_line(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main("studies.transfer", *flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_each_seed_is_a_run_of_its_own_with_its_effort():
    sources, targets = transfer.plan(transfer.Config(dataset="digits", seeds=2, fractions=(0.1, 1.0)))
    assert ["--seed 0" in flags for flags in sources.values()] == [True, False]
    assert len({run["name"] for run in targets}) == len(targets) == 12
    fractions = dict(zip(sorted({run["images"] for run in targets}), (0.1, 1.0), strict=True))
    for run in targets:
        epochs, batch = transfer.effort(20, fractions[run["images"]], run["images"])
        assert f"--seed {run['seed']} " in run["flags"] and f"--epochs {epochs} --batch_size {batch}" in run["flags"]


def test_the_names_of_all_classes_are_those_of_the_data(digits):
    for task in transfer.TASKS["digits"]:
        assert set(task.split(",")) < set(digits.classes)


def test_cifar10s_animals_and_vehicles_are_its_classes(cifar10):
    source, target = (task.split(",") for task in transfer.TASKS["cifar10"])
    assert sorted(source + target) == sorted(cifar10.classes)


@pytest.mark.parametrize(
    ("few", "many", "said"),
    [(1, 1, "one run each"), (2, 2, "standard deviation of 2 runs"), (2, 1, "standard deviation of 1 to 2 runs")],
)
def test_error_bars_are_promised_only_where_there_are_several_runs(few, many, said, tmp_path):
    stored = [
        {"images": images, "start": start, "accuracy": 0.5 + 0.1 * seed}
        for images, count in ((46, few), (456, many))
        for seed in range(count)
        for start in transfer.STARTS
    ]
    figure = transfer.draw(transfer.summarise(stored), tmp_path / "transfer.png", transfer.Config(dataset="digits"))
    (axes,) = figure.axes
    assert [container.has_yerr for container in axes.containers] == [few > 1] * len(transfer.STARTS)
    assert axes.get_ylabel().endswith(said)
