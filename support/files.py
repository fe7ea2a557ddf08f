"""Files: written whole or not at all, and checked when they are read."""

import contextlib
import hashlib
import io
import json
import os
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from support import schema

ROOT = Path(__file__).resolve().parent.parent  # of the project


def short(path: str | Path) -> Path:
    """The path from the working directory where that is shorter."""
    try:
        return Path(min(os.path.relpath(path), str(path), key=len))
    except ValueError:  # another drive of Windows
        return Path(path)


def home() -> Path:
    """The project's folder, as it is called from the working directory: `.` where one works in it."""
    return short(ROOT)


def figures_folder(given: str | Path | None) -> Path:
    """The folder that is given, else the project's figures/."""
    return Path(given or home() / "figures")


def find_file(path: str | Path) -> Path:
    """`saved/CNN.pt` as it is said, or, where there is no such file, the project's: commands work from any folder."""
    path = Path(path)
    in_project = home() / path
    return in_project if not path.exists() and in_project.exists() else path


# What is read back as it was written, besides tensors: of NumPy's numbers, say, a file would not be opened again.
PLAIN = {dict, OrderedDict, list, tuple, str, int, float, bool, type(None)}


class CheckpointError(ValueError):
    """A file that cannot be used, with the reason in one line."""


def first_line(error: Exception) -> str:
    """What an error says first, at most 200 characters; where PyTorch puts a heading above it, the line below that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[len(lines) > 1 and lines[0].endswith(":")][:200]


def write_file(path: str | Path, contents: dict) -> None:
    """Write tensors and plain values with a checksum, so that `path` is at every moment the old file or the new one.

    Raises:
        OSError: the folder cannot be written; what was at `path` is untouched.
    """
    buffer = io.BytesIO()
    torch.save({**contents, "sha256": _digest(contents)}, buffer)
    write_bytes(path, buffer.getvalue())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write to `<path>.tmp`, flush it to the disk, then rename it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from None


def read_file(path: str | Path, table: dict | None = None, wrong: str = "cannot be used") -> dict:
    """What `write_file` wrote. Only tensors and plain values are read: code in a file is refused and does not run, and
    what would take more memory than the file's size can justify is refused before it does.

    Args:
        table: of support/schema.py, what has to be in the file.
        wrong: what to say of a file that holds something else.

    Raises:
        CheckpointError: missing, truncated, altered, not one of this project's files, or not what the table says.
    """
    try:
        with Path(path).open("rb") as file:
            try:
                require_plain_archive(file)
                file.seek(0)
                data = file.read()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                _require_plain_values(contents, len(data))
                intact = contents.pop("sha256") == _digest(contents)
            except OSError:
                raise
            except Exception:  # whatever a damaged or foreign file does to the reader, the user needs to know just this
                raise CheckpointError(f"{path} is not a file of this project, or is truncated or damaged") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if not intact:
        raise CheckpointError(f"{path} is damaged: its contents do not match its checksum")
    try:
        schema.check(contents, table or {})
    except ValueError as error:
        raise CheckpointError(f"{path} {wrong}: {error}") from None
    return contents


# What torch.save calls for tensors and plain values. Further names could ask for memory that no file justifies.
CALLS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}


def require_plain_archive(file: BinaryIO) -> None:
    """
    Raises:
        ValueError: not an archive as torch.save writes it: without compression, and with nothing but tensors in it.
        zipfile.BadZipFile: not an archive.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        size = file.seek(0, os.SEEK_END)
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > size:
            raise ValueError("compressed")
        for member in members:
            if member.filename.endswith(".pkl"):
                for opcode, argument, _ in pickletools.genops(archive.read(member)):
                    known = argument in CALLS or str(argument).startswith("torch ") and argument.endswith("Storage")
                    if opcode.name in ("STACK_GLOBAL", "INST") or (opcode.name == "GLOBAL" and not known):
                        raise ValueError(f"calls {argument}")


def require_reasonable_size(path: str | Path) -> None:
    """
    Raises:
        ValueError: an archive that would unpack to much more than weights do.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > 20 * Path(path).stat().st_size:
                raise ValueError(f"{path} would unpack to more than twenty times its size: it holds no weights")


def _require_plain_values(contents: Any, size: int) -> None:
    """
    Raises:
        ValueError: something else than dicts, lists, tensors and plain values, or more than a file of `size` bytes can
            hold: a tensor larger than its storage, or lists of the same lists.
    """
    waiting, values, tensor_bytes, storages = [contents], 0, 0, {}
    while waiting:
        value = waiting.pop()
        values += 1
        if values > size:
            raise ValueError("more values than bytes")
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise ValueError("not a plain tensor")
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            tensor_bytes += value.nbytes
            # weights that several layers share are in a file once
            if value.nbytes > storage.nbytes() or tensor_bytes > 50 * size or sum(storages.values()) > size:
                raise ValueError("more numbers than bytes")
        elif not isinstance(value, str | int | float | bool | None):
            raise ValueError("not a plain value")


def _digest(contents: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if not isinstance(value, torch.Tensor) and type(value) not in PLAIN:
            raise TypeError(
                f"{value!r} cannot be saved: it is a {type(value).__name__}, and neither a tensor nor plain"
            )
        if isinstance(value, dict):
            digest.update(b"{")
            for key, item in value.items():
                add(key)
                add(item)
            digest.update(b"}")
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for item in value:
                add(item)
            digest.update(b"]")
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(value).encode())

    add(contents)
    return digest.hexdigest()
