"""Reports: what was found and how it came about, as JSON with a checksum, and as a table for the terminal."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from support import cli, distributed, schema
from support.files import ROOT, CheckpointError, short, write_bytes

PACKAGES = ("torchvision", "timm", "vit-pytorch", "numpy", "scipy")  # besides torch, those that figures depend on


def write_json(path: str | Path, contents: dict) -> None:
    """Write plain values as JSON that a person can read: indented, with lists of numbers or names on one line. What is
    not a finite number, and so has no place in JSON, becomes null; `sha256` is the checksum of all the rest."""
    contents = json.loads(json.dumps(_finite(contents)))  # as it will be read: names are text, and lists are lists
    text = json.dumps({**contents, "sha256": checksum(contents)}, indent=1, allow_nan=False)
    text = re.sub(r"\[\n\s*([^][{}]*?)\n\s*\]", lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text)
    write_bytes(path, (text + "\n").encode())


def write_results(path: str | Path, contents: dict, varying: tuple[str, ...] = ()) -> bool:
    """`write_json` of figures that are computed again and again: rounded to 6 digits, and only where they have changed.

    A file that has the same figures but for its `provenance` is left as it is, with the date and the machine of its
    first time: sums in another order, on more threads say, differ in the seventh digit.

    Args:
        varying: names of what is measured anew each time, seconds say, and so does not count as a change.

    Returns:
        Whether the file was written.
    """
    contents = json.loads(json.dumps(_rounded(_finite(contents))))
    with contextlib.suppress(CheckpointError):  # none, or a damaged one
        if same_results(read_json(path), contents, ("provenance", *varying)):
            print(f"the same results as before, left as they are:\n  {short(path)}")
            return False
    write_json(path, contents)
    return True


def same_results(stored: Any, new: Any, varying: tuple[str, ...] = ()) -> bool:
    """Whether two nested values are equal: numbers up to rounding, and without regard to the keys in `varying`."""
    if isinstance(stored, dict) and isinstance(new, dict):
        names = (stored.keys() | new.keys()) - set(varying)
        same_names = names <= stored.keys() and names <= new.keys()
        return same_names and all(same_results(stored[name], new[name], varying) for name in names)
    if isinstance(stored, list) and isinstance(new, list):
        pairs = zip(stored, new, strict=False)
        return len(stored) == len(new) and all(same_results(*pair, varying) for pair in pairs)
    if isinstance(stored, float) or isinstance(new, float):
        numbers = isinstance(stored, int | float) and isinstance(new, int | float)
        return numbers and math.isclose(stored, new, rel_tol=1e-5, abs_tol=2e-6)
    return stored == new


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_json(path: str | Path, table: dict | None = None, advice: str = "") -> dict:
    """What `write_json` wrote. Files of earlier versions have no checksum.

    Args:
        table: of support/schema.py, what has to be in the file.
        advice: what to do about a file that cannot be used.

    Raises:
        CheckpointError: missing, not JSON, altered, or not what the table says.
    """
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
        names = [name for name, value in contents.items() if name == "sha256" or _is_checksum(value)]
        found = {name: contents.pop(name) for name in names}
        if found and found != {"sha256": checksum(contents)}:  # its name may be what is damaged
            raise CheckpointError(f"{path} is damaged: its contents do not match its checksum{advice}")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is damaged or cut short: it is not JSON of this project{advice}") from None
    try:
        schema.check(contents, table or {})
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}{advice}") from None
    return contents


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _is_checksum(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def checksum(contents: dict) -> str:
    """SHA-256 of the values, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_table(columns: dict[str, list[str]], left: Collection[str]) -> str:
    """Cells by heading as aligned columns for the terminal; those in `left` begin at their left, others end at their
    right."""
    aligned = []
    for heading, cells in columns.items():
        cells = [heading, *cells]
        blanks = [" " * (max(map(width_of, cells)) - width_of(cell)) for cell in cells]
        aligned.append([cell + b if heading in left else b + cell for cell, b in zip(cells, blanks, strict=True)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))


def width_of(text: str) -> int:
    """In columns of a terminal, of which Chinese, Japanese and Korean letters take two."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def shorten(text: str, length: int) -> str:
    """To `length` columns of a terminal, with its middle left out: names often begin alike, and end alike."""
    if width_of(text) <= length:
        return text
    letters = max(4, length * len(text) // width_of(text))
    end = (letters - 3) // 2
    return f"{text[: letters - 3 - end]}...{text[len(text) - end :]}"


def shorten_names(names: list[str], length: int) -> list[str]:
    """Each to this length, or to the next at which no two become alike."""
    while len({shorten(name, length) for name in names}) < len(set(names)):
        length += 1
    return [shorten(name, length) for name in names]


def instruction_sets() -> list[str]:
    """Of those that decide how fast products are computed, the ones that torch uses on this CPU."""
    used = torch.backends.cpu.get_cpu_capability()
    if not used.startswith("AVX512"):
        return ["AVX2"] if used == "AVX2" else []
    wide = {"AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    return ["AVX2", "AVX-512", *(name for name, there in wide.items() if there)]


def provenance(device: str | torch.device = "cpu") -> dict:
    """What a stored figure came from: command, date, code, versions and machine.

    Args:
        device: on which it was computed.
    """
    return {
        "command": shlex.join(["python", *cli.command()]),
        "date": datetime.date.today().isoformat(),
        **code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": package_versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu_model(),
        "instruction_sets": instruction_sets(),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "accelerator": accelerator(torch.device(device)),
    }


def processor_of(provenance: dict) -> str:
    """The processor that a stored figure came from, by what matters to its speed: "AMD EPYC with AVX-512 BF16"."""
    sets = provenance.get("instruction_sets") or []
    name = provenance.get("cpu") or ("a processor" if sets else f"an unnamed processor, {provenance['machine']}")
    sets = sets[2:] or sets[-1:]  # of what the others have too, not a word
    return name + (f" with {' and '.join(sets)}" if sets else "")


def machine_of(provenance: dict) -> str:
    """The accelerator, or the processor and how many of its threads were used, in words."""
    threads = provenance["threads"]
    return provenance["accelerator"] or f"{processor_of(provenance)} ({threads} thread{'s' * (threads > 1)})"


def accelerator(device: torch.device) -> str | None:
    """The name of a CUDA card, or MPS; None of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return None if device.type == "cpu" else device.type.upper()


@functools.cache
def code_version() -> dict:
    """`commit`, and whether all Python files are as they are in it (`clean`); None where the project is no git
    repository of its own, or git is missing. Found once: what is changed later does not run."""
    unknown = {"commit": None, "clean": None}
    try:
        folder, commit = _output_of("git", "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(folder).resolve() != ROOT.resolve():
            return unknown
        return {"commit": commit, "clean": not _output_of("git", "status", "--porcelain", "--", "*.py")}
    except (OSError, ValueError, subprocess.SubprocessError):
        return unknown


def package_versions() -> dict[str, str]:
    """Of PACKAGES, those that are installed; none is imported."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def cpu_model() -> str:
    """As the system calls the processor: "AMD EPYC 9R14"."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Darwin":
            return _output_of("sysctl", "-n", "machdep.cpu.brand_string")
        if found := re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def _output_of(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
