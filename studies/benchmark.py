"""Speed: this project's Vision Transformer beside a plain reference and the libraries people would otherwise use.

    python -m studies.benchmark                      # training step, pipeline, and how cost grows: ten minutes
    python -m studies.benchmark --precision          # what bf16 gives on this processor: a minute, ten without bf16
    python -m studies.benchmark --augmentation       # what each augmentation costs: five minutes
    python -m studies.benchmark --time_to_accuracy   # seconds until 60.63 % validation accuracy, three seeds each
    python -m studies.benchmark --whole_runs         # the reference's whole training, and accurate's: six minutes

Contenders take turns within one process, so that a machine whose speed drifts is the same to all; what is compared are
medians, as ratios. Tables are printed and stored as JSON under figures/, those of steps and of precision once for each
kind of processor. What is stopped keeps the parts that are done: the same command goes on from there. Needs
requirements-dev.txt.
"""

import contextlib
import dataclasses
import math
import platform
import re
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import train
from images.augment import NAMES, import_torchvision
from network import VisionTransformer
from studies.cost import GROWTH, cost_in_a_process, measure_growth, summarise_cost
from studies.peers import REFERENCE_EPOCHS, ReferenceViT, time_run, train_cct_2
from studies.steps import AUTO, our_runner, our_step, print_table, synthetic_data, take_turns, training_step
from support import cli, schema
from support.files import figures_folder
from support.model import num_parameters
from support.report import instruction_sets, provenance, read_json, write_json
from training.callbacks import Clock, ProgressBar
from training.models import build_model, count_flops
from training.presets import PRESETS

TARGET = 0.6063  # test accuracy that earlier code of this kind reached after 20 epochs


@dataclass
class Config:
    """Compare speeds."""

    precision: bool = False  # a training step of each preset in fp32 and in bf16
    augmentation: bool = False  # what each augmentation costs: images/s of the loader alone and of a training epoch
    time_to_accuracy: bool = False  # train reference and quick ViT until 60.63 % validation accuracy
    seeds: int = 3  # runs of each in time_to_accuracy
    # processor seconds of whole trainings, the reference's and accurate's, from parts in turns
    whole_runs: bool = False
    contender: str | None = None  # one whole run: of the reference, a preset, or cct_2 with its authors' recipe
    seed: int = 0  # of that run
    cct_epochs: int = 11  # that cct_2 trains
    repeats: int = 15  # timed steps of each contender
    threads: int = 1  # of torch
    data_dir: str | None = None  # where CIFAR-10 lies
    output_dir: str | None = None  # where the results go; default: the project's figures/

    @property
    def figures(self) -> Path:
        return figures_folder(self.output_dir)


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        cli.require_positive(config, "seeds", "cct_epochs", "repeats", "threads")
        torch.set_num_threads(config.threads)
        if config.contender:
            run_whole(config)
        elif config.time_to_accuracy:
            store(config, "time_to_accuracy", time_to_accuracy(config))
        elif config.whole_runs:
            store(config, "whole_runs", compare_whole_runs(config))
        elif config.precision:
            store(config, f"precision_{kind_of_processor()}", compare_precisions(config))
        elif config.augmentation:
            store(config, "augmentation_cost", {"precision": AUTO, "images_per_second": compare_augmentations(config)})
        else:
            parts = {
                "step": lambda: compare_steps(config),
                "memory": lambda: compare_memory(config),
                "pipeline": compare_pipeline,
            }
            parts |= {name: lambda name=name: measure_growth(name, config.threads) for name in GROWTH}
            results = run_parts(config, "benchmark", parts)
            rows = [row for name in GROWTH for row in results.pop(name)]
            store(config, "cost", summarise_cost(rows, config.figures / "cost.png"))
            store(config, f"benchmark_{kind_of_processor()}", results)
            partial_path(config, "benchmark").unlink()


