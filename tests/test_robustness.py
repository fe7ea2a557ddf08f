"""Nothing is lost and nothing half-written is left: damaged files, failing disks, kills, and any hyperparameters."""

import builtins
import errno
import io
import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import crash_test
import psutil
import pytest
import torch
from filelock import FileLock
from helpers import outcome, start, tiny_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from images.loader import Dataset
from network import Model, VisionTransformer
from runner import Runner
from support import files
from training.checkpoints import Checkpoints
from training.live import Frames
from training.run import Run

NAME = "VisionTransformer_digits"


def run_on_tiny(folder: Path, *flags: str, data: Dataset | None = None) -> tuple[int, str]:
    """train.py in this process on a tiny data set: its exit code and lines of error."""
    with mock.patch.object(train, "load_data", lambda *_: data or tiny_dataset()):
        return outcome("train.py", "--output_dir", folder, "--gif_frames", "0", *flags)


# ------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A real training checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--epochs", "1", "--hidden_size", "8", "--num_heads", "2", "--num_blocks", "1", "--batch_size", "8")
    assert run_on_tiny(folder, *flags, "--name", NAME, "--keep_checkpoint") == (0, "")
    return folder / "saved" / "VisionTransformer_digits.checkpoint"


def loads_correctly_or_is_refused(path: Path, original: str) -> bool:
    """True if refused; fails on any other exception or on contents that are not the original's."""
    try:
        contents = files.read_file(path)
    except files.CheckpointError as error:
        assert "\n" not in str(error)
        return True
    assert files._digest(contents) == original
    return False


def test_a_truncated_checkpoint_is_refused_at_any_length(checkpoint, tmp_path):
    data, original = checkpoint.read_bytes(), files._digest(files.read_file(checkpoint))
    damaged = tmp_path / "damaged"
    lengths = random.Random(0).sample(range(len(data)), 50)
    for length in [0, *lengths]:
        damaged.write_bytes(data[:length])
        assert loads_correctly_or_is_refused(damaged, original)


def test_a_flipped_bit_in_a_checkpoint_is_refused_or_harmless(checkpoint, tmp_path):
    data, original = checkpoint.read_bytes(), files._digest(files.read_file(checkpoint))
    damaged = tmp_path / "damaged"
    refused = 0
    for position in random.Random(0).sample(range(8 * len(data)), 50):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        damaged.write_bytes(flipped)
        refused += loads_correctly_or_is_refused(damaged, original)
    assert refused > 25  # most bits are weights, which the checksum guards


def test_the_checksum_itself_finds_an_altered_weight(checkpoint, tmp_path):
    contents = torch.load(checkpoint, weights_only=True)
    contents["runner"]["model"]["head.bias"][0] += 1e-6
    torch.save(contents, tmp_path / "altered")
    with pytest.raises(files.CheckpointError, match="checksum"):
        files.read_file(tmp_path / "altered")


@pytest.mark.parametrize("key, value", [("metrics", {"train_loss": ["code"]}), ("metrics", []), ("progress", {})])
def test_a_checkpoint_whose_contents_make_no_sense_is_one_line(checkpoint, tmp_path, key, value):
    contents = files.read_file(checkpoint)
    contents["runner"][key] = value
    contents["results"] = None
    files.write_file(tmp_path / "saved" / checkpoint.name, contents)
    flags = ("--epochs", "1", "--hidden_size", "8", "--num_heads", "2", "--num_blocks", "1", "--batch_size", "8")
    code, errors = run_on_tiny(tmp_path, *flags, "--name", NAME, "--resume", "--resume_changed")
    assert code == 2 and f"no whole checkpoint of a run: runner.{key}" in errors and len(errors.splitlines()) == 1


def test_resuming_from_a_damaged_checkpoint_is_one_line(checkpoint, tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / checkpoint.name).write_bytes(checkpoint.read_bytes()[:-100])
    code, errors = run_on_tiny(tmp_path, "--batch_size", "8", "--name", NAME, "--resume")
    assert code == 2 and "truncated or damaged" in errors


# ------------------------------------------------------------------------------------------------- failing disks


