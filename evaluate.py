"""Where a trained model errs: confusion matrix, precision and recall, calibration, most confident mistakes.

    python evaluate.py saved/VisionTransformer.pt               # on the test set that it belongs to
    python evaluate.py saved/VisionTransformer.pt saved/CNN.pt  # each in turn

Writes figures/<name>_confusion.png, <name>_calibration.png and <name>_mistakes.png, and every figure in them as
<name>_evaluation.json; <name> is the model file's.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm
from tyro.conf import Positional

import cli
import utils
from files import CheckpointError, write_bytes
from network import Module
from runner import choose_device
from setup_cifar import ImageLoader, load_data

BINS = 15  # of confidence, as Guo et al. (2017) take for CIFAR
MISTAKES = 24  # shown in the picture


@dataclass
class Config:
    """Evaluate saved models, each on the test set of the data set that it was trained on."""

    models: Positional[tuple[str, ...]]  # files that train.py wrote
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str = "figures"  # the folder that pictures and figures go to
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    batch_size: int = 500  # images at a time


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        if not config.models:
            raise ValueError("name at least one file: python evaluate.py saved/VisionTransformer.pt")
        names = [Path(path).stem for path in config.models]
        if len(set(names)) < len(names):
            raise ValueError(f"two files of the same name would overwrite each other's figures: {', '.join(names)}")
        device = choose_device(config.device)
        models = [load_trained(path, device) for path in config.models]
        for model, path, name in zip(models, config.models, names, strict=True):
            loader = test_loader(model, config.data_dir, config.batch_size, device)
            evaluate(model, loader, path, Path(config.output_dir) / name)


def evaluate(model: Module, loader: ImageLoader, path: str, prefix: Path) -> dict:
    """Print, draw and store everything about one model; returns what is stored in `<prefix>_evaluation.json`."""
    classes, dataset = model.metadata["classes"], model.metadata["dataset"]
    logits, labels = predict(model, loader)
    probabilities = logits.softmax(dim=1)
    report = {
        "model": path,
        "dataset": dataset,
        "images": len(labels),
        "accuracy": (probabilities.argmax(dim=1) == labels).float().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
        "calibration": calibration(probabilities, labels),
        "confusion_matrix": confusion_matrix(probabilities, labels),
        "classes": per_class(probabilities, labels, classes),
        "provenance": cli.provenance(),
    }
    print(f"\n{path}: {model.title} on the {len(labels):,} test images of {dataset}")
    print(f"accuracy {report['accuracy']:.2%}  loss {report['loss']:.4f}", end="  ")
    print(f"expected calibration error {report['expected_calibration_error']:.2%} ({BINS} bins)\n")
    print(markdown_table(report["classes"]))
    title = f"{model.title} on {dataset}"
    files = [prefix.with_name(f"{prefix.name}_{what}.png") for what in ("confusion", "calibration", "mistakes")]
    draw_confusion(report["confusion_matrix"], classes, files[0], title)
    draw_calibration(report, files[1], title)
    draw_mistakes(loader.images, probabilities, labels, classes, files[2], title)
    files.append(prefix.with_name(f"{prefix.name}_evaluation.json"))
    write_bytes(files[-1], json.dumps(report, indent=1).encode())
    print("\nwrote " + ", ".join(str(file) for file in files))
    return report


# ---------------------------------------------------------------------------------------- a model and its test set


def load_trained(path: str | Path, device: str | torch.device = "cpu") -> Module:
    """A model of any class in eval mode, whose metadata says what it was trained on.

    Raises:
        CheckpointError: no usable file, or one without the metadata that train.py writes.
    """
    model = Module.load(path, device)
    missing = [name for name in ("dataset", "classes", "mean", "std") if name not in model.metadata]
    if missing:
        raise CheckpointError(f"{path} does not say what the model was trained on: no {', '.join(missing)} in it")
    return model


def image_size(model: Module) -> int:
    """Side in pixels of the images that a model takes."""
    return model.config.get("img_size") or math.isqrt(model.config["input_size"] // 3)


def test_loader(model: Module, data_dir: str | None, batch_size: int, device: str | torch.device) -> ImageLoader:
    """The test images of the data set that the model was trained on, normalised as they were in training."""
    metadata = model.metadata
    source = metadata.get("source", metadata["dataset"])  # a folder's path; files of older models have the name alone
    data = load_data(source, data_dir, img_size=image_size(model))
    if data.classes != metadata["classes"]:  # trained on some of them
        if not set(metadata["classes"]) <= set(data.classes):
            raise CheckpointError(f"the classes in {source} are no longer those that the model was trained on")
        data = data.select(metadata["classes"])
    return ImageLoader(data.test, batch_size, metadata["mean"], metadata["std"], device)


@torch.no_grad()
def predict(model: Module, loader: ImageLoader) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(n, classes)` and labels `(n,)` of all images, on the CPU."""
    batches = [
        (model(images).cpu(), labels.cpu()) for images, labels in tqdm(loader, "testing", unit="batch", leave=False)
    ]
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


