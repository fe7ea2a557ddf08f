"""What a terminal of 80 columns and a log file show of a run, and that pictures do not count as training."""

import os
import re
import struct
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SMALL, batches, start

from runner import Runner
from training.callbacks import Clock, ProgressBar, fitted
from training.live import num_frames


def on_a_terminal(columns: int, folder, *args) -> list[str]:
    """All lines that a terminal so wide shows while train.py runs, those that are drawn over each other too."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, str(ROOT / "train.py"), *map(str, args)]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment, cwd=folder)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += (new := os.read(ours, 4096))
        except OSError:  # the other end is closed
            break
        if not new:
            break
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[\w", "", shown.decode())) if line.strip()]


LONG = "--dataset digits --epochs 2 --batch_size 4 --gif_frames 0 --device cpu --output_dir".split()


@pytest.mark.parametrize("columns", [80, 120])
def test_everything_fits_the_terminal_and_the_most_important_is_there(tmp_path, columns):
    lines = on_a_terminal(columns, tmp_path, *LONG, ".")
    progress = [line for line in lines if line.startswith("epoch") and "|" in line and "accuracy" in line]
    after = [line for line in lines if line.startswith("epoch") and "|" not in line]
    assert progress and len(after) == 2
    assert max(map(len, progress + after)) <= columns
    for line in progress:
        assert re.search(r"\|.{8,}\| accuracy \d+\.\d%  \d+:\d\d left", line), line
    for line in after:
        assert re.search(r"val (accuracy )?\d+\.\d\d%.*train (accuracy )?\d+\.\d\d%.*\d+:\d\d left", line), line
    assert ("accuracy" in after[0]) == (columns == 120)  # there is room


def test_a_log_file_gets_plain_lines(tmp_path):
    process = start("train.py", *LONG, tmp_path, stderr=subprocess.STDOUT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "\r" not in printed and "|" not in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("epoch")] == ["1/2", "2/2"]


@pytest.mark.parametrize(
    ("width", "text"),
    [(30, "accuracy 50.0%  1:00 left"), (27, "accuracy 50.0%  1:00 left"), (20, "accuracy 50.0%"), (3, "")],
)
def test_what_does_not_fit_is_left_out_whole(width, text):
    assert fitted(["accuracy 50.0%", "1:00 left", "loss 1.000"], width) == text


def test_the_speed_shown_is_that_of_training_alone(capsys):
    runner = Runner(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), None, torch.nn.CrossEntropyLoss(), "cpu"
    )
    runner.optimizer = torch.optim.SGD(runner.model.parameters(), 0.1)
    clock = Clock()
    slow = SimpleNamespace(step_end=lambda runner: time.sleep(0.2))  # a picture
    runner.callbacks, runner.verbose = [clock, ProgressBar(clock), slow], False
    runner.train(batches(40), epochs=1)
    rate = float(re.search(r"([\d,]+) images/s", capsys.readouterr().out)[1].replace(",", ""))
    assert rate == pytest.approx(40 / clock.seconds, rel=0.05) and clock.seconds < 10 * 0.2


def test_a_bar_that_is_drawn_within_a_step_counts_that_step(monkeypatch):
    """In train.py's order, the bar before the clock."""
    clock, rates, now = Clock(), [], [0.0]
    monkeypatch.setattr("training.callbacks.time.perf_counter", lambda: now[0])
    bar, model = ProgressBar(clock), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    runner = Runner(model, torch.optim.SGD(model.parameters(), 0.1), torch.nn.CrossEntropyLoss(), "cpu", verbose=False)

    def take_half_a_second(runner):
        now[0] += 0.5
        rates.append(bar._rate(runner))

    runner.callbacks = [bar, SimpleNamespace(step_end=take_half_a_second), clock]
    runner.train(batches(40), epochs=1)
    assert rates == ["8 images/s"] * 10 and clock.seconds == 5  # 4 images in each step


def test_a_short_run_has_fewer_frames(tmp_path):
    assert [num_frames(40, epochs) for epochs in (1, 5, 20, 150)] == [8, 16, 40, 40] and num_frames(3, 20) == 3
    process = start("train.py", *SMALL, *"--batch_size 8 --epochs 1 --output_dir".split(), tmp_path)
    assert process.wait(timeout=120) == 0
    from PIL import Image

    with Image.open(tmp_path / "figures" / "VisionTransformer_digits_animation.gif") as gif:
        assert gif.n_frames <= 10
