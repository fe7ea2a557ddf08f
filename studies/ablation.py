"""What each part of the default recipe is worth: train with one thing removed or added at a time.

    python ablation.py                           # train what is missing, then table and figure; Ctrl-C, and it goes on
    python ablation.py --jobs 2                  # two runs at a time
    python ablation.py --epochs 20 --only default no_augmentation cutmix     # longer runs of some rows
    python ablation.py --dataset digits --epochs 1                           # all of it in miniature

Each run is one `python train.py`, stored as saved/ablation_<row>_seed<n>.json and .pt; another number of epochs than 5
appears in these names. What counts is the accuracy on the validation images; the test images, which train.py looks at
when it ends, are left out, as recipes are chosen here. Writes figures/ablation.md, .json and .png, always of all runs
of that length that are stored.
"""

import dataclasses
import json
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.figure import Figure

import utils
from studies.compare import TRAIN, run_all
from support import cli
from support.files import write_bytes
from training.checkpoints import is_of_interrupted_run


class Row(NamedTuple):
    title: str
    flags: str  # to train.py
    seeds: int = 1


ROWS = {
    "default": Row("the default recipe", "", 3),
    "no_augmentation": Row("no augmentation", "--augment none", 3),
    "adamw": Row("AdamW in place of Muon", "--optimizer adamw", 3),
    "conv": Row("convolutional tokenizer", "--tokenizer conv", 3),
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
class Config:
    """Train the default recipe with one thing removed or added at a time, then draw table and figure."""

    epochs: int = 5  # of each run
    only: list[Literal[tuple(ROWS)]] = field(default_factory=lambda: list(ROWS))  # rows to train; all by default
    dataset: Literal["cifar10", "digits"] = "cifar10"  # what all are trained on
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str = "."  # the folder that saved/ and figures/ are in
    jobs: int = 1  # trainings at a time; the cores are shared out among them
    train: bool = True  # train what is missing; --no-train only draws what is stored

    @property
    def saved(self) -> Path:
        return Path(self.output_dir) / "saved"

    @property
    def name(self) -> str:
        """What names of files begin with; what is not as by default appears in it."""
        data = "" if self.dataset == "cifar10" else f"_{self.dataset}"
        return f"ablation{data}" + ("" if self.epochs == Config.epochs else f"_{self.epochs}epochs")


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        for name in ("epochs", "jobs"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
        failed = train_missing(config) if config.train else []
        table = summarise(config)
        text = markdown_table(table, config)
        print(f"\n{text}\n")
        prefix = Path(config.output_dir) / "figures" / config.name
        report = {"config": dataclasses.asdict(config), "provenance": cli.provenance(), "rows": table}
        write_bytes(prefix.with_suffix(".md"), (text + "\n").encode())
        write_bytes(prefix.with_suffix(".json"), json.dumps(report, indent=1).encode())
        draw(table, prefix.with_suffix(".png"), config)
    print(f"wrote {prefix}.md, {prefix}.json, {prefix}.png")
    if failed:
        cli.fail(f"not trained: {', '.join(failed)}; what went wrong is said above", code=1)


def train_missing(config: Config) -> list[str]:
    """Train what is not stored, a first run of every row and then a second one; returns the names of those that
    failed."""
    commands = {}
    for seed in range(max(row.seeds for row in ROWS.values())):
        for key, row in ROWS.items():
            name = f"{config.name}_{key}_seed{seed}"
            if seed >= row.seeds or key not in config.only or (config.saved / f"{name}.json").exists():
                continue
            flags = f"--dataset {config.dataset} --epochs {config.epochs} {row.flags} --seed {seed} --gif_frames 0"
            commands[name] = [sys.executable, str(TRAIN), *flags.split(), "--name", name]
            commands[name] += ["--output_dir", config.output_dir]
            if is_of_interrupted_run(config.saved / f"{name}.checkpoint"):
                commands[name].append("--resume")
    print(f"{len(commands)} run{'s' * (len(commands) != 1)} to train")
    return run_all(commands, config) if commands else []


def summarise(config: Config) -> list[dict]:
    """Of each row that has a run: title, flags, and the validation accuracy of each run, their mean, standard deviation
    and difference from the default's mean over the same seeds (fractions); None where that cannot be said.

    Raises:
        ValueError: nothing is stored.
    """
    accuracies = {}
    for key, row in ROWS.items():
        for seed in range(row.seeds):
            path = config.saved / f"{config.name}_{key}_seed{seed}.json"
            if not path.exists():
                continue
            accuracies.setdefault(key, {})[seed] = json.loads(path.read_text())["results"]["val_accuracy"]
    if not accuracies:
        raise ValueError(f"no run of {config.epochs} epochs on {config.dataset} is stored in {config.saved}")
    default, table = accuracies.get("default", {}), []
    for key, runs in accuracies.items():
        values = list(runs.values())
        pairs = [runs[seed] - default[seed] for seed in runs.keys() & default.keys()]
        table.append(
            {
                "row": key,
                "title": ROWS[key].title,
                "flags": ROWS[key].flags,
                "val_accuracies": values,
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "difference": statistics.mean(pairs) if pairs and key != "default" else None,
            }
        )
    return table


def markdown_table(table: list[dict], config: Config) -> str:
    """A row for each change, with the command that made it."""
    lines = ["| | validation accuracy | points | runs | command |", "|---|---:|---:|---:|---|"]
    for row in table:
        accuracy = f"{row['mean']:.1%}" + (f" ± {100 * row['std']:.1f}" if row["std"] is not None else "")
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        data = "" if config.dataset == "cifar10" else f"--dataset {config.dataset} "
        command = shlex.join(f"python train.py {data}--epochs {config.epochs} {row['flags']}".split())
        lines.append(f"| {row['title']} | {accuracy} | {difference} | {len(row['val_accuracies'])} | `{command}` |")
    lines += ["", "Accuracy on the validation images; points are to the default's runs with the same seeds."]
    return "\n".join(lines)


def draw(table: list[dict], path: Path, config: Config) -> Figure:
    """Each run as a dot, each row's mean as a line, the default's across all; the best row on top."""
    rows = sorted(table, key=lambda row: row["mean"])
    figure = utils.new_figure(760, 118 + 28 * len(rows), dpi=200)
    title = "What each part of the recipe is worth"
    utils.add_text(figure, 14, 28, title, size=13, weight="bold")
    epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
    note = f"{config.dataset}, {epochs}, one thing changed at a time; a dot is a run, a line the mean of several"
    utils.add_text(figure, 14, 48, note, size=9.5)
    axes = utils.add_axes(figure, 230, 62, 500, 28 * len(rows))
    for height, row in enumerate(rows):
        color = utils.DARK if row["row"] == "default" else utils.BLUE
        values = [100 * value for value in row["val_accuracies"]]
        if len(values) > 1:
            axes.plot([100 * row["mean"]] * 2, [height - 0.32, height + 0.32], color=color, lw=2)
        axes.plot(values, [height] * len(values), "o", color=color, markersize=5, alpha=0.6, markeredgewidth=0)
        if row["row"] == "default":
            axes.axvline(100 * row["mean"], color=utils.GREY, lw=1, ls="--", zorder=0)
    utils.tidy(axes)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("validation accuracy, %", size=9.5, color=utils.DARK)
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
