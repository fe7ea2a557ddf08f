"""Speed: this project's Vision Transformer beside a plain reference and the libraries people would otherwise use.

    python benchmark.py                          # training step, pipeline, and how cost grows: under ten minutes
    python benchmark.py --augmentation           # what each augmentation costs: five minutes
    python benchmark.py --time_to_accuracy       # seconds until 60.63 % validation accuracy, three seeds each

Contenders take turns within one process, so that a machine whose speed drifts is the same to all; what is compared are
medians, as ratios. Tables are printed and stored as JSON under figures/. Needs requirements-dev.txt.
"""

import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import train
import utils
from images.augment import NAMES, import_torchvision
from network import VisionTransformer, count_flops
from runner import Runner
from setup_cifar import Dataset, Split, load_data
from studies.peers import PILDataset, ReferenceViT, accuracy_of, train_cct_2
from support import cli
from support.files import write_bytes
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
    output_dir: str = "figures"  # where the results go


def main() -> None:
    config = cli.parse(Config)
    torch.set_num_threads(config.threads)
    folder = Path(config.output_dir)
    if config.contender == "cct_2":
        with cli.one_line_errors():
            save(folder / f"cct_2_{config.seed}.json", train_cct_2(config.cct_epochs, config.seed, config.data_dir))
    elif config.contender:
        with cli.one_line_errors():
            save(folder / f"time_to_accuracy_{config.contender}_{config.seed}.json", time_run(config))
    elif config.time_to_accuracy:
        time_to_accuracy(config, folder)
    elif config.augmentation:
        results = {"images_per_second": compare_augmentations(config), "provenance": cli.provenance()}
        save(folder / "augmentation_cost.json", results)
    else:
        results = {"step": compare_steps(config), "pipeline": compare_pipeline(config), "cost": measure_cost(config)}
        save(folder / "benchmark.json", {**results, "provenance": cli.provenance()})


def save(path: Path, contents: dict) -> None:
    write_bytes(path, json.dumps(contents, indent=1).encode())
    print(f"wrote {path}")


