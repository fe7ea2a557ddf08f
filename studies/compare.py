"""The study: a CNN against Vision Transformers of several patch sizes, and an MLP, under two recipes.

    python -m studies.compare                    # train what is missing, one run after another; then table and figures
    python -m studies.compare --jobs 2           # two runs at a time
    python -m studies.compare --only cnn vit_patch4 --recipe default --seeds 1
    python -m studies.compare --no_train         # table and figures of what is stored, nothing else
    python -m studies.compare --dataset digits --epochs 1 --seeds 1              # all of it in about a minute

Each run is one `python train.py`, stored as saved/studies/study_<recipe>_<model>_seed<n>.pt (the model), .json (how it
came about and its metrics) and .npz (its answer to each test image). A run that is stored is not trained again, one
that was interrupted goes on. Writes figures/model_comparison.md and .json and the pictures beside them, always of all
runs that are stored, and says which are missing.
"""

import io
import zipfile
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from images.loader import ImageLoader
from network import Model
from runner import choose_device
from setup_cifar import load_data
from studies import comparison, comparison_figures
from studies.runs import StudyOptions, finish, read_report, require_positive, train_missing, write_study
from support import cli
from support.files import CheckpointError, write_bytes
from training.models import count_flops
from training.trained import load_model, predict

RECIPES = {  # name -> flags to train.py
    "plain": "--optimizer adam --lr 5e-4 --schedule constant --warmup 0 --augment none --label_smoothing 0 "
    "--weight_decay 0 --pooling cls",
    "default": "",
}


class Row(NamedTuple):
    """A model of the study."""

    title: str
    flags: str  # to train.py
    seeds: int = 3  # runs, where --seeds does not say


MODELS = {
    "cnn": Row("CNN", "--model cnn"),
    "vit_patch2": Row("ViT (patch=2)", "--patch_size 2", seeds=1),  # 256 patches: hours on a CPU
    "vit_patch4": Row("ViT (patch=4)", "--patch_size 4"),
    "vit_patch6": Row("ViT (patch=6)", "--patch_size 6"),
    "vit_patch8": Row("ViT (patch=8)", "--patch_size 8"),
    "vit_small": Row("small ViT (patch=4)", "--hidden_size 24 --num_blocks 3"),  # as many parameters as the CNN
    "mlp": Row("MLP", "--model mlp"),
}


@dataclass
class Config(StudyOptions):
    """Compare a CNN, Vision Transformers and an MLP: train what is missing, then draw table and figures."""

    # what is trained
    only: tuple[str, ...] = ()  # models: cnn, vit_patch2, ..4, ..6, ..8, vit_small, mlp; default: all
    recipe: Literal["both", "plain", "default"] = "both"  # plain: Adam, nothing else; default: that of train.py
    seeds: int | None = None  # runs of each model; default: 3, and 1 of vit_patch2
    epochs: int = 20  # of each run

    def run_name(self, recipe: str, model: str, seed: int | str) -> str:
        return f"study{self.suffix}_{recipe}_{model}_seed{seed}"


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        require_positive(config, "seeds", "epochs")
        if unknown := [name for name in config.only if name not in MODELS]:
            raise ValueError(f"only: no model {', '.join(unknown)}: choose {', '.join(MODELS)}")
        check_epochs(config)  # now rather than after hours of training
        failed = train_missing(wanted_runs(config), config) if config.train else []
        runs = load_runs(config)
        study = comparison.summarise(runs, [(r, m, MODELS[m].title) for r in RECIPES for m in MODELS], config.epochs)
        dataset = {"cifar10": "CIFAR-10"}.get(config.dataset, config.dataset)
        prefix = config.figures / f"model_comparison{config.suffix}"
        written = comparison_figures.draw_all(runs, study, prefix, dataset)
        for row in study["differences"]:
            del row["resampled"]
        text = comparison.as_markdown(study, dataset)
        written += write_study(prefix, text, config, **study, runs=[stored_run(run) for run in runs])
    finish(written, failed)


def wanted_runs(config: Config) -> dict[str, str]:
    """The flags of each run that is asked for, by name: a first run of everything, then a second one."""
    recipes = list(RECIPES) if config.recipe == "both" else [config.recipe]
    return {
        config.run_name(recipe, model, seed): f"{RECIPES[recipe]} {MODELS[model].flags} --dataset {config.dataset} "
        f"--epochs {config.epochs} --seed {seed}"
        for seed in range(config.seeds or max(row.seeds for row in MODELS.values()))
        for model in config.only or MODELS
        for recipe in recipes
        if seed < (config.seeds or MODELS[model].seeds)
    }


