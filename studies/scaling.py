"""From one core to many: what threads and processes gain here, what memory a step takes, and a large run on paper.

    python -m studies.scaling                            # all three: five minutes
    python -m studies.scaling --only memory              # or throughput, plan
    python -m studies.scaling --only plan --machines 4   # the large run on other hardware: see --help

docs/scaling.md explains the numbers. Writes figures/scaling.json and figures/scaling.png. Needs requirements-dev.txt.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from matplotlib.ticker import NullLocator, ScalarFormatter
from tqdm import tqdm

import utils
from network import VisionTransformer
from runner import Runner
from studies.cost import GROWTH, cost_in_a_process
from studies.steps import AUTO, our_runner, print_table, synthetic_data, take_turns
from support import cli, distributed, schema
from support.files import figures_folder
from support.model import num_parameters
from support.report import provenance, read_json, write_json
from training.models import count_flops
from training.parallel import ParallelRunner

VIT_S = dict(img_size=224, patch_size=16, hidden_size=384, num_heads=6, num_blocks=12)  # ViT-S/16


@dataclass
class Config:
    """Measure how training scales on this machine, and plan a large run on paper."""

    # what is measured
    only: tuple[Literal["throughput", "memory", "plan"], ...] = ("throughput", "memory", "plan")  # some of these
    workers: int = 2  # most threads, and most processes, that throughput is measured with
    turns: int = 3  # of each combination, by turns
    output_dir: str | None = None  # where the results go; default: the project's figures/

    # the large run: ViT-S/16 on ImageNet-1k (Deng et al. 2009)
    images: int = 1_281_167  # training images of ImageNet-1k
    epochs: int = 300  # as in DeiT (Touvron et al. 2021)
    batch_size: int = 1024  # of all GPUs together, the same source
    machines: int = 1  # with as many GPUs each
    gpus: int = 8  # of each machine
    peak_tflops: float = 312  # of a GPU in bf16: the data sheet of an A100
    utilisation: float = 0.35  # part of the peak that training reaches: an assumption, 0.3 to 0.5 are usual
    gpu_gigabytes_per_second: float = 300  # between GPUs of a machine, each way: NVLink of an A100, data sheet
    network_gigabits_per_second: float = 25  # between machines, each way: an assumption
    picture_kilobytes: float = 110  # a JPEG of ImageNet: 140 GB for all of them


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        check(config)
        path = figures_folder(config.output_dir) / "scaling.json"
        stored = path.exists()  # what is not measured now stays
        results = read_json(path, schema.SCALING, "; delete it and measure again") if stored else {"provenance": {}}
        measures = {"throughput": compare_throughput, "memory": compare_memory, "plan": plan}
        for part in config.only:
            results[part] = measures[part](config)
            results["provenance"] = {**results["provenance"], part: provenance()}
            write_json(path, results)
        if {"throughput", "memory"} <= results.keys():
            draw(results, path.with_suffix(".png"))
    print(f"\nwrote {path} and, where throughput and memory are known, scaling.png beside it")


def check(config: Config) -> None:
    """Raises ValueError for a flag that cannot be."""
    cli.require_positive(config, *(field.name for field in dataclasses.fields(config) if field.type is int))
    for field in dataclasses.fields(config):
        if field.type is float and not 0 < (value := getattr(config, field.name)) < math.inf:
            raise ValueError(f"{field.name} must be positive, not {value}")
    if config.batch_size % (config.machines * config.gpus):
        raise ValueError(f"batch_size {config.batch_size} is not a multiple of the number of GPUs")
    if config.batch_size > config.images:
        raise ValueError(f"batch_size {config.batch_size} is larger than images {config.images}")


# ------------------------------------------------------------------------------------------------------ throughput


WIDTHS = {64: 2048, 256: 512}  # of the ViT, and how many images an epoch has


def compare_throughput(config: Config) -> list[dict]:
    """images/s of training with 1, 2, 4, ... threads in one process, and with as many processes of one thread each.

    All train on batches of 128 images in total, with the default augmentation and optimiser; combinations take turns.
    """
    counts = [2**power for power in range(1, config.workers.bit_length())]
    combinations = [(1, 1)] + [pair for count in counts for pair in ((1, count), (count, 1))]
    runs = {(width, *combination): [] for width in WIDTHS for combination in combinations}
    for _ in tqdm(range(config.turns), desc="throughput, turns"):
        for (width, processes, threads), results in runs.items():
            results.append(train_in_processes(width, processes, threads))
    rows = []
    for (width, processes, threads), results in runs.items():
        medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
        rows.append({"hidden_size": width, "processes": processes, "threads": threads, "precision": AUTO, **medians})
        alone = next(row for row in rows if row["hidden_size"] == width)  # one thread is the first combination
        rows[-1]["speedup"] = medians["images_per_second"] / alone["images_per_second"]
    print_table(rows, "hidden_size processes threads images_per_second:,.0f speedup:.2f all_reduce_seconds:.4f")
    return rows


def train_in_processes(width: int, processes: int, threads: int) -> dict:
    """What `be_one_of_the_processes` finds, in new processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, "-m", "studies.scaling", "train", *map(str, (width, WIDTHS[width], threads))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=cli.ROOT
    )
    return json.loads(done.stdout.splitlines()[-1])


