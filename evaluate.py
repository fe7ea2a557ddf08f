"""Where a trained model errs: confusion matrix, precision and recall, calibration, most confident mistakes.

    python evaluate.py saved/VisionTransformer.pt               # on the test set that it belongs to
    python evaluate.py saved/VisionTransformer.pt saved/CNN.pt  # each in turn
    python evaluate.py saved/VisionTransformer.pt saved/CNN.pt --ensemble      # ... and both together
    python evaluate.py saved/VisionTransformer.pt --flip        # what it says of an image and of its mirror image

Writes figures/<name>_confusion.png, <name>_calibration.png and <name>_mistakes.png, and every figure in them as
<name>_evaluation.json; <name> is the model file's, or "ensemble", whose answer is the mean of the models'
probabilities. How much it gains over each is in ensemble.png and ensemble.json.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm
from tyro.conf import Positional

import utils
from network import Module
from runner import choose_device
from setup_cifar import ImageLoader, load_data
from support import cli
from support.files import CheckpointError, write_bytes
from support.significance import paired_bootstrap, wilson

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
    ensemble: bool = False  # also the mean of the models' probabilities, against each of them
    flip: bool = False  # every answer is the mean of the probabilities of an image and of its mirror image


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        if not config.models:
            raise ValueError("name at least one file: python evaluate.py saved/VisionTransformer.pt")
        if config.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {config.batch_size}")
        names = [Path(path).stem for path in config.models]
        if len(set(names)) < len(names):
            raise ValueError(f"two files of the same name would overwrite each other's figures: {', '.join(names)}")
        if config.ensemble and len(names) < 2:
            raise ValueError("an ensemble has at least two models: name their files")
        if config.ensemble and "ensemble" in names:
            raise ValueError("a file of the name ensemble would have its figures overwritten: rename it")
        device = choose_device(config.device)
        models = [load_trained(path, device) for path in config.models]
        if config.flip and any(model.metadata["dataset"] == "digits" for model in models):
            raise ValueError("--flip is not for digits: a mirrored digit is another sign")
        if config.ensemble:
            check_same_data(models, config.models)
        answers = []
        for model, path, name in zip(models, config.models, names, strict=True):
            loader = test_loader(model, config.data_dir, config.batch_size, device)
            answers.append(Answers(name, *predict(model, loader, config.flip)))
            title = model.title + FLIPPED * config.flip
            evaluate(answers[-1], loader.images, path, title, model.metadata, prefix_of(name, config))
            if config.flip:
                plain = Answers(f"{name}, not mirrored", *predict(model, loader))
                gain = compare([plain], answers[-1])[0]
                low, high = gain["bca"]
                print(f"mirroring: {points(gain['difference'])} points ({points(low)} to {points(high)})")
        if config.ensemble:
            together = average(answers, "ensemble")
            title = f"Ensemble of {len(models)}" + FLIPPED * config.flip
            prefix = prefix_of(together.name + suffix_of(models[0].metadata["dataset"]), config)
            evaluate(together, loader.images, " ".join(config.models), title, models[0].metadata, prefix)
            report_ensemble(answers, together, f"{title} on {models[0].metadata['dataset']}", prefix)


FLIPPED = ", with mirror images"  # in titles


def prefix_of(name: str, config: Config) -> Path:
    return Path(config.output_dir) / (name + "_flip" * config.flip)


def suffix_of(dataset: str) -> str:
    return "" if dataset == "cifar10" else f"_{dataset}"


class Answers(NamedTuple):
    """What a model, or several together, say of the test images: logits `(n, classes)`; and the right labels `(n,)`."""

    name: str
    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def correct(self) -> torch.Tensor:
        return self.logits.argmax(dim=1) == self.labels


def evaluate(answers: Answers, images: torch.Tensor, path: str, title: str, metadata: dict, prefix: Path) -> dict:
    """Print, draw and store everything about one model; returns what is stored in `<prefix>_evaluation.json`.

    Args:
        images: uint8 `(n, 3, h, w)`.
        metadata: the model's, of which `classes` and `dataset` are needed.
    """
    classes, dataset = metadata["classes"], metadata["dataset"]
    probabilities, labels = answers.logits.softmax(dim=1), answers.labels
    report = {
        "model": path,
        "dataset": dataset,
        **measures(answers),
        "calibration": calibration(probabilities, labels),
        "confusion_matrix": confusion_matrix(probabilities, labels),
        "classes": per_class(probabilities, labels, classes),
        "provenance": cli.provenance(),
    }
    print(f"\n{path}: {title} on the {len(labels):,} test images of {dataset}")
    print(f"accuracy {report['accuracy']:.2%}  loss {report['loss']:.4f}", end="  ")
    print(f"expected calibration error {report['expected_calibration_error']:.2%} ({BINS} bins)\n")
    print(markdown_table(report["classes"]))
    title = f"{title} on {dataset}"
    files = [prefix.with_name(f"{prefix.name}_{what}.png") for what in ("confusion", "calibration", "mistakes")]
    draw_confusion(report["confusion_matrix"], classes, files[0], title)
    draw_calibration(report, files[1], title)
    draw_mistakes(images, probabilities, labels, classes, files[2], title)
    files.append(prefix.with_name(f"{prefix.name}_evaluation.json"))
    write_bytes(files[-1], json.dumps(report, indent=1).encode())
    print("\nwrote " + ", ".join(str(file) for file in files))
    return report


def measures(answers: Answers) -> dict:
    """Number of images, accuracy (a fraction), loss, expected calibration error (a fraction)."""
    return {
        "images": len(answers.labels),
        "accuracy": answers.correct.float().mean().item(),
        "loss": F.cross_entropy(answers.logits, answers.labels).item(),
        "expected_calibration_error": expected_calibration_error(answers.logits.softmax(dim=1), answers.labels),
    }


# ---------------------------------------------------------------------------------------------------------- ensembles


def check_same_data(models: list[Module], paths: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: the models do not answer the same question about the same images.
    """
    for name in ("dataset", "classes", "source"):
        values = [model.metadata.get(name) for model in models]
        for path, value in zip(paths, values, strict=True):
            if value != values[0]:
                raise ValueError(f"no ensemble: the {name} of {path} is {value}, that of {paths[0]} {values[0]}")