# ---------------------------------------------------------------------------------------------------- what is stored


def find_runs(config: Config) -> list[tuple[str, str, int]]:
    """Recipe, model and seed of each stored run."""
    found = []
    for recipe in RECIPES:
        for model in MODELS:
            prefix = config.run_name(recipe, model, "")
            seeds = (path.stem[len(prefix) :] for path in config.saved.glob(f"{prefix}*.json"))
            found += [(recipe, model, seed) for seed in sorted(int(seed) for seed in seeds if seed.isdecimal())]
    return found


def check_epochs(config: Config) -> None:
    """
    Raises:
        ValueError: a stored run was not trained for as many epochs.
        CheckpointError: a report is damaged.
    """
    for key in find_runs(config):
        name = config.run_name(*key)
        epochs = read_report(name, config)["config"]["epochs"]
        if epochs != config.epochs:
            raise ValueError(
                f"{name} was trained for {epochs} epochs, not {config.epochs}: say --epochs {epochs}, or choose "
                "another --output_dir for a study of another length"
            )


def load_runs(config: Config) -> list[comparison.Run]:
    """All stored runs of the study on this data set; of those whose answers are not stored yet the model is tested.

    Raises:
        ValueError: there is none, or they were not tested on the same images.
        CheckpointError: a file is damaged.
    """
    found = find_runs(config)
    if not found:
        raise ValueError(f"no run of the study on {config.dataset} is stored in {config.saved}")
    store_answers([config.run_name(*key) for key in found], config)
    runs = [load_run(*key, config) for key in tqdm(found, "reading", unit="run", leave=False)]
    for run in runs:
        if not np.array_equal(run.labels, runs[0].labels):
            raise ValueError(f"{config.run_name(run.recipe, run.model, run.seed)} was tested on other images")
    return runs


def store_answers(names: list[str], config: Config) -> None:
    """Write <name>.npz for those that have none: what the model says of each test image."""
    names = [name for name in names if not (config.saved / f"{name}.npz").exists()]
    if not names:
        return
    data, device = load_data(config.dataset, config.data_dir), choose_device()
    for name in tqdm(names, "testing", unit="model", leave=False):
        model = load_model(config.saved / f"{name}.pt", device)
        loader = ImageLoader(data.test, 500, model.metadata["mean"], model.metadata["std"], device)
        logits, labels = predict(model, loader)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            correct=(logits.argmax(dim=1) == labels).numpy(),
            loss=F.cross_entropy(logits, labels, reduction="none").half().numpy(),
            probabilities=logits.softmax(dim=1).half().numpy(),
            labels=labels.byte().numpy(),
            classes=np.array(data.classes),
            flops=forward_flops(model, data.image_size),
        )
        write_bytes(config.saved / f"{name}.npz", buffer.getvalue())


def forward_flops(model: Model, image_size: int) -> int:
    """FLOPs for one image, as `count_flops` counts them."""
    image = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    with torch.no_grad():
        return count_flops(lambda: model(image))


def load_run(recipe: str, model: str, seed: int, config: Config) -> comparison.Run:
    name = config.run_name(recipe, model, seed)
    report, path = read_report(name, config), config.saved / f"{name}.npz"
    try:
        with np.load(path) as stored:
            answers = {what: stored[what] for what in ("correct", "labels", "classes", "flops")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise CheckpointError(f"{path} is damaged: delete it and the model is tested again") from None
    if abs(answers["correct"].mean() - report["results"]["test_accuracy"]) > 0.002:  # other devices round otherwise
        raise CheckpointError(f"{path} is of another model than {name}.json: delete it and the model is tested again")
    return comparison.Run(recipe, model, MODELS[model].title, seed, report, **answers)


def stored_run(run: comparison.Run) -> dict:
    """A run in model_comparison.json: train.py's report without the training metrics, and the right answers as 0/1."""
    metrics = {name: values for name, values in run.report["metrics"].items() if name.startswith("val_")}
    correct = "".join(map(str, run.correct.astype(int)))
    return {**run.report, "metrics": metrics, "recipe": run.recipe, "name": run.title, "correct": correct}


if __name__ == "__main__":
    main()