def be_one_of_the_processes(width: int, images: int, threads: int) -> dict:
    """Train a ViT as train.py does, an epoch to warm up and three that count; returns images/s, and the seconds that
    summing the gradients of all processes takes by itself."""
    torch.set_num_threads(threads)
    share = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    loader = synthetic_data(images).loader("train", 128, shuffle=True, augment="crop_flip", **share)
    torch.manual_seed(0)
    model, alone = VisionTransformer(pooling="mean", hidden_size=width), distributed.world_size() == 1
    runner = our_runner(model, kind=Runner if alone else ParallelRunner)
    gradients = torch.zeros(num_parameters(model))
    # by the clock: a process that waits for another has not much to do
    clock, sums = time.perf_counter, {"sum": lambda: alone or dist.all_reduce(gradients)}
    seconds = take_turns({"epoch": lambda: runner.train(loader, epochs=1)}, repeats=3, warmup=1, now=clock)
    seconds |= take_turns(sums, repeats=20, warmup=0, now=clock)
    return {
        "images_per_second": images / statistics.median(seconds["epoch"]),
        "all_reduce_seconds": 0.0 if alone else statistics.median(seconds["sum"]),
    }


# ---------------------------------------------------------------------------------------------------------- memory


ALLOCATOR = 1.1  # fitted to what compare_memory measures; all else in the formula is counted


