"""The study: a CNN against Vision Transformers of several patch sizes, and an MLP, under two recipes.

    python compare.py                            # train what is missing, one run after another; then table and figures
    python compare.py --jobs 2                   # two runs at a time
    python compare.py --only cnn vit_patch4 --recipe default --seeds 1
    python compare.py --no-train                 # table and figures of what is stored, nothing else
    python compare.py --dataset digits --epochs 1 --seeds 1              # all of it in about a minute

Each run is one `python train.py`, stored as saved/study_<recipe>_<model>_seed<n>.pt (the model), .json (how it came
about and its metrics) and .npz (its answer to each test image). A run that is stored is not trained again, one that was
interrupted goes on. Writes figures/model_comparison.md and .json and the pictures beside them, always of all runs that
are stored, and says which are missing.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from evaluate import load_trained, predict
from network import Module, count_flops
from runner import choose_device
from setup_cifar import ImageLoader, load_data
from studies import comparison, comparison_figures
from support import cli
from support.files import CheckpointError, write_bytes
from training.checkpoints import is_of_interrupted_run

RECIPES = {  # name -> flags to train.py
    "plain": "--optimizer adam --lr 5e-4 --schedule constant --warmup 0 --augment none --label_smoothing 0 "
    "--weight_decay 0 --pooling cls",
    "default": "",
}


class Model(NamedTuple):
    """A row of the study."""

    title: str
    flags: str  # to train.py
    seeds: int = 3  # runs, where --seeds does not say


MODELS = {
    "cnn": Model("CNN", "--model cnn"),
    "vit_patch2": Model("ViT (patch=2)", "--patch_size 2", seeds=1),  # 256 patches: hours on a CPU
    "vit_patch4": Model("ViT (patch=4)", "--patch_size 4"),
    "vit_patch6": Model("ViT (patch=6)", "--patch_size 6"),
    "vit_patch8": Model("ViT (patch=8)", "--patch_size 8"),
    "vit_small": Model("small ViT (patch=4)", "--hidden_size 24 --num_blocks 3"),  # about as many parameters as the CNN
    "mlp": Model("MLP", "--model mlp"),
}
TRAIN = Path(__file__).with_name("train.py")


@dataclass
class Config:
    """Compare a CNN, Vision Transformers and an MLP: train what is missing, then draw table and figures."""

    only: tuple[str, ...] = ()  # models to train: cnn, vit_patch2, ..4, ..6, ..8, vit_small, mlp; default: all
    recipe: Literal["both", "plain", "default"] = "both"  # plain: Adam, nothing else; default: that of train.py
    seeds: int | None = None  # runs of each model; default: 3, and 1 of vit_patch2
    epochs: int = 20  # of each run
    dataset: Literal["cifar10", "digits"] = "cifar10"  # what all are trained and tested on
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str = "."  # the folder that saved/ and figures/ are in
    jobs: int = 1  # trainings at a time; the cores are shared out among them
    train: bool = True  # train what is missing; --no-train only draws what is stored

    @property
    def saved(self) -> Path:
        return Path(self.output_dir) / "saved"

    @property
    def suffix(self) -> str:
        """Data other than CIFAR-10 appears in the names of files."""
        return "" if self.dataset == "cifar10" else f"_{self.dataset}"

    def run_name(self, recipe: str, model: str, seed: int | str) -> str:
        return f"study{self.suffix}_{recipe}_{model}_seed{seed}"


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        check(config)
        check_epochs(config)  # now rather than after hours of training
        failed = train_missing(config) if config.train else []
        runs = load_runs(config)
        study = comparison.summarise(runs, [(r, m, MODELS[m].title) for r in RECIPES for m in MODELS], config.epochs)
        written = write_results(runs, study, config)
    print("\nwrote " + ", ".join(str(path) for path in written))
    if failed:
        cli.fail(f"not trained: {', '.join(failed)}; what went wrong is said above", code=1)


def check(config: Config) -> None:
    """Refuse what cannot be run.

    Raises:
        ValueError: naming the flag.
    """
    unknown = [name for name in config.only if name not in MODELS]
    if unknown:
        raise ValueError(f"only: no model {', '.join(unknown)}: choose {', '.join(MODELS)}")
    for name in ("seeds", "epochs", "jobs"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


# -------------------------------------------------------------------------------------------------------- training


def train_missing(config: Config) -> list[str]:
    """Train each run that was asked for and is not stored; returns the names of those that failed."""
    recipes = list(RECIPES) if config.recipe == "both" else [config.recipe]
    models = config.only or MODELS
    wanted = [  # a first run of everything, then a second one
        (recipe, model, seed)
        for seed in range(config.seeds or max(model.seeds for model in MODELS.values()))
        for model in models
        for recipe in recipes
        if seed < (config.seeds or MODELS[model].seeds)
    ]
    commands = {}
    for recipe, model, seed in wanted:
        name = config.run_name(recipe, model, seed)
        if not (config.saved / f"{name}.json").exists():
            flags = f"{RECIPES[recipe]} {MODELS[model].flags} --dataset {config.dataset} --epochs {config.epochs}"
            flags += f" --seed {seed} --gif_frames 0 --name {name}"
            commands[name] = [sys.executable, str(TRAIN), *flags.split(), "--output_dir", config.output_dir]
            if is_of_interrupted_run(config.saved / f"{name}.checkpoint"):
                commands[name].append("--resume")
    print(f"{len(wanted)} runs asked for, {len(wanted) - len(commands)} of them stored, {len(commands)} to train")
    return run_all(commands, config) if commands else []


def run_all(commands: dict[str, list[str]], config: Config) -> list[str]:
    """Run the commands, `config.jobs` at a time; returns the names of those that failed.

    One at a time they write to the terminal; several at a time each writes to saved/<name>.log. Ctrl-C and SIGTERM stop
    the trainings with a checkpoint.
    """
    environment = dict(os.environ)
    if config.data_dir is not None:  # not as a flag: a report that is published need not say where data lay
        environment["DATA_DIR"] = config.data_dir
    if config.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.jobs)))
    config.saved.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(commands), {}, []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with tqdm(total=len(waiting), desc="runs", unit="run", disable=config.jobs == 1) as bar:
            while waiting or running:
                while waiting and len(running) < config.jobs:
                    name = waiting.pop(0)
                    tqdm.write(f"\n{name}, {len(waiting)} more after it" if config.jobs == 1 else f"started {name}")
                    running[name] = start(commands[name], environment, config.saved / f"{name}.log", config.jobs > 1)
                time.sleep(0.05)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    bar.update()
                    if running.pop(name).returncode or not (config.saved / f"{name}.json").exists():
                        failed.append(name)
                        why = f": {last_line(config.saved / f'{name}.log')}" if config.jobs > 1 else ""
                        tqdm.write(f"FAILED {name}{why}")
    except (KeyboardInterrupt, SystemExit):
        print("\nstopping; the same command goes on from here", file=sys.stderr)
        if os.name == "posix":  # on Windows this would kill; there Ctrl-C reaches the trainings by itself
            for process in running.values():
                process.terminate()
        raise
    finally:
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, previous)
    return failed


def start(command: list[str], environment: dict, log: Path, quietly: bool) -> subprocess.Popen:
    if not quietly:
        return subprocess.Popen(command, env=environment)
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.split("\r")[-1] for line in reversed(lines) if line.strip()), "it printed nothing")


# ---------------------------------------------------------------------------------------------------- what is stored


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


def find_runs(config: Config) -> list[tuple[str, str, int]]:
    """Recipe, model and seed of each stored run."""
    found = []
    for recipe in RECIPES:
        for model in MODELS:
            prefix = config.run_name(recipe, model, "")
            paths = config.saved.glob(f"{prefix}*.json")
            seeds = sorted(int(seed) for path in paths if (seed := path.stem[len(prefix) :]).isdecimal())
            found += [(recipe, model, seed) for seed in seeds]
    return found


def check_epochs(config: Config) -> None:
    """
    Raises:
        ValueError: a stored run was not trained for as many epochs.
        CheckpointError: a report is damaged.
    """
    for key in find_runs(config):
        name = config.run_name(*key)
        epochs = read_report(config.saved / name)["config"]["epochs"]
        if epochs != config.epochs:
            raise ValueError(
                f"{name} was trained for {epochs} epochs, not {config.epochs}: say --epochs {epochs}, or choose "
                "another --output_dir for a study of another length"
            )


def store_answers(names: list[str], config: Config) -> None:
    """Write saved/<name>.npz for those that have none: what the model says of each test image."""
    names = [name for name in names if not (config.saved / f"{name}.npz").exists()]
    if not names:
        return
    data, device = load_data(config.dataset, config.data_dir), choose_device()
    for name in tqdm(names, "testing", unit="model", leave=False):
        model = load_trained(config.saved / f"{name}.pt", device)
        logits, labels = predict(
            model, ImageLoader(data.test, 500, model.metadata["mean"], model.metadata["std"], device)
        )
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


def forward_flops(model: Module, image_size: int) -> int:
    """FLOPs for one image, as `count_flops` counts them."""
    image = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    with torch.no_grad():
        return count_flops(lambda: model(image))


def load_run(recipe: str, model: str, seed: int, config: Config) -> comparison.Run:
    path = config.saved / config.run_name(recipe, model, seed)
    report = read_report(path)
    try:
        with np.load(path.with_suffix(".npz")) as stored:
            answers = {name: stored[name] for name in ("correct", "labels", "classes", "flops")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise CheckpointError(f"{path}.npz is damaged: delete it and the model is tested again") from None
    if abs(answers["correct"].mean() - report["results"]["test_accuracy"]) > 0.002:  # other devices round otherwise
        raise CheckpointError(
            f"{path}.npz is of another model than {path}.json: delete it and the model is tested again"
        )
    return comparison.Run(recipe, model, MODELS[model].title, seed, report, **answers)


NEEDED = {  # of a report
    "results": ("parameters", "val_accuracy", "test_loss", "test_accuracy", "training_seconds"),
    "config": ("epochs", "seed"),
    "provenance": ("machine", "threads", "accelerator", "torch"),
    "metrics": ("val_loss", "val_accuracy", "val_step"),
}


def read_report(path: Path) -> dict:
    """What train.py wrote to `path`.json.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        report = json.loads(path.with_suffix(".json").read_text())
        whole = all(name in report[part] for part, names in NEEDED.items() for name in names)
        whole = whole and len(report["val_seconds"]) == len(report["metrics"]["val_step"]) > 0
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}.json is damaged: delete it and train again")
    return report


