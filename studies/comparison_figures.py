"""Pictures of the study: training curves, differences from the CNN, accuracy against training time, classes.

Colours are Okabe and Ito's, for every kind of colour vision; each model has a marker of its own besides.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from scipy.stats import gaussian_kde

import utils
from studies.comparison import REFERENCE, Run, group, interval, p_text, points

STYLES = {  # model -> colour and marker
    "cnn": (utils.VERMILLION, "s"),
    "vit_patch2": (utils.BLUE, "o"),
    "vit_patch4": ("#56B4E9", "^"),
    "vit_patch6": (utils.GREEN, "v"),
    "vit_patch8": ("#E69F00", "D"),
    "vit_small": ("#CC79A7", "P"),
    "mlp": ("#7F7F7F", "X"),
}


def draw_all(runs: list[Run], study: dict, prefix: Path, dataset: str) -> list[Path]:
    """Write <prefix>_curves.png, _time.png and, where there is a CNN to compare with, _bootstrap.png, _classes.png."""

    def path(what: str) -> Path:
        return prefix.with_name(f"{prefix.name}_{what}.png")

    draw_curves(runs, path("curves"), dataset)
    draw_time(study, path("time"), dataset)
    if not study["differences"]:
        return [path("curves"), path("time")]
    draw_bootstrap(study, path("bootstrap"), dataset)
    draw_classes(study, path("classes"), dataset)
    return [path(what) for what in ("curves", "time", "bootstrap", "classes")]


def recipes_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["recipe"] for row in rows))


def clock_unit(seconds: float) -> tuple[float, str]:
    """By what to divide seconds, and the unit's name, for an axis that goes this far."""
    return (60, "minutes") if seconds > 300 else (1, "seconds")


