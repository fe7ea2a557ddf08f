"""Cross-validation: folds that share no image, stratified; resumed fold by fold; a mean and spread that are right."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import run_main
from PIL import Image

import train
from setup_cifar import DataError
from studies import crossval
from support import cli


def rows(split):
    return {image.numpy().tobytes() for image in split.images}


def test_every_image_is_held_out_once_and_classes_have_equal_shares(digits):
    everything = rows(digits.train) | rows(digits.val)
    parts = [digits.fold(k, 4, seed=3) for k in range(4)]
    held_out = [rows(part.val) for part in parts]
    assert set.union(*held_out) == everything and sum(map(len, held_out)) == len(everything)
    counts = torch.stack([torch.bincount(part.val.labels, minlength=10) for part in parts])
    assert (counts.max(dim=0).values - counts.min(dim=0).values).max() <= 1
    for part in parts:
        assert not rows(part.train) & rows(part.val) and len(part.train) + len(part.val) == len(everything)
        assert torch.equal(part.test.images, digits.test.images)
        assert part.mean == pytest.approx((part.train.images.double() / 255).mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    again = digits.fold(1, 4, seed=3)
    assert torch.equal(again.val.images, parts[1].val.images)
    assert rows(digits.fold(1, 4, seed=4).val) != held_out[1]


def test_folds_that_cannot_be(digits):
    for number, folds in ((0, 1), (0, 1000), (5, 5), (-1, 5)):
        with pytest.raises(DataError, match="fold"):
            digits.fold(number, folds)


FLAGS = "--dataset digits --model mlp --hidden_size 8 --epochs 1 --folds 3 --output_dir".split()


def run(*flags):
    run_main("studies.crossval", *flags)


def test_folds_are_trained_once_and_averaged(tmp_path, capfd):
    run(*FLAGS, tmp_path)
    out, _ = capfd.readouterr()
    reports = [
        json.loads((tmp_path / f"saved/studies/crossval_mlp_digits_fold{k}.json").read_text(encoding="utf-8"))
        for k in range(3)
    ]
    assert [report["config"]["fold"] for report in reports] == ["0/3", "1/3", "2/3"]
    accuracies = [report["results"]["val_accuracy"] for report in reports]
    summary = json.loads((tmp_path / "figures/crossval_mlp_digits.json").read_text(encoding="utf-8"))
    assert summary["val_accuracy"]["mean"] == pytest.approx(np.mean(accuracies), rel=1e-5)
    assert summary["val_accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1), rel=1e-5)
    assert f"{np.mean(accuracies):.2%} ± {100 * np.std(accuracies, ddof=1):.2f}" in out
    assert (tmp_path / "figures/crossval_mlp_digits.png").read_bytes().startswith(b"\x89PNG")

    last = tmp_path / "saved/studies/crossval_mlp_digits_fold2"
    for ending in (".json", ".pt"):  # as if it had been killed before the last fold
        last.with_suffix(ending).unlink()
    first = last.with_name("crossval_mlp_digits_fold0.pt").stat().st_mtime_ns
    run(*FLAGS, tmp_path)
    assert last.with_name("crossval_mlp_digits_fold0.pt").stat().st_mtime_ns == first
    again = json.loads((tmp_path / "figures/crossval_mlp_digits.json").read_text(encoding="utf-8"))
    assert again["val_accuracy"] == summary["val_accuracy"]
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:  # what is stored is of another model
        run(*FLAGS, tmp_path, "--hidden_size", "9")
    assert stop.value.code == 2 and "with hidden_size 8 and not 9" in capfd.readouterr().err


@pytest.mark.parametrize("flags", [("--folds", "1"), ("--fold", "2/5"), ("--folds", "100000")])
def test_refused_in_one_line(tmp_path, capfd, flags):
    with pytest.raises(SystemExit) as stop:
        run(*FLAGS, tmp_path, *flags)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and "fold" in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_folds_of_a_folder_that_has_changed_between_them_are_not_averaged(tmp_path, capfd):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        for number in range(30):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / "train" / name / f"{number}.png")
    flags = (
        f"--dataset {tmp_path / 'pets'} --img_size 8 --model mlp --hidden_size 4 --batch_size 8 --epochs 1 --folds 2"
    )
    flags = [*flags.split(), "--gif_frames", "0", "--output_dir", str(tmp_path)]
    run_main("studies.crossval", *flags)
    capfd.readouterr()
    run_main("studies.crossval", flags[0], f"{flags[1]}/", *flags[2:])  # as a shell completes it
    assert "0 to train" in capfd.readouterr().out
    (tmp_path / "saved" / "studies" / "crossval_mlp_pets_fold1.json").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "pets" / "train" / "a" / "one more.png")
    with pytest.raises(SystemExit) as stop:
        run_main("studies.crossval", *flags)
    assert stop.value.code == 2 and "have changed since a fold was trained" in capfd.readouterr().err


@pytest.mark.parametrize("percentages", [[75.3, 74.5, 73.8], [99.9, 100, 100], [0, 0.2], [40, 80, 60], [0, 100]])
def test_folds_that_hardly_differ_look_like_it(percentages, tmp_path):
    reports = [{"metrics": {"val_accuracy": [0.1, value / 100]}} for value in percentages]
    accuracies = pd.Series(percentages) / 100
    _, right = crossval.draw(reports, accuracies, tmp_path / "crossval.png", "").axes
    low, high = right.get_ylim()
    assert high - low >= 10 - 1e-9 and 0 <= low <= min(percentages) and max(percentages) <= high + 1e-9 <= 100 + 1e-8


def test_flags_are_those_that_were_typed():
    typed = "--preset quick --minutes 1 --dataset digits --no_whiten --output_dir out --name mine"
    config = cli.parse(crossval.Config, typed.split(), train.dependent_defaults)
    assert crossval.flags_of(config) == "--minutes 1.0 --preset quick --no_whiten"  # train.py adds what comes with them


def test_a_stored_run_is_not_repeated_fold_by_fold(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--config", "saved/CNN.json", "--output_dir", tmp_path)
    assert "--config repeats one run" in capsys.readouterr().err