# -------------------------------------------------------------------------------------------------- training step


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
    return lambda: runner._train_step(images, labels)


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

    def plain(model):
        return training_step(model, torch.optim.AdamW(model.parameters(), lr=1e-3), images, labels)

    def ours(**options):
        return VisionTransformer(**options)

    timm_sizes = dict(img_size=32, patch_size=4, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=4)
    lucid_sizes = dict(image_size=32, patch_size=4, num_classes=10, dim=64, depth=4, heads=4, dim_head=16, mlp_dim=256)
    reference = ReferenceViT()
    default = ours(pooling="mean")
    steps = {
        "reference, MLP ratio 1": training_step(reference, torch.optim.Adam(reference.parameters()), images, labels),
        "ours, MLP ratio 1, CLS": our_step(ours(mlp_ratio=1.0), images, labels),
        "ours, MLP ratio 1, mean": our_step(ours(mlp_ratio=1.0, pooling="mean"), images, labels),
        "timm, MLP ratio 4": plain(TimmViT(**timm_sizes)),
        "vit-pytorch, MLP ratio 4": plain(PytorchViT(**lucid_sizes)),
        "ours, MLP ratio 4, CLS": our_step(ours(), images, labels),
        "ours, MLP ratio 4, mean": our_step(default, images, labels),
        "ours, MLP ratio 4, mean, Muon (train.py)": our_step(ours(pooling="mean"), images, labels, "muon"),
        "cct_2 of vit-pytorch": plain(cct_2(img_size=32, num_classes=10, n_conv_layers=2, kernel_size=3)),
        "ours, convolutional tokenizer, MLP ratio 2": our_step(
            ours(tokenizer="conv", pooling="mean", mlp_ratio=2.0), images, labels
        ),
    }
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = take_turns({**steps, "GEMM": lambda: left @ right}, config.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    gemm_rate = 2 * 2048**3 / medians.pop("GEMM")
    flops = count_flops(training_step(default, torch.optim.SGD(default.parameters()), images, labels))
    share = flops / medians["ours, MLP ratio 4, mean"] / gemm_rate

    print(f"\nTraining step, batch 128, {config.threads} thread(s), {config.repeats} turns\n")
    print("| contender | ms (median) | images/s |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1e3 * median:.1f} | {128 / median:,.0f} |")
    ratios = {
        f"{peer} / {mine}": medians[peer] / medians[mine]
        for peer, mine in [
            ("reference, MLP ratio 1", "ours, MLP ratio 1, CLS"),
            ("reference, MLP ratio 1", "ours, MLP ratio 1, mean"),
            ("timm, MLP ratio 4", "ours, MLP ratio 4, CLS"),
            ("timm, MLP ratio 4", "ours, MLP ratio 4, mean"),
            ("vit-pytorch, MLP ratio 4", "ours, MLP ratio 4, CLS"),
            ("vit-pytorch, MLP ratio 4", "ours, MLP ratio 4, mean"),
        ]
    }
    print("\n| ratio of medians | |\n|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio:.2f} |")
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


def compare_pipeline(config: Config) -> dict:
    """images/s of whole epochs through Runner.train, beside those of the bare step, in turns."""
    data = synthetic_data()
    loader = data.loader("train", 128, shuffle=True, augment="crop_flip")
    images, labels = next(iter(loader))
    model = VisionTransformer(pooling="mean")
    bare = our_step(model, images, labels, "muon")
    optimizer = build_optimizer(model)
    runner = Runner(
        model, optimizer, nn.CrossEntropyLoss(), "cpu", build_schedule(optimizer, 10_000), eval_criterion=None
    )

    def bare_epoch():
        for _ in range(len(loader)):
            bare()

    seconds = take_turns({"bare": bare_epoch, "whole": lambda: runner.train(loader, epochs=1)}, repeats=3, warmup=1)
    rates = {name: data_size / statistics.median(s) for name, s in seconds.items() for data_size in [len(data.train)]}
    share = rates["whole"] / rates["bare"]
    print("\n| pipeline | images/s |\n|---|---|")
    print(f"| bare step, the same batch again and again | {rates['bare']:,.0f} |")
    print(f"| whole epoch: shuffling, augmentation, metrics, progress bar | {rates['whole']:,.0f} |")
    print(f"| ratio | {share:.3f} |")
    return {"images_per_second": rates, "ratio": share}


def compare_augmentations(config: Config) -> dict:
    """images/s of each augmentation, of the loader alone and of an epoch of the default ViT, all in turns."""
    data = synthetic_data(1024)
    runs = {}
    for name in NAMES:
        loader = data.loader("train", 128, shuffle=True, augment=name)
        model = VisionTransformer(pooling="mean")
        optimizer = build_optimizer(model)
        runner = Runner(model, optimizer, nn.CrossEntropyLoss(), "cpu", build_schedule(optimizer, 10_000))
        runs[name, "loader"] = lambda loader=loader: deque(loader, maxlen=0)  # takes every batch and keeps none
        runs[name, "epoch"] = lambda loader=loader, runner=runner: runner.train(loader, epochs=1)
    with contextlib.redirect_stdout(io.StringIO()):  # the runner's line for each epoch
        seconds = take_turns(runs, config.repeats, warmup=1)
    rates = {name: {} for name in NAMES}
    for (name, what), values in seconds.items():
        rates[name][what] = len(data.train) / statistics.median(values)
    print(f"\nAugmentation, batch 128, {config.threads} thread(s), medians of {config.repeats} turns\n")
    print(
        "| augment | loader alone, images/s | training the default ViT, images/s | against none |\n|---|---:|---:|---:|"
    )
    for name, rate in rates.items():
        share = rate["epoch"] / rates["none"]["epoch"] - 1
        print(f"| {name} | {rate['loader']:,.0f} | {rate['epoch']:,.0f} | {share:+.0%} |")
    return rates


# ----------------------------------------------------------------------------------------------- how cost grows


GROWTH = {  # what varies, and its values
    "patch_size": [8, 4, 2],
    "hidden_size": [32, 64, 128, 256],
    "num_blocks": [2, 4, 8],
    "batch_size": [32, 64, 128, 256],
}


def measure_cost(config: Config) -> dict:
    """Step time and peak memory against tokens, width, depth and batch, each in a process of its own."""
    rows = []
    for name, values in GROWTH.items():
        for value in tqdm(values, desc=f"cost against {name}"):
            options = {"batch_size": 128, "patch_size": 4, "hidden_size": 64, "num_blocks": 4, name: value}
            rows.append({"varied": name, **options, **cost_in_a_process(options, config.threads)})
    exponents = {}
    for name in GROWTH:
        chosen = [row for row in rows if row["varied"] == name]
        label, size = axis_of(name, chosen)
        for quantity in ("seconds", "memory_mb"):
            slope = np.polyfit(np.log(size), np.log([row[quantity] for row in chosen]), 1)[0]
            exponents[f"{quantity} ~ {label}"] = round(float(slope), 2)
    print("\n| varied | value | tokens | step, ms | memory above the start, MB |\n|---|---|---|---|---|")
    for row in rows:
        tokens = (32 // row["patch_size"]) ** 2
        value = row[row["varied"]]
        print(f"| {row['varied']} | {value} | {tokens} | {1e3 * row['seconds']:.0f} | {row['memory_mb']:.0f} |")
    print("\nfitted exponents: " + ", ".join(f"{name}^{value}" for name, value in exponents.items()))
    draw_cost(rows, exponents, Path(config.output_dir) / "cost.png")
    return {"rows": rows, "exponents": exponents}


def draw_cost(rows: list[dict], exponents: dict[str, float], path: Path) -> None:
    """Step time and memory against tokens, width, depth and batch, both axes logarithmic: a power law is a line."""
    figure = utils.new_figure(1000, 480, dpi=200)
    utils.add_text(figure, 14, 30, "How a training step's cost grows", size=13, weight="bold")
    note = "hidden 64, 4 heads, 4 blocks, patch 4, batch 128, one of them varied; slopes are fitted exponents"
    utils.add_text(figure, 14, 50, note, size=9)
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
            axes.tick_params(labelsize=9)
            axes.text(
                0.06, 0.86, f"exponent {exponents[f'{quantity} ~ {label}']:.2f}", transform=axes.transAxes, size=9
            )
            axes.spines[["top", "right"]].set_visible(False)
            if line == 1:
                axes.set_xlabel(label.replace("_", " "), size=10)
            if column == 0:
                axes.set_ylabel(unit, size=10)
    utils.save_figure(figure, path)


def axis_of(name: str, rows: list[dict]) -> tuple[str, list[int]]:
    """What stands on the axis when `name` is varied, and its values: tokens, where that is the patch size."""
    if name == "patch_size":
        return "tokens", [(32 // row["patch_size"]) ** 2 for row in rows]
    return name, [row[name] for row in rows]


def cost_in_a_process(options: dict, threads: int = 1) -> dict:
    """`cost_of_one` in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, __file__, "cost", json.dumps(options), str(threads)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


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


def time_run(config: Config) -> dict:
    """Validation accuracy after each epoch against the seconds spent in training, evaluation excluded."""
    torch.manual_seed(config.seed)
    data = load_data("cifar10", config.data_dir)
    if config.contender == "reference":
        model, epochs, schedule = ReferenceViT(), 20, None
        train_loader = DataLoader(PILDataset(data.train), batch_size=128, shuffle=True)
        val_loader = DataLoader(PILDataset(data.val), batch_size=128)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    elif config.contender == "quick":
        quick = dataclasses.replace(train.Config(), **train.PRESETS["quick"])
        train.use_defaults(quick)
        model, epochs = train.build_model(quick, data), quick.epochs
        train_loader = data.loader("train", quick.batch_size, shuffle=True, augment=quick.augment, seed=config.seed)
        val_loader = data.loader("val", 500)
        optimizer = build_optimizer(model, quick.optimizer, quick.lr, quick.weight_decay)
        schedule = build_schedule(optimizer, epochs * len(train_loader), quick.warmup)
    else:
        raise ValueError(f"unknown contender {config.contender!r}: choose reference or quick")
    history = []
    wall = cpu = 0.0
    for epoch in range(1, epochs + 1):
        model.train()
        wall_started, cpu_started = time.perf_counter(), time.process_time()
        for images, labels in tqdm(train_loader, desc=f"{config.contender}, seed {config.seed}, epoch {epoch}"):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        wall += time.perf_counter() - wall_started
        cpu += time.process_time() - cpu_started
        accuracy = accuracy_of(model, val_loader)
        history.append({"epoch": epoch, "wall_seconds": wall, "cpu_seconds": cpu, "val_accuracy": accuracy})
        if accuracy > config.stop_at:
            break
    return {"config": dataclasses.asdict(config), "history": history, "provenance": cli.provenance()}


def time_to_accuracy(config: Config, folder: Path) -> None:
    """Run what is missing, each in a process of its own, two contenders by turns; then compare medians."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
    reached = {"reference": [], "quick": []}
    for seed in range(config.seeds):
        for contender, rows in reached.items():
            path = folder / f"time_to_accuracy_{contender}_{seed}.json"
            if not path.exists():
                flags = ["--contender", contender, "--seed", str(seed), "--threads", str(config.threads)]
                flags += ["--output_dir", str(folder)] + (["--data_dir", config.data_dir] if config.data_dir else [])
                subprocess.run([sys.executable, __file__, *flags], check=True, env=environment)
            history = json.loads(path.read_text())["history"]
            rows.append(next((row for row in history if row["val_accuracy"] > TARGET), None))
    print(f"\nTraining until {TARGET:.2%} of the validation images are right, {config.threads} thread(s)\n")
    print("| contender | seed | epoch | accuracy | wall seconds | CPU seconds |\n|---|---|---|---|---|---|")
    for contender, rows in reached.items():
        for seed, row in enumerate(rows):
            if row is None:
                print(f"| {contender} | {seed} | not reached | | | |")
            else:
                accuracy = f"{row['val_accuracy']:.2%}"
                seconds = f"{row['wall_seconds']:.1f} | {row['cpu_seconds']:.1f}"
                print(f"| {contender} | {seed} | {row['epoch']} | {accuracy} | {seconds} |")
    ratios = {}
    for clock in ("wall_seconds", "cpu_seconds"):
        medians = {
            contender: statistics.median([row[clock] if row else float("inf") for row in rows])
            for contender, rows in reached.items()
        }
        ratios[clock] = medians["reference"] / medians["quick"]
        print(f"\nratio of medians, {clock.replace('_', ' ')}: {ratios[clock]:.1f}")
    save(folder / "time_to_accuracy.json", {"reached": reached, "ratios": ratios, "provenance": cli.provenance()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["cost"]:  # a process started by measure_cost
        print(json.dumps(cost_of_one(json.loads(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