def run_parts(config: Config, name: str, parts: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """What each part returns, by its name. It is stored when the part is done, and not measured again by a later call
    with the same settings; Ctrl-C says what is stored."""
    path = partial_path(config, name)
    here = provenance()
    settings, done = {"repeats": config.repeats, "commit": here["commit"], **conditions(here)}, {}
    if path.exists():
        found = read_json(path, schema.BENCHMARK_PARTS, "; delete it and measure again")
        done = found["parts"] if found["settings"] == settings else {}
    if done:
        print(f"measured before, and taken from {path}: {', '.join(done)}")
    for part in [part for part in parts if part not in done]:
        with told_when_stopped(lambda: f"{', '.join(done)} in {path}" if done else "nothing yet"):
            done[part] = parts[part]()
            write_json(path, {"settings": settings, "parts": done})
    return {part: done[part] for part in parts}


def conditions(provenance: dict) -> dict:
    """What measurements must have in common to stand side by side."""
    return {key: provenance.get(key) for key in ("torch", "machine", "cpu", "instruction_sets", "threads")}


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


def kind_of_processor() -> str:
    """By the last of the instruction sets that matter here, "avx2" or "avx_512_bf16"; else its architecture."""
    return re.sub(r"\W", "_", (instruction_sets() or [platform.machine()])[-1].lower())


def store(config: Config, name: str, results: dict) -> None:
    path = config.figures / f"{name}.json"
    write_json(path, {**results, "provenance": provenance()})
    cli.say_written([path])


# -------------------------------------------------------------------------------------------------- training step


def compare_steps(config: Config) -> dict:
    """A training step of batch 128 at hidden 64, 4 heads, 4 blocks, patch 4, in fp32; with MLP ratio 4 also in bf16 if
    the processor computes in it."""
    import_torchvision()  # timm needs it
    from timm.models import VisionTransformer as TimmViT
    from vit_pytorch import ViT as PytorchViT
    from vit_pytorch.cct import cct_2

    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def plain(model, optimizer=torch.optim.AdamW, precision="fp32"):
        return training_step(model, optimizer(model.parameters(), lr=1e-3), images, labels, precision)

    def ours(optimizer="adamw", precision="fp32", **options):
        return our_step(VisionTransformer(**options), images, labels, optimizer, precision)

    timm_sizes = dict(img_size=32, patch_size=4, num_classes=10, embed_dim=64, depth=4, num_heads=4, mlp_ratio=4)
    lucid_sizes = dict(image_size=32, patch_size=4, num_classes=10, dim=64, depth=4, heads=4, dim_head=16, mlp_dim=256)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    low_left, low_right = left.bfloat16(), right.bfloat16()
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
        "product": lambda: left @ right,
    }
    peers = {"timm": (TimmViT, timm_sizes), "vit-pytorch": (PytorchViT, lucid_sizes)}
    precisions = ["fp32"]
    if AUTO == "bf16":  # elsewhere a step in bf16 takes seconds
        precisions.append("bf16")
        steps["product, bf16"] = lambda: low_left @ low_right
        for name, (kind, sizes) in peers.items():
            steps[f"{name}, MLP ratio 4, bf16"] = plain(kind(**sizes), precision="bf16")
        for pooling, name in (("cls", "CLS"), ("mean", "mean")):
            steps[f"ours, MLP ratio 4, {name}, bf16"] = ours(pooling=pooling, precision="bf16")
    medians = {name: statistics.median(values) for name, values in take_turns(steps, config.repeats).items()}
    flops = count_flops(plain(VisionTransformer(pooling="mean"), torch.optim.SGD))
    rates, shares, ratios = {}, {}, {}
    for precision in precisions:
        tail = "" if precision == "fp32" else ", bf16"
        rates[precision] = 2 * 2048**3 / medians.pop(f"product{tail}")
        shares[precision] = flops / medians[f"ours, MLP ratio 4, mean{tail}"] / rates[precision]
    for peer in ("reference, MLP ratio 1", *(f"{name}, MLP ratio 4" for name in peers)):
        for mine in (f"ours, {peer.split(', ')[1]}, {pooling}" for pooling in ("CLS", "mean")):
            ratios[f"{peer} / {mine}"] = medians[peer] / medians[mine]
            if "ratio 4" in peer and "bf16" in precisions:
                ratios[f"{peer} / {mine}, bf16"] = medians[peer] / medians[f"{mine}, bf16"]
                ratios[f"{peer}, bf16 / {mine}, bf16"] = medians[f"{peer}, bf16"] / medians[f"{mine}, bf16"]
    print(f"\nTraining step, batch 128, {config.threads} thread(s), {config.repeats} turns")
    rows = [{"step": name, "ms": 1e3 * s, "images_per_second": 128 / s} for name, s in medians.items()]
    print_table(rows, "step ms:.1f images_per_second:,.0f")
    print_table([{"medians": name, "ratio": ratio} for name, ratio in ratios.items()], "medians ratio:.2f")
    print("\nFLOPs of the default step over the rate of a large product:")
    for name, share in shares.items():
        print(f"{name}: {share:.2f} of {rates[name] / 1e9:.0f} GFLOP/s")
    return {"medians": medians, "ratios": ratios, "flops_per_second_of_products": rates, "shares_of_that_rate": shares}


