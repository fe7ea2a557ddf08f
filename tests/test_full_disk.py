"""A disk that is really full: a file system of 2 MB in memory. Every command ends with one line, and what lies on the
disk can be read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from helpers import MODEL, SMALL, outcome, start, tiny_dataset, train_small
from PIL import Image

import export
import train
from support import files
from support.files import read_file

SIZE = 2 * 1024  # kB
TINY = "--dataset digits --hidden_size 8 --num_heads 2 --num_blocks 1 --patch_size 8 --batch_size 8 --epochs 2".split()


@pytest.fixture
def disk(tmp_path):
    """The folder of a disk that is empty."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounts a file system: needs Linux and root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk until so many kB are left."""
    (disk / "filler").unlink(missing_ok=True)
    left = shutil.disk_usage(disk).free - 1024 * free
    (disk / "filler").write_bytes(bytes(left))
    assert shutil.disk_usage(disk).free <= 1024 * free


def check_files(folder: Path) -> set[str]:
    """No file is half written; returns their names."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "filler"]
    for path in files:
        assert path.suffix in (".checkpoint", ".pt", ".json", ".csv", ".png", ".gif", ".lock", ".onnx", ".pt2"), path
        if path.suffix in (".checkpoint", ".pt"):
            read_file(path)
        elif path.suffix == ".csv":
            assert path.read_text().startswith("epoch,step,train_loss,train_accuracy,val_loss,val_accuracy\n")
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".png", ".gif"):
            with Image.open(path) as picture:
                picture.load()
    return {path.name for path in files}


def is_one_line(errors: str) -> bool:
    return errors.count("error: ") == errors.count("No space left on device") == 1 and "Traceback" not in errors


def test_a_disk_that_training_fills_is_one_line_and_keeps_the_checkpoint_that_fitted(disk):
    """There is room for one checkpoint, and not for the next beside it."""
    flags = "--device cpu --hidden_size 64 --num_blocks 2 --epochs 3 --gif_frames 2 --output_dir".split()
    process = start("train.py", *SMALL, *flags, disk)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and is_one_line(errors), errors
    names = check_files(disk)
    assert {f"{MODEL}.checkpoint", f"{MODEL}.csv", f"{MODEL}_curves.png"} == {n for n in names if n.startswith(MODEL)}
    assert read_file(disk / f"saved/{MODEL}.checkpoint")["runner"]["progress"]["epoch"] in (1, 2)


KINDS = [".csv", "frame_0000002.png", ".best.pt", "_curves.png", ".checkpoint", "frame_0000004.png", ".last.pt"]
KINDS += [f"{MODEL}.pt", ".json", ".gif", "_attention_maps.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_at_whatever_file_the_disk_becomes_full_all_are_whole_and_the_run_goes_on_when_there_is_room(disk, kind):
    def opened(path, mode):
        if Path(path).name.endswith(f"{kind}.tmp"):
            leave(disk, 0 if kind in (".csv", ".json") else 4)  # these two are small
        return open(path, mode)

    flags = (*TINY, "--patience", "3", "--gif_frames", "2", "--name", MODEL, "--output_dir", disk)
    with mock.patch.object(train, "load_data", lambda *_: tiny_dataset()):
        with mock.patch.object(files, "open", opened, create=True):
            code, errors = outcome("train.py", *flags)
        names = check_files(disk)
        assert code == 1 and is_one_line(errors) and kind in errors, errors
        (disk / "filler").unlink()
        resume = ["--resume"] if f"{MODEL}.checkpoint" in names else []
        assert outcome("train.py", *flags, *resume) == (0, "")
    assert {f"{MODEL}.pt", f"{MODEL}.json", f"{MODEL}_curves.png"} <= check_files(disk)


def test_tensorboard_on_a_full_disk_is_one_line(disk):
    pytest.importorskip("tensorboard")
    leave(disk, 120)
    process = start(
        "train.py", *SMALL, *"--device cpu --epochs 9 --gif_frames 0 --tensorboard --output_dir".split(), disk
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and is_one_line(errors) and str(disk / "runs") in errors, errors


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The file of a trained model."""
    folder = tmp_path_factory.mktemp("trained")
    train_small(folder)
    return folder / f"saved/{MODEL}.pt"


@pytest.mark.parametrize("script", ["evaluate.py", "predict.py", "explain.py"])
def test_pictures_on_a_full_disk_are_one_line(disk, model, script):
    Image.new("RGB", (50, 40), "red").save(disk / "red.png")
    asked = {"evaluate.py": [model], "predict.py": [disk / "red.png", "--checkpoint", model]}
    args = [*asked.get(script, ["--checkpoint", model]), "--device", "cpu", "--output_dir", disk / "figures"]
    leave(disk, 8)
    code, errors = outcome(script, *args)
    assert code == 2 and is_one_line(errors), errors
    assert check_files(disk) == {"red.png"}


@pytest.mark.parametrize("free", [8, 100])
def test_an_export_to_a_full_disk_is_one_line(disk, model, free):
    for package in export.PACKAGES:
        pytest.importorskip(package)
    leave(disk, free)
    flags = ("--output_dir", disk, "--figures_dir", disk, "--images", "10", "--no_latency")
    code, errors = outcome("export.py", model, *flags)
    assert code == 2 and is_one_line(errors), errors
    assert check_files(disk) <= {f"{MODEL}.onnx", f"{MODEL}.pt2"}
