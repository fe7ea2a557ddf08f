"""Proof that nothing is lost: kill train.py again and again, resume it each time, and compare with a run left alone.

    python -m tests.crash_test --kills 25       # or: make crash-test

Every other kill waits until a checkpoint is being written. At the end weights, metrics, test figures and the GIF must
be equal to those of the uninterrupted run, bit for bit.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--dataset digits --batch_size 64 --num_blocks 2 --patch_size 8 --drop_path 0.2 --device cpu --gif_frames 6"
FLAGS += " --ema 0.99 --patience 1000"
NAME = "VisionTransformer_digits"


def start(folder: Path, epochs: int, *extra: str) -> subprocess.Popen:
    flags = [*FLAGS.split(), "--epochs", str(epochs), "--output_dir", str(folder), *extra]
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # of so small a model, on a busy machine, two are slower
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    )


def run_to_the_end(folder: Path, epochs: int, *extra: str) -> None:
    process = start(folder, epochs, *extra)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"train.py ended with exit code {process.returncode}: {errors[-2000:]}")


def kill_while_writing(process: subprocess.Popen, folder: Path, number: int) -> bool:
    """SIGKILL while the `number`-th checkpoint from now is being written; False if the process ended before that."""
    half_written = folder / "saved" / f"{NAME}.checkpoint.tmp"
    for i in range(number):
        for should_be_there in (False, True) if i else (True,):
            while half_written.exists() != should_be_there:
                if process.poll() is not None:
                    return False
    process.kill()
    return True


def crash(folder: Path, epochs: int, kills: int, seed: int) -> dict[str, int]:
    """Kill and resume `kills` times, then let the run end; counts the kills that met a live process."""
    moments = random.Random(seed)
    met = {"at random moments": 0, "during the writing of a checkpoint": 0}
    checkpoint = folder / "saved" / f"{NAME}.checkpoint"

    def resume() -> list[str]:
        return ["--checkpoint_minutes", "0.001", *(["--resume"] if checkpoint.exists() else [])]

    for kill in tqdm(range(kills), desc="kills"):
        (folder / "saved" / f"{NAME}.checkpoint.tmp").unlink(missing_ok=True)  # left by the kill before
        process = start(folder, epochs, *resume())
        if kill % 2:
            alive = kill_while_writing(process, folder, moments.randint(1, 5))
            met["during the writing of a checkpoint"] += alive
        else:
            time.sleep(moments.uniform(0, 10))
            alive = process.poll() is None
            process.kill()
            met["at random moments"] += alive
        _, errors = process.communicate()
        if not alive and process.returncode:
            raise RuntimeError(f"train.py ended with exit code {process.returncode}: {errors[-2000:]}")
    run_to_the_end(folder, epochs, *resume())
    return met


def differences(left: Path, right: Path) -> list[str]:
    """What is not equal, bit for bit, between two runs."""
    models = [torch.load(folder / "saved" / f"{NAME}.pt", weights_only=True) for folder in (left, right)]
    reports = [json.loads((folder / "saved" / f"{NAME}.json").read_text(encoding="utf-8")) for folder in (left, right)]
    gifs = [(folder / "animation_vit_digits.gif").read_bytes() for folder in (left, right)]
    weights = [model["weights"] for model in models]
    found = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    found += [name for name in reports[0]["metrics"] if reports[0]["metrics"][name] != reports[1]["metrics"][name]]
    found += [f for f in ("test_loss", "test_accuracy") if reports[0]["results"][f] != reports[1]["results"][f]]
    return found + (["GIF"] if gifs[0] != gifs[1] else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, crashed = Path(folder) / "alone", Path(folder) / "crashed"
        epochs = 4 + 3 * args.kills  # so that there is something left to kill
        run_to_the_end(alone, epochs)
        met = crash(crashed, epochs, args.kills, args.seed)
        found = differences(alone, crashed)
    print(", ".join(f"{count} kills {moment}" for moment, count in met.items()))
    print(f"DIFFERENT: {', '.join(found)}" if found else "weights, metrics, test figures and GIF are equal bit for bit")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
