"""--no_test: the same training, and the test images are not touched."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA_DIR
from helpers import MODEL, ROOT, outcome, run_main, same_weights, train_small
from PIL import Image

from network import Model
from setup_cifar import CIFAR, load_data
from studies import compare, runs
from support.files import CheckpointError
from support.report import read_json, write_json
from training.trained import load_model
from training.trained import test_loader as images_to_test_on

FIGURES_OF_TESTS = {"test_accuracy", "test_loss", "tested_epoch"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The reports and models of two runs, with and without the test."""
    folders = [tmp_path_factory.mktemp(name) for name in ("tested", "untested")]
    models = [train_small(folder, *flags) for folder, flags in zip(folders, ((), ("--no_test",)), strict=True)]
    return folders, models, [read_json(folder / "saved" / f"{MODEL}.json") for folder in folders]


def test_what_is_learned_is_the_same_and_the_report_says_what_was_not_done(both):
    _, models, (tested, untested) = both
    assert same_weights(*models) and tested["metrics"] == untested["metrics"]
    assert tested["results"]["tested"] is True and untested["results"]["tested"] is False
    assert not FIGURES_OF_TESTS & untested["results"].keys()
    assert tested["results"].keys() - untested["results"].keys() == FIGURES_OF_TESTS
    assert "images" not in untested and untested["images_but_test"] == tested["images_but_test"]
    assert "test" not in models[1].metadata["fingerprints"]


def test_a_run_without_the_test_takes_the_place_of_one_with_it(both, tmp_path, capsys):
    """And the other way round: they have one name, and neither is another run."""
    folders, _, _ = both
    shutil.copytree(folders[0], tmp_path, dirs_exist_ok=True)
    for flags in (("--no_test",), ()):
        train_small(tmp_path, *flags)
        assert "now called" not in capsys.readouterr().out
    train_small(tmp_path, "--resume", "--epochs", "2", "--resume_changed", "--no_test")
    assert read_json(tmp_path / "saved" / f"{MODEL}.json")["results"]["tested"] is False
    train_small(tmp_path, "--resume", "--epochs", "2")  # it has ended
    assert "has finished: validation accuracy" in capsys.readouterr().out


def test_side_by_side_has_an_empty_cell(both, tmp_path, monkeypatch, capsys):
    folders, _, _ = both
    for folder in folders:
        shutil.copy(folder / "saved" / f"{MODEL}.json", tmp_path / f"{folder.name}.json")
    monkeypatch.chdir(tmp_path)
    run_main("evaluate.py", "--runs", *tmp_path.glob("*.json"), "--each", "--output_dir", tmp_path)
    header, tested, untested = sorted(capsys.readouterr().out.splitlines()[:3], key=lambda line: line[0] != "n")
    cells = {line.split()[0]: line.count("%") for line in (tested, untested)}
    assert "test_accuracy" in header and sorted(cells.values()) == [1, 2]


def test_a_model_that_was_not_tested_is_tested_later(both):
    folders, _, (tested, _) = both
    model = load_model(folders[1] / "saved" / f"{MODEL}.pt")
    images, labels = next(iter(images_to_test_on(model, None, 1000, "cpu")))
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=1) == labels).float().mean().item()
    assert accuracy == pytest.approx(tested["results"]["test_accuracy"])


def test_a_study_that_reports_test_figures_says_that_there_are_none(both, tmp_path):
    _, _, (_, untested) = both
    (tmp_path / "saved" / "studies").mkdir(parents=True)
    name = "study_digits_plain_cnn_seed0"
    config = {**untested["config"], "name": name}
    write_json(tmp_path / "saved" / "studies" / f"{name}.json", {**untested, "config": config})
    options = compare.Config(dataset="digits", epochs=1, output_dir=str(tmp_path))
    assert runs.read_report(name, options)["results"]["val_accuracy"] is not None
    with pytest.raises(CheckpointError, match="--no_test"):
        compare.find_reports(options)


@pytest.mark.parametrize("own_test", [True, False])
def test_pictures_to_test_on_are_not_read(tmp_path, own_test, capsys):
    random = np.random.default_rng(0)
    for part in ("train", "test") if own_test else ("train",):
        for name in ("a", "b"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(40):
                path = tmp_path / "pets" / part / name / f"{number}.png"
                Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
                if part == "test":
                    path.write_bytes(b"no picture")  # which would be said, and would be an error
    folder, options = str(tmp_path / "pets"), {"img_size": 8}
    data = load_data(folder, **options, test=False)
    err = capsys.readouterr().err
    assert len(data.test) == 0 and "skipped" not in err and "pets/test" not in err
    if own_test:
        with pytest.raises(ValueError, match="no picture"):
            load_data(folder, **options)
    else:
        whole = load_data(folder, **options)
        assert len(whole.test) > 0 and whole.fingerprints.items() >= data.fingerprints.items()


def test_of_cifar_the_file_with_the_test_images_is_not_read(cifar10, tmp_path):
    folder = CIFAR["cifar10"].folder
    source = Path(DATA_DIR or ROOT / "data") / folder
    (tmp_path / folder).mkdir()
    for path in source.iterdir():
        if path.name != "test_batch":
            (tmp_path / folder / path.name).symlink_to(path.resolve())
    data = load_data("cifar10", tmp_path, test=False)
    assert len(data.test) == 0 and cifar10.fingerprints.items() >= data.fingerprints.items()
    flags = "--dataset cifar10 --model mlp --hidden_size 4 --label_fraction 0.01 --epochs 1 --gif_frames 0 --no_test"
    assert outcome("train.py", *flags.split(), "--data_dir", tmp_path, "--output_dir", tmp_path) == (0, "")
    assert outcome("train.py", *flags.split()[:-1], "--data_dir", tmp_path, "--output_dir", tmp_path)[0] == 2
    assert isinstance(Model.load(next((tmp_path / "saved").glob("*.pt"))), Model)
