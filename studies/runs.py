"""Runs of train.py for a study: what is stored is read, what is missing is trained, what was interrupted goes on.

Every study names its runs and the flags that make them; here is all that it takes to have them.
"""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

import train
from support import cli, schema
from support.files import CheckpointError, home, write_bytes
from support.report import provenance, read_json, write_results
from training.checkpoints import in_todays_words, is_checkpoint
from training.options import OWN, unify_spelling, without_effect

Runs = dict[str, str]  # name -> flags to train.py


class Row(NamedTuple):
    """A row of a study's table."""

    title: str
    flags: str  # to train.py
    seeds: int = 1  # runs


@dataclass
class StudyOptions:
    """What every study can be told."""

    # the study
    dataset: Literal["cifar10", "digits"] = "cifar10"  # what all are trained on
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str | None = None  # the folder that saved/studies/ and figures/ are in; default: the project's
    jobs: int = 1  # trainings at a time; the cores are shared out among them
    train: bool = True  # training of what is not stored yet

    @property
    def saved(self) -> Path:
        return Path(self.output_dir or home()) / "saved" / "studies"

    @property
    def figures(self) -> Path:
        return Path(self.output_dir or home()) / "figures"

    @property
    def suffix(self) -> str:
        """Data other than CIFAR-10 appears in the names of files."""
        return "" if self.dataset == "cifar10" else f"_{self.dataset}"


def train_missing(runs: Runs, options: StudyOptions, beside: Runs | None = None) -> list[str]:
    """Train each run that is not stored, one that was interrupted from where it was; returns the names of those that
    failed.

    Args:
        beside: runs that are not asked for, and stand in the same table where they are stored.

    Raises:
        ValueError: a stored run was trained with other hyperparameters than its flags say.
    """
    missing = {}
    together = {**(beside or {}), **runs}
    stored = {name: flags for name, flags in together.items() if (options.saved / f"{name}.json").exists()}
    for name, flags in stored.items():
        require_same_hyperparameters(name, flags, options)
    for name, flags in runs.items():
        if name in stored:
            continue
        (options.saved / f"{name}.npz").unlink(missing_ok=True)  # answers of a model that is no more
        missing[name] = [sys.executable, str(cli.ROOT / "train.py"), *shlex.split(flags), "--name", f"studies/{name}"]
        missing[name] += ["--output_dir", options.output_dir] if options.output_dir else []
        missing[name] += ["--gif_frames", "0"]
        # also of a run that has ended, and whose report is lost
        if is_checkpoint(options.saved / f"{name}.checkpoint"):
            missing[name].append("--resume")
    print(f"{len(runs)} runs asked for, {len(runs) - len(missing)} of them stored, {len(missing)} to train", flush=True)
    return run_all(missing, options) if missing else []


def require_same_hyperparameters(name: str, flags: str, options: StudyOptions) -> None:
    parsed = cli.parse(train.Config, shlex.split(flags), train.dependent_defaults, remember=False)
    unify_spelling(parsed)
    config = dataclasses.asdict(parsed)
    stored = in_todays_words(read_report(name, options)["config"])
    free = {*OWN, "preset", *without_effect(parsed), *(["epochs"] if parsed.minutes else [])}
    shrunk = stored.get("batch_size", parsed.batch_size)  # where there were fewer images, to a quarter of these
    if shrunk < parsed.batch_size and ("batch_size" not in parsed.given or 4 * shrunk < parsed.batch_size):
        free.add("batch_size")
    if None not in (stored.get("init_from"), parsed.init_from):  # which may be said from another folder
        free |= {"init_from"} if Path(stored["init_from"]).name == Path(parsed.init_from).name else set()
    different = [
        f"{key} {stored[key]!r} and not {value!r}"
        for key, value in config.items()
        if key in stored and key not in free and value != "auto" and stored[key] != value
    ]
    if different:
        raise ValueError(
            f"{options.saved / name}.json was trained with {', '.join(different)}: choose another --output_dir, or "
            "delete it and train again"
        )


