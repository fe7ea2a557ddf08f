"""Options of a run: those that concern the run alone, what is refused, what has no effect, and what a run is called."""

import copy
import dataclasses
import hashlib
import inspect
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from images.augment import parse_augment
from images.loader import Dataset, join_names, split_names
from support import cli, distributed, schema
from support.files import CheckpointError, find_file, home
from support.report import read_json
from training.checkpoints import in_todays_words, nothing_to_resume, read_checkpoint
from training.models import find_model


@dataclass
class RunOptions:
    """What concerns a run and not what is learned. All but the precision may change when it is resumed."""

    # the run
    name: str | None = None  # of the files written; default: the model's, and what differs from the defaults
    data_dir: str | None = None  # where the data lie or go; default: the environment's DATA_DIR, else data
    output_dir: str | None = None  # the folder that saved/, figures/ and the GIF go to; default: the project's
    config: str | None = None  # saved/<name>.json: the hyperparameters of that run, where no flag says otherwise
    resume: bool = False  # go on from the last checkpoint; with --name alone, with that run's own hyperparameters
    resume_changed: bool = False  # ... also where hyperparameters differ from the checkpoint's
    minutes: float | None = None  # in place of epochs: as many as end, with all that the run does, in this time
    test: bool = True  # the test at the end; runs among which you choose do without it, and look at no test image
    checkpoint_minutes: float = 5.0  # a checkpoint is written after every epoch, and this often within one
    keep_checkpoint: bool = False  # keep that of a run that has ended, to go on with more epochs (--resume_changed)
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    # number of CPU threads, which changes the last digits of the weights; default: all cores, or OMP_NUM_THREADS
    threads: int | None = None
    # auto is bf16 on GPUs and CPUs that compute in it (AMX, AVX-512 BF16), else fp32
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False  # torch.compile the model for training, which takes half a minute; on a CPU no step is faster
    # most pictures in the GIF, which has eight for the first epoch and two for each further one; 0: no GIF
    gif_frames: int = 40
    gif_frame_duration: int = 250  # milliseconds that each is shown
    tensorboard: bool = False  # also write scalars and pictures to runs/, for tensorboard --logdir runs


OWN = {field.name for field in dataclasses.fields(RunOptions)} - {"precision"}  # what concerns the run alone


