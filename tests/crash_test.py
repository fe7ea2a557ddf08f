"""Is nothing lost? Kill train.py again and again, resume it each time, and compare with a run left alone.

    python -m tests.crash_test --kills 100      # or: make crash-test

Of the kills 40 % come while a file is being written, the others at random moments of the training. Where torchrun has
started two processes, every third kill is that of the second alone, every third that of torchrun alone, and every third
that of all; none may be left behind. At the end weights, metrics, test figures and the GIF must be equal to those of
the uninterrupted run, bit for bit.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tqdm import tqdm

from support.report import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
NAME = "VisionTransformer_digits"
SMALL = "--dataset digits --device cpu --batch_size 64 --num_blocks 2 --patch_size 8 --gif_frames 6 --ema 0.99"
SMALL += f" --name {NAME} --keep_checkpoint"
WHILE_WRITING = 0.4  # of the kills
LONGEST = 1.5  # seconds of training before a kill at a random moment
TRAINED = 1.1  # seconds of training until a kill, on average, that there have to be epochs for
KILLED = (-9, 15)  # exit codes; the second on Windows
PATIENCE = 30  # seconds that processes have to end after a kill


class Configuration(NamedTuple):
    title: str
    flags: str
    victims: tuple[str, ...] = ("all",)  # whom the kills meet in turn
    processes: int = 1


CONFIGURATIONS = {
    "vit": Configuration("ViT, Muon, crop and flip, stochastic depth, EMA", f"{SMALL} --drop_path 0.2 --patience 1000"),
    "conv": Configuration(
        "conv tokenizer, Muon, Mixup, EMA", f"{SMALL} --tokenizer conv --augment mixup --hidden_size 16 --num_heads 2"
    ),
    "torchrun": Configuration(
        "torchrun, two processes",
        f"{SMALL} --drop_path 0.2 --hidden_size 16 --num_heads 2",
        ("second", "torchrun", "all"),
        processes=2,
    ),
}


@dataclass
class Tally:
    """What came of the kills."""

    folders: list[Path] = field(default_factory=list)  # of the runs killed: one, if it was long enough
    met: int = 0  # kills that met a live process
    writing: int = 0  # of these, while a file was being written
    missed: int = 0  # kills that came after the run's end, and were repeated
    left: int = 0  # processes that lived on after a kill


# ---------------------------------------------------------------------------------------------------- a run


def start(configuration: Configuration, folder: Path, epochs: int, *extra: str) -> subprocess.Popen:
    """train.py, or torchrun with several; what it prints goes to a file beside the folder."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={configuration.processes}"]
    command = [sys.executable, *(launcher if configuration.processes > 1 else []), str(ROOT / "train.py")]
    command += [*configuration.flags.split(), "--epochs", str(epochs), "--output_dir", str(folder), *extra]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}  # of so small a model, two are slower
    folder.parent.mkdir(parents=True, exist_ok=True)
    with log_of(folder).open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def resume(configuration: Configuration, folder: Path, epochs: int) -> subprocess.Popen:
    """Go on with the run, if it has begun, and write a checkpoint after nearly every step."""
    return start(configuration, folder, epochs, "--checkpoint_minutes", "0.001", *resume_flags(folder))


def resume_flags(folder: Path) -> list[str]:
    return ["--resume"] if (folder / "saved" / f"{NAME}.checkpoint").exists() else []


def run_to_the_end(configuration: Configuration, folder: Path, epochs: int, *extra: str) -> None:
    if start(configuration, folder, epochs, *extra).wait():
        raise RuntimeError(f"train.py ended before its time: {end_of_log(folder)}")


def log_of(folder: Path) -> Path:
    return folder.with_suffix(".log")


def end_of_log(folder: Path) -> str:
    return log_of(folder).read_text(encoding="utf-8")[-2000:]


