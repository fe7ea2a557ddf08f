"""The study: CNNs against Vision Transformers of several patch sizes, and an MLP, under two recipes.

    python -m studies.compare                            # train what is missing, one run after another; then draw
    python -m studies.compare --jobs 2                   # two runs at a time
    python -m studies.compare --only cnn vit_patch4 --recipe default --seeds 1
    python -m studies.compare --no_train                 # tables and figures of what is stored, nothing else
    python -m studies.compare --dataset digits --epochs 1 --seeds 1              # all of it in about a minute

Each run is one `python train.py`, stored as saved/studies/study_<recipe>_<model>_seed<n>.pt (the model), .json (how it
came about and its metrics) and .npz (which test images are right). A run that is stored is not trained again, one that
was interrupted goes on. Writes figures/model_comparison.md and .json and the pictures beside them, always of all
runs that are stored, and says which are missing.
"""

import dataclasses
import hashlib
import io
import itertools
import shlex
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from runner import choose_device
from studies import comparison, comparison_figures, runs
from studies.runs import Row
from support import cli
from support.files import CheckpointError, write_bytes
from support.model import Model
from training.models import count_flops
from training.trained import load_model, predict, test_loader

LARGEST = 16 << 20  # bytes that a run's answers may unpack to; those of CIFAR-100 take 30 kB
RECIPES = {  # name -> flags to train.py
    "plain": "--optimizer adam --lr 5e-4 --schedule constant --warmup 0 --augment none --label_smoothing 0 "
    "--weight_decay 0 --pooling cls --no_whiten --precision fp32",
    "default": "",
}
MODELS = {  # seeds: of each, where --seeds does not say
    "cnn": Row("CNN", "--model cnn", 3),
    "resnet20": Row("ResNet-20", "--model resnet20", 3),
    "vit_patch2": Row("ViT (patch=2)", "--patch_size 2"),  # 256 patches: hours on a CPU
    "vit_patch4": Row("ViT (patch=4)", "--patch_size 4", 3),
    "vit_patch6": Row("ViT (patch=6)", "--patch_size 6", 3),
    "vit_patch8": Row("ViT (patch=8)", "--patch_size 8", 3),
    "vit_small": Row("small ViT (patch=4)", "--hidden_size 24 --num_blocks 3", 3),  # as many parameters as the CNN
    "vit_wide": Row("wide ViT (patch=4)", "--hidden_size 72", 3),  # about as many as ResNet-20
    "mlp": Row("MLP", "--model mlp", 3),
}


@dataclass
class Config(runs.StudyOptions):
    """Compare CNNs, Vision Transformers and an MLP: train what is missing, then draw tables and figures."""

    # what is trained
    only: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)  # models to train
    recipe: Literal["both", "plain", "default"] = "both"  # plain: Adam and nothing else; default: train.py's
    seeds: int | None = None  # runs of each model; default: 3, and 1 of vit_patch2
    epochs: int = 20  # of each run

    def run_name(self, recipe: str, model: str, seed: int | str) -> str:
        return f"study{self.suffix}_{recipe}_{model}_seed{seed}"


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        cli.require_positive(config, "seeds", "epochs", "jobs")
        find_reports(config)  # now rather than after hours of training: they may be of another number of epochs
        everything = plan(dataclasses.replace(config, only=tuple(MODELS), recipe="both", seeds=10))
        failed = runs.train_missing(plan(config), config, beside=everything) if config.train else []
        found = load_runs(config)
        titles = {(recipe, model): MODELS[model].title for recipe in RECIPES for model in MODELS}
        study = comparison.summarise(found, titles, config.epochs)
        study["missing_command"] = command_for_missing(found, config)
        dataset = {"cifar10": "CIFAR-10"}.get(config.dataset, config.dataset)
        prefix = config.figures / f"model_comparison{config.suffix}"
        pictures = comparison_figures.draw_all(found, study, prefix, dataset)
        for row in study["differences"]:
            del row["resampled"]  # 10,000 numbers, which the figure alone needs
        text = comparison.as_markdown(study, dataset)
        runs.write_study(prefix, text, config, pictures, failed, **study, runs=[run.stored() for run in found])


def plan(config: Config) -> runs.Runs:
    """The runs asked for: a first one of everything, then a second one."""
    return {
        config.run_name(recipe, model, seed): f"{flags} {MODELS[model].flags} --dataset {config.dataset} "
        f"--epochs {config.epochs} --seed {seed}"
        for seed in range(config.seeds or max(model.seeds for model in MODELS.values()))
        for model in config.only
        for recipe, flags in RECIPES.items()
        if config.recipe in ("both", recipe) and seed < (config.seeds or MODELS[model].seeds)
    }


