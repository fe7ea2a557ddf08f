"""Cross-validation: train as many times as there are folds, each time with another part held out.

    python crossval.py --folds 5 --epochs 10             # any flag of train.py
    python crossval.py --model cnn --dataset digits      # five folds, half a minute

The training images (the validation images among them, the test images not) are cut into folds with equal shares of each
class, always the same by --split_seed. Each run is one `python train.py`, stored as saved/<name>_fold<n>.pt and .json;
run again after an interruption it goes on where it was. Writes figures/<name>.png and .json; <name> is --name, by
default crossval_<model>. The standard deviation is over folds, whose training images overlap: it says less than one
over independent data would (Bengio & Grandvalet 2004).
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

import train
import utils
from setup_cifar import load_data
from support import cli
from support.files import write_bytes


@dataclass
class Config(train.Config):
    """Cross-validate a model: the flags of train.py, which runs once for each of --folds."""

    folds: int = (
        5  # parts that the training images are cut into, with equal shares of each class; each is held out once
    )


def main() -> None:
    config = cli.parse(Config, presets=train.PRESETS)
    with cli.one_line_errors():
        if config.fold:
            raise ValueError("crossval.py runs every fold: leave --fold away")
        if config.folds < 2:
            raise ValueError(f"folds must be at least 2, not {config.folds}")
        data = load_data(config.dataset, config.data_dir, config.val_fraction, config.split_seed, config.img_size)
        data.fold(0, config.folds, config.split_seed)  # refuses now what no run could do
        name = config.name or f"crossval_{config.model.removeprefix('timm:')}" + (
            "" if data.name == "cifar10" else f"_{data.name}"
        )
        reports = [run_fold(f"{name}_fold{k}", k, config) for k in range(config.folds)]
        summary = summarise(reports)
        print(f"\n{markdown_table(summary)}\n")
        prefix = Path(config.output_dir) / "figures" / name
        contents = {**summary, "dataset": data.name, "config": reports[0]["config"], "provenance": cli.provenance()}
        write_bytes(prefix.with_name(f"{name}.json"), json.dumps(contents, indent=1).encode())
        draw(reports, summary, prefix.with_name(f"{name}.png"), f"{config.model} on {data.name}")
        print(f"wrote {prefix}.json, {prefix}.png")


def run_fold(name: str, fold: int, config: Config) -> dict:
    """The report of one run of train.py, which goes on where it was interrupted and is not repeated once finished."""
    print(f"\nfold {fold + 1} of {config.folds}", flush=True)
    saved = Path(config.output_dir) / "saved"
    flags = [flag for flag in sys.argv[1:] if flag != "--resume"]  # as they were given: train.py reads them alike
    flags += ["--folds", str(config.folds), "--fold", str(fold), "--name", name, "--gif_frames", "0"]
    begun = (saved / f"{name}.checkpoint").exists()
    flags += ["--resume"] if begun else []
    process = subprocess.run([sys.executable, Path(__file__).with_name("train.py"), *flags])
    if process.returncode:
        if process.returncode == 2 and begun:
            print("(another --name begins a cross-validation of its own)", file=sys.stderr)
        if process.returncode in (130, 143):
            print("or, for all folds, the same crossval.py command")
        raise SystemExit(process.returncode)  # train.py has said why
    return json.loads((saved / f"{name}.json").read_text())


def summarise(reports: list[dict]) -> dict:
    """Accuracy (a fraction) and loss on what was held out: each fold's, their mean and standard deviation (n - 1)."""
    summary = {"folds": len(reports)}
    for quantity in ("val_accuracy", "val_loss"):
        values = [report["results"][quantity] for report in reports]
        summary[quantity] = {"each": values, "mean": statistics.mean(values), "std": statistics.stdev(values)}
    return summary


def markdown_table(summary: dict) -> str:
    accuracy, loss = summary["val_accuracy"], summary["val_loss"]
    rows = [
        (f"fold {k}", f"{a:.2%}", f"{b:.4f}")
        for k, (a, b) in enumerate(zip(accuracy["each"], loss["each"], strict=True))
    ]
    spread = f"{accuracy['mean']:.2%} ± {100 * accuracy['std']:.2f}"
    rows.append(("mean ± standard deviation", spread, f"{loss['mean']:.4f} ± {loss['std']:.4f}"))
    lines = ["| held out | accuracy | loss |", "|---|---:|---:|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def draw(reports: list[dict], summary: dict, path: Path, title: str) -> Figure:
    """Left each fold's accuracy on what was held out, epoch by epoch; right where they ended, and their mean."""
    figure = utils.new_figure(760, 400, dpi=200)
    utils.add_text(figure, 14, 28, f"Cross-validation: {title}", size=13, weight="bold")
    accuracy = summary["val_accuracy"]
    spread = f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %"
    note = f"accuracy on the held-out fold: {spread}, mean and standard deviation of {len(reports)} folds"
    utils.add_text(figure, 14, 48, note, size=9.5)
    left, right = utils.add_axes(figure, 60, 72, 420, 270), utils.add_axes(figure, 560, 72, 180, 270)
    for report in reports:
        values = [100 * value for value in report["metrics"]["val_accuracy"]]
        left.plot(range(1, len(values) + 1), values, color=utils.BLUE, lw=1.4, alpha=0.6, marker="o", markersize=3)
    left.set_xlabel("epoch", size=9.5, color=utils.DARK)
    left.set_ylabel("accuracy, %", size=9.5, color=utils.DARK)
    left.xaxis.get_major_locator().set_params(integer=True)
    mean, std = 100 * accuracy["mean"], 100 * accuracy["std"]
    right.axhspan(mean - std, mean + std, color=utils.LIGHT, lw=0)
    right.axhline(mean, color=utils.DARK, lw=1.4)
    folds = range(len(reports))
    right.plot(folds, [100 * value for value in accuracy["each"]], "o", color=utils.BLUE, markersize=6)
    right.set_xlabel("fold", size=9.5, color=utils.DARK)
    right.set_xticks(folds if len(reports) <= 10 else range(0, len(reports), 5))
    right.set_xlim(-0.6, len(reports) - 0.4)
    for axes in (left, right):
        utils.tidy(axes)
    right.grid(visible=False)
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
