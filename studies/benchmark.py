"""Speed: this project's Vision Transformer beside a plain reference and the libraries people would otherwise use.

    python -m studies.benchmark                      # training step, pipeline, and how cost grows: under ten minutes
    python -m studies.benchmark --augmentation       # what each augmentation costs: five minutes
    python -m studies.benchmark --time_to_accuracy   # seconds until 60.63 % validation accuracy, three seeds each

Contenders take turns within one process, so that a machine whose speed drifts is the same to all; what is compared are
medians, as ratios. Tables are printed and stored as JSON under figures/. What is stopped keeps the parts that are done:
the same command goes on from there. Needs requirements-dev.txt.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import utils
from images.augment import NAMES, import_torchvision
from images.loader import Dataset, Split
from network import VisionTransformer
from runner import Runner
from studies.peers import ReferenceViT, time_run, train_cct_2
from studies.runs import markdown
from support import cli, schema
from support.files import figures_folder
from support.report import provenance, read_json, write_json
from training.callbacks import Clock, ProgressBar
from training.models import count_flops
from training.optim import build_optimizer, build_schedule

TARGET = 0.6063  # test accuracy that earlier code of this kind reached after 20 epochs


@dataclass
class Config:
    """Compare speeds."""

    augmentation: bool = False  # what each augmentation costs: images/s of the loader alone and of a training epoch
    time_to_accuracy: bool = False  # train reference and quick ViT until 60.63 % validation accuracy
    seeds: int = 3  # runs of each in time_to_accuracy
    contender: str | None = None  # one run: reference or quick (of time_to_accuracy), or cct_2 with its authors' recipe
    seed: int = 0  # of that run
    cct_epochs: int = 11  # that cct_2 trains: as many as fit in the time of the reference's 20
    stop_at: float = TARGET  # validation accuracy (a fraction) at which that run ends; 1 trains all its epochs
    repeats: int = 15  # timed steps of each contender
    threads: int = 1  # of torch
    data_dir: str | None = None  # where CIFAR-10 lies
    output_dir: str | None = None  # where the results go; default: the project's figures/

    @property
    def figures(self) -> Path:
        return figures_folder(self.output_dir)


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    torch.set_num_threads(config.threads)
    with cli.one_line_errors():
        if config.contender:
            run_contender(config, config.contender, config.seed)
        elif config.time_to_accuracy:
            store(config, "time_to_accuracy", time_to_accuracy(config))
        elif config.augmentation:
            store(config, "augmentation_cost", {"images_per_second": compare_augmentations(config)})
        else:
            parts = {"step": lambda: compare_steps(config), "pipeline": compare_pipeline}
            parts |= {name: lambda name=name: measure_growth(config, name) for name in GROWTH}
            results = run_parts(config, "benchmark", parts)
            cost = summarise_cost(config, [row for name in GROWTH for row in results.pop(name)])
            store(config, "benchmark", {**results, "cost": cost})
            partial_path(config, "benchmark").unlink()


def run_parts(config: Config, name: str, parts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each part returns, by its name. It is stored when the part is done, and not measured again by a later call
    with the same settings; Ctrl-C says what is stored."""
    path = partial_path(config, name)
    machine = {key: value for key, value in provenance().items() if key in ("torch", "machine", "threads")}
    settings, done = {"repeats": config.repeats, **machine}, {}
    if path.exists():
        found = read_json(path, schema.PARTS, "; delete it and measure again")
        done = found["parts"] if found["settings"] == settings else {}
    if done:
        print(f"measured before, and taken from {path}: {', '.join(done)}")
    for part in [part for part in parts if part not in done]:
        with told_when_stopped(lambda: f"{', '.join(done)} in {path}" if done else "nothing yet"):
            done[part] = parts[part]()
            write_json(path, {"settings": settings, "parts": done})
    return {part: done[part] for part in parts}