def logarithmic_time(axes: Axes, subs: tuple[int, ...] = (1, 2, 5)) -> None:
    """A logarithmic axis with ticks at these multiples of the powers of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


# ---------------------------------------------------------------------------------------------------------- curves


def draw_curves(runs: list[Run], path: Path, dataset: str) -> Figure:
    """Validation accuracy and loss by optimiser step and by training time; a column for each recipe.

    Lines are means over seeds, bands reach from the lowest to the highest.
    """
    groups = group(runs)
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    unit, unit_name = clock_unit(max(run.report["val_seconds"][-1] for run in runs))
    width, height, first = 440, 190, 108 if len(recipes) > 1 else 128
    title = f"Validation on {dataset}, mean and range over seeds"
    figure = utils.new_figure(max(70 + width * len(recipes), 620), first + 4 * (height + 66), title)
    handles = [
        Line2D([], [], color=STYLES[model][0], marker=STYLES[model][1], markersize=5, label=title)
        for model, title in dict.fromkeys((run.model, run.title) for run in runs)
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(6 / figure.get_figwidth() / 100, 1 - 36 / figure.get_figheight() / 100),
        ncols=7 if len(recipes) > 1 else 4,
        handletextpad=0.4,
        columnspacing=1.2,
    )
    for row, (metric, against) in enumerate(
        (metric, against) for metric in ("accuracy", "loss") for against in ("step", "time")
    ):
        panels = []
        for column, recipe in enumerate(recipes):
            axes = utils.add_axes(figure, 62 + width * column, first + row * (height + 66), width - 50, height)
            for (its_recipe, model), members in groups.items():
                if its_recipe == recipe:
                    draw_curve(axes, members, model, metric, against, unit)
            axes.grid()
            axes.set_xlabel("optimiser step" if against == "step" else f"training time, {unit_name}")
            if row == 0:
                axes.set_title(f"recipe: {recipe}", size=11, weight="bold")
            if column == 0:
                axes.set_ylabel("accuracy, %" if metric == "accuracy" else "loss")
                axes.yaxis.set_label_coords(-44 / (width - 50), 0.5)
            if against == "time":
                logarithmic_time(axes, (1, 3))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            panels.append(axes)
        for limits in ("xlim", "ylim"):  # the same in each column, so that recipes can be compared
            ends = [getattr(axes, f"get_{limits}")() for axes in panels]
            for axes in panels:
                axes.set(**{limits: (min(low for low, _ in ends), max(high for _, high in ends))})
    utils.save_figure(figure, path)
    return figure


def draw_curve(axes: Axes, runs: list[Run], model: str, metric: str, against: str, unit: float) -> None:
    values = np.array([run.report["metrics"][f"val_{metric}"] for run in runs]) * (100 if metric == "accuracy" else 1)
    if against == "step":
        x = runs[0].report["metrics"]["val_step"]
    else:
        x = np.mean([run.report["val_seconds"] for run in runs], axis=0) / unit
    color, marker = STYLES[model]
    axes.plot(x, values.mean(axis=0), color=color, marker=marker, markersize=3.5, lw=1.5)
    if len(runs) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)


# ------------------------------------------------------------------------------------------------------- bootstrap


def draw_bootstrap(study: dict, path: Path, dataset: str) -> Figure:
    """How the difference in accuracy from the CNN varies with the test images, and beside it with the seed."""
    recipes = recipes_of(study["differences"])
    blocks = [[row for row in study["differences"] if row["recipe"] == recipe] for recipe in recipes]
    row_height, left, width = 44, 150, 540
    note = (
        f"Hills: 10,000 paired resamples of the {study['images']:,} test images. Bars: 95 % interval (BCa). "
        "Small dots: single seeds. p: McNemar's, after Holm."
    )
    height = 94 + sum(64 + row_height * len(rows) for rows in blocks)
    figure = utils.new_figure(940, height, f"Test accuracy minus that of the CNN, {dataset}", note)
    values = [value for row in study["differences"] for value in (*row["bca"], *row["by_seed"], row["difference"], 0)]
    margin = 0.06 * (max(values) - min(values)) + 0.002
    top = 92
    for recipe, rows in zip(recipes, blocks, strict=True):
        axes = utils.add_axes(figure, left, top, width, row_height * len(rows))
        for i, row in enumerate(rows):
            draw_difference(axes, row, i)
            axes.text(
                1.02,
                i,
                f"{points(row['difference'])}  ({interval(row['bca'])}), p {equals(p_text(row['p_holm']))}",
                va="center_baseline",
                transform=axes.get_yaxis_transform(),
            )
        axes.axvline(0, color=STYLES[REFERENCE][0], lw=1.2)
        axes.grid()
        axes.set_title(f"recipe: {recipe}", size=11, weight="bold")
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(ylim=(len(rows) - 0.45, -0.75), xlim=(100 * (min(values) - margin), 100 * (max(values) + margin)))
        top += row_height * len(rows) + 64
    axes.set_xlabel("percentage points; the line at 0 is the CNN")
    utils.save_figure(figure, path)
    return figure


def draw_difference(axes: Axes, row: dict, y: int) -> None:
    color, _ = STYLES[row["model"]]
    resampled = 100 * row["resampled"]
    if np.ptp(resampled) > 0:
        x = np.linspace(resampled.min(), resampled.max(), 200)
        density = gaussian_kde(resampled)(x)
        axes.fill_between(x, y - 0.1, y - 0.1 - 0.5 * density / density.max(), color=color, alpha=0.45, linewidth=0)
    low, high = (100 * end for end in row["bca"])
    axes.plot([low, high], [y, y], color=color, lw=5, solid_capstyle="butt")
    axes.plot(100 * row["difference"], y, "o", color="white", markersize=3.5)
    if len(row["by_seed"]) > 1:
        axes.plot(
            [100 * value for value in row["by_seed"]], [y + 0.22] * len(row["by_seed"]), ".", color=utils.DARK, ms=4
        )


def equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


# ------------------------------------------------------------------------------------------------------------ time


def draw_time(study: dict, path: Path, dataset: str) -> Figure:
    """Test accuracy against training time; a line leads from each model's plain recipe to its default one."""
    unit, unit_name = clock_unit(max(row["training_seconds"] for row in study["rows"]))
    note = f"{study['epochs']} epochs, means over seeds; bars: 95 % interval over test images"
    figure = utils.new_figure(900, 470, f"Test accuracy against training time, {dataset}", note)
    axes = utils.add_axes(figure, 62, 70, 620, 340)
    recipes = recipes_of(study["rows"])
    last = recipes[-1]  # has full markers, those before it have hollow ones
    models = {}
    for row in study["rows"]:
        models.setdefault(row["model"], []).append(row)
    for model, rows in models.items():
        color, marker = STYLES[model]
        seconds, accuracies = ([row[name] for row in rows] for name in ("training_seconds", "test_accuracy"))
        axes.plot(np.divide(seconds, unit), np.multiply(accuracies, 100), color=color, lw=1, ls=":")
        for row in rows:
            x, y = row["training_seconds"] / unit, 100 * row["test_accuracy"]
            axes.plot([x, x], [100 * end for end in row["interval"]], color=color, lw=1.6)
            face = color if row["recipe"] == last else "white"
            axes.plot(x, y, marker, color=color, markersize=9, markerfacecolor=face)
    axes.grid()
    logarithmic_time(axes)
    axes.set(xlabel=f"training time, {unit_name} (logarithmic)", ylabel="test accuracy, %")
    handles = [
        Line2D([], [], color=STYLES[model][0], marker=STYLES[model][1], ls="", markersize=8, label=rows[0]["title"])
        for model, rows in models.items()
    ] + [
        Line2D(
            [], [], color=utils.DARK, marker="o", ls="", markersize=8, markerfacecolor=face, label=f"recipe: {recipe}"
        )
        for recipe in recipes
        for face in [utils.DARK if recipe == last else "white"]
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1))
    utils.save_figure(figure, path)
    return figure


