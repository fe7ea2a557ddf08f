"""Pictures of a search: how it went, and which hyperparameters mattered."""

from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from support.figures import BLUE, DARK, GREY, VERMILLION, add_axes, new_figure, save_figure

FEWEST = 4  # finished trials from which importance is computed
SHOWN = 15  # points below the best that are still in the picture


def draw_all(study: optuna.Study, rows: list[dict], best: int, prefix: Path, config) -> list[Path]:
    """<prefix>_history.png and, where there are enough trials, <prefix>_importance.png; returns what was written."""
    epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
    title = f"{ {'vit': 'Vision Transformer', 'cnn': 'CNN'}[config.model] } on {config.dataset}".strip()
    paths = [prefix.with_name(f"{prefix.name}_{what}.png") for what in ("history", "importance")]
    draw_history(rows, best, paths[0], f"Tuning: {title}", f"a trial is {epochs}; what counts is its last accuracy")
    found = importance(study)
    if found is None:
        paths.pop().unlink(missing_ok=True)  # of an earlier search, which it does not belong to
    else:
        finished = sum(row["state"] == "finished" for row in rows)
        note = f"{title}, {finished} finished trials of {epochs}: part of the variance of their accuracy (fANOVA)"
        draw_importance(found, paths[1], "Which hyperparameters matter", note)
    return paths


def importance(study: optuna.Study) -> dict[str, float] | None:
    """Of each hyperparameter the part of the variance of the accuracy that it explains within its range (functional
    ANOVA over a random forest, Hutter et al. 2014), the largest first; of finished trials alone."""
    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(finished) < FEWEST or len({trial.value for trial in finished}) < 2:
        return None
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def draw_history(rows: list[dict], best: int, path: Path, title: str, note: str) -> Figure:
    """Left each trial's accuracy in the order of their numbers, and the best until then; right epoch by epoch."""
    lowest = 100 * rows[best]["val_accuracies"][-1] - SHOWN
    below = sum(bool(row["val_accuracies"]) and 100 * row["val_accuracies"][-1] < lowest for row in rows)
    figure = new_figure(760, 400, title, note + f"; {below} so low that they are not shown" * bool(below))
    left, right = add_axes(figure, 72, 92, 390, 250), add_axes(figure, 530, 92, 210, 250)
    seen, highest, until = [], [], 0.0
    for row in rows:
        values = [100 * value for value in row["val_accuracies"]]
        if not values or row["state"] not in ("finished", "pruned"):
            continue
        finished, number = row["state"] == "finished", row["number"]
        color = VERMILLION if number == best else BLUE if finished else GREY
        style = {"color": color, "zorder": 4 if number == best else 3 if finished else 2}
        left.plot(number, values[-1], "o" if finished else "x", markersize=6 if finished else 5, **style)
        right.plot(range(1, len(values) + 1), values, marker=".", lw=1.2, alpha=0.9, **style)
        if finished:
            until = max(until, values[-1])
            seen.append(number)
            highest.append(until)
    left.step(seen, highest, where="post", color=DARK, lw=1.2, zorder=1)
    kinds = [("o", VERMILLION, "the best"), ("o", BLUE, "finished"), ("x", GREY, "pruned, where it was")]
    for marker, color, label in kinds:
        left.plot([], [], marker, color=color, label=label)
    left.plot([], [], color=DARK, lw=1.2, label="best until then")
    left.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, columnspacing=1.0, handletextpad=0.4)
    left.set(xlabel="trial; 0 is the default", ylabel="validation accuracy, %")
    right.set(xlabel="epoch")
    for axes in (left, right):
        axes.set_ylim(bottom=max(axes.get_ylim()[0], lowest))
        axes.grid()
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)
    return figure


def draw_importance(found: dict[str, float], path: Path, title: str, note: str) -> Figure:
    names, height = list(found)[::-1], 26 * len(found)
    figure = new_figure(760, 112 + height, title, note)
    axes = add_axes(figure, 150, 62, 560, height)
    values = [100 * found[name] for name in names]
    axes.barh(range(len(names)), values, color=BLUE, height=0.6)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.0f}", va="center")
    axes.set_yticks(range(len(names)), [name.removesuffix("_times").replace("_", " ") for name in names])
    axes.set(xlabel="part of the variance, %", xlim=(0, 1.1 * max(values)))
    axes.tick_params(left=False)
    axes.grid(axis="x")
    save_figure(figure, path)
    return figure
