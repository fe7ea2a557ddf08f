"""Where a trained model errs: confusion matrix, precision and recall, calibration, most confident mistakes.

    python evaluate.py saved/VisionTransformer.pt               # on the test set that it belongs to
    python evaluate.py saved/VisionTransformer.pt saved/CNN.pt  # each in turn
    python evaluate.py saved/VisionTransformer.pt saved/CNN.pt --ensemble      # ... and both together
    python evaluate.py saved/VisionTransformer.pt --flip        # what it says of an image and of its mirror image
    python evaluate.py --runs saved                             # your runs side by side: a table and their curves

Writes figures/<name>_confusion.png, <name>_calibration.png and <name>_mistakes.png, and every figure in them as
<name>_evaluation.json; <name> is the model file's, or "ensemble", whose answer is the mean of the models'
probabilities. How much it gains over each is in ensemble.png and ensemble.json. Of runs it writes runs.csv, runs.html
and runs.png, from what is stored of them: nothing is computed anew.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import train
from network import Model
from runner import choose_device
from support import cli
from support.files import figures_folder
from support.report import plain_table, provenance, shorten_names, write_results
from support.significance import interval_text, paired_bootstrap, points
from training.evaluation_figures import draw_calibration, draw_confusion, draw_ensemble, draw_mistakes
from training.side_by_side import show
from training.trained import data_title, load_model, mean_probabilities, predict, test_loader

BINS = 15  # of confidence, as Guo et al. (2017) take for CIFAR


@dataclass
class Config:
    """Evaluate saved models, each on the test set of the data set that it was trained on."""

    models: tuple[str, ...]  # files that train.py wrote
    model: str | None = None  # my_model.py:MyNet, where the class of a model of your own lies; only for such a model
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str | None = None  # the folder that pictures and figures go to; default: the project's figures/
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    batch_size: int = 500  # images at a time
    ensemble: bool = False  # also the mean of the models' probabilities, against each of them
    flip: bool = False  # every answer is the mean of the probabilities of an image and of its mirror image
    shift: bool = False  # ... and of the image moved by a pixel to the upper left and to the lower right

    # runs side by side
    runs: tuple[str, ...] = ()  # in place of models: reports, checkpoints, folders of them, or saved/*.json
    sort: str = "val_accuracy"  # the column by which they are sorted, the best first
    each: bool = False  # a row for every run, rather than one for those that differ in the seed alone


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        names = [Path(path).stem for path in config.models]
        check(config, names)
        if config.runs:
            folder = figures_folder(config.output_dir)
            show(config.runs, asdict(train.Config()), config.sort, config.each, folder)
            return
        device = choose_device(config.device)
        viewed = title_of_views(config)
        models = [load_model(path, device, config.model) for path in config.models]
        if config.ensemble:
            check_same_data(models, config.models)
        others = models if config.ensemble else ()  # all are tested on the same images
        loaders = [test_loader(model, config.data_dir, config.batch_size, device, others) for model in models]
        for model, loader in zip(models, loaders, strict=True):
            if config.flip and not loader.augmentation.flip:
                raise ValueError(f"--flip is not for {model.metadata['dataset']}: a mirrored digit is another sign")
            if loader.num_images < 2 and (config.ensemble or viewed):
                raise ValueError("--ensemble, --flip and --shift compare answers, which takes two test images or more")
        answers = []
        for model, loader, path, name in zip(models, loaders, config.models, names, strict=True):
            answers.append(Answers(name, *predict(model, loader, config.flip, config.shift)))
            without = compare([Answers(name, *predict(model, loader))], answers[-1])[0] if viewed else None
            title, prefix = model.title + viewed, prefix_of(name, config)
            evaluate(answers[-1], loader.images, path, title, model.metadata, prefix, device, without)
            if without:
                change = f"{points(without['difference'], 2)} points ({interval_text(without['bca'], 2)})"
                print(f"without {viewed.removeprefix(', with ')}: {without['accuracy']:.2%}; they give {change}")
        if config.ensemble:
            together = average(answers, "ensemble")
            metadata = models[0].metadata
            title = f"Ensemble of {len(models)}" + viewed
            suffix = "" if metadata["dataset"] == "cifar10" else f"_{metadata['dataset']}"
            prefix = prefix_of(together.name + suffix, config)
            evaluate(together, loader.images, " ".join(config.models), title, metadata, prefix, device)
            report_ensemble(answers, together, f"{title} on {data_title(metadata)}", prefix, device)


def check(config: Config, names: list[str]) -> None:
    """
    Raises:
        ValueError: what was asked for cannot be done.
    """
    if config.runs:
        if beside := config.given - {"runs", "sort", "each", "output_dir"}:
            named = ", ".join(name if name == "models" else f"--{name}" for name in sorted(beside))
            raise ValueError(f"--runs shows what is stored of runs, and does nothing with {named}")
        return
    if config.each or config.sort != Config.sort:
        raise ValueError("--sort and --each are for --runs")
    if not names:
        raise ValueError("name at least one file: python evaluate.py saved/VisionTransformer.pt")
    cli.require_positive(config, "batch_size")
    if len(set(names)) < len(names):
        raise ValueError(f"two files of the same name would overwrite each other's figures: {', '.join(names)}")
    if config.ensemble and len(names) < 2:
        raise ValueError("an ensemble has at least two models: name their files")
    if config.ensemble and any(name.startswith("ensemble") for name in names):
        raise ValueError("a file whose name begins with ensemble may have its figures overwritten: rename it")


def title_of_views(config: Config) -> str:
    """What a title says of --flip and --shift."""
    views = ["mirror images"] * config.flip + ["shifts"] * config.shift
    return ", with " + " and ".join(views) if views else ""


def prefix_of(name: str, config: Config) -> Path:
    return figures_folder(config.output_dir) / (name + "_flip" * config.flip + "_shift" * config.shift)


class Answers(NamedTuple):
    """What a model, or several together, say of the test images: logits `(n, classes)`; and the right labels `(n,)`."""

    name: str
    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def correct(self) -> torch.Tensor:
        return self.logits.argmax(dim=1) == self.labels


def evaluate(
    answers: Answers,
    images: torch.Tensor,
    path: str,
    title: str,
    metadata: dict,
    prefix: Path,
    device: torch.device,
    without: dict | None = None,
) -> dict:
    """Print, draw and store everything about one model; returns what is stored in `<prefix>_evaluation.json`.

    Args:
        images: uint8 `(n, 3, h, w)`.
        metadata: the model's, of which `classes` and `dataset` are needed.
        device: that gave the answers.
        without: measures without mirror images and shifts, where the answers are with them.
    """
    classes, dataset = metadata["classes"], metadata["dataset"]
    probabilities, labels = answers.logits.softmax(dim=1), answers.labels
    report = {
        "model": path,
        "dataset": dataset,
        **measures(answers),
        "confusion_matrix": confusion_matrix(labels, probabilities.argmax(dim=1), labels=range(len(classes))).tolist(),
        "classes": per_class(probabilities, labels, classes),
        **({"without": without} if without else {}),
        "provenance": provenance(device),
    }
    print(f"\n{path}\n{title} on the {len(labels):,} test images of {data_title(metadata)}")
    error = f"expected calibration error {report['expected_calibration_error']:.2%} ({BINS} bins)"
    print(f"accuracy {report['accuracy']:.2%}  loss {report['loss']:.4f}  {error}\n")
    print(table_of_classes(report["classes"]), end="\n\n")
    title = f"{title} on {data_title(metadata)}"
    files = [prefix.with_name(f"{prefix.name}_{what}.png") for what in ("confusion", "calibration", "mistakes")]
    draw_confusion(report["confusion_matrix"], classes, files[0], title)
    draw_calibration(report, files[1], title)
    draw_mistakes(images, probabilities, labels, classes, files[2], title)
    report_path = prefix.with_name(f"{prefix.name}_evaluation.json")
    if write_results(report_path, report):
        files.append(report_path)
    cli.say_written(files)
    return report


def measures(answers: Answers) -> dict:
    """Number of images, accuracy (a fraction), loss, expected calibration error (a fraction) and its table."""
    table = calibration(answers.logits.softmax(dim=1), answers.labels)
    return {
        "images": len(answers.labels),
        "accuracy": answers.correct.float().mean().item(),
        "loss": F.cross_entropy(answers.logits, answers.labels).item(),
        "expected_calibration_error": expected_calibration_error(table),
        "calibration": table,
    }


# ---------------------------------------------------------------------------------------------------------- ensembles


def check_same_data(models: list[Model], paths: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: the models do not answer the same question about the same images.
    """
    marks = [model.metadata.get("fingerprints", {}).get("test") for model in models]
    # files of earlier versions do not say which images they belong to
    names = ("classes",) if all(marks) else ("classes", "dataset", "source")
    compared = {name: [model.metadata.get(name) for model in models] for name in names}
    if all(marks):
        compared["test images"] = marks
    for name, values in compared.items():
        for path, value in zip(paths, values, strict=True):
            if value != values[0]:
                raise ValueError(f"no ensemble: the {name} of {path}: {value}; of {paths[0]}: {values[0]}")


