"""Does it help to have seen other pictures first? Train on some classes, then learn others with few labels or many.

    python -m studies.transfer                                # CIFAR-10: animals first, then vehicles
    python -m studies.transfer --dataset digits --epochs 2    # 0 to 5, then 6 to 9: to see it work

A model is trained on the source classes. Then the target classes are learned with a part of their labels, each time
from scratch, from the source model's weights, and from these with all but the head frozen; by the same recipe and with
the same images, as processes of train.py. Run it again after an interruption: what is done is not done again.

Writes figures/transfer.png, .md and .json (of digits: transfer_digits), and the models and reports of all runs as
saved/studies/transfer_*.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from setup_cifar import load_data
from studies import runs
from support import cli
from support.figures import BLUE, DARK, VERMILLION, add_axes, new_figure, save_figure

TASKS = {  # source and target classes
    "cifar10": ("bird,cat,deer,dog,frog,horse", "airplane,automobile,ship,truck"),
    "digits": ("0,1,2,3,4,5", "6,7,8,9"),
}
STARTS = {
    "scratch": "from scratch",
    "transfer": "from the source's weights",
    "frozen": "the same, all but the head frozen",
}
COLOURS = dict(zip(STARTS, (DARK, BLUE, VERMILLION), strict=True))


@dataclass
class Config(runs.StudyOptions):
    """Train on some classes, then on others with part of the labels, from scratch and from what was learned.

    --dataset cifar10 has animals and vehicles, digits 0 to 5 and 6 to 9.
    """

    # what is trained
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)  # of the target's labels, at least one for each class
    epochs: int = 20  # on the source, and on all of the target's images; on fewer images more
    seeds: int = 1  # runs of everything, with seeds 0, 1, ...
    flags: str = ""  # further ones for every train.py: --flags="--hidden_size 32 --device cpu"


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        cli.require_positive(config, "epochs", "seeds", "jobs")
        if not all(0 < fraction <= 1 for fraction in config.fractions):
            raise ValueError(f"fractions must be above 0 and at most 1, not {config.fractions}")
        sources, targets = plan(config)
        failed = runs.train_missing(sources, config) if config.train else []
        if config.train and not failed:
            failed = runs.train_missing({run["name"]: run["flags"] for run in targets}, config)
        stored = [run for run in targets if (config.saved / f"{run['name']}.json").exists()]
        if not stored:
            raise ValueError(f"no run of this study is stored in {config.saved}")
        for run in stored:
            run["accuracy"] = runs.read_report(run["name"], config, tested=True)["results"]["test_accuracy"]
        table, prefix = summarise(stored), config.figures / f"transfer{config.suffix}"
        picture = prefix.with_suffix(".png")
        draw(table, picture, config)
        runs.write_study(prefix, as_markdown(table), config, [picture], failed, table=runs.records(table), runs=stored)


def plan(config: Config) -> tuple[runs.Runs, list[dict]]:
    """The runs on the source by name, and those on the target: of each name, flags, start and number of images."""
    source, target = TASKS[config.dataset]
    data = load_data(config.dataset, config.data_dir).select(target.split(","))
    sources, targets = {}, []
    for seed in range(config.seeds):
        common = f"--dataset {config.dataset} --seed {seed} {config.flags}"
        first = f"transfer_{config.dataset}_source_seed{seed}"
        sources[first] = f"{common} --classes {source} --epochs {config.epochs}"
        from_first = f"--init_from {(config.saved / first).as_posix()}.pt"
        starts = {"scratch": "", "transfer": from_first, "frozen": f"{from_first} --freeze backbone"}
        counts = {len(data.part_of_labels(fraction).train): fraction for fraction in sorted(config.fractions)}
        if len(counts) < len(config.fractions):
            raise ValueError(f"fractions {config.fractions}: two of them are the same number of images")
        for images, fraction in counts.items():
            epochs, batch_size = effort(config.epochs, fraction, images)
            for start, flags in starts.items():
                name = f"transfer_{config.dataset}_{start}_{100 * fraction:g}percent_seed{seed}"
                flags = f"{common} --classes {target} --label_fraction {fraction} {flags} --epochs {epochs}"
                flags += f" --batch_size {batch_size}"
                targets.append({"name": name, "start": start, "seed": seed, "images": images, "flags": flags})
    return sources, targets


def effort(epochs: int, fraction: float, images: int) -> tuple[int, int]:
    """Epochs and batch size for a part of the images. A hundredth of them would be a handful of steps: it gets five
    times the epochs and at least five steps in each, a twentieth of the work all the same."""
    return round(epochs * fraction**-0.35), max(1, min(128, images // 5))


def summarise(stored: list[dict]) -> pd.DataFrame:
    """For each number of images and each start: mean test accuracy (a fraction), its standard deviation, and n."""
    groups = pd.DataFrame(stored).groupby(["images", "start"], sort=False)["accuracy"]
    return groups.agg(accuracy="mean", std="std", runs="count").reset_index()


def as_markdown(table: pd.DataFrame) -> str:
    """A row for each start, a column for each number of images."""
    rows = []
    for start, description in STARTS.items():
        cells = table[table["start"] == start].sort_values("images").itertuples()
        texts = {f"{row.images:,}": runs.spread(row.accuracy, row.std) for row in cells}
        rows.append({"labelled images": description, **texts})
    return runs.markdown(rows)


def draw(table: pd.DataFrame, path: Path, config: Config) -> Figure:
    """Test accuracy by the number of labelled images, a line for each start, with standard deviations over
    seeds where there are several."""
    source, target = (task.replace(",", ", ") for task in TASKS[config.dataset])
    note = f"{config.dataset}: first {source}; then {target}"
    figure = new_figure(760, 470, "Does it help to have seen other pictures first?", note)
    axes = add_axes(figure, 66, 92, 660, 320)
    least, most = table["runs"].min(), table["runs"].max()
    for start, description in STARTS.items():
        rows = table[table["start"] == start].sort_values("images")
        style = {"color": COLOURS[start], "marker": "o", "lw": 2, "markersize": 5, "capsize": 3, "label": description}
        spread = 100 * rows["std"] if most > 1 else None  # no bars in the legend either, where there are none
        axes.errorbar(rows["images"], 100 * rows["accuracy"], spread, **style)
    ticks = sorted(table["images"].unique())
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{images:,}" for images in ticks])
    axes.set_xticks([], minor=True)
    count = most if least == most else f"{least} to {most}"
    over = f", mean ± standard deviation of {count} runs" if most > 1 else ", one run each"
    axes.set(xlabel="labelled images of the target classes", ylabel=f"test accuracy, %{over}")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(STARTS), columnspacing=1.2)
    axes.grid(axis="y")
    save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
