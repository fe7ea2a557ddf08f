"""Reports: what was found and how it came about, as JSON."""

import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from support import cli, distributed
from support.files import write_bytes


def write_json(path: str | Path, contents: Any) -> None:
    """Write plain values as JSON that a person can read: indented, with lists of numbers or names on one line."""
    text = json.dumps(contents, indent=1)
    text = re.sub(r"\[\n\s*([^][{}]*?)\n\s*\]", lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text)
    write_bytes(path, (text + "\n").encode())


def provenance() -> dict:
    """What a stored figure came from: command, date, versions and machine."""
    return {
        "command": " ".join(["python", *cli.command()]),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