@contextlib.contextmanager
def told_when_stopped(stored: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C says what is stored."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; stored: {stored()}. The same command goes on from there", file=sys.stderr)
        raise


def partial_path(config: Config, name: str) -> Path:
    """Where the parts are until all are done."""
    return config.figures / f"{name}.json.part"


def store(config: Config, name: str, results: dict) -> None:
    path = config.figures / f"{name}.json"
    write_json(path, {**results, "provenance": provenance()})
    cli.say_written([path])


def print_table(rows: list[dict], columns: str) -> None:
    """As Markdown; `columns` are keys of a row, each with its format: "batch_size error:+.0%"."""
    texts = {column.partition(":")[0].replace("_", " "): "{" + column + "}" for column in columns.split()}
    print("\n" + markdown([{heading: text.format(**row) for heading, text in texts.items()} for row in rows]))


# -------------------------------------------------------------------------------------------------- training step


def training_step(model: nn.Module, optimizer, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    def step():
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_runner(model: nn.Module, optimizer: str = "muon", kind: type[Runner] = Runner) -> Runner:
    """As train.py makes it."""
    optimizer = build_optimizer(model, optimizer)
    schedule = build_schedule(optimizer, 10_000)
    return kind(model.train(), optimizer, nn.CrossEntropyLoss(), "cpu", schedule, verbose=False)


def our_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer: str = "adamw"):
    """What `Runner` does in a step, with metrics and the check for infinities."""
    runner = our_runner(model, optimizer)
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


def compare_steps(config: Config) -> dict:
    """A training step of batch 128 at hidden 64, 4 heads, 4 blocks, patch 4, in fp32."""
    import_torchvision()  # timm needs it
    from timm.models import VisionTransformer as TimmViT
    from vit_pytorch import ViT as PytorchViT
    from vit_pytorch.cct import cct_2

    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def plain(model, optimizer=torch.optim.AdamW):
        return training_step(model, optimizer(model.parameters(), lr=1e-3), images, labels)

    def ours(optimizer="adamw", **options):
        return our_step(VisionTransformer(**options), images, labels, optimizer)

    timm_sizes = dict(img_size=32, patch_size=4, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=4)
    lucid_sizes = dict(image_size=32, patch_size=4, num_classes=10, dim=64, depth=4, heads=4, dim_head=16, mlp_dim=256)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    steps = {
        "reference, MLP ratio 1": plain(ReferenceViT(), torch.optim.Adam),
        "ours, MLP ratio 1, CLS": ours(mlp_ratio=1.0),
        "ours, MLP ratio 1, mean": ours(mlp_ratio=1.0, pooling="mean"),
        "timm, MLP ratio 4": plain(TimmViT(**timm_sizes)),
        "vit-pytorch, MLP ratio 4": plain(PytorchViT(**lucid_sizes)),
        "ours, MLP ratio 4, CLS": ours(),
        "ours, MLP ratio 4, mean": ours(pooling="mean"),
        "ours, MLP ratio 4, mean, Muon (train.py)": ours("muon", pooling="mean"),
        "cct_2 of vit-pytorch": plain(cct_2(img_size=32, num_classes=10, n_conv_layers=2, kernel_size=3)),
        "ours, convolutional tokenizer, MLP ratio 2": ours(tokenizer="conv", pooling="mean", mlp_ratio=2.0),
        "GEMM": lambda: left @ right,
    }
    medians = {name: statistics.median(values) for name, values in take_turns(steps, config.repeats).items()}
    gemm_rate = 2 * 2048**3 / medians.pop("GEMM")
    flops = count_flops(plain(VisionTransformer(pooling="mean"), torch.optim.SGD))
    share = flops / medians["ours, MLP ratio 4, mean"] / gemm_rate
    ratios = {}
    for peer in ("reference, MLP ratio 1", "timm, MLP ratio 4", "vit-pytorch, MLP ratio 4"):
        for mine in (f"ours, {peer.split(', ')[1]}, {pooling}" for pooling in ("CLS", "mean")):
            ratios[f"{peer} / {mine}"] = medians[peer] / medians[mine]
    print(f"\nTraining step, batch 128, {config.threads} thread(s), {config.repeats} turns")
    rows = [{"step": name, "ms": 1e3 * s, "images_per_second": 128 / s} for name, s in medians.items()]
    print_table(rows, "step ms:.1f images_per_second:,.0f")
    print_table([{"medians": name, "ratio": ratio} for name, ratio in ratios.items()], "medians ratio:.2f")
    print(f"\nFLOPs of the default step over the GEMM rate of {gemm_rate / 1e9:.0f} GFLOP/s: {share:.2f}")
    return {"medians": medians, "ratios": ratios, "gemm_flops_per_second": gemm_rate, "share_of_gemm_rate": share}


