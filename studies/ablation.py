"""What each part of the default recipe is worth: train with one thing removed or added at a time.

    python -m studies.ablation                   # train what is missing, then table and figure; Ctrl-C, and it goes on
    python -m studies.ablation --jobs 2          # two runs at a time
    python -m studies.ablation --epochs 20 --only default no_augmentation cutmix     # longer runs of some rows
    python -m studies.ablation --dataset digits --epochs 1                           # all of it in miniature

Each run is one `python train.py`, stored as saved/studies/ablation_<row>_seed<n>.json and .pt; another number of epochs
than 5 appears in these names. What counts is the accuracy on the validation images; the test images are not touched, as
recipes are chosen here. Writes figures/ablation.md, .json and .png, always of all runs of that length that are stored.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies import runs
from studies.runs import Row
from support import cli
from support.figures import BLUE, DARK, GREY, add_axes, new_figure, save_figure
from support.significance import interval_text, paired_t, points

ROWS = {
    "default": Row("the default recipe", "", 3),
    "no_augmentation": Row("no augmentation", "--augment none", 3),
    "adamw": Row("AdamW in place of Muon", "--optimizer adamw", 3),
    "conv": Row("convolutional tokenizer", "--tokenizer conv", 3),
    "no_whitening": Row("random first filters", "--no_whiten", 3),
    "adamw_slow": Row("AdamW at half its rate", "--optimizer adamw --lr 1e-3"),
    "adamw_fast": Row("AdamW at twice its rate", "--optimizer adamw --lr 4e-3"),
    "adam": Row("Adam", "--optimizer adam"),
    "sgd": Row("SGD with Nesterov momentum", "--optimizer sgd"),
    "constant": Row("no cool-down", "--schedule constant"),
    "linear": Row("cool-down along a line", "--schedule linear"),
    "step": Row("cool-down in steps", "--schedule step"),
    "one_cycle": Row("one cycle", "--schedule one_cycle"),
    "no_warmup": Row("no warm-up", "--warmup 0"),
    "grad_clip": Row("gradients clipped to norm 1", "--grad_clip 1"),
    "cls": Row("CLS token in place of the mean", "--pooling cls"),
    "no_smoothing": Row("no label smoothing", "--label_smoothing 0"),
    "no_decay": Row("no weight decay", "--weight_decay 0"),
    "drop_path": Row("stochastic depth added", "--drop_path 0.1"),
    "ema": Row("average of the weights added", "--ema 0.999"),
    "randaugment": Row("RandAugment added", "--augment randaugment"),
    "trivialaugment": Row("TrivialAugment added", "--augment trivialaugment"),
    "autoaugment": Row("AutoAugment added", "--augment autoaugment"),
    "random_erasing": Row("random erasing added", "--augment random_erasing"),
    "mixup": Row("Mixup added", "--augment mixup"),
    "cutmix": Row("CutMix added", "--augment cutmix"),
}


@dataclass
class Config(runs.StudyOptions):
    """Train the default recipe with one thing removed or added at a time, then draw table and figure."""

    # what is trained
    epochs: int = 5  # of each run
    only: tuple[Literal[tuple(ROWS)], ...] = tuple(ROWS)  # rows to train
    seeds: int | None = None  # runs of each row; default: three of the first rows, one of the others

    @property
    def name(self) -> str:
        """What names of files begin with; what is not as by default appears in it."""
        return f"ablation{self.suffix}" + ("" if self.epochs == Config.epochs else f"_{self.epochs}epochs")


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        cli.require_positive(config, "epochs", "seeds", "jobs")
        everything = plan(dataclasses.replace(config, only=tuple(ROWS), seeds=10))
        failed = runs.train_missing(plan(config), config, beside=everything) if config.train else []
        table = summarise(config)
        prefix = config.figures / config.name
        picture = prefix.with_suffix(".png")
        draw(table, picture, config)
        runs.write_study(prefix, as_markdown(table, config), config, [picture], failed, rows=runs.records(table))


def plan(config: Config) -> runs.Runs:
    """The runs asked for: a first one of every row, and then a second one."""
    common = f"--dataset {config.dataset} --epochs {config.epochs} --no_test"
    rows = {key: row._replace(seeds=config.seeds or row.seeds) for key, row in ROWS.items() if key in config.only}
    return {
        f"{config.name}_{key}_seed{seed}": f"{common} {row.flags} --seed {seed}"
        for seed in range(max(row.seeds for row in rows.values()))
        for key, row in rows.items()
        if seed < row.seeds
    }


def summarise(config: Config) -> pd.DataFrame:
    """Of each row that has a run: title, flags, and the validation accuracy of each run, their mean, standard deviation
    and difference from the default's runs with the same seeds (fractions), with Student's 95 % interval
    `[low, high]` over the seeds; nan or None where that cannot be said.

    Raises:
        ValueError: nothing is stored.
    """
    found = {
        key: {seed: runs.read_report(f"{prefix}{seed}", config)["results"]["val_accuracy"] for seed in seeds}
        for key in ROWS
        if (seeds := runs.stored_seeds(prefix := f"{config.name}_{key}_seed", config))
    }
    if not found:
        raise ValueError(f"no run of {config.epochs} epochs on {config.dataset} is stored in {config.saved}")
    rows, default = [], found.get("default", {})
    for key, accuracies in found.items():
        values = list(accuracies.values())
        pairs = sorted(accuracies.keys() & default.keys()) if key != "default" else []
        compared = paired_t([accuracies[seed] for seed in pairs], [default[seed] for seed in pairs]) if pairs else {}
        rows.append(
            {
                "row": key,
                "title": ROWS[key].title,
                "flags": ROWS[key].flags,
                "val_accuracies": values,
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else np.nan,
                "difference": compared.get("difference", np.nan),
                "interval": compared.get("interval"),
            }
        )
    return pd.DataFrame(rows)


def as_markdown(table: pd.DataFrame, config: Config) -> str:
    """A row for each change, with the command that made it."""
    data = "" if config.dataset == "cifar10" else f"--dataset {config.dataset} "
    command = f"python train.py {data}--epochs {config.epochs}"
    rows = [
        {
            "": row.title,
            "validation accuracy": runs.spread(row.mean, row.std),
            "points": "" if pd.isna(row.difference) else points(row.difference),
            "95 % interval": interval_text(row.interval) if row.interval else "",
            "runs": str(len(row.val_accuracies)),
            "command": f"`{f'{command} {row.flags}'.strip()}`",
        }
        for row in table.itertuples()
    ]
    note = (
        "Accuracy on the validation images; points are to the default's runs with the same seeds, the interval is "
        "Student's over two seeds or more."
    )
    return f"{runs.markdown(rows)}\n\n{note}"


def draw(table: pd.DataFrame, path: Path, config: Config) -> Figure:
    """Each run as a dot, each row's mean as a line, the default's across all; the best row on top."""
    epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
    note = f"{config.dataset}, {epochs}, one thing changed at a time; a dot is a run, a line the mean of several"
    figure = new_figure(760, 118 + 28 * len(table), "What each part of the recipe is worth", note)
    axes = add_axes(figure, 230, 62, 500, 28 * len(table))
    for height, row in enumerate(table.sort_values("mean").itertuples()):
        color = DARK if row.row == "default" else BLUE
        values, mean = [100 * value for value in row.val_accuracies], 100 * row.mean
        if len(values) > 1:
            axes.plot([mean, mean], [height - 0.32, height + 0.32], color=color, lw=2)
        axes.plot(values, [height] * len(values), "o", color=color, markersize=5, alpha=0.6, markeredgewidth=0)
        if row.row == "default":
            axes.axvline(mean, color=GREY, lw=1, ls="--", zorder=0)
    axes.grid()
    axes.set_yticks(range(len(table)), table.sort_values("mean")["title"])
    axes.set(ylim=(-0.6, len(table) - 0.4), xlabel="validation accuracy, %")
    save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