class FullDisk(io.RawIOBase):
    """Takes half of what is written to it, as a disk does that becomes full."""

    def __init__(self, path):
        self.file = io.FileIO(path, "w")

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self):
        return self.file.fileno()


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_file(path, {"value": torch.ones(3)})
    monkeypatch.setattr(files, "open", lambda path, mode: FullDisk(path), raising=False)
    with pytest.raises(OSError, match="cannot write .*file: No space left on device"):
        files.write_file(path, {"value": torch.zeros(3)})
    assert torch.equal(files.read_file(path)["value"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_in_training_is_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    writes = []

    def fill_up(path, mode):
        writes.append("checkpoint" in Path(path).name)
        return FullDisk(path) if sum(writes) > 3 else builtins.open(path, mode)  # a probe, two checkpoints

    monkeypatch.setattr(files, "open", fill_up, raising=False)
    flags = ("--epochs", "9", "--hidden_size", "8", "--num_blocks", "1", "--batch_size", "8")
    code, errors = run_on_tiny(tmp_path, *flags, "--name", NAME)
    assert code == 1 and "No space left" in errors and errors.count("\n") == 0
    assert files.read_file(tmp_path / f"saved/{NAME}.checkpoint")["runner"]["progress"]["epoch"] == 2
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.pt"))


def test_a_folder_deleted_during_the_run_is_made_again(tmp_path):
    files.write_file(tmp_path / "saved" / "a", {})
    (tmp_path / "saved" / "a").unlink()
    (tmp_path / "saved").rmdir()
    files.write_file(tmp_path / "saved" / "a", {"x": 1})
    assert files.read_file(tmp_path / "saved" / "a") == {"x": 1}


# -------------------------------------------------------------------------------------------- kills and two at once


@pytest.mark.parametrize("configuration, kills", [("vit", 3), ("torchrun", 2)])
def test_a_run_killed_again_and_again_ends_as_the_run_left_alone(tmp_path, configuration, kills):
    """Of two processes, the second is killed first, then torchrun alone."""
    if configuration == "torchrun" and os.name == "nt":
        pytest.skip("no process on Windows learns that its parent was killed")
    configuration, epochs = crash_test.CONFIGURATIONS[configuration], 8
    crash_test.run_to_the_end(configuration, tmp_path / "alone", epochs)
    tally = crash_test.crash(configuration, tmp_path / "crashed", epochs, kills, seed=1)
    assert (tally.met, tally.left) == (kills, 0)
    for folder in tally.folders:
        assert crash_test.differences(tmp_path / "alone", folder) == []


def test_a_run_killed_after_its_pictures_and_before_its_last_checkpoint_can_be_finished(tmp_path):
    flags = ("--epochs", "1", "--num_blocks", "1", "--batch_size", "8", "--gif_frames", "2", "--name", NAME)
    write = Checkpoints.write

    def die_at_the_end(checkpoints, runner, results=None):
        if results is not None:
            raise SystemExit(9)
        write(checkpoints, runner)

    with mock.patch.object(Checkpoints, "write", die_at_the_end):
        assert run_on_tiny(tmp_path, *flags)[0] == 9
    gif = (tmp_path / "figures/VisionTransformer_digits_animation.gif").read_bytes()
    assert run_on_tiny(tmp_path, *flags, "--resume") == (0, "")
    assert (tmp_path / "figures/VisionTransformer_digits_animation.gif").read_bytes() == gif
    assert not (tmp_path / "figures" / "VisionTransformer_digits_frames").exists()


def interrupt(folder: Path, event: str, *flags: str) -> None:
    """Run until the given callback event, and end there as a kill would, after writing a checkpoint."""

    def write_and_die(checkpoints, runner):
        checkpoints.write(runner)
        raise SystemExit(9)

    with mock.patch.object(Checkpoints, event, write_and_die):
        assert run_on_tiny(folder, *flags)[0] == 9


SMALL = (
    "--num_blocks",
    "1",
    "--hidden_size",
    "8",
    "--num_heads",
    "2",
    "--batch_size",
    "16",
    "--name",
    NAME,
    "--keep_checkpoint",
)


def test_a_run_killed_between_its_last_batch_and_validation_can_be_resumed(tmp_path):
    flags = (*SMALL, "--epochs", "2")  # 16 images: the first step is the last of its epoch
    interrupt(tmp_path / "killed", "step_end", *flags)
    assert run_on_tiny(tmp_path / "killed", *flags, "--resume") == (0, "")
    assert run_on_tiny(tmp_path / "alone", *flags) == (0, "")
    killed, alone = (Model.load(tmp_path / name / "saved/VisionTransformer_digits.pt") for name in ("killed", "alone"))
    assert all(torch.equal(a, b) for a, b in zip(killed.parameters(), alone.parameters(), strict=True))


def test_a_changed_learning_rate_is_in_force_after_resume_changed(tmp_path):
    interrupt(tmp_path, "epoch_end", *SMALL, "--epochs", "4")
    checkpoint = tmp_path / "saved" / "VisionTransformer_digits.checkpoint"
    before = files.read_file(checkpoint)["runner"]["model"]
    flags = (*SMALL, "--epochs", "4", "--resume", "--resume_changed", "--lr", "1e-12", "--weight_decay", "0")
    assert run_on_tiny(tmp_path, *flags) == (0, "")
    after = files.read_file(checkpoint)["runner"]["model"]
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)


def test_a_new_run_sets_the_checkpoint_of_an_interrupted_one_aside(tmp_path):
    interrupt(tmp_path, "epoch_end", *SMALL, "--epochs", "4")
    assert run_on_tiny(tmp_path, *SMALL, "--epochs", "1") == (0, "")
    aside = files.read_file(tmp_path / f"saved/{NAME}_old1.checkpoint")
    assert aside["runner"]["progress"]["epoch"] == 1


def test_weights_that_are_no_longer_finite_end_the_run_even_when_steps_are_skipped(tmp_path):
    code, errors = run_on_tiny(tmp_path, *SMALL, "--epochs", "2", "--lr", "1e30", "--skip_nonfinite")
    assert code == 1 and "learning rate too high" in errors


def test_a_second_run_of_the_same_name_says_so_and_stops(tmp_path):
    (tmp_path / "saved").mkdir()
    with FileLock(tmp_path / "saved" / "VisionTransformer_digits.lock"):
        flags = [*crash_test.CONFIGURATIONS["vit"].flags.split(), "--output_dir", str(tmp_path)]
        second = start("train.py", *flags)
        _, errors = second.communicate(timeout=120)
    assert second.returncode == 2 and f"another run named {NAME}" in errors
    # the lock file of a run that has ended is no lock
    code, errors = run_on_tiny(tmp_path, "--epochs", "1", "--num_blocks", "1", "--batch_size", "8", "--name", NAME)
    assert code == 0, errors


# --------------------------------------------------------------------------------------------------- long runs


def test_a_long_run_does_not_grow(tmp_path):
    """200 epochs with frames: the process's memory at the end within 5 % of that after the tenth epoch."""
    sizes = []

    def measure(runner):
        if runner.epoch in (10, 200):
            sizes.append(psutil.Process().memory_info().rss)

    data = tiny_dataset()
    model = VisionTransformer(hidden_size=8, num_heads=2, num_blocks=1, patch_size=16)
    runner = Runner(model, torch.optim.AdamW(model.parameters()), torch.nn.CrossEntropyLoss(), "cpu")
    val_loader = data.loader("val", 8)
    frames = tmp_path / "frames"
    runner.callbacks += [
        Frames(val_loader, data.classes, frames, count=20, title="a long run"),
        Checkpoints(tmp_path / "checkpoint", {}),
        SimpleNamespace(epoch_end=measure),
    ]
    runner.train(data.loader("train", 16, shuffle=True), val_loader, epochs=200)
    assert sizes[1] < 1.05 * sizes[0]
    assert len(list(frames.iterdir())) <= 22


# ------------------------------------------------------------------------------------------- any hyperparameters


def mostly(good: list, bad: list):
    """One of `good` nine times in ten, so that a combination of many is often good altogether."""
    return st.integers(0, 9).flatmap(lambda i: st.sampled_from(good if i else bad))


@pytest.fixture(scope="module")
def trained():
    """Hyperparameters that did train, which many must: the others test no more than the refusal."""
    found = []
    yield found
    assert len(found) > 60


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    model=st.sampled_from(["vit", "vit", "vit", "cnn", "mlp"]),
    hidden_size=mostly([8, 16, 24, 32, 64], [-1, 0, 1, 3, 33]),
    num_heads=mostly([1, 2, 4, 8], [-1, 0, 3]),
    num_blocks=mostly([1, 2, 3], [-1, 0]),
    patch_size=mostly([2, 3, 4, 6, 8], [-1, 0, 1, 33]),
    mlp_ratio=mostly([0.01, 0.5, 1.0, 4.0], [-1.0, 0.0]),
    pooling=st.sampled_from(["mean", "cls"]),
    tokenizer=st.sampled_from(["patch", "patch", "conv"]),
    drop_path=mostly([0.0, 0.5], [-0.1, 1.0]),
    batch_size=mostly([1, 3, 5, 16], [-1, 0, 17]),
    epochs=mostly([1, 2], [-1, 0]),
    optimizer=st.sampled_from(["muon", "adamw", "adam", "sgd"]),
    schedule=st.sampled_from(["cosine", "constant", "linear", "step", "one_cycle"]),
    ema=mostly([0.0, 0.0, 0.9], [1.0]),
    patience=mostly([0, 0, 1], [-1]),
    layer_decay=mostly([1.0, 0.5], [0.0]),
    lr=mostly([1e-3, 1e-2], [-1.0, 0.0, float("nan")]),
    warmup=mostly([0.0, 0.1, 0.9], [-0.5, 1.0]),
    augment=mostly(["none", "crop_flip", "autoaugment+random_erasing", "mixup", "cutmix"], ["rotate", "none+cutmix"]),
    size=st.sampled_from([4, 5, 8, 32]),
)
def test_any_hyperparameters_train_or_are_refused_before_anything_is_written(trained, size, **hyperparameters):
    flags = [part for name, value in hyperparameters.items() for part in (f"--{name}", str(value))]
    data = tiny_dataset(16, size)
    # pictures have tests of their own, and take long
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Run, "draw_pictures", return_value=[]):
        code, errors = run_on_tiny(Path(folder), *flags, data=data)
        if code:
            assert code == 2 and len(errors.splitlines()) == 1, errors
            assert list(Path(folder).iterdir()) == []
        else:
            trained.append(hyperparameters)
            model = Model.load(next(Path(folder).glob("saved/*.pt")))
            logits = model(torch.rand(2, 3, size, size))
            assert logits.shape == (2, 10) and logits.isfinite().all()
