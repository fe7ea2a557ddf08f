"""Pictures of what evaluate.py finds: confusion matrix, calibration, most confident mistakes, an ensemble's gain."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import utils
from support.report import shorten
from support.significance import wilson

MISTAKES = 24  # shown in the picture


def draw_confusion(matrix: list[list[int]], classes: list[str], path: Path, title: str) -> Figure:
    """What each right class (row) is taken for (column), in percent of the row; mistakes by depth of colour, which is
    all that there is room for with more than 20 classes. With more than 200 there is none for names either."""
    counts = torch.tensor(matrix, dtype=torch.float64)
    percent = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    mistakes = percent.clone().fill_diagonal_(0)
    many = len(classes) > 20
    cell, size = (min(12, 2400 / len(classes)), 6.5) if many else (max(46, 260 // len(classes)), 9.5)  # few: not tiny
    names = [utils.fit(name, 20 * size, size) for name in classes] if cell >= 12 else []
    longest = max(map(len, names), default=0)
    side, margin, top = cell * len(classes), 30 + 8 * longest, max(128, 56 + 5 * longest)
    edge = max(50, 6 * len(names[-1]) if names else 0)  # the last column's name leans over it
    note = "percent of each right class (row), by predicted class (column)"
    figure = utils.new_figure(max(margin + side + edge, 500), top + side + 24, f"{title}: what is taken for what", note)
    axes = utils.add_axes(figure, margin, top, side, side)
    axes.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=max(1.0, 1.4 * mistakes.max().item()))
    for row in range(len(classes)):
        axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, color=utils.GREEN, linewidth=0))
        for column in range(0 if many else len(classes)):
            value = percent[row, column].item()
            style = {"color": utils.DARK if value >= 0.5 else utils.GREY}
            if row == column:
                style = {"color": "white", "size": 10.5, "weight": "bold"}
            axes.text(column, row, f"{value:.0f}", ha="center", va="center_baseline", **style)
    slant = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if 7 * longest > cell else {}
    axes.set_xticks(range(len(names)), names, **({"rotation": 90} if many else slant))
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=size)
    axes.spines[:].set_visible(False)
    utils.save_figure(figure, path)
    return figure


FEW = 20  # images that a bin needs, so that its accuracy is shown


def draw_calibration(report: dict, path: Path, title: str) -> Figure:
    """Reliability diagram: accuracy by confidence, and below it how many images have that confidence. Above, bins with
    few images are left out: what they show is chance."""
    filled = [row for row in report["calibration"] if row["images"]]
    rows = [row for row in filled if row["images"] >= FEW] or filled
    width = 100 / len(report["calibration"])
    centres = [50 * (row["low"] + row["high"]) for row in rows]
    accuracies = [100 * row["accuracy"] for row in rows]
    error, accuracy = 100 * report["expected_calibration_error"], 100 * report["accuracy"]
    note = f"expected calibration error {error:.1f} %, accuracy {accuracy:.1f} %, {report['images']:,} test images"
    figure = utils.new_figure(520, 600, f"{title}: calibration", note)

    upper = utils.add_axes(figure, 66, 72, 430, 330)
    upper.bar(centres, accuracies, width * 0.94, color=utils.BLUE, label="accuracy")
    ends = [(100 * row["confidence"], accuracy) for row, accuracy in zip(rows, accuracies, strict=True)]
    for confidence, right in ends:
        upper.plot([confidence] * 2, [right, confidence], color=utils.VERMILLION, lw=1.6)
    style = {"color": utils.VERMILLION, "markersize": 4, "clip_on": False, "label": "gap to the confidence"}
    upper.plot(*zip(*ends, strict=True), "o", **style)
    upper.plot([0, 100], [0, 100], "--", color=utils.DARK, lw=1, label="perfectly calibrated")
    few = f" of at least {FEW}" if len(rows) < len(filled) else ""
    upper.set_ylabel(f"right, % of the images in a bin{few}")
    upper.legend(loc="best")
    lower = utils.add_axes(figure, 66, 428, 430, 112)
    everywhere = [50 * (row["low"] + row["high"]) for row in filled]
    lower.bar(everywhere, [100 * row["images"] / report["images"] for row in filled], width * 0.94, color=utils.GREY)
    lower.set_ylabel("% of images")
    lower.set_xlabel("confidence: probability of the predicted class, %")
    upper.set(xlim=(0, 100), ylim=(0, 100))
    lower.set_xlim(0, 100)
    utils.save_figure(figure, path)
    return figure


def draw_ensemble(report: dict, path: Path, title: str) -> Figure:
    """Left the accuracy of each member and of the ensemble, right what the ensemble gains; with 95 % intervals."""
    together, members = report["ensemble"], report["members"]
    rows = [{"name": "ensemble", **together}, *reversed(members)]
    height = 34 * len(rows)
    note = f"accuracy on {together['images']:,} test images, and the ensemble's minus each member's; 95 % intervals"
    figure = utils.new_figure(800, 130 + height, title, note)
    names = [shorten(row["name"], 44) for row in rows]
    margin = 30 + 6.5 * max(map(len, names))
    width = (800 - margin - 60) / 2
    left = utils.add_axes(figure, margin, 66, width, height)
    right = utils.add_axes(figure, margin + width + 34, 66, width, height)
    for y, row in enumerate(rows):
        color = utils.VERMILLION if y == 0 else utils.BLUE
        interval = [100 * end for end in wilson(row["accuracy"], row["images"])]
        left.plot(interval, [y, y], color=color, lw=2)
        left.plot([100 * row["accuracy"]], [y], "o", color=color, markersize=6)
        if "bca" in row:
            right.plot([100 * end for end in row["bca"]], [y, y], color=color, lw=2)
            right.plot([100 * row["difference"]], [y], "o", color=color, markersize=6)
    left.set_yticks(range(len(rows)), names)
    right.set_yticks([])
    right.axvline(0, color=utils.GREY, lw=1)
    for axes, label in ((left, "test accuracy, %"), (right, "the ensemble's gain, percentage points")):
        axes.grid()
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(label)
    utils.save_figure(figure, path)
    return figure


def draw_mistakes(
    images: torch.Tensor, probabilities: torch.Tensor, labels: torch.Tensor, classes: list[str], path: Path, title: str
) -> Figure:
    """The wrong predictions with the highest probability, most confident first.

    Args:
        images: uint8 `(n, 3, h, w)`.
    """
    confidence, prediction = probabilities.max(dim=1)
    wrong = (prediction != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)][:MISTAKES].tolist()
    columns, tile, gap = 8, 96, 26  # a gap in which a name ends before the next picture
    note = f"{len(wrong):,} of {len(labels):,} test images are wrong" if worst else "no mistakes"
    height = 66 + max(1, -(-len(worst) // columns)) * (tile + 48)
    figure = utils.new_figure(14 + columns * (tile + gap), height, f"{title}: the most confident mistakes", note)
    for position, i in enumerate(worst):
        row, column = divmod(position, columns)
        left, top = 14 + column * (tile + gap), 90 + row * (tile + 48)
        axes = utils.add_axes(figure, left, top, tile, tile)
        axes.imshow(images[i].permute(1, 2, 0).cpu().numpy())
        axes.axis("off")
        answer, right = (utils.fit(classes[k], 75.2, 8.5, "bold") for k in (prediction[i], labels[i]))
        said = f"{answer} {100 * confidence[i]:.0f} %"
        utils.add_text(figure, left, top - 17, said, utils.VERMILLION, size=8.5, weight="bold")
        utils.add_text(figure, left, top - 4, f"is: {right}", utils.GREEN, size=8.5)
    utils.save_figure(figure, path)
    return figure