def command_for_missing(found: list[comparison.Run], config: Config) -> str:
    """What trains each model that has no run under a recipe; empty where there is none."""
    stored = {(run.recipe, run.model) for run in found}
    missing = [key for key in itertools.product(RECIPES, MODELS) if key not in stored]
    models, recipes = ([name for name in table if any(name in key for key in missing)] for table in (MODELS, RECIPES))
    flags = ["--only", *models]
    flags += ["--recipe", *recipes] if len(recipes) == 1 else []
    for name in ("dataset", "epochs", "seeds"):
        if getattr(config, name) != getattr(Config, name):
            flags += [f"--{name}", str(getattr(config, name))]
    return shlex.join(["python", "-m", "studies.compare", *flags]) if missing else ""


def find_reports(config: Config) -> dict[tuple[str, str, int], dict]:
    """The report of each stored run by recipe, model and seed.

    Raises:
        ValueError: a run was not trained for as many epochs.
        CheckpointError: a report is damaged.
    """
    found = {}
    for recipe, model in ((recipe, model) for recipe in RECIPES for model in MODELS):
        prefix = config.run_name(recipe, model, "")
        for seed in runs.stored_seeds(prefix, config):
            report = found[recipe, model, seed] = runs.read_report(f"{prefix}{seed}", config, tested=True)
            epochs = report["config"]["epochs"]
            if epochs != config.epochs:
                raise ValueError(
                    f"{prefix}{seed} was trained for {epochs} epochs, not {config.epochs}: say --epochs {epochs}, or "
                    "choose another --output_dir for a study of another length"
                )
    return found


def load_runs(config: Config) -> list[comparison.Run]:
    """All stored runs of the study on this data set. A model whose answers are not stored yet is tested now.

    Raises:
        ValueError: there is none, or they were not tested on the same images.
        CheckpointError: a file is damaged.
    """
    loaded = []
    for (recipe, model, seed), report in cli.progress(find_reports(config).items(), "reading", "run"):
        name = config.run_name(recipe, model, seed)
        answers = load_answers(name, report, config)
        loaded.append(comparison.Run(recipe, model, MODELS[model].title, seed, report, **answers))
        if not np.array_equal(loaded[-1].labels, loaded[0].labels):
            raise ValueError(f"{name} was tested on other images")
    if not loaded:
        raise ValueError(f"no run of the study on {config.dataset} is stored in {config.saved}")
    return loaded


def load_answers(name: str, report: dict, config: Config) -> dict[str, np.ndarray]:
    path = config.saved / f"{name}.npz"
    if not path.exists():
        store_answers(name, config)
    answers = read_answers(path)
    # other devices round otherwise
    allowed = max(0.002, 2 / len(answers["correct"]))
    if abs(answers["correct"].mean() - report["results"]["test_accuracy"]) > allowed:
        raise CheckpointError(f"{path} is of another model than {name}.json: delete it and the model is tested again")
    return answers


def read_answers(path: Path) -> dict[str, np.ndarray]:
    """What `store_answers` stored.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                raise ValueError("larger than any data set's answers")
        with np.load(path, allow_pickle=False) as stored:
            answers = {key: stored[key] for key in stored.files}
        found = answers.pop("sha256", None)  # files of earlier versions have none
        correct, labels, classes = (answers[key] for key in ("correct", "labels", "classes"))
        whole = (
            (found is None or str(found) == checksum(answers))
            and correct.dtype == bool
            and labels.dtype.kind + classes.dtype.kind in ("uU", "iU")
            and (correct.shape, classes.ndim, answers["flops"].shape) == (labels.shape, 1, ())
            and (labels.ndim, answers["flops"].dtype.kind) == (1, "i")
            and 0 <= labels.min() <= labels.max() < len(classes)
        )
    except Exception:  # whatever a damaged file does to the reader
        whole = False
    if not whole:
        raise CheckpointError(f"{path} is damaged: delete it and the model is tested again")
    return {key: answers[key] for key in ("correct", "labels", "classes", "flops")}


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, kinds and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def store_answers(name: str, config: Config) -> None:
    """Write saved/studies/<name>.npz: which test images the model classifies correctly."""
    device = choose_device()
    model = load_model(config.saved / f"{name}.pt", device)
    logits, labels = predict(model, test_loader(model, config.data_dir, 500, device))
    answers = {
        "correct": (logits.argmax(dim=1) == labels).numpy(),
        "labels": labels.byte().numpy(),
        "classes": np.array(model.metadata["classes"]),
        "flops": np.array(forward_flops(model, model.image_size)),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **answers, sha256=np.array(checksum(answers)))
    write_bytes(config.saved / f"{name}.npz", buffer.getvalue())


def forward_flops(model: Model, image_size: int) -> int:
    """FLOPs for one image, as `count_flops` counts them."""
    image = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    with torch.no_grad():
        return count_flops(lambda: model(image))


if __name__ == "__main__":
    main()
