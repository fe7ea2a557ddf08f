"""Does it help to have seen other pictures first? Train on some classes, then learn others with few labels or many.

    python transfer.py                                # CIFAR-10: animals first, then vehicles
    python transfer.py --dataset digits --epochs 2    # 0 to 5, then 6 to 9: to see it work

A model is trained on the source classes. Then the target classes are learned with a part of their labels, each time
from scratch, from the source model's weights, and from these with all but the head frozen; by the same recipe and with
the same images, as processes of train.py. Run it again after an interruption: what is done is not done again.

Writes figures/transfer.png and figures/transfer.json (of digits: transfer_digits), and the models and reports of all
runs as saved/transfer_*.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure
from tqdm import tqdm

import utils
from setup_cifar import load_data
from support import cli
from support.files import write_bytes

TASKS = {  # source and target classes
    "cifar10": ("bird,cat,deer,dog,frog,horse", "airplane,automobile,ship,truck"),
    "digits": ("0,1,2,3,4,5", "6,7,8,9"),
}
STARTS = {
    "scratch": "from scratch",
    "transfer": "from the source's weights",
    "frozen": "the same, all but the head frozen",
}
COLOURS = dict(zip(STARTS, (utils.DARK, utils.BLUE, utils.VERMILLION), strict=True))


@dataclass
class Config:
    """Train on some classes, then on others with part of the labels, from scratch and from what was learned."""

    dataset: Literal["cifar10", "digits"] = "cifar10"  # CIFAR-10's animals and vehicles, or digits 0-5 and 6-9
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)  # of the target's labels, at least one for each class
    epochs: int = 20  # on the source, and on all of the target's images; on fewer images more, see below
    seeds: int = 1  # runs of everything, with seeds 0, 1, ...
    flags: str = ""  # further ones for every train.py: --flags="--hidden_size 32 --device cpu"
    output_dir: str = "."  # the folder that saved/ and figures/ go to


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        if not all(0 < fraction <= 1 for fraction in config.fractions) or not config.fractions:
            raise ValueError(f"fractions must be above 0 and at most 1, not {config.fractions}")
        for name in ("epochs", "seeds"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
        runs = plan(config)
        for run in tqdm(runs, "runs", unit="run"):
            run["results"] = train(run, config)
        table = summarise(runs)
        print(markdown_table(table))
        name = "transfer" if config.dataset == "cifar10" else f"transfer_{config.dataset}"
        figures = [Path(config.output_dir) / "figures" / f"{name}.{kind}" for kind in ("json", "png")]
        report = {"config": dataclasses.asdict(config), "provenance": cli.provenance(), "table": table, "runs": runs}
        write_bytes(figures[0], json.dumps(report, indent=1).encode())
        draw(table, figures[1], config.dataset, config.seeds)
        print(f"wrote {figures[0]}, {figures[1]}")


def plan(config: Config) -> list[dict]:
    """The runs in the order in which they are made: of each its name, what it is, and its flags for train.py."""
    source, target = TASKS[config.dataset]
    data = load_data(config.dataset, config.data_dir).select(target.split(","))
    runs = []
    for seed in range(config.seeds):
        first = f"transfer_{config.dataset}_source_seed{seed}"
        runs.append({"name": first, "start": "source", "seed": seed, "flags": ["--classes", source]})
        runs[-1]["flags"] += ["--epochs", str(config.epochs)]
        from_first = ["--init_from", str(Path(config.output_dir) / "saved" / f"{first}.pt")]
        starts = {"scratch": [], "transfer": from_first, "frozen": [*from_first, "--freeze", "backbone"]}
        for fraction in sorted(config.fractions):
            images = len(data.part_of_labels(fraction).train)
            epochs, batch_size = effort(config.epochs, fraction, images)
            for start, flags in starts.items():
                name = f"transfer_{config.dataset}_{start}_{100 * fraction:g}percent_seed{seed}"
                flags = ["--classes", target, "--label_fraction", str(fraction), *flags]
                flags += ["--epochs", str(epochs), "--batch_size", str(batch_size)]
                runs.append({"name": name, "start": start, "seed": seed, "images": images, "flags": flags})
    return runs


def effort(epochs: int, fraction: float, images: int) -> tuple[int, int]:
    """Epochs and batch size for a part of the images. A hundredth of them would be a handful of steps: it gets five
    times the epochs and at least five steps in each, a twentieth of the work all the same."""
    return round(epochs * fraction**-0.35), max(1, min(128, images // 5))


def train(run: dict, config: Config) -> dict:
    """The results of one run of train.py, which goes on where it was interrupted, and is not repeated once finished."""
    saved = Path(config.output_dir) / "saved"
    flags = ["--dataset", config.dataset, "--name", run["name"], "--seed", str(run["seed"]), "--gif_frames", "0"]
    flags += ["--output_dir", config.output_dir, *run["flags"], *config.flags.split()]
    flags += ["--data_dir", config.data_dir] if config.data_dir else []
    flags += ["--resume"] if (saved / f"{run['name']}.checkpoint").exists() else []
    process = subprocess.run([sys.executable, Path(__file__).with_name("train.py"), *flags])
    if process.returncode:
        raise SystemExit(process.returncode)  # train.py has said why
    return json.loads((saved / f"{run['name']}.json").read_text())["results"]


def summarise(runs: list[dict]) -> list[dict]:
    """For each number of images and each start: mean test accuracy (a fraction), its standard deviation, and n."""
    table = []
    for images in sorted({run["images"] for run in runs if run["start"] in STARTS}):
        for start in STARTS:
            accuracies = [
                run["results"]["test_accuracy"] for run in runs if (run["start"], run.get("images")) == (start, images)
            ]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
            mean = statistics.mean(accuracies)
            table.append({"images": images, "start": start, "accuracy": mean, "std": spread, "runs": len(accuracies)})
    return table


def markdown_table(table: list[dict]) -> str:
    """A row for each start, a column for each number of images."""
    columns = sorted({row["images"] for row in table})
    cells = {(row["start"], row["images"]): row for row in table}
    lines = [
        "| labelled images | " + " | ".join(f"{images:,}" for images in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for start, description in STARTS.items():
        values = [cells[start, images] for images in columns]
        texts = [f"{row['accuracy']:.1%}" + (f" ± {100 * row['std']:.1f}" if row["std"] else "") for row in values]
        lines.append(f"| {description} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def draw(table: list[dict], path: Path, dataset: str, seeds: int) -> Figure:
    """Test accuracy by the number of labelled images, a line for each start, with standard deviations over seeds."""
    figure = utils.new_figure(760, 470, dpi=200)
    utils.add_text(figure, 14, 28, "Does it help to have seen other pictures first?", size=13, weight="bold")
    source, target = (task.replace(",", ", ") for task in TASKS[dataset])
    note = f"{dataset}: first {source}; then {target}"
    utils.add_text(figure, 14, 48, note, size=9.5)
    axes = utils.add_axes(figure, 66, 92, 660, 320)
    for start, description in STARTS.items():
        rows = [row for row in table if row["start"] == start]
        images, accuracies = [row["images"] for row in rows], [100 * row["accuracy"] for row in rows]
        spread = [100 * (row["std"] or 0) for row in rows]
        style = {"color": COLOURS[start], "marker": "o", "lw": 2, "markersize": 5, "capsize": 3}
        axes.errorbar(images, accuracies, spread, label=description, **style)
    ticks = sorted({row["images"] for row in table})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{images:,}" for images in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("labelled images of the target classes", size=9.5, color=utils.DARK)
    over = f", mean ± standard deviation of {seeds} runs" if seeds > 1 else ", one run each"
    axes.set_ylabel(f"test accuracy, %{over}", size=9.5, color=utils.DARK)
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": len(STARTS), "columnspacing": 1.2}
    axes.legend(**place, fontsize=9.5, frameon=False, labelcolor=utils.DARK)
    axes.grid(axis="y", color=utils.LIGHT)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9.5, color=utils.GREY, labelcolor=utils.DARK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(utils.GREY)
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