# ------------------------------------------------------------------------------------------------------- measures


def calibration(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> list[dict]:
    """How often the model is right, by how sure it is: `bins` equal intervals (low, high] of the top probability.

    Of each bin: `low`, `high`, `images` in it, and their mean `confidence` and `accuracy`, None where it is empty.
    All but `images` are fractions.

    Args:
        probabilities: `(n, classes)`.
        labels: `(n,)`.
    """
    confidence, prediction = probabilities.double().max(dim=1)
    correct = (prediction == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    table = []
    for i in range(bins):
        members = index == i
        count = int(members.sum())
        table.append(
            {
                "low": i / bins,
                "high": (i + 1) / bins,
                "images": count,
                "confidence": confidence[members].mean().item() if count else None,
                "accuracy": correct[members].mean().item() if count else None,
            }
        )
    return table


def expected_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """The mean over images of |accuracy - confidence| of the bin that each falls into, a fraction (Guo et al. 2017)."""
    table = [row for row in calibration(probabilities, labels, bins) if row["images"]]
    return sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in table) / len(labels)


def confusion_matrix(probabilities: torch.Tensor, labels: torch.Tensor) -> list[list[int]]:
    """Counts of images: a row for each right class, a column for each predicted one."""
    count = probabilities.shape[1]
    pairs = labels * count + probabilities.argmax(dim=1)
    return torch.bincount(pairs, minlength=count**2).view(count, count).tolist()


def per_class(probabilities: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> list[dict]:
    """Precision, recall and F1 of each class as fractions, and its number of images.

    Precision is 0 for a class that is never predicted.
    """
    from sklearn.metrics import precision_recall_fscore_support

    values = precision_recall_fscore_support(
        labels, probabilities.argmax(dim=1), labels=range(len(classes)), zero_division=0
    )
    return [
        {"class": name, "precision": float(p), "recall": float(r), "f1": float(f1), "images": int(count)}
        for name, p, r, f1, count in zip(classes, *values, strict=True)
    ]


def markdown_table(rows: list[dict]) -> str:
    lines = ["| class | precision | recall | F1 | images |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        percentages = " | ".join(f"{row[name]:.1%}" for name in ("precision", "recall", "f1"))
        lines.append(f"| {row['class']} | {percentages} | {row['images']:,} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- pictures


def draw_confusion(matrix: list[list[int]], classes: list[str], path: Path, title: str) -> Figure:
    """What each right class (row) is taken for (column), in percent of the row; mistakes by depth of colour, which is
    all that there is room for with more than 20 classes."""
    counts = torch.tensor(matrix, dtype=torch.float64)
    percent = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    mistakes = percent.clone().fill_diagonal_(0)
    many = len(classes) > 20
    cell, size = (12, 6.5) if many else (46, 9.5)
    side, margin = cell * len(classes), 30 + 8 * max(len(name) for name in classes)
    figure = utils.new_figure(max(margin + side + 50, 500), 128 + side + 24, dpi=200)
    utils.add_text(figure, 14, 28, f"{title}: what is taken for what", size=13, weight="bold")
    utils.add_text(figure, 14, 48, "percent of each right class (row), by predicted class (column)", size=9.5)
    axes = utils.add_axes(figure, margin, 128, side, side)
    axes.imshow(mistakes.numpy(), cmap="Oranges", vmin=0, vmax=max(1.0, 1.4 * mistakes.max().item()))
    for row in range(len(classes)):
        axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, color=utils.GREEN, linewidth=0))
        for column in range(0 if many else len(classes)):
            value = percent[row, column].item()
            style = {"color": utils.DARK if value >= 0.5 else utils.GREY, "size": 9.5}
            if row == column:
                style = {"color": "white", "size": 10.5, "weight": "bold"}
            axes.text(column, row, f"{value:.0f}", ha="center", va="center_baseline", **style)
    slant = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if max(map(len, classes)) > 6 else {}
    axes.set_xticks(range(len(classes)), classes, **({"rotation": 90} if many else slant))
    axes.set_yticks(range(len(classes)), classes)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=size, labelcolor=utils.DARK)
    axes.spines[:].set_visible(False)
    utils.save_figure(figure, path)
    return figure


def draw_calibration(report: dict, path: Path, title: str) -> Figure:
    """Reliability diagram: accuracy by confidence, and below it how many images have that confidence."""
    rows = [row for row in report["calibration"] if row["images"]]
    width = 100 / len(report["calibration"])
    centres = [50 * (row["low"] + row["high"]) for row in rows]
    accuracies = [100 * row["accuracy"] for row in rows]
    figure = utils.new_figure(520, 600, dpi=200)
    utils.add_text(figure, 14, 28, f"{title}: calibration", size=13, weight="bold")
    error, accuracy = 100 * report["expected_calibration_error"], 100 * report["accuracy"]
    note = f"expected calibration error {error:.1f} %, accuracy {accuracy:.1f} %, {report['images']:,} test images"
    utils.add_text(figure, 14, 48, note, size=9.5)

    upper = utils.add_axes(figure, 66, 72, 430, 330)
    upper.bar(centres, accuracies, width * 0.94, color=utils.BLUE, label="accuracy")
    ends = [(100 * row["confidence"], accuracy) for row, accuracy in zip(rows, accuracies, strict=True)]
    for confidence, accuracy in ends:
        upper.plot([confidence] * 2, [accuracy, confidence], color=utils.VERMILLION, lw=1.6)
    upper.plot(
        *zip(*ends, strict=True),
        "o",
        color=utils.VERMILLION,
        markersize=4,
        clip_on=False,
        label="gap to the confidence",
    )
    upper.plot([0, 100], [0, 100], "--", color=utils.DARK, lw=1, label="perfectly calibrated")
    upper.set_ylabel("right, % of the images in a bin", size=9.5, color=utils.DARK)
    upper.legend(loc="upper left", fontsize=9.5, frameon=False, labelcolor=utils.DARK)
    lower = utils.add_axes(figure, 66, 428, 430, 112)
    lower.bar(centres, [100 * row["images"] / report["images"] for row in rows], width * 0.94, color=utils.GREY)
    lower.set_ylabel("% of images", size=9.5, color=utils.DARK)
    lower.set_xlabel("confidence: probability of the predicted class, %", size=9.5, color=utils.DARK)
    upper.set_ylim(0, 100)
    for axes in (upper, lower):
        axes.set_xlim(0, 100)
        axes.tick_params(labelsize=9.5, color=utils.GREY, labelcolor=utils.DARK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(utils.GREY)
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
    columns, tile = 8, 96
    figure = utils.new_figure(14 + columns * (tile + 18), 66 + max(1, -(-len(worst) // columns)) * (tile + 48), dpi=200)
    utils.add_text(figure, 14, 28, f"{title}: the most confident mistakes", size=13, weight="bold")
    note = f"{len(wrong):,} of {len(labels):,} test images are wrong" if worst else "no mistakes"
    utils.add_text(figure, 14, 48, note, size=9.5)
    for position, i in enumerate(worst):
        row, column = divmod(position, columns)
        left, top = 14 + column * (tile + 18), 90 + row * (tile + 48)
        axes = utils.add_axes(figure, left, top, tile, tile)
        axes.imshow(images[i].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        axes.axis("off")
        said = f"{classes[prediction[i]]} {100 * confidence[i]:.0f} %"
        utils.add_text(figure, left, top - 17, said, utils.VERMILLION, size=8.5, weight="bold")
        utils.add_text(figure, left, top - 4, f"is: {classes[labels[i]]}", utils.GREEN, size=8.5)
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
