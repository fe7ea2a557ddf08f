"""What several test files need."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from images.loader import Dataset, Split
from network import Model
from training.run import Run

ROOT = Path(__file__).resolve().parent.parent
# the smallest ViT on digits; its name is MODEL
MODEL = "VisionTransformer_digits"
SMALL = "--dataset digits --hidden_size 16 --num_heads 2 --num_blocks 2 --patch_size 8 --batch_size 200 --name".split()
SMALL += [MODEL, "--keep_checkpoint"]


def start(script: str, *args, **options) -> subprocess.Popen:
    """`python train.py ...`, or `python -m studies.compare ...` where `script` is "studies.compare", in a process of
    its own with one thread."""
    called = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, **options}
    return subprocess.Popen([sys.executable, *called, *map(str, args)], **options)


def run_main(script: str, *args) -> None:
    """The same in this process, which saves importing torch."""
    importlib.import_module(script.removesuffix(".py")).main([str(arg) for arg in args])


def outcome(script: str, *args) -> tuple[int, str]:
    """Exit code of `run_main` and its lines of error, without progress bars."""
    errors, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run_main(script, *args)
    except SystemExit as stop:
        code = stop.code or 0
    return code, "\n".join(line for line in errors.getvalue().splitlines() if "error:" in line)


def train_small(output_dir: Path, *args) -> Model:
    """One epoch of train.py without pictures; returns the trained model."""
    with mock.patch.object(Run, "draw_pictures", return_value=[]):
        run_main("train.py", *SMALL, *"--epochs 1 --gif_frames 0 --output_dir".split(), output_dir, *args)
    reports = (output_dir / "saved").glob("*.json")  # those that were set aside are older
    report = max(reports, key=lambda path: path.stat().st_mtime)
    return Model.load(report.with_suffix(".pt"))


@contextlib.contextmanager
def refused(capfd, folder: Path, *words: str, script: str = "train.py"):
    """Exit code 2, one line on stderr that has all `words`, and nothing written into `folder`."""
    before = contents(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    complaint = capfd.readouterr().err
    assert stop.value.code == 2
    assert complaint.startswith(f"{script}: error: ")
    assert complaint.count("\n") == 1
    assert not [word for word in words if word not in complaint], complaint
    assert contents(folder) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file and folder below `folder`, with what is in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models are equal bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def noise(n: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of noise `(n, 3, 4, 4)` in 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def batches(n: int = 10, batch_size: int = 4, seed: int = 0) -> DataLoader:
    return DataLoader(TensorDataset(*noise(n, seed)), batch_size)


def tiny_dataset(images: int = 16, size: int = 32) -> Dataset:
    """Noise in ten classes under the name of digits."""
    torch.manual_seed(0)

    def split(n: int) -> Split:
        return Split(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8), torch.randint(0, 10, (n,)))

    return Dataset("digits", [str(i) for i in range(10)], split(images), split(8), split(8), flip=False)


def results_are_committed() -> bool:
    """Whether what is stored is what the repository has: a training of one's own takes the place of a stored model, and
    what is written about that need not be about this."""
    status = ["git", "status", "--porcelain", "--", "saved", "figures"]
    try:
        done = subprocess.run(status, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return False
    return done.returncode == 0 and not done.stdout


committed_results = pytest.mark.skipif(
    not results_are_committed(), reason="saved/ or figures/ differ from the repository, or git is missing"
)
