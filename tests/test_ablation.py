"""ablation.py: rows of one changed thing, validation accuracy alone, and a table that is right."""

import dataclasses
import json
import re
import statistics

import pytest
from helpers import run_main

from studies import ablation
from train import Config as TrainConfig


def run(*flags):
    run_main("studies.ablation", *flags)


def table_of(folder):
    """The Markdown table without the spaces that make its columns even."""
    return re.sub(" +", " ", (folder / "figures" / "ablation.md").read_text(encoding="utf-8"))


def test_every_row_changes_one_hyperparameter_that_exists():
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert len(ablation.ROWS) >= 9 and ablation.ROWS["default"].flags == ""
    for key, row in ablation.ROWS.items():
        if key != "default":
            flag, value, *rate = row.flags.replace("--no_whiten", "--whiten False").split()
            assert str(fields[flag.removeprefix("--")]) != value
            assert not rate or (flag, rate[0]) == ("--optimizer", "--lr")  # an optimiser, at a rate other than its own
    assert sum(row.seeds >= 3 for row in ablation.ROWS.values()) >= 4  # the default and three more


def store(folder, key, seed, accuracy):
    folder.joinpath("saved", "studies").mkdir(parents=True, exist_ok=True)
    report = {
        "results": {
            "parameters": 1,
            "val_accuracy": accuracy,
            "val_loss": 1.0,
            "test_loss": 1,
            "test_accuracy": 0.123,
            "training_seconds": 1,
        },
        "config": {"epochs": 5, "seed": seed},
        "provenance": {"machine": "", "threads": 1, "accelerator": None, "torch": ""},
        "metrics": {"val_loss": [1], "val_accuracy": [accuracy], "val_step": [1]},
        "val_seconds": [1],
    }
    (folder / "saved" / "studies" / f"ablation_{key}_seed{seed}.json").write_text(json.dumps(report), encoding="utf-8")


def test_table_and_figure_of_what_is_stored(tmp_path, capsys):
    for seed, accuracy in enumerate((0.70, 0.72, 0.77)):
        store(tmp_path, "default", seed, accuracy)
    for seed, accuracy in enumerate((0.60, 0.64)):
        store(tmp_path, "adamw", seed, accuracy)
    store(tmp_path, "cls", 0, 0.75)
    run("--no-train", "--output_dir", tmp_path)
    table = table_of(tmp_path)
    std = 100 * statistics.stdev((0.70, 0.72, 0.77))
    assert f"| the default recipe | 73.0% ± {std:.1f} | | | 3 | `python train.py --epochs 5` |" in table
    # -10 and -8 to the runs with the same seed: Student's t of one degree of freedom is 12.706, the standard error 1
    adamw = "| 62.0% ± 2.8 | -9.0 | -21.7 to +3.7 | 2 | `python train.py --epochs 5 --optimizer adamw` |"
    assert f"| AdamW in place of Muon {adamw}" in table
    assert "| CLS token in place of the mean | 75.0% | +5.0 | | 1 |" in table
    assert "12.3" not in table + capsys.readouterr().out  # the test accuracy
    report = json.loads((tmp_path / "figures" / "ablation.json").read_text(encoding="utf-8"))
    assert [row["row"] for row in report["rows"]] == ["default", "adamw", "cls"] and report["provenance"]["torch"]
    assert (tmp_path / "figures" / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_stored_of_that_length(tmp_path, capsys):
    store(tmp_path, "default", 0, 0.7)
    with pytest.raises(SystemExit):
        run("--no-train", "--epochs", 20, "--output_dir", tmp_path)
    assert "no run of 20 epochs" in capsys.readouterr().err


def test_rows_are_trained_once(tmp_path, monkeypatch, capsys):
    rows = {key: ablation.Row("row", ablation.ROWS[key].flags) for key in ("default", "adamw")}
    monkeypatch.setattr(ablation, "ROWS", rows)
    flags = ("--dataset", "digits", "--epochs", "1", "--output_dir", tmp_path, "--jobs", "2")
    run(*flags, "--only", "default")
    assert "1 to train" in capsys.readouterr().out
    run(*flags)
    assert "1 to train" in capsys.readouterr().out
    report = json.loads(
        (tmp_path / "saved" / "studies" / "ablation_digits_1epochs_adamw_seed0.json").read_text(encoding="utf-8")
    )
    assert report["config"]["optimizer"] == "adamw" and report["config"]["epochs"] == 1
    run(*flags, "--only", "default", "--seeds", "2")
    assert "2 runs asked for, 1 of them stored" in capsys.readouterr().out
    run(*flags)
    out = capsys.readouterr().out
    assert "0 to train" in out and f"{report['results']['val_accuracy']:.1%}" in out