def hyperparameters(config) -> dict[str, Any]:
    """All of the config that does not concern the run alone, by name."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in OWN}


# ---------------------------------------------------------------------------------------------- of an earlier run


def whole(epochs: float) -> float:
    """The same number, as an int where it is one."""
    return int(epochs) if isinstance(epochs, float) and epochs.is_integer() else epochs


def stored_values(config) -> dict[str, Any]:
    """What takes the place of defaults because an earlier run is repeated (--config) or continued (--resume --name).

    Raises:
        CheckpointError: there is no such run, or its file is damaged.
        ValueError: flags that say two things at once.
    """
    if config.config:
        if config.resume:
            raise ValueError("--config begins a new run and --resume continues one: choose one")
        path = find_file(config.config)
        stored, own = read_json(path, schema.STORED_RUN)["config"], OWN
    elif config.resume and config.name:
        root = Path(config.output_dir or home()) / "saved"
        path, report = root / f"{config.name}.checkpoint", root / f"{config.name}.json"
        if path.exists():
            stored = read_checkpoint(path)["config"]
        elif report.exists():
            path, stored = report, read_json(report, schema.STORED_RUN)["config"]
        elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
            return {}  # a machine without the files: flags have to say there what they hold, else Run refuses
        else:
            raise nothing_to_resume(path, config.name)
        own = {"name", "output_dir", "config", "resume", "resume_changed"}
    else:
        return {}
    try:
        schema.check(stored, {...: schema.PLAIN}, "config")
        values = {name: value for name, value in in_todays_words(stored).items() if name not in own}
        values = cli.checked_values(type(config), values)
        if "epochs" in config.given:  # which say how long to train, as --minutes does
            values.pop("minutes", None)
        if "optimizer" in config.given and config.optimizer != values.get("optimizer"):  # it has rates of its own
            values = {name: value for name, value in values.items() if name not in ("lr", "weight_decay", "momentum")}
        as_stored = copy.copy(config)
        vars(as_stored).update(values)
        check(as_stored)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    if "preset" in config.given and config.preset != as_stored.preset:
        raise ValueError(f"that run has the hyperparameters of --preset {as_stored.preset}: leave --preset out")
    other_minutes = "minutes" in config.given and values.get("minutes") != config.minutes
    if config.resume and other_minutes and not config.resume_changed:
        raise ValueError("--minutes changes the epochs of the run: leave it out, or say --resume_changed too")
    return values


def same_hyperparameters(stored: dict[str, Any], config) -> bool:
    """Whether a stored config says to learn the same, in whatever precision the machine chose; what an earlier version
    did not know is as it is by default."""
    before, now = {**hyperparameters(type(config)()), **in_todays_words(stored)}, hyperparameters(config)
    free = {"preset", *without_effect(config)} | {n for n in ("dataset", "precision") if before[n] == "auto"}
    free |= {"precision"} - set(config.given)
    return all(before[name] == value for name, value in now.items() if name not in free)


# ------------------------------------------------------------------------------------------ what a run is called

VALUES = ("preset", "augment", "optimizer", "schedule", "pooling", "tokenizer", "precision")  # say what they are of


def name_of(title: str, data: Dataset, config, usual: dict[str, Any]) -> str:
    """A run's name: the model's, the data's if not CIFAR-10, and each hyperparameter that differs from `usual`.

    `VisionTransformer`, `VisionTransformer_quick`, `CNN_epochs5_lr0.002`, `VisionTransformer_cat_dog_patch8`.
    """
    names = data.classes if config.classes else []
    parts = [title] + ([] if data.name == "cifar10" else [data.name])
    parts += names if len(names) <= 4 else [f"{len(names)}classes"]
    usual = {**hyperparameters(type(config)()), **usual} | ({"epochs": config.epochs} if config.minutes else {})
    left_out = {"model", "dataset", "classes", *without_effect(config, data)}
    if "precision" not in config.given:
        left_out.add("precision")  # the machine chose it
    if "batch_size" not in config.given and not config.config:
        left_out.add("batch_size")  # it has shrunk because there are few images
    changed = {name: v for name, v in hyperparameters(config).items() if v != usual[name] and name not in left_out}
    parts += [_label(name, changed[name]) for name in sorted(changed, key=lambda name: name == "precision")]
    parts += [f"minutes{config.minutes:g}"] if config.minutes else []
    text = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "-", "_".join(parts))
    if len(text) > 100:  # a file's name has at most 255 bytes, and has to be read
        text = f"{text[:90].rpartition('_')[0]}_{hash_of(text)}"
    return text


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _label(name: str, value: Any) -> str:
    short = name.removeprefix("num_").removesuffix("_size")
    if name in VALUES and value != "none":
        return str(value)
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if name == "val_fraction" and value == 0:
        return "all"
    if name in ("init_from", "pretrained_file"):
        return f"from_{Path(value).stem}"
    if isinstance(value, str):
        return f"{short}_{value}".replace("/", "of")
    return f"{short}{value:g}" if isinstance(value, int | float) else f"{short}_{value}"


# ------------------------------------------------------------------------------------------- what has no effect


def drop_without_effect(config, data: Dataset) -> None:
    """Say which flags change nothing in this run, and put them back to their defaults, so that neither the name nor the
    report says that they did."""
    reasons = without_effect(config, data)
    flags = {name: reason for name, reason in reasons.items() if name in config.given}
    for reason in dict.fromkeys(flags.values()):
        same = [name for name in flags if flags[name] == reason]
        names = [f"--no_{name}" if getattr(config, name) is False else f"--{name}" for name in same]
        print(f"{', '.join(names)} {'have' if len(names) > 1 else 'has'} no effect {reason}")
    of_preset = ("on a", "with --fold")  # what it says for another model or split
    preset = [name for name, reason in reasons.items() if name not in config.given and reason.startswith(of_preset)]
    default = type(config)()
    preset = [name for name in preset if getattr(config, name) != getattr(default, name)]
    for reason in dict.fromkeys(reasons[name] for name in preset if config.preset != "default"):
        same = [name for name in preset if reasons[name] == reason]
        print(f"what --preset {config.preset} says of {', '.join(same)} has no effect {reason}")
    for name in [*flags, *preset]:
        setattr(config, name, getattr(default, name))


def without_effect(config, data: Dataset | None = None) -> dict[str, str]:
    """Of each hyperparameter that cannot change anything in this run, the reason: "on a CNN"."""
    groups = cli.flag_groups(type(config))
    model = find_model(config.model)
    wanted = inspect.signature(model.__init__).parameters
    what = "a timm model" if config.model.startswith("timm:") else MODEL_NAMES.get(config.model, f"a {config.model}")
    found = {
        name: f"on {what}"
        for name, (title, _) in groups.items()
        if title == "model" and name != "model" and name not in wanted
    }

    def add(names: str, reason: str, applies: bool) -> None:
        found.update({name: reason for name in names.split() if applies and name not in found})

    add("tokenizer_depth", "with --tokenizer patch", config.tokenizer == "patch")
    add("whiten", f"on {what}", not hasattr(model, "whiten"))
    add("whiten", "with --tokenizer conv", config.tokenizer == "conv")
    add("whiten", "with --init_from", bool(config.init_from))
    add("monitor min_improvement", "without --patience", not config.patience)
    add("pretrained", "beside --pretrained_file", bool(config.pretrained_file))
    add("val_fraction", "with --fold", config.fold is not None)
    if data is not None and data.is_folder:
        has_val = (Path(data.source) / "val").is_dir() and not config.fold
        add("val_fraction", "on a folder with pictures in val/", has_val)
        add("split_seed", "on a folder with pictures in val/", has_val and config.label_fraction == 1)
    add("momentum", f"on {what}, which has no matrix for Muon", config.optimizer == "muon" and config.model == "mlp")
    add(
        "momentum",
        "with --freeze backbone, as Muon has no matrix",
        config.optimizer == "muon" and config.freeze != "none",
    )
    add("layer_decay drop_path", "with --freeze backbone", config.freeze != "none")
    add("resume_changed", "without --resume", not config.resume)
    add("gif_frame_duration", "without a GIF", not config.gif_frames)
    if data is not None:
        add("data_dir", f"on {data.name}", data.name == "digits" or data.is_folder)
    return found


MODEL_NAMES = {"vit": "a ViT", "cnn": "a CNN", "resnet20": "a ResNet-20", "mlp": "an MLP"}


# ------------------------------------------------------------------------------------- what cannot be trained

SHORTEST = 0.5  # minutes: what Python and torch need to start, and the test, leave nothing of less
POSITIVE = ("epochs", "minutes", "batch_size", "grad_accum", "lr", "checkpoint_minutes")
NOT_NEGATIVE = ("weight_decay", "patience", "min_improvement", "grad_clip", "gif_frames", "gif_frame_duration")
BELOW_ONE = ("warmup", "label_smoothing", "ema", "momentum")  # and at least 0
FRACTIONS = ("layer_decay", "label_fraction")  # above 0 and at most 1


def check_minutes(config) -> None:
    """Refuse what --minutes and --preset auto do not go with.

    Raises:
        ValueError: naming both.
    """
    if config.preset == "auto" and (config.minutes is None or config.resume):
        raise ValueError(
            "--preset auto chooses by the time there is: say --minutes too, and leave it out with --resume"
        )
    if config.preset == "auto" and config.model != "vit":
        raise ValueError(f"--preset auto is for the ViT: say --minutes alone with --model {config.model}")
    if config.minutes is None:
        return
    if "epochs" in config.given:
        raise ValueError("--minutes and --epochs both say how long to train: choose one")
    if config.resume and not config.name:
        raise ValueError("--minutes is known of a run that is resumed: say --resume --name and the run's name")
    if config.minutes < SHORTEST and not config.resume:
        raise ValueError(f"minutes {config.minutes} is too short for anything: give at least --minutes {SHORTEST}")
    if distributed.world_size() > 1:
        raise ValueError("--minutes is for one process: say --epochs with torchrun")


def unify_spelling(config) -> None:
    """Spell in one way what can be typed in several: pets/ is pets, and `cat, dog` is cat,dog."""
    config.dataset = config.dataset.rstrip("/\\") or config.dataset
    if config.classes:
        config.classes = join_names(split_names(config.classes))


def check(config) -> None:
    """Refuse what cannot be trained, before data are loaded; what is not refused here, constructors refuse before
    anything is written.

    Raises:
        ValueError: naming the hyperparameter.
    """
    for names, holds, what in (
        (POSITIVE, lambda x: 0 < x < math.inf, "must be positive"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "must not be negative"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
        (FRACTIONS, lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
        (POSITIVE + NOT_NEGATIVE, lambda x: x <= 1e30, "is too large"),
        (("seed", "split_seed"), lambda x: 0 <= x < 2**32, "must be in [0, 2**32)"),
        (("gif_frame_duration",), lambda x: x <= 655_350, "is longer than a GIF can: 655350 milliseconds"),
    ):
        for name in names:
            if getattr(config, name) is not None and not holds(getattr(config, name)):
                raise ValueError(f"{name} {getattr(config, name)} {what}")
    check_minutes(config)
    parse_augment(config.augment)
    find_model(config.model)
    if config.fold is not None and not re.fullmatch(r"\d+/\d+", config.fold):
        raise ValueError(f"fold {config.fold} must be a number and how many there are: 0/5 is the first of five")
    unify_spelling(config)
    timm, weights = config.model.startswith("timm:"), config.pretrained or config.pretrained_file
    if timm and config.optimizer == "muon":
        raise ValueError("--optimizer muon is for the project's own blocks: choose adamw, adam or sgd for timm's")
    if weights and not timm:
        raise ValueError(f"--pretrained is for timm's models: --model {config.model} can start with --init_from")
    if weights and config.init_from:
        raise ValueError("--init_from and --pretrained both say what weights to start from: choose one")
    if config.freeze == "backbone" and not (config.init_from or weights):
        raise ValueError("--freeze backbone is for trained weights: say --init_from, --pretrained or --pretrained_file")
    parts = re.split(r"[/\\]", "name" if config.name is None else config.name)
    if {"", ".", ".."} & set(parts):
        raise ValueError(f"name {config.name!r} must be that of a file in saved/, with or without folders before it")
    if parts[-1].endswith((".best", ".last")):
        raise ValueError(f"name {config.name!r}: files that end so belong to runs with --patience")