def compare_memory(config: Config) -> dict:
    """Seconds and MB of train.py's step, which keeps freed memory, and of the same with PyTorch's own way: in
    processes of their own, in turns."""
    rows = {"kept": [], "given back": []}
    for _ in tqdm(range(5), desc="memory kept and given back, turns"):
        for name, costs in rows.items():
            options = {"batch_size": 128, "optimizer": "muon", "precision": AUTO, "keep_memory": name == "kept"}
            costs.append(cost_in_a_process(options, config.threads))
    medians = {
        name: {key: statistics.median(cost[key] for cost in costs) for key in costs[0]} for name, costs in rows.items()
    }
    print(f"\nThe default's step in {AUTO}, its memory kept for the next one or given back to the system")
    print_table([{"memory": name, **row} for name, row in medians.items()], "memory seconds:.3f memory_mb:.0f")
    ratio = medians["given back"]["seconds"] / medians["kept"]["seconds"]
    print(f"\nratio: {ratio:.2f}")
    return {"precision": AUTO, **medians, "ratio": ratio}


def compare_precisions(config: Config) -> dict:
    """A training step of each preset in fp32 and in bf16, and of the default without its optimiser's."""
    steps, parameters = {}, {}
    presets = [preset for preset in PRESETS if preset != "best"]  # whose step is accurate's
    for preset in presets:
        settings = cli.parse(train.Config, ["--preset", preset], train.dependent_defaults, remember=False)
        images, labels = torch.randn(settings.batch_size, 3, 32, 32), torch.randint(0, 10, (settings.batch_size,))
        for precision in ("fp32", "bf16"):
            model = build_model("vit", dataclasses.asdict(settings), 32, 10)
            parameters[preset] = num_parameters(model)
            runner = our_runner(model, precision=precision)
            steps[f"{preset}, {precision}"] = lambda runner=runner, x=images, y=labels: runner.train_step(x, y)
            if preset == "default":
                steps[f"Muon and AdamW of the default, gradients in {precision}"] = runner.optimizer.step
    repeats = config.repeats if AUTO == "bf16" else min(3, config.repeats)  # else bf16 takes seconds
    medians = {name: statistics.median(s) for name, s in take_turns(steps, repeats).items()}
    ratios = {preset: medians[f"{preset}, fp32"] / medians[f"{preset}, bf16"] for preset in presets}
    share = medians[f"Muon and AdamW of the default, gradients in {AUTO}"] / medians[f"default, {AUTO}"]
    print(f"\nA training step of each preset, {config.threads} thread(s), {repeats} turns; auto is {AUTO} here")
    print_table([{"step": name, "ms": 1e3 * s} for name, s in medians.items()], "step ms:.1f")
    print_table(
        [{"preset": name, "bf16_over_fp32": ratio} for name, ratio in ratios.items()], "preset bf16_over_fp32:.2f"
    )
    print(f"\nThe optimiser's share of the default's step: {share:.1%}")
    found = {"medians": medians, "speed_of_bf16_over_fp32": ratios, "auto": AUTO, "share_of_optimizer": share}
    return {"parameters": parameters, **found}