# --------------------------------------------------------------------------------------------------------- results


def write_results(runs: list[comparison.Run], study: dict, config: Config) -> list[Path]:
    """Print the tables; write them, the figures, and everything as JSON; returns the paths."""
    dataset = {"cifar10": "CIFAR-10"}.get(config.dataset, config.dataset)
    text = comparison.markdown(study, dataset)
    print(f"\n{text}")
    prefix = Path(config.output_dir) / "figures" / f"model_comparison{config.suffix}"
    written = comparison_figures.draw_all(runs, study, prefix, dataset)
    differences = [{name: value for name, value in row.items() if name != "resampled"} for row in study["differences"]]
    contents = {
        **study,
        "differences": differences,
        "runs": [stored_run(run) for run in runs],
        "provenance": cli.provenance(),
    }
    for ending, content in ((".md", text + "\n"), (".json", json.dumps(contents))):
        written.append(prefix.with_name(prefix.name + ending))
        write_bytes(written[-1], content.encode())
    return written


def stored_run(run: comparison.Run) -> dict:
    """A run in model_comparison.json: train.py's report without the training metrics, and the right answers as 0/1."""
    metrics = {name: values for name, values in run.report["metrics"].items() if name.startswith("val_")}
    correct = "".join(map(str, run.correct.astype(int)))
    return {**run.report, "metrics": metrics, "recipe": run.recipe, "name": run.title, "correct": correct}


if __name__ == "__main__":
    main()