def predicted_memory_mb(
    batch_size: int,
    parameters: int,
    img_size: int = 32,
    patch_size: int = 4,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_blocks: int = 4,
    mlp_ratio: float = 4.0,
    bytes_per_number: int = 4,
) -> float:
    """Peak memory in MB (2**20 bytes) of a training step of the ViT with AdamW, without what an empty process has.

    Each parameter takes 16 bytes: weight, gradient and AdamW's two averages (Muon has one for matrices: 12). Backward
    needs of each block and token, in multiples of `hidden_size`: its input, the first norm's output, query, key, value,
    attention's output, its sum with the input, the second norm's output (8), and the MLP's hidden layer before and
    after GELU (2 mlp_ratio); then 4 numbers of the norms and one of each head. The final norm needs its input and 2
    more. Backward begins in the last block's MLP while all of that is there, with gradients of the hidden layer before
    and after GELU and of what goes in and out (2 mlp_ratio + 2). Attention itself, fused, keeps nothing that grows
    with the square of the tokens. An allocator holds more than is in use: ALLOCATOR times as much.

    `bytes_per_number` is 4, or 2 in half precision, roughly: norms and sums stay in fp32.
    """
    tokens = (img_size // patch_size) ** 2
    kept = num_blocks * (hidden_size * (8 + 2 * mlp_ratio) + 4 + num_heads) + hidden_size + 2
    passing = hidden_size * (2 * mlp_ratio + 2)
    return ALLOCATOR * (16 * parameters + bytes_per_number * batch_size * tokens * (kept + passing)) / 2**20


def memory_grid() -> list[dict]:
    """Batch sizes and models to measure: one thing varied at a time, and at last a ViT-S/16 at 224 pixels."""
    default = {"batch_size": 128, "patch_size": 4, "hidden_size": 64, "num_blocks": 4, "mlp_ratio": 4.0}
    grid = [{**default, name: value} for name, values in GROWTH.items() for value in values]
    grid += [{**default, "mlp_ratio": 1.0}, {**default, "mlp_ratio": 2.0}, {"batch_size": 16, **VIT_S}]
    return [options for i, options in enumerate(grid) if options not in grid[:i]]


def compare_memory(_config: Config) -> dict:
    """Peak memory of a training step in a process of its own beside the formula's, and how far off that is.

    Libraries take memory of their own once they are used: that of the smallest model with one image is measured and
    added to what the formula says.
    """
    smallest = {"batch_size": 1, "hidden_size": 8, "num_heads": 2, "num_blocks": 1, "patch_size": 8}
    base = cost_in_a_process(smallest)["memory_mb"]
    rows = []
    for options in tqdm(memory_grid(), desc="memory"):
        sizes = {name: value for name, value in options.items() if name != "batch_size"}
        parameters = num_parameters(VisionTransformer(pooling="mean", **sizes))
        cost = cost_in_a_process(options)
        predicted = base + predicted_memory_mb(parameters=parameters, **options)
        error = predicted / cost["memory_mb"] - 1
        rows.append({**options, "parameters": parameters, **cost, "predicted_mb": predicted, "error": error})
    print(f"\nlibraries' own: {base:.0f} MB")
    columns = "batch_size img_size patch_size hidden_size num_blocks mlp_ratio:g parameters:, memory_mb:.0f"
    rows_in_full = [{"img_size": 32, "mlp_ratio": 4.0, **row} for row in rows]
    print_table(rows_in_full, columns + " predicted_mb:.0f error:+.0%")
    print(f"\nlargest error {max(abs(row['error']) for row in rows):.0%}")
    return {"base_mb": base, "rows": rows}


# ------------------------------------------------------------------------------------------------------------ plan


def plan(config: Config) -> dict:
    """What ViT-S/16 on ImageNet needs: its parameters and FLOPs counted, the rest by `on_gpus`."""
    model = VisionTransformer(output_size=1000, pooling="mean", **VIT_S)
    flops = count_flops(lambda: model(torch.zeros(1, 3, 224, 224)).sum().backward())  # forward and backward
    result = on_gpus(config, num_parameters(model), flops)
    print(f"\nViT-S/16, {config.images:,} images, {config.epochs} epochs, batch {config.batch_size:,}, on paper")
    texts = {name: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for name, value in result.items()}
    print_table([{"quantity": name.replace("_", " "), "value": text} for name, text in texts.items()], "quantity value")
    return result


def on_gpus(config: Config, parameters: int, flops: int) -> dict:
    """What a model of so many parameters, and FLOPs for an image, needs under `config`'s assumptions.

    Gradients are summed by ring all-reduce, in which each GPU sends 2 (n - 1) / n times their bytes (Patarasuk & Yuan
    2009), over the slowest link; in fp32, and none of it hidden behind the backward pass.
    """
    gpus = config.machines * config.gpus
    per_gpu = config.batch_size // gpus
    rate = gpus * config.utilisation * config.peak_tflops * 1e12 / flops
    compute = config.batch_size / rate
    sent = 2 * (gpus - 1) / gpus * 4 * parameters
    links = [config.gpu_gigabytes_per_second] + [config.network_gigabits_per_second / 8] * (config.machines > 1)
    communication = sent / (min(links) * 1e9)
    steps = config.epochs * (config.images // config.batch_size)
    overall = config.batch_size / (compute + communication)
    return {
        "parameters": parameters,
        "training_flops_per_image": flops,
        "gpus": gpus,
        "images_per_gpu": per_gpu,
        "images_per_second_by_compute": rate,
        "compute_seconds_per_step": compute,
        "communication_bytes_per_step": sent,
        "communication_seconds_per_step": communication,
        "images_per_second": overall,
        "steps": steps,
        "hours": steps * (compute + communication) / 3600,
        "memory_gigabytes_per_gpu": predicted_memory_mb(per_gpu, parameters, **VIT_S, bytes_per_number=2) / 1024,
        "disk_megabytes_per_second": overall * config.picture_kilobytes / 1e3,
        "gigabytes_of_uint8": config.images * 3 * 224**2 / 1e9,
    }


# --------------------------------------------------------------------------------------------------------- picture


def draw(results: dict, path: Path) -> None:
    """Left images/s of threads and processes, right the formula's memory against what was measured."""
    note = "training against one thread, batch 128 in all; on the bars images/s"
    figure = utils.new_figure(1000, 400, "Threads and processes", note)
    axes = utils.add_axes(figure, 60, 70, 380, 270)
    rows = results["throughput"]
    combinations = list(dict.fromkeys((row["processes"], row["threads"]) for row in rows))
    for number, (width, color) in enumerate(zip(WIDTHS, (utils.BLUE, utils.VERMILLION), strict=False)):
        bars = [row for row in rows if row["hidden_size"] == width]
        places = [combinations.index((row["processes"], row["threads"])) + 0.4 * (number - 0.5) for row in bars]
        drawn = axes.bar(places, [row["speedup"] for row in bars], width=0.36, color=color, label=f"hidden {width}")
        axes.bar_label(drawn, [f"{row['images_per_second']:,.0f}" for row in bars], padding=2, size=9)
    axes.grid(axis="y")
    texts = [f"{p} process{'es' * (p > 1)}\n{t} thread{'s' * (t > 1)}" for p, t in combinations]
    axes.set_xticks(range(len(combinations)), texts)
    axes.set(ylabel="speed, in multiples of one thread's", ylim=(0, 1.25 * max(row["speedup"] for row in rows)))
    axes.legend(loc="upper left")

    utils.add_text(figure, 520, 28, "Memory of a training step", size=13, weight="bold")
    utils.add_text(figure, 520, 48, "MB above the empty process; grey: within 20 % of what was measured")
    axes = utils.add_axes(figure, 570, 70, 400, 270)
    rows = results["memory"]["rows"]
    values = [value for row in rows for value in (row["memory_mb"], row["predicted_mb"])]
    ends = [0.8 * min(values), 1.25 * max(values)]
    axes.fill_between(ends, [0.8 * end for end in ends], [1.2 * end for end in ends], color="0.9", lw=0)
    axes.loglog([row["memory_mb"] for row in rows], [row["predicted_mb"] for row in rows], "o", color=utils.BLUE)
    axes.grid()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_ticks([75, 150, 300, 600, 1200])
        axis.set_minor_locator(NullLocator())
    axes.set(xlim=ends, ylim=ends, xlabel="measured", ylabel="formula")
    utils.save_figure(figure, path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:  # a process started by train_in_processes
        with distributed.processes():  # of which the first alone prints
            print(json.dumps(be_one_of_the_processes(*map(int, sys.argv[2:]))))
    else:
        main()
