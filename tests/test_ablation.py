"""ablation.py: rows of one changed thing, validation accuracy alone, and a table that is right."""

import dataclasses
import json
import statistics
import sys

import pytest

from studies import ablation
from train import Config as TrainConfig


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["ablation.py", *map(str, flags)])
    ablation.main()


def test_every_row_changes_one_hyperparameter_that_exists():
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert len(ablation.ROWS) >= 9 and ablation.ROWS["default"].flags == ""
    for key, row in ablation.ROWS.items():
        if key != "default":
            flag, value, *rate = row.flags.split()
            assert str(fields[flag.removeprefix("--")]) != value
            assert not rate or (flag, rate[0]) == ("--optimizer", "--lr")  # an optimiser, at a rate other than its own
    assert sum(row.seeds >= 3 for row in ablation.ROWS.values()) >= 4  # the default and three more


def store(folder, key, seed, accuracy):
    folder.joinpath("saved").mkdir(exist_ok=True)
    report = {"results": {"val_accuracy": accuracy, "test_accuracy": 0.123}}
    (folder / "saved" / f"ablation_{key}_seed{seed}.json").write_text(json.dumps(report))


def test_table_and_figure_of_what_is_stored(tmp_path, monkeypatch, capsys):
    for seed, accuracy in enumerate((0.70, 0.72, 0.77)):
        store(tmp_path, "default", seed, accuracy)
    for seed, accuracy in enumerate((0.60, 0.64)):
        store(tmp_path, "adamw", seed, accuracy)
    store(tmp_path, "cls", 0, 0.75)
    run(monkeypatch, "--no-train", "--output_dir", tmp_path)
    table = (tmp_path / "figures" / "ablation.md").read_text()
    std = 100 * statistics.stdev((0.70, 0.72, 0.77))
    assert f"| the default recipe | 73.0% ± {std:.1f} |  | 3 | `python train.py --epochs 5` |" in table
    adamw = "| AdamW in place of Muon | 62.0% ± 2.8 | -9.0 | 2 | `python train.py --epochs 5 --optimizer adamw` |"
    assert adamw in table  # -10 and -8 to the runs with the same seed
    assert "| CLS token in place of the mean | 75.0% | +5.0 | 1 |" in table
    assert "12.3" not in table + capsys.readouterr().out  # the test accuracy
    report = json.loads((tmp_path / "figures" / "ablation.json").read_text())
    assert [row["row"] for row in report["rows"]] == ["default", "adamw", "cls"] and report["provenance"]["torch"]
    assert (tmp_path / "figures" / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_stored_of_that_length(tmp_path, monkeypatch, capsys):
    store(tmp_path, "default", 0, 0.7)
    with pytest.raises(SystemExit):
        run(monkeypatch, "--no-train", "--epochs", 20, "--output_dir", tmp_path)
    assert "no run of 20 epochs" in capsys.readouterr().err


def test_rows_are_trained_once(tmp_path, monkeypatch, capsys):
    rows = {key: ablation.Row("row", ablation.ROWS[key].flags) for key in ("default", "adamw")}
    monkeypatch.setattr(ablation, "ROWS", rows)
    flags = ("--dataset", "digits", "--epochs", "1", "--output_dir", tmp_path, "--jobs", "2")
    run(monkeypatch, *flags, "--only", "default")
    assert "1 run to train" in capsys.readouterr().out
    run(monkeypatch, *flags)
    assert "1 run to train" in capsys.readouterr().out
    report = json.loads((tmp_path / "saved" / "ablation_digits_1epochs_adamw_seed0.json").read_text())
    assert report["config"]["optimizer"] == "adamw" and report["config"]["epochs"] == 1
    run(monkeypatch, *flags)
    out = capsys.readouterr().out
    assert "0 runs to train" in out and f"{report['results']['val_accuracy']:.1%}" in out
