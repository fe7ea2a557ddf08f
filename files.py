"""Files: written and downloaded whole or not at all, and checked when they are read."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class DownloadError(ValueError):
    """A file that could not be fetched, with the reason in one line."""


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
        os.replace(temporary, path)
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


# ------------------------------------------------------------------------------------------------------- downloads


def file_md5(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.md5()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: Path, md5: str, attempts: int = 4, timeout: float = 20, wait: float = 2) -> None:
    """Fetch `url` to `path` with a progress bar; a broken transfer goes on from where it stopped.

    The bytes collect in `<path>.part`, which becomes `path` only once its md5 is right. A hanging server is given
    `timeout` seconds, and `wait` seconds (doubling) lie between attempts.

    Raises:
        DownloadError: after the last attempt, with the reason.
    """
    part = path.with_name(path.name + ".part")
    reason = ""
    for attempt in range(attempts):
        if attempt:
            print(f"download interrupted ({reason}); trying again ({attempt + 1} of {attempts})", file=sys.stderr)
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            transfer(url, part, timeout)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # nothing beyond what we have: the partial file is not a beginning of this one
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break
        except urllib.error.URLError as error:
            reason = str(error.reason)
            if not part.exists():  # no connection at all: waiting longer will not help
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        else:
            if file_md5(part) == md5:
                part.replace(path)
                return
            reason = "what arrived is not the genuine file: its md5 differs"
            part.unlink()
    raise DownloadError(f"{path.name} could not be downloaded from {url} ({reason})")


def transfer(url: str, part: Path, timeout: float) -> None:
    """One attempt: append to `part` what is missing, or start anew where the server ignores Range."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length) + (have if resumed else 0)
        have, title = have if resumed else 0, f"downloading {part.stem}"
        bar = tqdm(desc=title, total=total, initial=have, unit="B", unit_scale=True)
        part.parent.mkdir(parents=True, exist_ok=True)  # only now: a mistyped folder is not made for nothing
        with open(part, "ab" if resumed else "wb") as file, bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError("the connection broke off")