def report(folder: Path) -> dict:
    return json.loads((folder / "saved" / f"{NAME}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- kills


def crash(configuration: Configuration, folder: Path, epochs: int, kills: int, seed: int) -> Tally:
    """Kill and resume until so many kills have met a live process, then let the run end. If it ends before, another
    run takes its place."""
    moments, tally = random.Random(seed), Tally([folder / "1"])
    with tqdm(total=kills, desc=configuration.title) as bar:
        while tally.met < kills:
            if not kill_once(configuration, epochs, moments, tally):
                tally.folders.append(folder / str(len(tally.folders) + 1))
            bar.update(tally.met - bar.n)
    run_to_the_end(configuration, tally.folders[-1], epochs, *resume_flags(tally.folders[-1]))
    return tally


def kill_once(configuration: Configuration, epochs: int, moments: random.Random, tally: Tally) -> bool:
    """Start or resume the run and kill it once it trains; False if it ended before."""
    folder, victim = tally.folders[-1], configuration.victims[tally.met % len(configuration.victims)]
    for path in half_written(folder):  # left by the kill before
        path.unlink()
    process = resume(configuration, folder, epochs)
    begun = wait_until(
        lambda: re.search(r"resuming after|epoch +1/", log_of(folder).read_text(encoding="utf-8")), process
    )
    targets = processes_to_kill(process, victim) if begun else []
    if tally.writing < WHILE_WRITING * (tally.met + 1):
        for _ in range(moments.randint(1, 5)):
            wait_until(lambda: not half_written(folder), process)
            wait_until(lambda: half_written(folder), process)
    else:
        time.sleep(moments.uniform(0, LONGEST))
    for target in targets:
        with contextlib.suppress(psutil.NoSuchProcess):
            target.kill()
    writing = bool(half_written(folder))
    tally.left += end_what_is_left(folder)
    code = process.wait()
    if code == 0:
        tally.missed += 1
        return False
    killed = "SIGKILL" in end_of_log(folder) if victim == "second" else code in KILLED
    if not killed:
        raise RuntimeError(f"train.py ended with exit code {code}: {end_of_log(folder)}")
    tally.met += 1
    tally.writing += writing
    return True


def half_written(folder: Path) -> list[Path]:
    try:
        return list(folder.rglob("*.tmp"))
    except FileNotFoundError:  # a folder was removed while it was read
        return []


def wait_until(holds: Callable, process: subprocess.Popen) -> bool:
    """Whether it came to hold before the process ended."""
    while process.poll() is None:
        if holds():
            return True
        time.sleep(0.0002)  # a file is written in a few milliseconds
    return False


def processes_to_kill(process: subprocess.Popen, victim: str) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    if victim == "torchrun":
        return [parent]
    children = parent.children()
    if victim == "second":
        return [child for child in children if child.environ()["RANK"] == "1"]
    return [parent, *children]


def end_what_is_left(folder: Path) -> int:
    """How many processes that write into the folder have not ended in time; now they end."""
    deadline = time.monotonic() + PATIENCE
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        process.kill()
    return len(left)


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]


# ------------------------------------------------------------------------------------------------- the proof


def differences(left: Path, right: Path) -> list[str]:
    """What is not equal, bit for bit, between two runs."""
    models = [torch.load(folder / "saved" / f"{NAME}.pt", weights_only=True) for folder in (left, right)]
    reports = [report(folder) for folder in (left, right)]
    gifs = [(folder / "figures/VisionTransformer_digits_animation.gif").read_bytes() for folder in (left, right)]
    weights = [model["weights"] for model in models]
    found = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    found += [name for name in reports[0]["metrics"] if reports[0]["metrics"][name] != reports[1]["metrics"][name]]
    found += [f for f in ("test_loss", "test_accuracy") if reports[0]["results"][f] != reports[1]["results"][f]]
    return found + (["GIF"] if gifs[0] != gifs[1] else [])


def prove(configuration: Configuration, kills: int, seed: int) -> tuple[Tally, list[str]]:
    """The kills, and what is then not equal to the run left alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        resume(configuration, folder / "speed", 10).wait()
        seconds = report(folder / "speed")["results"]["training_seconds"] / 10
        epochs = 10 + math.ceil(kills * TRAINED / seconds)  # so that there is something left to kill
        run_to_the_end(configuration, folder / "alone", epochs)
        tally = crash(configuration, folder / "crashed", epochs, kills, seed)
        found = [what for killed in tally.folders for what in differences(folder / "alone", killed)]
    return tally, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="in each configuration, that meet a live process")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--store", metavar="FILE", type=Path, help="where the counts go, as JSON")
    args = parser.parse_args()
    print(
        "| Configuration | Kills that met a live process | of these, while a file was written | Kills after the end, "
        "repeated | Processes left behind | Equal bit for bit to the run left alone |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    rows, started = [], provenance() | {"command": shlex.join(["python", "-m", "tests.crash_test", *sys.argv[1:]])}
    for name in args.configurations:
        tally, found = prove(CONFIGURATIONS[name], args.kills, args.seed)
        equal = f"NO: {', '.join(found)}" if found else "yes"
        cells = (CONFIGURATIONS[name].title, tally.met, tally.writing, tally.missed, tally.left, equal)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        counts = {"met": tally.met, "writing": tally.writing, "missed": tally.missed, "left": tally.left}
        rows.append({"configuration": name, **counts, "different": found})
    if args.store:
        write_json(args.store, {"rows": rows, "provenance": started})
    raise SystemExit(any(row["different"] or row["left"] for row in rows))


if __name__ == "__main__":
    main()
