"""How the time and memory of a training step grow with tokens, width, depth and batch: a part of studies.benchmark."""

import json
import statistics
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm import tqdm

import utils
from network import VisionTransformer
from runner import keep_freed_memory
from studies.steps import our_step, print_table, take_turns
from support import cli

GROWTH = {  # what varies, and its values
    "patch_size": [8, 4, 2],
    "hidden_size": [32, 64, 128, 256],
    "num_blocks": [2, 4, 8],
    "batch_size": [32, 64, 128, 256],
}
QUANTITIES = {"seconds": ("step, ms", 1e3, utils.BLUE), "memory_mb": ("memory, MB", 1, utils.VERMILLION)}


def measure_growth(name: str, threads: int) -> list[dict]:
    """Step time and peak memory for each value of what is varied, in a process of its own."""
    rows = []
    for value in tqdm(GROWTH[name], desc=f"cost against {name}"):
        options = {"batch_size": 128, "patch_size": 4, "hidden_size": 64, "num_blocks": 4, name: value}
        rows.append({"varied": name, **options, **cost_in_a_process(options, threads)})
    return rows


def summarise_cost(rows: list[dict], picture: Path) -> dict:
    """Print, draw and fit how step time and peak memory grow with tokens, width, depth and batch."""
    exponents = {}
    for name in GROWTH:
        label, sizes = axis_of(name)
        for quantity in QUANTITIES:
            measured = [row[quantity] for row in rows if row["varied"] == name]
            slope = np.polyfit(np.log(sizes), np.log(measured), 1)[0]
            exponents[f"{quantity} ~ {label}"] = round(float(slope), 2)
    print_table(rows, "varied batch_size patch_size hidden_size num_blocks seconds:.3f memory_mb:.0f")
    print("\nfitted exponents: " + ", ".join(f"{name}^{value}" for name, value in exponents.items()))
    draw_cost(rows, exponents, picture)
    return {"rows": rows, "exponents": exponents}


def draw_cost(rows: list[dict], exponents: dict[str, float], path: Path) -> None:
    """Step time and memory against tokens, width, depth and batch, both axes logarithmic: a power law is a line."""
    note = (
        "hidden 64, 4 heads, 4 blocks, patch 4, batch 128, one of them varied, panels measured apart; slopes are fitted"
    )
    figure = utils.new_figure(1000, 480, "How a training step's cost grows", note)
    for column, name in enumerate(GROWTH):
        label, sizes = axis_of(name)
        for line, (quantity, (unit, scale, color)) in enumerate(QUANTITIES.items()):
            axes = utils.add_axes(figure, 76 + 236 * column, 80 + 190 * line, 166, 140)
            values = [scale * row[quantity] for row in rows if row["varied"] == name]
            axes.loglog(sizes, values, "o-", color=color)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.set_yticks(values, [f"{value:,.0f}" for value in values])
            axes.minorticks_off()
            axes.set_title(f"exponent {exponents[f'{quantity} ~ {label}']:.2f}")
            axes.set_xlabel(label.replace("_", " ") if line == 1 else "")
            axes.set_ylabel(unit if column == 0 else "")
    utils.save_figure(figure, path)


def axis_of(name: str) -> tuple[str, list[int]]:
    """What stands on the axis when `name` is varied, and its values: tokens, where that is the patch size."""
    if name == "patch_size":
        return "tokens", [(32 // size) ** 2 for size in GROWTH[name]]
    return name, GROWTH[name]


def cost_in_a_process(options: dict, threads: int = 1) -> dict:
    """`cost_of_one` in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, "-m", "studies.cost", json.dumps(options), str(threads)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, cwd=cli.ROOT).stdout)


def cost_of_one(
    threads: int,
    batch_size: int,
    img_size: int = 32,
    optimizer: str = "adamw",
    precision: str = "fp32",
    keep_memory: bool = False,
    **options,
) -> dict:
    """Median seconds of a step, and the peak resident memory above what the process had before there was a model.

    Args:
        keep_memory: as train.py does.
        options: the ViT's other arguments.
    """
    torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()
    images, labels = torch.randn(batch_size, 3, img_size, img_size), torch.randint(0, 10, (batch_size,))
    process, done, sizes = psutil.Process(), threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            sizes.append(process.memory_info().rss)
            done.wait(0.002)

    before = process.memory_info().rss
    step = our_step(VisionTransformer(img_size, pooling="mean", **options), images, labels, optimizer, precision)
    seconds = take_turns({"step": step}, repeats=5, warmup=2)["step"]
    watcher = threading.Thread(target=watch)  # only now: it takes time of the processor too
    watcher.start()
    step()
    step()
    sizes.append(process.memory_info().rss)  # at least once, however short a step is
    done.set()
    watcher.join()
    return {"seconds": statistics.median(seconds), "memory_mb": (max(sizes) - before) / 2**20}


if __name__ == "__main__":  # a process started by `cost_in_a_process`
    print(json.dumps(cost_of_one(int(sys.argv[2]), **json.loads(sys.argv[1]))))
