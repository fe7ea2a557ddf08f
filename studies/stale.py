"""Stale reports: those of which today's code would make another one from the command that is stored with them."""

import contextlib
import dataclasses
import functools
import io
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import train
from studies import ablation, compare, crossval
from support import cli
from support.files import CheckpointError
from support.report import read_json
from training.checkpoints import in_todays_words
from training.options import OWN, without_effect

OF_CROSSVAL = {"folds", "jobs", "fold"}  # what differs between its runs, and its own fields
NOT_REPEATED = {"--name": 1, "--output_dir": 1, "--threads": 1, "--gif_frames": 1, "--resume": 0}  # flags, their values

SUMMARIES = ("ablation", "ablation_20epochs", "model_comparison", "crossval")  # of runs that are compared themselves


class Stale(NamedTuple):
    """A report that today's defaults would not make."""

    path: str
    changes: dict[str, tuple[Any, Any]]  # hyperparameter -> what is stored, what it would be now
    command: str  # that makes it anew


def find_stale(root: Path) -> list[Stale]:
    """All stale reports of runs in saved/ and saved/studies/, and of the cross-validation."""
    found = []
    paths = [*sorted((root / "saved").glob("*.json")), *sorted((root / "saved" / "studies").glob("*.json"))]
    for path in [*paths, *(root / "figures").glob("crossval.json")]:
        name = path.relative_to(root).as_posix()
        with contextlib.suppress(CheckpointError):
            report = read_json(path)
            if changes := changes_since(report):
                found.append(Stale(name, changes, command_of(name, report)))
    return found


def changes_since(report: dict) -> dict[str, tuple[Any, Any]]:
    """The hyperparameters that differ between a report's config and what its command, or for a run of a study what that
    study's code, would give today.

    Left out is what changes nothing in that run, what concerns the run alone (folders, threads, device), and what the
    machine decides: the data set and the precision where the command does not say them.
    """
    stored = stored_config(report)
    config = parse(flags_of_study(stored.get("name")) or report["provenance"]["command"])
    if config is None:
        return {"command": ("accepted", "refused")}
    own = OF_CROSSVAL if isinstance(config, crossval.Config) else set()
    free = {*OWN, *own, "preset", *without_effect(config)}
    free |= {"precision", "dataset"} - set(config.given)
    if config.minutes:
        free.add("epochs")  # what fitted into the time on that machine
    now = dataclasses.asdict(config)
    return {
        name: (stored[name], value)
        for name, value in now.items()
        if name in stored and name not in free and "auto" not in (value, stored[name]) and stored[name] != value
    }


def flags_of_study(name: str | None) -> str | None:
    """The command by which studies.compare or studies.ablation would make the run of that name today, if one would."""
    flags = planned_runs().get(Path(name).name) if name else None
    return None if flags is None else f"python train.py {flags}"


@functools.cache
def planned_runs() -> dict[str, str]:
    """The runs of both studies with their flags, also of more seeds than they take by themselves."""
    plans = [compare.plan(compare.Config(seeds=10))]
    plans += [ablation.plan(ablation.Config(epochs=epochs, seeds=10)) for epochs in (5, 20)]
    return {name: flags for plan in plans for name, flags in plan.items()}


@functools.cache
def parse(command: str) -> train.Config | None:
    """Today's config of a stored command, `python train.py ...` or `python -m studies.crossval ...`; None where it is
    refused."""
    words = shlex.split(command)
    flags = words[3:] if words[1] == "-m" else words[2:]
    kind = crossval.Config if "crossval" in " ".join(words[1:3]) else train.Config
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return cli.parse(kind, flags, train.dependent_defaults, remember=False)
    return None


def stored_config(report: dict) -> dict[str, Any]:
    stored = report.get("trained") or report["config"]  # crossval's has one of the study and one of its runs
    return in_todays_words(stored)