def mean_probabilities(logits: list[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean of the probabilities that these logits `(n, classes)` stand for."""
    return torch.stack([x.log_softmax(dim=1) for x in logits]).logsumexp(dim=0) - math.log(len(logits))


def average(members: list[Answers], name: str) -> Answers:
    """What they say together: the mean of their probabilities (as in Lakshminarayanan et al. 2017)."""
    return Answers(name, mean_probabilities([member.logits for member in members]), members[0].labels)


def compare(members: list[Answers], together: Answers) -> list[dict]:
    """For each member its measures, the accuracy of `together` less its own, and 95 % intervals of that difference."""
    rows = []
    for member in members:
        gain = paired_bootstrap(together.correct.numpy(), member.correct.numpy())
        del gain["resampled"]
        rows.append({"name": member.name, **measures(member), **gain})
    return rows


def report_ensemble(members: list[Answers], together: Answers, title: str, prefix: Path) -> dict:
    """Print, draw and store how the ensemble does against each member; returns what is stored in `<prefix>.json`."""
    rows = compare(members, together)
    report = {"ensemble": measures(together), "members": rows, "provenance": cli.provenance()}
    lines = [
        "| | test accuracy | loss | calibration error | the ensemble's gain, points (95 %, BCa) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in (*rows, {"name": "ensemble", **report["ensemble"]}):
        gain = ""
        if "bca" in row:
            gain = f"{points(row['difference'])} ({points(row['bca'][0])} to {points(row['bca'][1])})"
        error = row["expected_calibration_error"]
        lines.append(f"| {row['name']} | {row['accuracy']:.2%} | {row['loss']:.4f} | {error:.2%} | {gain} |")
    print("\n" + "\n".join(lines))
    draw_ensemble(report, prefix.with_name(f"{prefix.name}.png"), title)
    write_bytes(prefix.with_name(f"{prefix.name}.json"), json.dumps(report, indent=1).encode())
    print(f"\nwrote {prefix}.png, {prefix}.json")
    return report


def points(fraction: float) -> str:
    """A difference of accuracies in percentage points."""
    return f"{100 * fraction:+.2f}"


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
def predict(model: Module, loader: ImageLoader, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(n, classes)` and labels `(n,)` of all images, on the CPU. With `flip` each image's are the logarithm of
    its and its mirror image's mean probabilities."""

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        return mean_probabilities([model(images), model(images.flip(-1))]) if flip else model(images)

    batches = [
        (logits_of(images).cpu(), labels.cpu()) for images, labels in tqdm(loader, "testing", unit="batch", leave=False)
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


def draw_ensemble(report: dict, path: Path, title: str) -> Figure:
    """Left the accuracy of each member and of the ensemble, right what the ensemble gains; with 95 % intervals."""
    together, members = report["ensemble"], report["members"]
    rows = [{"name": "ensemble", **together}, *reversed(members)]
    height = 34 * len(rows)
    figure = utils.new_figure(800, 130 + height, dpi=200)
    utils.add_text(figure, 14, 28, title, size=13, weight="bold")
    note = f"accuracy on {together['images']:,} test images, and the ensemble's less each member's; 95 % intervals"
    utils.add_text(figure, 14, 48, note, size=9.5)
    longest = max(len(row["name"]) for row in rows)
    margin = min(320, 30 + 6.5 * longest)
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
    left.set_yticks(range(len(rows)), [row["name"] for row in rows])
    right.set_yticks([])
    right.axvline(0, color=utils.GREY, lw=1)
    for axes, label in ((left, "test accuracy, %"), (right, "the ensemble's gain, percentage points")):
        utils.tidy(axes)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(label, size=9.5, color=utils.DARK)
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