# ------------------------------------------------------------------------------------------------------- pipeline


def compare_pipeline() -> dict:
    """images/s of whole epochs through Runner.train, beside those of the bare step, in turns."""
    data = synthetic_data(2048)
    loader = data.loader("train", 128, shuffle=True, augment="crop_flip")
    runner, clock = our_runner(VisionTransformer(pooling="mean")), Clock()
    runner.callbacks += [clock, ProgressBar(clock)]
    bare = our_step(runner.model, *next(iter(loader)), "muon", AUTO)
    epochs = {"bare": lambda: [bare() for _ in range(len(loader))], "whole": lambda: runner.train(loader, epochs=1)}
    seconds = take_turns(epochs, repeats=7, warmup=1)
    rates = {name: len(data.train) / statistics.median(values) for name, values in seconds.items()}
    share = rates["whole"] / rates["bare"]
    print(f"\n{rates['bare']:,.0f} images/s in bare steps with the same batch again and again; in a whole epoch, with")
    print(f"shuffling, augmentation, metrics and progress bar, {rates['whole']:,.0f}: {share:.3f} of that")
    return {"precision": AUTO, "images_per_second": rates, "ratio": share}


def compare_augmentations(config: Config) -> dict:
    """images/s of each augmentation, of the loader alone and of an epoch of the default ViT, all in turns."""
    data = synthetic_data(1024)
    runs = {}
    for name in NAMES:
        loader = data.loader("train", 128, shuffle=True, augment=name)
        runner = our_runner(VisionTransformer(pooling="mean"))
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


# ----------------------------------------------------------------------------------------------- time to accuracy


def run_whole(config: Config) -> None:
    """Store validation accuracy and seconds after each epoch of the run that --contender names."""
    name, seed = config.contender, config.seed
    if name == "cct_2":
        results = train_cct_2(config.cct_epochs, seed, config.data_dir)
    else:
        results = {"seed": seed, "history": time_run(name, seed, 1.0, config.data_dir)}
    store(config, f"whole_run_{name}_{seed}", {"contender": name, **results})


def time_to_accuracy(config: Config) -> dict:
    """Run what is missing on this processor, two contenders in turns; then compare medians."""
    reached, table = {"reference": [], "quick": []}, []
    print(f"Training until {TARGET:.2%} of the validation images are right, {config.threads} thread(s)")
    for seed in range(config.seeds):
        for contender, rows in reached.items():
            name = f"time_to_accuracy_{contender}_{seed}"
            history = stored_history(config.figures / f"{name}.json")
            if history is None:
                with told_when_stopped(lambda: f"{len(table)} of {2 * config.seeds} runs in {config.figures}"):
                    history = time_run(contender, seed, TARGET, config.data_dir)
                store(config, name, {"contender": contender, "seed": seed, "history": history})
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


def stored_history(path: Path) -> list[dict] | None:
    """That of a run under today's conditions, on this processor; else None."""
    if not path.exists():
        return None
    stored = read_json(path, schema.HISTORY, "; delete it and run again")
    alike = conditions(stored["provenance"]) == conditions(provenance())
    return stored["history"] if alike else None


def compare_whole_runs(config: Config, part: float = 0.25, turns: int = 3) -> dict:
    """Processor seconds of the reference's and of accurate's training, with loading and without validation: medians of
    parts of an epoch in turns, times the epochs."""
    epochs = {"reference": REFERENCE_EPOCHS, "accurate": PRESETS["accurate"]["epochs"]}
    seconds = {name: [] for name in epochs}
    for turn in range(turns):
        for name, values in seconds.items():
            history = time_run(name, turn, 1.0, config.data_dir, part)
            values.append(history[-1]["cpu_seconds"] / part)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {"training": name, "epochs": n, "epoch": medians[name], "whole": n * medians[name]}
        for name, n in epochs.items()
    ]
    print("\nSeconds of the processor")
    print_table(rows, "training epochs epoch:.1f whole:,.0f")
    return {"seconds_of_an_epoch": seconds, "rows": rows}


if __name__ == "__main__":
    main()
