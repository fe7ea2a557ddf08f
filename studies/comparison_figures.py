"""Pictures of the study: training curves, differences from the CNN, accuracy against training time, classes.

Colours are Okabe and Ito's and two more, for every kind of colour vision; each model has a marker of
its own besides.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from scipy.stats import gaussian_kde

from studies.comparison import REFERENCE, Run, group, p_text
from support.figures import BLUE, DARK, GREEN, VERMILLION, new_figure, save_figure
from support.significance import interval_text, points

STYLES = {  # model -> colour and marker
    "cnn": (VERMILLION, "s"),
    "resnet20": ("#882255", "*"),
    "vit_patch2": (BLUE, "o"),
    "vit_patch4": ("#56B4E9", "^"),
    "vit_patch6": (GREEN, "v"),
    "vit_patch8": ("#E69F00", "D"),
    "vit_small": ("#CC79A7", "P"),
    "vit_wide": ("#7B5FC4", "p"),
    "mlp": ("#7F7F7F", "X"),
}
BOLD = {"size": 11, "weight": "bold"}


def draw_all(runs: list[Run], study: dict, prefix: Path, dataset: str) -> list[Path]:
    """Write <prefix>_curves.png, _time.png and, where there is a CNN to compare with, _bootstrap.png, _classes.png."""
    figures = {"curves": draw_curves(runs, dataset), "time": draw_time(study, dataset)}
    if study["differences"]:
        figures |= {"bootstrap": draw_bootstrap(study, dataset), "classes": draw_classes(study, dataset)}
    paths = [prefix.with_name(f"{prefix.name}_{what}.png") for what in figures]
    for figure, path in zip(figures.values(), paths, strict=True):
        save_figure(figure, path)
    return paths


def add_panels(figure: Figure, top: int, rows: int, columns: int, **options) -> np.ndarray:
    """Axes `(rows, columns)` that fill the figure below its uppermost `top` pixels."""
    below = 1 - top / (100 * figure.get_figheight())
    pads = {"w_pad": 0.1, "h_pad": 0.08, "wspace": 0.02, "hspace": 0.02}
    figure.set_layout_engine("constrained", rect=(0, 0, 1, below), **pads)
    return figure.subplots(rows, columns, squeeze=False, **options)


def recipes_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["recipe"] for row in rows))


def clock_unit(seconds: float) -> tuple[float, str]:
    """By what to divide seconds, and the unit's name, for an axis that goes this far."""
    return (60, "minutes") if seconds > 300 else (1, "seconds")


def logarithmic_time(axes: Axes) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 times the powers of ten."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


# ---------------------------------------------------------------------------------------------------------- curves


def draw_curves(runs: list[Run], dataset: str) -> Figure:
    """Validation accuracy and loss by optimiser step; a column for each recipe.

    Lines are means over seeds, bands reach from the lowest to the highest.
    """
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    height = 900
    title = f"Validation on {dataset}, mean and range over seeds"
    figure = new_figure(max(70 + 440 * len(recipes), 620), height, title)
    columns = 5 if len(recipes) > 1 else 4
    legend_rows = -(-len({run.model for run in runs}) // columns)
    panels = add_panels(figure, 48 + 18 * legend_rows, 2, len(recipes), sharex=True, sharey="row")
    for metric, label, row in zip(("accuracy", "loss"), ("accuracy, %", "loss"), panels, strict=True):
        row[0].set_ylabel(label)
        for recipe, axes in zip(recipes, row, strict=True):
            for (its_recipe, model), members in group(runs).items():
                if its_recipe == recipe:
                    draw_curve(axes, members, model, metric)
            axes.grid()
    for recipe, top, bottom in zip(recipes, *panels, strict=True):
        top.set_title(f"recipe: {recipe}", **BOLD)
        bottom.set_xlabel("optimiser step")
        bottom.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    lines = {line.get_label(): line for axes in panels[0] for line in axes.get_lines()}
    place = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 36 / height), "ncols": columns}
    figure.legend(lines.values(), lines, **place, handletextpad=0.4, columnspacing=1.2)
    return figure


def draw_curve(axes: Axes, runs: list[Run], model: str, metric: str) -> None:
    values = np.array([run.report["metrics"][f"val_{metric}"] for run in runs]) * (100 if metric == "accuracy" else 1)
    steps = runs[0].report["metrics"]["val_step"]
    color, marker = STYLES[model]
    axes.plot(steps, values.mean(axis=0), color=color, marker=marker, markersize=3.5, lw=1.5, label=runs[0].title)
    if len(runs) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)


# ------------------------------------------------------------------------------------------------------- bootstrap


