"""Runs as they lie in saved/: finished ones, interrupted ones, and those of earlier versions."""

import glob
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import schema
from support.files import CheckpointError, find_file, home
from support.report import read_json
from training.checkpoints import in_todays_words, read_checkpoint
from training.options import OWN

# of a report what is needed here: reports of earlier versions say less, and a run without validation has no such values
FIGURES = {"accuracy": schema.FRACTION, "loss": schema.NUMBER}
REPORT = schema.optional(
    {
        "results": schema.optional(
            {},
            parameters=schema.COUNT,
            epochs=schema.EPOCHS,
            training_seconds=schema.NOT_NEGATIVE,
            **{f"{part}_{what}": schema.maybe(kind) for part in ("val", "test") for what, kind in FIGURES.items()},
        ),
        "config": schema.optional({...: schema.PLAIN}, model=schema.TEXT, epochs=schema.EPOCHS, seed=schema.COUNT),
        "metrics": {f"val_{what}": [schema.maybe(kind)] for what, kind in FIGURES.items()},
    },
    images=schema.TEXT,
)
NOT_LEARNED = OWN | {"preset"}  # a preset's values all count
MEASURED = (
    "parameters",
    "epochs",
    "val_accuracy",
    "best_val_accuracy",
    "test_accuracy",
    "val_loss",
    "best_val_loss",
    "minutes",
)


@dataclass
class StoredRun:
    """A run as it is stored: `measured` has None for what is not known, `curves` are by epoch."""

    name: str
    config: dict[str, Any]
    finished: bool
    measured: dict[str, float | None]
    curves: dict[str, list[float | None]]
    images: str | None  # a fingerprint


def read_runs(paths: tuple[str, ...], defaults: dict) -> list[StoredRun]:
    """What is stored of each run; of several files, those that cannot be read are left out with a line each."""
    found = find_files(paths)
    stems = Counter(path.stem for path in found)
    runs, wrong = [], []
    for path in found:
        name = path.stem if stems[path.stem] == 1 else path.with_suffix("").as_posix()
        try:
            runs.append(read_run(path, name, defaults))
        except CheckpointError as error:
            wrong.append(str(error))
    if not runs:
        raise ValueError(wrong[0] if len(wrong) == 1 else f"none of {len(wrong)} files is a run: {wrong[0]}")
    for line in wrong:
        print(f"left out: {line}", file=sys.stderr)
    return runs


def find_files(paths: tuple[str, ...]) -> list[Path]:
    """The reports and checkpoints among what was named; where a run has both, its report. Windows leaves patterns as
    they are, so that they are looked up here."""
    found, begun, others = {}, [], []
    for given in paths:
        path = find_file(given)
        if path.is_dir():
            matches = sorted(path.iterdir())
        elif path.exists():
            matches = [path]
        else:  # Path.glob takes no pattern with a folder of any kind before it
            matches = sorted(map(Path, glob.glob(given) or glob.glob(str(home() / given))))  # noqa: PTH207
        if not matches:
            raise ValueError(f"there is nothing in {given}" if path.is_dir() else f"there is no {given}")
        for match in matches:
            if match.suffix not in (".json", ".checkpoint") or not match.is_file():
                others.append(match)
                ends = (match.with_suffix(ending) for ending in (".json", ".checkpoint"))
                if match.suffix == ".lock" and not any(end.exists() for end in ends):
                    begun.append(f"{match.with_suffix('')} has begun and has no checkpoint yet")
                continue
            report = match.with_suffix(".json")
            found.setdefault(report.resolve(), report if report.exists() else match)
    if not found and begun:
        raise ValueError(f"{begun[0]}: the first is written when an epoch ends")
    for line in begun:
        print(f"left out: {line}", file=sys.stderr)
    if not found:
        raise ValueError(f"{others[0]} is no run: those are stored as .json, and as .checkpoint until they end")
    return list(found.values())


def read_run(path: Path, name: str, defaults: dict) -> StoredRun:
    """
    Raises:
        CheckpointError: it is damaged, or something else than a run.
    """
    if path.suffix == ".json":
        report = read_json(path, REPORT)
        results = report["results"]
    else:
        report = read_checkpoint(path)
        results = report["results"] or results_until_now(report["runner"])
        report["metrics"] = {what: values.tolist() for what, values in report["runner"]["metrics"].items()}
    curves = {what: report["metrics"][f"val_{what}"] for what in FIGURES}
    known = {what: [value for value in values if value is not None] for what, values in curves.items()}
    last = {f"val_{what}": values[-1] for what, values in curves.items() if values}
    seconds = results.get("training_seconds")
    measured = {
        "parameters": None,
        "epochs": len(curves["loss"]),
        **last,  # earlier versions do not have it among the results
        "best_val_accuracy": max(known["accuracy"], default=None),
        "best_val_loss": min(known["loss"], default=None),
        "minutes": None if seconds is None else seconds / 60,
        **results,
    }
    return StoredRun(
        name=name,
        config=hyperparameters(report["config"], defaults, path),
        finished=path.suffix == ".json" or report["results"] is not None,
        measured={what: measured.get(what) for what in MEASURED},
        curves=curves,
        images=report.get("images"),
    )


def results_until_now(runner: dict) -> dict:
    """Of a checkpoint. BatchNorm's statistics are among the weights, and are not learned."""
    statistic = ("running_mean", "running_var", "num_batches_tracked")
    clock = runner["callbacks"].get("Clock", {}).get("seconds")
    return {
        "parameters": sum(x.numel() for name, x in runner["model"].items() if not name.endswith(statistic)),
        "epochs": runner["progress"]["epoch"],
        **({"training_seconds": clock} if schema.NOT_NEGATIVE.fits(clock) else {}),
    }


def hyperparameters(config: dict, defaults: dict, path: Path) -> dict[str, Any]:
    """All that counts of a config, with the default of what an earlier version did not have, spelled as it is now."""
    config = in_todays_words(config)
    if config.get("dataset") == "auto":
        config["dataset"] = "digits" if path.stem.endswith("_digits") else "cifar10"
    return {name: value for name, value in {**defaults, **config}.items() if name not in NOT_LEARNED}