# --------------------------------------------------------------------------------------------------------- classes


def draw_classes(study: dict, path: Path, dataset: str) -> Figure:
    """Which classes a model gets that the CNN does not, and the other way round: a column a model, a row a recipe."""
    rows = study["differences"]
    recipes = recipes_of(rows)
    models = [model for model in STYLES if any(row["model"] == model for row in rows)]
    classes = list(rows[0]["only_model"])
    width, height, left, top = 138, 20 * len(classes), 30 + 8 * max(map(len, classes)), 104
    note = (
        "Percent of each class's test images. To the left: only the CNN is right; to the right: only the other model."
    )
    size = max(left + width * len(models) + 10, 800), top + len(recipes) * (height + 80) - 40
    figure = utils.new_figure(*size, f"Who gets which classes, {dataset}", f"{note} Black: net.")
    limit = 100 * max(
        value for row in rows for side in ("only_model", "only_reference") for value in row[side].values()
    )
    limit = max(1.0, 1.05 * limit)
    tick = float(f"{0.6 * limit:.1g}")
    for i, recipe in enumerate(recipes):
        utils.add_text(figure, 14, top - 26 + i * (height + 80), f"recipe: {recipe}", size=11, weight="bold")
        for row in rows:
            if row["recipe"] != recipe:
                continue
            j = models.index(row["model"])
            axes = utils.add_axes(figure, left + width * j, top + i * (height + 80), width - 12, height)
            gained, lost = (100 * np.array(list(row[side].values())) for side in ("only_model", "only_reference"))
            axes.barh(range(len(classes)), gained, height=0.8, color=STYLES[row["model"]][0])
            axes.barh(range(len(classes)), -lost, height=0.8, color=STYLES[REFERENCE][0])
            axes.plot(gained - lost, range(len(classes)), "|", color=utils.DARK, markersize=9, markeredgewidth=2)
            axes.axvline(0, color=utils.DARK, lw=0.8)
            axes.grid()
            axes.set_title(row["title"])
            axes.set(xlim=(-limit, limit), ylim=(len(classes) - 0.5, -0.5))
            axes.set_xticks([-tick, 0, tick], [f"{tick:g}", "0", f"{tick:g}"])
            axes.set_yticks(range(len(classes)), classes if j == 0 else [""] * len(classes))
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
    utils.save_figure(figure, path)
    return figure