def run_all(commands: dict[str, list[str]], options: StudyOptions) -> list[str]:
    """Run the commands, `options.jobs` at a time; returns the names of those that failed.

    One at a time they write to the terminal; several at a time each writes to saved/studies/<name>.log. Ctrl-C and
    SIGTERM stop the trainings with a checkpoint.
    """
    environment, quietly = dict(os.environ), options.jobs > 1
    if options.data_dir is not None:  # not as a flag: a report that is published need not say where data lay
        environment["DATA_DIR"] = options.data_dir
    if quietly:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.jobs)))
    options.saved.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(commands), {}, []
    previous = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        with tqdm(total=len(waiting), desc="runs", unit="run", disable=not quietly) as bar:
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    name = waiting.pop(0)
                    tqdm.write(f"started {name}" if quietly else f"\n{name}, {len(waiting)} more after it")
                    running[name] = _start(commands[name], environment, options.saved / f"{name}.log", quietly)
                time.sleep(0.05)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    bar.update()
                    if running.pop(name).returncode or not (options.saved / f"{name}.json").exists():
                        failed.append(name)
                        why = f": {last_line(options.saved / f'{name}.log')}" if quietly else ""
                        tqdm.write(f"FAILED {name}{why}")
    except (KeyboardInterrupt, SystemExit):
        print("\nstopping; the same command goes on from here", file=sys.stderr)
        if os.name == "posix":  # on Windows this would kill; there Ctrl-C reaches the trainings by itself
            for process in running.values():
                process.terminate()
        raise
    finally:
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, previous)
    return failed


def _start(command: list[str], environment: dict, log: Path, quietly: bool) -> subprocess.Popen:
    if not quietly:
        return subprocess.Popen(command, env=environment)
    environment = {**environment, "PYTHONIOENCODING": "utf-8"}  # in which the log is read, whatever the system's is
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.split("\r")[-1] for line in reversed(lines) if line.strip()), "it printed nothing")


def stored_seeds(prefix: str, options: StudyOptions) -> list[int]:
    """The seeds of the runs that are stored under this name and a seed after it."""
    seeds = (path.stem.removeprefix(prefix) for path in options.saved.glob(f"{prefix}*.json"))
    return sorted(int(seed) for seed in seeds if re.fullmatch("0|[1-9][0-9]{0,8}", seed))


def read_report(name: str, options: StudyOptions, tested: bool = False) -> dict:
    """What train.py stored of a run.

    Args:
        tested: whether it has to have figures of the test images.

    Raises:
        CheckpointError: it is damaged, or lacks these.
    """
    path = options.saved / f"{name}.json"
    advice = "; delete it and train again"
    report = read_json(path, schema.REPORT, advice)
    lengths = {len(report["metrics"][f"val_{what}"]) for what in ("loss", "accuracy", "step")}
    if lengths != {len(report["val_seconds"])} or 0 in lengths:
        wrong = "metrics.val_loss, its like and val_seconds are empty or of different lengths"
    elif Path(report["config"].get("name") or name).name != Path(name).name:
        wrong = "it is the report of another run"
    elif None in (report["results"]["val_accuracy"], report["results"]["val_loss"]):
        wrong = "results.val_accuracy or results.val_loss is missing"
    elif tested and not {"test_accuracy", "test_loss"} <= report["results"].keys():
        wrong = "the run was trained with --no_test"
    else:
        return report
    raise CheckpointError(f"{path} cannot be used: {wrong}{advice}")


def markdown(rows: list[dict[str, str]]) -> str:
    """A Markdown table of rows of texts by column; the first column, recipes and commands are set to the left."""
    frame = pd.DataFrame(rows)
    left = {frame.columns[0], "recipe", "command", "flags"}
    align = ["left" if name in left else "right" for name in frame.columns]
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def spread(mean: float, std: float, digits: int = 1) -> str:
    """A fraction in percent, with its standard deviation where that is known (not nan)."""
    return f"{mean:.{digits}%}" + ("" if np.isnan(std) else f" ± {100 * std:.{digits}f}")


def records(table: pd.DataFrame) -> list[dict]:
    """The rows of a table as plain values, with None for nan."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def write_study(
    prefix: Path, text: str, config: StudyOptions, pictures: list[Path], failed: list[str], **results
) -> None:
    """Print the tables and write them as <prefix>.md, and everything as <prefix>.json; say what was written. Ends with
    exit code 1 where a run could not be trained."""
    print(f"\n{text}\n")
    paths = [prefix.with_name(prefix.name + ending) for ending in (".md", ".json")]
    write_bytes(paths[0], f"{text}\n".encode())
    # where files lie on one machine says nothing to others
    local = {field.name for field in dataclasses.fields(StudyOptions)} - {"dataset"}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in local}
    if not write_results(paths[1], {"config": settings, **results, "provenance": provenance()}):
        paths.pop()
    cli.say_written([*paths, *pictures])
    if failed:
        cli.fail(f"not trained: {', '.join(failed)}; what went wrong is said above", code=1)
