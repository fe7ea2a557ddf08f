"""Command lines: hyperparameters from a dataclass, and errors of one line with exit code 2."""

import argparse
import contextlib
import dataclasses
import datetime
import io
import itertools
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
import tyro

from support import distributed

T = TypeVar("T")


def parse(config_class: type[T], args: list[str] | None = None, presets: dict[str, dict] | None = None) -> T:
    """The dataclass `config_class` from the command line; `--help` shows its fields, their comments and defaults.

    With `presets`, the flag `--preset` names one of them: values that take the defaults' place.

    A flag may be written with dashes or underscores. A flag or value that is not known ends the program with one line
    on stderr and exit code 2.
    """
    options = {}
    if presets:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--preset", nargs="?")
        preset = finder.parse_known_args(args)[0].preset
        options["default"] = dataclasses.replace(config_class(), **presets.get(preset, {}))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_class, args=args, config=(tyro.conf.FlagCreatePairsOff,), **options)
    except SystemExit as stop:
        if stop.code:
            # tyro draws a box: its title, what was wrong, a rule, and then advice; where it must, of ASCII alone
            lines = [line.strip("│╰╯ ") for line in complaint.getvalue().splitlines()[1:]]
            what_was_wrong = itertools.takewhile(
                is_no_rule, itertools.dropwhile(lambda line: not is_no_rule(line), lines)
            )
            fail(" ".join(what_was_wrong) + " (--help shows all flags)")
        raise


def is_no_rule(line: str) -> bool:
    return line.strip("─-") != ""


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause (a bad value, a bad file) into one line; other exceptions keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        fail(str(error))


def fail(message: str, code: int = 2) -> None:
    """Print one line, of several processes only the first that fails, and end with this exit code."""
    message = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(message.split()))  # how Python begins a system's errors
    if distributed.first_to_fail():
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def provenance() -> dict:
    """What a stored figure came from: command, date, versions and machine."""
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