def command_of(name: str, report: dict) -> str:
    """What makes the report anew, under the same name."""
    stored = flags_of_study(stored_config(report).get("name")) or report["provenance"]["command"]
    words, kept = shlex.split(stored), []
    if name.startswith("figures/"):
        return "python -m studies.crossval " + shlex.join(words[3:] if words[1] == "-m" else words[2:])
    rest = iter(words[2:])
    for word in rest:
        if word in NOT_REPEATED:
            for _ in range(NOT_REPEATED[word]):
                next(rest, None)
        else:
            kept.append(word)
    target = name.removeprefix("saved/").removesuffix(".json")
    study = "/" in target  # the two committed models keep their pictures, and their names
    return shlex.join(["python", "train.py", *kept, *(["--gif_frames", "0", "--name", target] if study else [])])


def sentence(runs: dict[str, dict], briefly: bool = False) -> str:
    """What a page says of those of its runs that are stale; nothing where none is. `briefly`: without what differs."""
    stale = {name: changes for name, run in runs.items() if (changes := changes_since(run))}
    if not stale:
        return ""
    if len(stale) == len(runs):
        who = "This run was" if len(runs) == 1 else f"These {len(runs)} runs were"
    else:
        earlier = short_names(stale, list(runs))
        others = short_names([name for name in runs if name not in stale], list(runs))
        who = f"All runs here but {', '.join(others)}" if len(others) < len(earlier) else ", ".join(earlier)
        who += "" if briefly else f" ({len(stale)} of the {len(runs)} runs)"
        who += " was" if len(stale) == 1 else " were"
    if briefly:
        return f"{who} made with earlier defaults."
    pairs = {}
    for changes in stale.values():
        for name, pair in changes.items():
            pairs.setdefault(name, {})[tuple(map(in_words, pair))] = None
    if len(pairs) > 4:  # of another preset, and the numbers are in presets.py and in the reports
        return f"{who} made with earlier values of {', '.join(f'`{name}`' for name in pairs)}."
    changes = "; ".join(f"`{name}` " + " or ".join(f"{a}, now {b}" for a, b in pairs[name]) for name in pairs)
    return f"{who} made with earlier defaults: {changes}."


def short_names(paths: Iterable[str], among: list[str]) -> list[str]:
    """Runs by name in code; where all of `among` that begin alike are meant, by that beginning and a star."""
    chosen, names = {Path(path).stem for path in paths}, []
    everything = [Path(path).stem for path in among]
    for name in sorted(chosen):
        parts = name.split("_")
        for beginning in ("_".join([*parts[:k], ""]) for k in range(1, len(parts))):
            alike = {other for other in everything if other.startswith(beginning)}
            if len(alike) > 1 and alike <= chosen:
                name = f"{beginning}*"
                break
        names.append(f"`{name}`")
    return list(dict.fromkeys(names))


def in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, int | float) else "none" if value is None else str(value)


def not_comparable(root: Path) -> list[str]:
    """Results of studies that do not store the hyperparameters they were made with: a line each, from the oldest on."""
    lines = []
    for path in sorted((root / "figures").glob("*.json")):
        with contextlib.suppress(CheckpointError):
            provenance = read_json(path).get("provenance") or {}
            parts = provenance.values() if provenance and "command" not in provenance else [provenance]
            for part in parts if path.stem not in SUMMARIES else ():
                command = re.sub(
                    r"python (?:-m studies\.)?(benchmark|scaling|transfer)(?:\.py)?",
                    r"python -m studies.\1",
                    part.get("command", ""),
                )
                command = re.sub(r" --(output_dir|threads) \S+", "", command)
                date, name = part.get("date") or "no date", path.relative_to(root).as_posix()
                lines.append(f"{date} {name}: {command or 'no command is stored'}")
    return list(dict.fromkeys(sorted(lines)))


def as_text(stale: list[Stale]) -> str:
    """A report to a line, with the fields that differ, and below it the command that makes it anew."""
    lines = []
    for path, changes, command in stale:
        listed = ", ".join(f"{name} {in_words(a)}, now {in_words(b)}" for name, (a, b) in changes.items())
        lines += [f"{path}: {listed}", f"  {command}"]
    return "\n".join(lines)
