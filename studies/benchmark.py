"""Speed: this project's Vision Transformer beside a plain reference and the libraries people would otherwise use.

    python -m studies.benchmark                      # training step, pipeline, and how cost grows: under ten minutes
    python -m studies.benchmark --augmentation       # what each augmentation costs: five minutes
    python -m studies.benchmark --time_to_accuracy   # seconds until 60.63 % validation accuracy, three seeds each

Contenders take turns within one process, so that a machine whose speed drifts is the same to all; what is compared are
medians, as ratios. Tables are printed and stored as JSON under figures/. Needs requirements-dev.txt.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from images.augment import NAMES, import_torchvision
from images.loader import Dataset, Split
from network import VisionTransformer
from runner import Runner
from studies.cost import measure_cost, our_step, take_turns, training_step
from studies.peers import ReferenceViT, time_run, train_cct_2
from studies.runs import markdown
from support import cli
from support.report import provenance, write_json
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
    output_dir: str = "figures"  # where the results go


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    torch.set_num_threads(config.threads)
    folder = Path(config.output_dir)
    with cli.one_line_errors():
        if config.contender == "cct_2":
            results, name = train_cct_2(config.cct_epochs, config.seed, config.data_dir), f"cct_2_{config.seed}"
        elif config.contender:
            history = time_run(config.contender, config.seed, config.stop_at, config.data_dir)
            results = {"config": dataclasses.asdict(config), "history": history}
            name = f"time_to_accuracy_{config.contender}_{config.seed}"
        elif config.time_to_accuracy:
            results, name = time_to_accuracy(config, folder), "time_to_accuracy"
        elif config.augmentation:
            results, name = {"images_per_second": compare_augmentations(config)}, "augmentation_cost"
        else:
            results = {"step": compare_steps(config), "pipeline": compare_pipeline()}
            results["cost"], name = measure_cost(config.threads, folder / "cost.png"), "benchmark"
        write_json(folder / f"{name}.json", {**results, "provenance": provenance()})
        print(f"wrote {folder / name}.json")


# -------------------------------------------------------------------------------------------------- training step


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
    rows = medians.items()
    print(markdown([{"step": name, "ms": f"{1e3 * s:.1f}", "images/s": f"{128 / s:,.0f}"} for name, s in rows]))
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
    print("\n" + markdown([{"medians": name, "ratio": f"{ratio:.2f}"} for name, ratio in ratios.items()]))
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
    images, labels = next(iter(loader))
    model = VisionTransformer(pooling="mean")
    bare = our_step(model, images, labels, "muon")
    optimizer = build_optimizer(model)
    schedule = build_schedule(optimizer, 10_000)
    runner = Runner(model, optimizer, nn.CrossEntropyLoss(), "cpu", schedule, verbose=False)
    clock = Clock()
    runner.callbacks += [clock, ProgressBar(clock)]

    def bare_epoch():
        for _ in range(len(loader)):
            bare()

    seconds = take_turns({"bare": bare_epoch, "whole": lambda: runner.train(loader, epochs=1)}, repeats=3, warmup=1)
    rates = {name: data_size / statistics.median(s) for name, s in seconds.items() for data_size in [len(data.train)]}
    share = rates["whole"] / rates["bare"]
    print(f"\nbare step, the same batch again and again: {rates['bare']:,.0f} images/s")
    print(f"whole epoch, with shuffling, augmentation, metrics, progress bar: {rates['whole']:,.0f} images/s")
    print(f"ratio: {share:.3f}")
    return {"images_per_second": rates, "ratio": share}


def compare_augmentations(config: Config) -> dict:
    """images/s of each augmentation, of the loader alone and of an epoch of the default ViT, all in turns."""
    data = synthetic_data(1024)
    runs = {}
    for name in NAMES:
        loader = data.loader("train", 128, shuffle=True, augment=name)
        model = VisionTransformer(pooling="mean")
        optimizer = build_optimizer(model)
        schedule = build_schedule(optimizer, 10_000)
        runner = Runner(model, optimizer, nn.CrossEntropyLoss(), "cpu", schedule, verbose=False)
        runs[name, "loader"] = lambda loader=loader: deque(loader, maxlen=0)  # takes every batch and keeps none
        runs[name, "epoch"] = lambda loader=loader, runner=runner: runner.train(loader, epochs=1)
    seconds = take_turns(runs, config.repeats, warmup=1)
    rates = {name: {} for name in NAMES}
    for (name, what), values in seconds.items():
        rates[name][what] = len(data.train) / statistics.median(values)
    print(f"\nAugmentation, batch 128, {config.threads} thread(s), medians of {config.repeats} turns\n")
    table = [
        {
            "augment": name,
            "loader alone, images/s": f"{rate['loader']:,.0f}",
            "training the default ViT, images/s": f"{rate['epoch']:,.0f}",
            "against none": f"{rate['epoch'] / rates['none']['epoch'] - 1:+.0%}",
        }
        for name, rate in rates.items()
    ]
    print(markdown(table))
    return rates


# ----------------------------------------------------------------------------------------------- time to accuracy


def time_to_accuracy(config: Config, folder: Path) -> dict:
    """Run what is missing, each in a process of its own, two contenders in turns; then compare medians."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
    reached = {"reference": [], "quick": []}
    for seed in range(config.seeds):
        for contender, rows in reached.items():
            path = folder / f"time_to_accuracy_{contender}_{seed}.json"
            if not path.exists():
                flags = ["--contender", contender, "--seed", str(seed), "--threads", str(config.threads)]
                flags += ["--output_dir", str(folder)] + (["--data_dir", config.data_dir] if config.data_dir else [])
                command = [sys.executable, "-m", "studies.benchmark", *flags]
                subprocess.run(command, check=True, env={**environment, "PYTHONPATH": str(cli.ROOT)})
            history = json.loads(path.read_text())["history"]
            rows.append(next((row for row in history if row["val_accuracy"] > TARGET), None))
    print(f"\nTraining until {TARGET:.2%} of the validation images are right, {config.threads} thread(s)\n")
    columns = {"epoch": "{}", "val_accuracy": "{:.2%}", "wall_seconds": "{:.1f}", "cpu_seconds": "{:.1f}"}
    table = [
        {"contender": contender, "seed": str(seed)}
        | {name: "not reached" if row is None else text.format(row[name]) for name, text in columns.items()}
        for contender, rows in reached.items()
        for seed, row in enumerate(rows)
    ]
    print(markdown(table))
    ratios = {}
    for clock in ("wall_seconds", "cpu_seconds"):
        medians = {
            contender: statistics.median([row[clock] if row else float("inf") for row in rows])
            for contender, rows in reached.items()
        }
        ratios[clock] = medians["reference"] / medians["quick"]
        print(f"\nratio of medians, {clock.replace('_', ' ')}: {ratios[clock]:.1f}")
    return {"reached": reached, "ratios": ratios}


if __name__ == "__main__":
    main()