def average(members: list[Answers], name: str) -> Answers:
    """What they say together: the mean of their probabilities (as in Lakshminarayanan et al. 2017)."""
    return Answers(name, mean_probabilities([member.logits for member in members]), members[0].labels)


def compare(members: list[Answers], together: Answers) -> list[dict]:
    """For each member its measures, the accuracy of `together` minus its own, and that difference's 95 % intervals."""
    rows = []
    for member in members:
        row = {"name": member.name, **measures(member)}
        row |= paired_bootstrap(together.correct.numpy(), member.correct.numpy())
        rows.append({name: value for name, value in row.items() if name not in ("calibration", "resampled")})
    return rows


def report_ensemble(members: list[Answers], together: Answers, title: str, prefix: Path, device: torch.device) -> dict:
    """Print, draw and store how the ensemble does against each member; returns what is stored in `<prefix>.json`."""
    whole, rows = measures(together), compare(members, together)
    del whole["calibration"]
    report = {"ensemble": whole, "members": rows, "provenance": provenance(device)}
    shown = (*rows, {"name": "ensemble", **whole})
    gains = [f"{points(row['difference'], 2)} ({interval_text(row['bca'], 2)})" for row in rows]
    columns = {
        "": shorten_names([row["name"] for row in shown], 22),
        "accuracy": [f"{row['accuracy']:.2%}" for row in shown],
        "loss": [f"{row['loss']:.4f}" for row in shown],
        "calibration": [f"{row['expected_calibration_error']:.2%}" for row in shown],
        "gain": [*gains, ""],
    }
    print("\n" + plain_table(columns, left=[""]))
    print("\ncalibration: the expected calibration error")
    print("gain: the ensemble's accuracy minus this one's, in points (95 % interval, BCa)\n")
    files = [prefix.with_name(f"{prefix.name}.{ending}") for ending in ("png", "json")]
    draw_ensemble(report, files[0], title)
    cli.say_written(files if write_results(files[1], report) else files[:1])
    return report


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
        row = {"low": i / bins, "high": (i + 1) / bins, "images": int(members.sum())}
        for name, values in (("confidence", confidence), ("accuracy", correct)):
            row[name] = values[members].mean().item() if row["images"] else None
        table.append(row)
    return table