def draw_bootstrap(study: dict, dataset: str) -> Figure:
    """How the difference in accuracy from the CNN varies with the test images, and beside it with the seed."""
    recipes = recipes_of(study["differences"])
    blocks = [[row for row in study["differences"] if row["recipe"] == recipe] for recipe in recipes]
    note = (
        f"Hills: 10,000 paired resamples of the {study['images']:,} test images. Bars: 95 % interval (BCa). "
        "Small dots: single seeds. p: McNemar's, after Holm."
    )
    height = 80 + sum(64 + 44 * len(rows) for rows in blocks)
    figure = new_figure(940, height, f"Test accuracy minus the CNN's, {dataset}", note)
    panels = add_panels(figure, 58, len(blocks), 1, sharex=True, height_ratios=[len(rows) for rows in blocks])
    for recipe, rows, axes in zip(recipes, blocks, panels[:, 0], strict=True):
        for i, row in enumerate(rows):
            draw_difference(axes, row, i)
        axes.axvline(0, color=STYLES[REFERENCE][0], lw=1.2)
        axes.grid()
        axes.set_title(f"recipe: {recipe}", **BOLD)
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=True)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(rows) - 0.45, -0.75)
    axes.set_xlabel("percentage points; the line at 0 is the CNN")
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
    seeds = row["by_seed"] if len(row["by_seed"]) > 1 else []
    axes.plot([100 * value for value in seeds], [y + 0.22] * len(seeds), ".", color=DARK, ms=4)
    p = p_text(row["p_holm"])
    text = f"{points(row['difference'])}  ({interval_text(row['bca'])}), p {p if p.startswith('<') else f'= {p}'}"
    axes.text(1.02, y, text, va="center_baseline", transform=axes.get_yaxis_transform())


# ------------------------------------------------------------------------------------------------------------ time


def draw_time(study: dict, dataset: str) -> Figure:
    """Test accuracy against training time; a line leads from each model's plain recipe to its default one."""
    unit, unit_name = clock_unit(max(row["training_seconds"] for row in study["rows"]))
    note = f"{study['epochs']} epochs, means over seeds; bars: 95 % interval over test images"
    figure = new_figure(900, 470, f"Test accuracy against training time, {dataset}", note)
    ((axes,),) = add_panels(figure, 58, 1, 1)
    recipes = recipes_of(study["rows"])
    faces = {recipe: "white" for recipe in recipes[:-1]}  # of markers: the last recipe has full ones
    handles = []
    for model, (color, marker) in STYLES.items():
        rows = [row for row in study["rows"] if row["model"] == model]
        if not rows:
            continue
        x = [row["training_seconds"] / unit for row in rows]
        y = [100 * row["test_accuracy"] for row in rows]
        axes.plot(x, y, color=color, lw=1, ls=":")
        for row, seconds, accuracy in zip(rows, x, y, strict=True):
            axes.plot([seconds, seconds], [100 * end for end in row["interval"]], color=color, lw=1.6)
            face = faces.get(row["recipe"], color)
            axes.plot(seconds, accuracy, marker, color=color, markersize=9, markerfacecolor=face)
        handles.append(Line2D([], [], color=color, marker=marker, ls="", markersize=8, label=rows[0]["title"]))
    for recipe in recipes:
        style = {"color": DARK, "marker": "o", "ls": "", "markersize": 8, "markerfacecolor": faces.get(recipe, DARK)}
        handles.append(Line2D([], [], label=f"recipe: {recipe}", **style))
    axes.grid()
    logarithmic_time(axes)
    axes.set(xlabel=f"training time, {unit_name} (logarithmic)", ylabel="test accuracy, %")
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure


# --------------------------------------------------------------------------------------------------------- classes


def draw_classes(study: dict, dataset: str) -> Figure:
    """Which classes a model gets that the CNN does not, and the other way round: a column a model, a row a recipe."""
    rows = study["differences"]
    recipes, models = recipes_of(rows), [model for model in STYLES if any(row["model"] == model for row in rows)]
    classes = list(rows[0]["only_model"])
    note = (
        "Percent of each class's test images. To the left: only the CNN is right; to the right: only the other model. "
        "Black: right minus left."
    )
    height = 70 + len(recipes) * (20 * len(classes) + 80)
    figure = new_figure(max(120 + 138 * len(models), 800), height, f"Who gets which classes, {dataset}", note)
    panels = add_panels(figure, 58, len(recipes), len(models), sharex=True, sharey=True)
    for axes in panels.flat:
        axes.set_visible(False)  # until there is something in it
    for row in rows:
        axes = panels[recipes.index(row["recipe"]), models.index(row["model"])]
        axes.set_visible(True)
        gained, lost = (100 * np.array(list(row[side].values())) for side in ("only_model", "only_reference"))
        axes.barh(classes, gained, height=0.8, color=STYLES[row["model"]][0])
        axes.barh(classes, -lost, height=0.8, color=STYLES[REFERENCE][0])
        axes.plot(gained - lost, classes, "|", color=DARK, markersize=9, markeredgewidth=2)
        axes.axvline(0, color=DARK, lw=0.8)
        axes.grid()
        axes.set_title(f"{row['title']}\n{row['recipe']}")
        axes.xaxis.set_major_formatter(lambda x, _position: f"{abs(x):g}")
        axes.tick_params(axis="x", labelbottom=True)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    limit = max(1.0, 1.05 * max(map(abs, axes.get_xlim())))
    axes.set(xlim=(-limit, limit), ylim=(len(classes) - 0.5, -0.5))
    return figure
