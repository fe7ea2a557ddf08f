"""How a training step's cost grows: seconds and memory against tokens, width, depth and batch.

python -m studies.benchmark                  # measures it, beside the rest
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import utils
from network import VisionTransformer
from runner import Runner
from studies.runs import markdown
from support import cli
from training.optim import build_optimizer


def training_step(model: nn.Module, optimizer, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    def step():
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer: str = "adamw"):
    """What `Runner` does in a step, with metrics and the check for infinities, as train.py uses it."""
    runner = Runner(model, build_optimizer(model, optimizer), nn.CrossEntropyLoss(), "cpu")
    model.train()
    return lambda: runner.train_step(images, labels)


def take_turns(steps: dict[str, Callable[[], None]], repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    """Wall-clock seconds of each step, measured in turns."""
    seconds = {name: [] for name in steps}
    for repeat in tqdm(range(warmup + repeats), desc="taking turns"):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


GROWTH = {  # what varies, and its values
    "patch_size": [8, 4, 2],
    "hidden_size": [32, 64, 128, 256],
    "num_blocks": [2, 4, 8],
    "batch_size": [32, 64, 128, 256],
}


def measure_cost(threads: int, picture: Path) -> dict:
    """Step time and peak memory against tokens, width, depth and batch, each in a process of its own."""
    rows = []
    for name, values in GROWTH.items():
        for value in tqdm(values, desc=f"cost against {name}"):
            options = {"batch_size": 128, "patch_size": 4, "hidden_size": 64, "num_blocks": 4, name: value}
            rows.append({"varied": name, **options, **cost_in_a_process(options, threads)})
    exponents = {}
    for name in GROWTH:
        chosen = [row for row in rows if row["varied"] == name]
        label, size = axis_of(name, chosen)
        for quantity in ("seconds", "memory_mb"):
            slope = np.polyfit(np.log(size), np.log([row[quantity] for row in chosen]), 1)[0]
            exponents[f"{quantity} ~ {label}"] = round(float(slope), 2)
    table = [
        {
            "varied": row["varied"],
            "value": str(row[row["varied"]]),
            "tokens": str((32 // row["patch_size"]) ** 2),
            "step, ms": f"{1e3 * row['seconds']:.0f}",
            "memory above the start, MB": f"{row['memory_mb']:.0f}",
        }
        for row in rows
    ]
    print(f"\n{markdown(table)}")
    print("\nfitted exponents: " + ", ".join(f"{name}^{value}" for name, value in exponents.items()))
    draw_cost(rows, exponents, picture)
    return {"rows": rows, "exponents": exponents}


def draw_cost(rows: list[dict], exponents: dict[str, float], path: Path) -> None:
    """Step time and memory against tokens, width, depth and batch, both axes logarithmic: a power law is a line."""
    note = "hidden 64, 4 heads, 4 blocks, patch 4, batch 128, one of them varied; slopes are fitted exponents"
    figure = utils.new_figure(1000, 480, "How a training step's cost grows", note)
    quantities = (("seconds", "step, ms", 1e3, utils.BLUE), ("memory_mb", "memory, MB", 1, utils.VERMILLION))
    for column, name in enumerate(GROWTH):
        chosen = [row for row in rows if row["varied"] == name]
        label, size = axis_of(name, chosen)
        for line, (quantity, unit, scale, color) in enumerate(quantities):
            axes = utils.add_axes(figure, 62 + 240 * column, 80 + 190 * line, 170, 140)
            values = [scale * row[quantity] for row in chosen]
            axes.loglog(size, values, "o-", color=color)
            axes.set_xticks(size, [f"{value:,}" for value in size])
            axes.set_yticks(values, [f"{value:,.0f}" for value in values])
            axes.minorticks_off()
            exponent = exponents[f"{quantity} ~ {label}"]
            axes.text(0.06, 0.86, f"exponent {exponent:.2f}", transform=axes.transAxes)
            if line == 1:
                axes.set_xlabel(label.replace("_", " "))
            if column == 0:
                axes.set_ylabel(unit)
    utils.save_figure(figure, path)


def axis_of(name: str, rows: list[dict]) -> tuple[str, list[int]]:
    """What stands on the axis when `name` is varied, and its values: tokens, where that is the patch size."""
    if name == "patch_size":
        return "tokens", [(32 // row["patch_size"]) ** 2 for row in rows]
    return name, [row[name] for row in rows]


def cost_in_a_process(options: dict, threads: int = 1) -> dict:
    """`cost_of_one` in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, "-m", "studies.cost", json.dumps(options), str(threads)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=cli.ROOT).stdout)


def cost_of_one(options: dict, threads: int) -> dict:
    """Median seconds of a step, and the peak resident memory above what the process needed before it.

    `options` are the batch size and the ViT's arguments.
    """
    torch.set_num_threads(threads)
    batch_size, img_size = options.pop("batch_size"), options.get("img_size", 32)
    images, labels = torch.randn(batch_size, 3, img_size, img_size), torch.randint(0, 10, (batch_size,))
    process, done, sizes = psutil.Process(), threading.Event(), []

    def watch() -> None:
        while not done.wait(0.002):
            sizes.append(process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    step = our_step(VisionTransformer(pooling="mean", **options), images, labels)
    seconds = take_turns({"step": step}, repeats=5, warmup=2)["step"]
    done.set()
    watcher.join()
    return {"seconds": statistics.median(seconds), "memory_mb": (max(sizes) - before) / 2**20}


if __name__ == "__main__":  # a process started by `cost_in_a_process`
    print(json.dumps(cost_of_one(json.loads(sys.argv[1]), int(sys.argv[2]))))
