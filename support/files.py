"""Files: written whole or not at all, and checked when they are read."""

import contextlib
import hashlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A file that cannot be used, with the reason in one line."""


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


def read_file(path: str | Path) -> dict:
    """What `write_file` wrote. Only tensors and plain values are read: code in a file is refused and does not run.

    Raises:
        CheckpointError: missing, truncated, altered, or not one of this project's files.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        intact = contents.pop("sha256") == _digest(contents)
    except Exception:  # whatever a damaged or foreign file does to the reader, the user needs to know just this
        raise CheckpointError(f"{path} is not a file of this project, or is truncated or damaged") from None
    if not intact:
        raise CheckpointError(f"{path} is damaged: its contents do not match its checksum")
    return contents


def _digest(contents: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
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
