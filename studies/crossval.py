"""Cross-validation: train as many times as there are folds, each time with another part held out.

    python -m studies.crossval --folds 5 --epochs 10             # any flag of train.py
    python -m studies.crossval --model cnn --dataset digits      # five folds, half a minute

The training images (the validation images among them, the test images not) are cut into folds with equal shares of each
class, always the same by --split_seed. Each run is one `python train.py`, stored as saved/studies/<name>_fold<n>.pt and
.json; run again after an interruption it goes on where it was. Writes figures/<name>.png, .md and .json; <name> is
--name, by default crossval_<model>. The standard deviation is over folds, whose training images overlap: it says less
than one over independent data would (Bengio & Grandvalet 2004).
"""

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import train
from images.loader import agree
from setup_cifar import load_data
from studies import runs
from support import cli
from support.figures import BLUE, DARK, LIGHT, add_axes, new_figure, save_figure


@dataclass
class Config(train.Config):
    """Cross-validate a model: the flags of train.py, which runs once for each of --folds."""

    # cross-validation
    folds: int = 5  # parts that the training images are cut into, with equal shares of each class
    jobs: int = 1  # trainings at a time; the cores are shared out among them


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args, train.dependent_defaults)
    with cli.one_line_errors():
        if config.config:
            raise ValueError("--config repeats one run: say here the flags that it had")
        if config.fold is not None:
            raise ValueError("all folds are trained: leave --fold away, and say with --folds how many")
        if config.folds < 2:
            raise ValueError(f"folds must be at least 2, not {config.folds}")
        data = load_data(
            config.dataset, config.data_dir, config.val_fraction, config.split_seed, config.img_size, test=False
        )
        data.fold(0, config.folds, config.split_seed)  # refuses now what no run could do
        if config.dataset == "auto":
            vars(config).update(vars(train.with_defaults(config, dataset=data.name)))
        model = config.model.removeprefix("timm:").rpartition(":")[2]
        name = config.name or f"crossval_{model}" + ("" if data.name == "cifar10" else f"_{data.name}")
        options = runs.StudyOptions(data_dir=config.data_dir, output_dir=config.output_dir, jobs=config.jobs)
        cli.require_positive(options, "jobs")
        flags = f"{flags_of(config)} --dataset {shlex.quote(config.dataset)} --no_test"
        folds = {f"{name}_fold{k}": f"{flags} --fold {k}/{config.folds}" for k in range(config.folds)}
        if failed := runs.train_missing(folds, options):
            cli.fail(f"not trained: {', '.join(failed)}; what went wrong is said above", code=1)
        reports = [runs.read_report(fold, options) for fold in folds]
        of_all = config.classes is None and config.label_fraction == 1
        if of_all and not all(agree(report, data.marks) for report in reports):
            raise ValueError(f"the pictures in {data.source} have changed since a fold was trained: say another --name")
        results = pd.DataFrame([report["results"] for report in reports])[["val_accuracy", "val_loss"]]
        picture = options.figures / f"{name}.png"
        draw(reports, results["val_accuracy"], picture, f"{config.model} on {data.name}")
        summary = {
            quantity: {"each": values.tolist(), "mean": values.mean(), "std": values.std()}
            for quantity, values in results.items()
        }
        more = {"folds": config.folds, "dataset": data.name, "trained": reports[0]["config"]}
        runs.write_study(options.figures / name, as_markdown(results), config, [picture], [], **summary, **more)


def flags_of(config: train.Config) -> str:
    """The flags that were typed, for train.py, but for the data set, names and folders."""
    flags, left_out = [], ("dataset", "name", "output_dir", "data_dir", "resume", "gif_frames", "test")
    for name in [field.name for field in dataclasses.fields(train.Config) if field.name in config.given]:
        value = getattr(config, name)
        if name in left_out:
            continue
        flags += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return shlex.join(flags)


def as_markdown(results: pd.DataFrame) -> str:
    """Accuracy and loss on what each fold held out, their mean and standard deviation (n - 1)."""
    rows = [
        {"held out": f"fold {k}", "accuracy": f"{row.val_accuracy:.2%}", "loss": f"{row.val_loss:.4f}"}
        for k, row in enumerate(results.itertuples())
    ]
    mean, std = results.mean(), results.std()
    accuracy = runs.spread(mean.val_accuracy, std.val_accuracy, digits=2)
    loss = f"{mean.val_loss:.4f} ± {std.val_loss:.4f}"
    return runs.markdown([*rows, {"held out": "mean ± standard deviation", "accuracy": accuracy, "loss": loss}])


def draw(reports: list[dict], accuracies: pd.Series, path: Path, title: str) -> Figure:
    """Left each fold's accuracy on what was held out, epoch by epoch; right where they ended, and their mean."""
    mean, std = 100 * accuracies.mean(), 100 * accuracies.std()
    note = (
        f"accuracy on the held-out fold: {mean:.1f} ± {std:.1f} %, mean and standard deviation of {len(reports)} folds"
    )
    figure = new_figure(760, 400, f"Cross-validation: {title}", note)
    left, right = add_axes(figure, 60, 72, 420, 270), add_axes(figure, 560, 72, 180, 270)
    for report in reports:
        values = [100 * value for value in report["metrics"]["val_accuracy"]]
        left.plot(range(1, len(values) + 1), values, color=BLUE, lw=1.4, alpha=0.6, marker="o", markersize=3)
    left.set(xlabel="epoch", ylabel="accuracy, %")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid()
    right.axhspan(mean - std, mean + std, color=LIGHT, lw=0)
    right.axhline(mean, color=DARK, lw=1.4)
    folds = range(len(reports))
    right.plot(folds, 100 * accuracies, "o", color=BLUE, markersize=6, clip_on=False)
    right.set(xlabel="fold", xlim=(-0.6, len(reports) - 0.4), ylim=limits(100 * accuracies))
    right.set_xticks(folds if len(reports) <= 10 else range(0, len(reports), 5))
    save_figure(figure, path)
    return figure


def limits(percentages: pd.Series) -> tuple[float, float]:
    """Of an axis at least ten points high, so that folds which hardly differ look like it."""
    mean = percentages.mean()
    half = max(5, 1.2 * (percentages - mean).abs().max())
    low = max(0, min(mean - half, 100 - 2 * half))
    return low, min(low + 2 * half, 100)


if __name__ == "__main__":
    main()