# ------------------------------------------------------------------------------------------------------- pipeline


def synthetic_data(images: int = 4096) -> Dataset:
    """Random pictures of CIFAR-10's shape: how long they take does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        pictures = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(pictures, torch.randint(0, 10, (n,), generator=generator))

    return Dataset("random", [str(i) for i in range(10)], split(images), split(512), split(512), flip=True)


def compare_pipeline() -> dict:
    """images/s of whole epochs through Runner.train, beside those of the bare step, in turns."""
    data = synthetic_data()
    loader = data.loader("train", 128, shuffle=True, augment="crop_flip")
    runner, clock = our_runner(VisionTransformer(pooling="mean")), Clock()
    runner.callbacks += [clock, ProgressBar(clock)]
    bare = our_step(runner.model, *next(iter(loader)), "muon")
    epochs = {"bare": lambda: [bare() for _ in range(len(loader))], "whole": lambda: runner.train(loader, epochs=1)}
    seconds = take_turns(epochs, repeats=3, warmup=1)
    rates = {name: len(data.train) / statistics.median(values) for name, values in seconds.items()}
    share = rates["whole"] / rates["bare"]
    print(f"\n{rates['bare']:,.0f} images/s in bare steps with the same batch again and again; in a whole epoch, with")
    print(f"shuffling, augmentation, metrics and progress bar, {rates['whole']:,.0f}: {share:.3f} of that")
    return {"images_per_second": rates, "ratio": share}


def compare_augmentations(config: Config) -> dict:
    """images/s of each augmentation, of the loader alone and of an epoch of the default ViT, all in turns."""
    data = synthetic_data(1024)
    runs = {}
    for name in NAMES:
        loader, runner = (
            data.loader("train", 128, shuffle=True, augment=name),
            our_runner(VisionTransformer(pooling="mean")),
        )
        runs[name, "loader"] = lambda loader=loader: deque(loader, maxlen=0)  # takes every batch and keeps none
        runs[name, "epoch"] = lambda loader=loader, runner=runner: runner.train(loader, epochs=1)
    rates = {name: {} for name in NAMES}
    for (name, what), values in take_turns(runs, config.repeats, warmup=1).items():
        rates[name][what] = len(data.train) / statistics.median(values)
    print(f"\nimages/s of the loader alone, and of training the default ViT: {config.threads} thread(s), batch 128,")
    print(f"medians of {config.repeats} turns; and how far the second is from that without augmentation")
    rows = [{"augment": name, **r, "change": r["epoch"] / rates["none"]["epoch"] - 1} for name, r in rates.items()]
    print_table(rows, "augment loader:,.0f epoch:,.0f change:+.0%")
    return rates


# ------------------------------------------------------------------------------------------------- how cost grows


GROWTH = {  # what varies, and its values
    "patch_size": [8, 4, 2],
    "hidden_size": [32, 64, 128, 256],
    "num_blocks": [2, 4, 8],
    "batch_size": [32, 64, 128, 256],
}
QUANTITIES = {"seconds": ("step, ms", 1e3, utils.BLUE), "memory_mb": ("memory, MB", 1, utils.VERMILLION)}


def measure_growth(config: Config, name: str) -> list[dict]:
    """Step time and peak memory for each value of what is varied, in a process of its own."""
    rows = []
    for value in tqdm(GROWTH[name], desc=f"cost against {name}"):
        options = {"batch_size": 128, "patch_size": 4, "hidden_size": 64, "num_blocks": 4, name: value}
        rows.append({"varied": name, **options, **cost_in_a_process(options, config.threads)})
    return rows


def summarise_cost(config: Config, rows: list[dict]) -> dict:
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
    draw_cost(rows, exponents, config.figures / "cost.png")
    return {"rows": rows, "exponents": exponents}


def draw_cost(rows: list[dict], exponents: dict[str, float], path: Path) -> None:
    """Step time and memory against tokens, width, depth and batch, both axes logarithmic: a power law is a line."""
    note = "hidden 64, 4 heads, 4 blocks, patch 4, batch 128, one of them varied; slopes are fitted exponents"
    figure = utils.new_figure(1000, 480, "How a training step's cost grows", note)
    for column, name in enumerate(GROWTH):
        label, sizes = axis_of(name)
        for line, (quantity, (unit, scale, color)) in enumerate(QUANTITIES.items()):
            axes = utils.add_axes(figure, 62 + 240 * column, 80 + 190 * line, 170, 140)
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
    command = [sys.executable, "-m", "studies.benchmark", "cost", json.dumps(options), str(threads)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, cwd=cli.ROOT).stdout)


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


# ----------------------------------------------------------------------------------------------- time to accuracy


def run_contender(config: Config, contender: str, seed: int) -> list[dict]:
    """Validation accuracy and seconds after each epoch, stored too."""
    if contender == "cct_2":
        results, name = train_cct_2(config.cct_epochs, seed, config.data_dir), f"cct_2_{seed}"
    else:
        results = {"history": time_run(contender, seed, config.stop_at, config.data_dir)}
        name = f"time_to_accuracy_{contender}_{seed}"
    settings = {**dataclasses.asdict(config), "contender": contender, "seed": seed}
    store(config, name, {"config": settings, **results})
    return results["history"]


def time_to_accuracy(config: Config) -> dict:
    """Run what is missing, two contenders in turns; then compare medians."""
    reached, table = {"reference": [], "quick": []}, []
    print(f"Training until {TARGET:.2%} of the validation images are right, {config.threads} thread(s)")
    for seed in range(config.seeds):
        for contender, rows in reached.items():
            path = config.figures / f"time_to_accuracy_{contender}_{seed}.json"
            if path.exists():
                history = read_json(path, schema.HISTORY, "; delete it and run again")["history"]
            else:
                with told_when_stopped(lambda: f"{len(table)} of {2 * config.seeds} runs in {config.figures}"):
                    history = run_contender(config, contender, seed)
            row = next((row for row in history if row["val_accuracy"] > TARGET), None)
            rows.append(row)
            table.append({"contender": contender, "seed": seed, "reached": bool(row), **(row or history[-1])})
    print_table(table, "contender seed reached epoch val_accuracy:.2% wall_seconds:.1f cpu_seconds:.1f")
    ratios = {}
    for clock in ("wall_seconds", "cpu_seconds"):
        seconds = {name: [row[clock] if row else math.inf for row in rows] for name, rows in reached.items()}
        ratios[clock] = statistics.median(seconds["reference"]) / statistics.median(seconds["quick"])
        print(f"\nratio of medians, {clock.replace('_', ' ')}: {ratios[clock]:.1f}")
    return {"reached": reached, "ratios": ratios}


if __name__ == "__main__":
    if sys.argv[1:2] == ["cost"]:  # a process started by `cost_in_a_process`
        print(json.dumps(cost_of_one(json.loads(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