def expected_calibration_error(table: list[dict]) -> float:
    """Of a table by `calibration`: the mean over images of |accuracy - confidence| of the bin that each falls into, a
    fraction (Guo et al. 2017)."""
    full = [row for row in table if row["images"]]
    images = sum(row["images"] for row in full)
    return sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in full) / images


def per_class(probabilities: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> list[dict]:
    """Precision, recall and F1 of each class as fractions, and its number of images.

    Precision is 0 for a class that is never predicted; recall and F1 of a class without images are None.
    """
    values = precision_recall_fscore_support(
        labels, probabilities.argmax(dim=1), labels=range(len(classes)), zero_division=0
    )
    rows = []
    for name, precision, recall, f1, count in zip(classes, *values, strict=True):
        known = {"recall": float(recall), "f1": float(f1)} if count else {"recall": None, "f1": None}
        rows.append({"class": name, "precision": float(precision), **known, "images": int(count)})
    return rows


def table_of_classes(rows: list[dict]) -> str:
    """For the terminal."""
    columns = {"class": shorten_names([row["class"] for row in rows], 40)}
    for name in ("precision", "recall", "f1"):
        columns[name.replace("f1", "F1")] = ["" if row[name] is None else f"{row[name]:.1%}" for row in rows]
    columns["images"] = [f"{row['images']:,}" for row in rows]
    return plain_table(columns, left=["class"])


if __name__ == "__main__":
    main()
