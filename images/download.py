"""Downloads: resumed where they broke off, and taken only once their md5 is right."""

import contextlib
import errno
import hashlib
import http.client
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from images.loader import DataError

MOST = 1 << 30  # bytes of a file whose size the server does not say; CIFAR's are 170 MB
FULL = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}  # of this machine's disk


class DownloadError(ValueError):
    """A file that could not be fetched, with the reason in one line."""


def file_md5(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.md5()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within, this process alone has the path: others of this user that want it wait."""
    user = getattr(os, "getuid", int)()  # another one's lock could not be opened; Windows has a folder for each user
    name = hashlib.md5(f"{user} {path.resolve()}".encode()).hexdigest()
    with FileLock(Path(tempfile.gettempdir()) / f"download-{name}.lock"):  # not beside it: there may be no folder yet
        yield


def find_or_download(path: Path, urls: list[str], md5: str, also: str = "") -> None:
    """Have the file at `path`, with this md5; where there is none, it is downloaded.

    Args:
        urls: tried in turn.
        also: what may be put into its place as well, for the advice where no address gives it.
    """
    if not path.exists():
        with alone(path):
            if not path.exists():  # still: another process may have fetched it
                return fetch(path, urls, md5, also)
    if file_md5(path) != md5:
        raise DataError(f"{path} is damaged or incomplete (its md5 differs): delete it and try again")


def fetch(path: Path, urls: list[str], md5: str, also: str) -> None:
    """The file, from the first address that gives it."""
    failed = []
    for url in urls:
        try:
            return download(url, path, md5)
        except DownloadError as error:
            failed.append(str(error))
    raise DownloadError(
        f"{'; '.join(failed)}. Put it{also} into {path.parent}, or name its place with --data_dir or DATA_DIR; "
        "train.py --dataset digits does without"
    )


def download(url: str, path: Path, md5: str, attempts: int = 4, timeout: float = 20, wait: float = 2) -> None:
    """Fetch `url` to `path` with a progress bar; a broken transfer goes on from where it stopped.

    The bytes collect in `<path>.part`, which becomes `path` only once its md5 is right. A hanging server is given
    `timeout` seconds, and `wait` seconds (doubling) lie between attempts.

    Raises:
        DownloadError: after the last attempt, with the reason.
        DataError: this machine cannot write the file.
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
        except (ValueError, OverflowError, http.client.InvalidURL) as error:  # no address, or sent on to none
            reason = f"{type(error).__name__}: {error}"
            break
        except (OSError, http.client.HTTPException) as error:
            require_network_error(error, part)
            reason = str(error) or type(error).__name__
        else:
            if file_md5(part) == md5:
                part.replace(path)
                return
            reason = "what arrived is not the genuine file: its md5 differs"
            part.unlink()
    shown = "".join(letter if letter.isprintable() else " " for letter in reason)[:200]  # a server may say anything
    raise DownloadError(f"{path.name} could not be downloaded from {url} ({shown})")


def require_network_error(error: Exception, part: Path) -> None:
    """
    Raises:
        DataError: it is this machine that cannot write the file, and trying again will not help.
    """
    if getattr(error, "filename", None) or getattr(error, "errno", None) in FULL:  # the network has no files
        raise DataError(f"cannot write {part}: {error.strerror}") from None


def transfer(url: str, part: Path, timeout: float) -> None:
    """One attempt: append to `part` what is missing, or start anew where the server ignores Range."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        resumed = response.status == 206
        have, title = have if resumed else 0, f"downloading {part.stem}"
        length = response.headers.get("Content-Length", "")
        known = length.isascii() and length.isdigit() and len(length) < 16  # otherwise it is no size
        total = have + int(length) if known else None
        most = MOST if total is None else total
        bar = tqdm(desc=title, total=total, initial=have, unit="B", unit_scale=True)
        part.parent.mkdir(parents=True, exist_ok=True)  # only now: a mistyped folder is not made for nothing
        with open(part, "ab" if resumed else "wb") as file, bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > most:
                    break
    if part.stat().st_size > most:
        part.unlink()
        raise ConnectionError(f"the server sent more than {most:,} bytes")
    if total is not None and part.stat().st_size < total:
        raise ConnectionError("the connection broke off")
