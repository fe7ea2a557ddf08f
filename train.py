"""Train a model on CIFAR-10, from data to pictures.

    python train.py                                   # the Vision Transformer, 20 epochs
    python train.py --model cnn --epochs 5            # every hyperparameter below is also a flag
    python train.py --resume                          # go on with an interrupted run
    torchrun --nproc_per_node=2 train.py              # in two processes, on two cores or GPUs

Writes saved/<Model>.pt (the model), saved/<Model>.json (the figures and how they came about), training curves and
attention maps under figures/, and animation_<model>.gif.
"""

import dataclasses
import json
import math
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

import utils
from images.augment import parse_augment
from network import CNN, FeedForward, Module, TimmModel, VisionTransformer, num_parameters
from runner import NonFiniteLoss, Runner, choose_device, choose_precision
from setup_cifar import Dataset, load_data
from support import cli, distributed
from support.files import write_bytes
from training.callbacks import EarlyStopping, TensorBoard, WeightAverage, compile_training, draw_frames
from training.checkpoints import Checkpoints, stop_on_signals
from training.models import freeze_backbone, load_timm_weights, start_from
from training.optim import DEFAULTS, FINE_TUNING_RATE, build_optimizer, build_schedule


@dataclass
class Config:
    """Train a model on CIFAR-10: data, model, Runner, pictures. Every hyperparameter is here, with its default."""

    preset: Literal["default", "quick", "accurate", "small"] = "default"  # other aims: see PRESETS below

    # data
    dataset: str = "auto"  # auto (CIFAR-10 where it can be had, else digits), cifar10, cifar100, digits, or a folder
    data_dir: str | None = None  # where CIFAR lies or goes; default: the environment's DATA_DIR, else data
    img_size: int = 32  # side in pixels that a folder's pictures are brought to; the other data sets have 32
    val_fraction: float = 0.2  # part of the training images held out for validation: an 80/20 split
    split_seed: int = 0  # which images these are; the same for every --seed, so that runs can be compared
    folds: int = 0  # for cross-validation, which crossval.py runs: the training images are cut into so many parts ...
    fold: int = 0  # ... and this one, from 0, is held out in place of val_fraction
    classes: str | None = None  # names with commas between, cat,dog say, of those to train and test on; default: all
    label_fraction: float = 1.0  # part of the training images that is used, the same of each class
    # with none a ViT overfits by epoch 10; then crop_flip, and with it one or several (randaugment+cutmix) of
    # randaugment, trivialaugment, autoaugment, random_erasing, mixup, cutmix
    augment: str = "crop_flip"

    # model
    model: str = "vit"  # vit, cnn, mlp, or a model of timm by its name: timm:vit_tiny_patch16_224
    hidden_size: int = 64  # width of a ViT's tokens, or of the MLP's hidden layer
    num_heads: int = 4  # attention heads in each ViT block; must divide hidden_size
    num_blocks: int = 4  # transformer blocks
    patch_size: int = 4  # side of a patch in pixels: 4 on 32x32 images gives 64 patches
    mlp_ratio: float = 4.0  # width of a ViT block's hidden layer over hidden_size
    pooling: Literal["mean", "cls"] = "mean"  # what the ViT's head reads: the patches' mean, or a CLS token
    tokenizer: Literal["patch", "conv"] = "patch"  # one strided convolution, or a stack of 3x3 convolutions
    tokenizer_depth: int = 1  # convolutions in each stage (each halving of the image) of the conv tokenizer
    drop_path: float = 0.0  # probability of skipping a branch of the last block, rising from 0 at the first block

    # trained weights to start from
    init_from: str | None = None  # a file of saved/ with a model like this one; its head is left out
    pretrained: bool = False  # a timm model's published weights, which are downloaded
    pretrained_file: str | None = None  # ... or taken from this file (.safetensors, .pth, .npz)
    freeze: Literal["none", "backbone"] = "none"  # backbone: train the head alone

    # optimisation
    epochs: int = 20  # passes over the training images
    batch_size: int = 128  # images in a step; several processes share them
    grad_accum: int = 1  # batches whose gradients are added up for a step: that of a batch so many times as large
    optimizer: Literal["muon", "adamw", "adam", "sgd"] = "muon"  # muon: hidden matrices and filters, AdamW: the rest
    lr: float | None = None  # peak learning rate, after warm-up; default: the optimiser's, 8e-3 for muon (see optim.py)
    schedule: Literal["cosine", "constant", "linear", "step", "one_cycle"] = "cosine"  # of the rate, after warm-up
    warmup: float = 0.1  # part of all steps in which the learning rate rises to its peak
    weight_decay: float | None = None  # on matrices alone; default: the optimiser's, 0.1 for muon (see optim.py)
    layer_decay: float = 1.0  # each layer's rate over that of the layer above; below 1 spares what trained weights know
    label_smoothing: float = 0.1  # probability spread over the other classes in the training targets
    ema: float = 0.0  # decay of a moving average of the weights, 0.999 say, validated and saved in their place; 0: none
    patience: int = 0  # epochs without improvement after which to stop and use the best epoch's weights; 0: never
    monitor: Literal["loss", "accuracy"] = "loss"  # of the validation images: what has to improve
    min_improvement: float = 0.0  # the least that counts: of the loss in nats, of the accuracy as a fraction
    grad_clip: float = 0.0  # largest norm of all gradients together; 0 leaves them alone
    skip_nonfinite: bool = False  # step over batches whose loss or gradient is not finite, where else training stops

    # the run
    seed: int = 0  # of initial weights, order and augmentation: the same seed gives the same weights on a CPU
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    # auto is bf16 on GPUs that have it, else fp32; on CPUs with AMX, too, bf16 is up to twice as fast
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False  # torch.compile the model for training, which takes half a minute; on a CPU no step is faster
    name: str | None = None  # of the files written; default: the model's class, with the data set if not CIFAR-10
    output_dir: str = "."  # the folder that saved/, figures/ and the GIF go to
    gif_frames: int = 40  # pictures in the GIF; 0 for none
    gif_frame_duration: int = 250  # milliseconds that each is shown
    tensorboard: bool = False  # also write scalars and pictures to runs/, for tensorboard --logdir runs
    resume: bool = False  # go on from the last checkpoint of the run of this name
    resume_changed: bool = False  # ... also where hyperparameters differ from the checkpoint's
    checkpoint_minutes: float = 5.0  # a checkpoint is written after every epoch, and this often within one


PRESETS = {  # `--preset NAME` puts these in the place of the defaults above; flags go before both
    "default": {},
    "quick": {  # above 60 % after one epoch
        "epochs": 1,
        "tokenizer": "conv",
        "patch_size": 8,
        "num_blocks": 2,
        "mlp_ratio": 2.0,
        "batch_size": 64,
        "lr": 8e-3,
        "label_smoothing": 0.0,
    },
    "accurate": {  # deep convolutional tokenizer down to 4x4 tokens, wide blocks; 2.2 million parameters
        "epochs": 26,
        "tokenizer": "conv",
        "tokenizer_depth": 2,
        "patch_size": 8,
        "hidden_size": 256,
        "num_heads": 8,
        "num_blocks": 2,
        "mlp_ratio": 2.0,
        "lr": 6e-3,
        "weight_decay": 0.05,
        "precision": "bf16",
    },
    "small": {  # the same with fewer than 300,000 parameters, and long enough to make up for it: an hour and a half
        "epochs": 150,
        "augment": "random_erasing",
        "tokenizer": "conv",
        "tokenizer_depth": 2,
        "patch_size": 8,
        "hidden_size": 96,
        "num_heads": 3,
        "num_blocks": 2,
        "mlp_ratio": 1.5,
        "lr": 6e-3,
        "weight_decay": 0.05,
        "precision": "bf16",
    },
}


class Files:
    """Where a run writes."""

    def __init__(self, config: Config, model: str, dataset: str):
        suffix = "" if dataset == "cifar10" else f"_{dataset}"
        suffix += f"_{classes_in_names(config)}" if config.classes else ""
        root = Path(config.output_dir)
        self.name = config.name or model + suffix
        self.saved, self.figures = root / "saved", root / "figures"
        self.model = self.saved / f"{self.name}.pt"  # the weights that the test figures belong to
        self.best = self.saved / f"{self.name}.best.pt"  # with --patience: the best until now
        self.last = self.saved / f"{self.name}.last.pt"  # and those that training ended with
        self.report = self.saved / f"{self.name}.json"
        self.checkpoint = self.saved / f"{self.name}.checkpoint"
        self.lock = self.saved / f"{self.name}.lock"
        self.curves = self.figures / f"{self.name}_curves.png"
        self.frames = self.figures / f"{self.name}_frames"
        self.tensorboard = root / "runs" / self.name
        self.attention = self.figures / f"attention_maps{'_' + config.name if config.name else suffix}.png"
        self.gif = root / f"animation_{config.name or config.model.removeprefix('timm:') + suffix}.gif"

    def claim(self) -> FileLock:
        """Make the folders, make sure now that they can be written, and lock the name.

        The lock is released when this process ends, however it ends.

        Raises:
            OSError: a folder that cannot be written.
            ValueError: another run of this name is under way.
        """
        for folder in (self.saved, self.figures):
            probe = folder / f".{self.name}.probe"
            write_bytes(probe, b"")
            probe.unlink()
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run named {self.name} is under way here: choose another --name") from None
        return lock


def classes_in_names(config: Config, separator: str = "_") -> str:
    """The classes chosen: up to four by name, of more the number."""
    names = config.classes.split(",")
    return separator.join(names) if len(names) <= 4 else f"{len(names)}classes"


def main() -> None:
    config = cli.parse(Config, presets=PRESETS)
    with cli.one_line_errors():
        use_defaults(config)
        check(config)
        device = choose_device(distributed.device_name(config.device))
        config.precision = choose_precision(config.precision, device)
        data = load_images(config)
        if config.dataset == "auto":
            config.dataset = data.name
        torch.manual_seed(config.seed)
        model = build_model(config, data)
        use_trained_weights(model, data, config)
        distributed.share_batch_norm(model, device)

        share = {"rank": distributed.rank(), "world_size": distributed.world_size()}  # of each batch
        options = {"shuffle": True, "augment": config.augment, "seed": config.seed}
        train_loader = data.loader("train", config.batch_size * config.grad_accum, device, **options, **share)
        val_loader = data.loader("val", 500, device, **share)
        runner = build_runner(model, device, config, steps=config.epochs * len(train_loader))
        stopping = None
        if config.patience:
            stopping = EarlyStopping(runner, config.monitor, config.patience, config.min_improvement)

        files = Files(config, model.title, data.name)
        checkpoints = Checkpoints(files.checkpoint, dataclasses.asdict(config))
        if config.resume and (results := checkpoints.resume(runner)):
            print(f"this run has finished: test accuracy {results['test_accuracy']:.2%}, {files.model}")
            return
        first = distributed.rank() == 0  # of several processes it alone writes
        if first:
            if config.tensorboard:
                TensorBoard(runner, files.tensorboard, val_loader, data.classes)
            lock = files.claim()  # noqa: F841  kept until the end
            if not config.resume:
                checkpoints.set_interrupted_run_aside()
                for path in (files.best, files.last):  # of the run before, if any: this one may write none
                    path.unlink(missing_ok=True)
            if stopping:
                stopping.on_best = lambda runner: runner.eval_model.save(files.best, **data.metadata)
        distributed.draw_apart(config.seed, runner.step)
        if config.compile:
            images, _ = next(iter(train_loader))
            compile_training(runner, images.tensor_split(config.grad_accum)[0])
        runner.training_model = distributed.share_gradients(runner.training_model, device)

    title = f"{model.title} on {data.name}" + (f", {classes_in_names(config, ', ')}" if config.classes else "")
    processes = f", in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    print(f"{title}: {num_parameters(model):,} parameters, {len(data.train):,} training images, on {device}{processes}")
    if first:
        if config.gif_frames:
            draw_frames(runner, val_loader, data.classes, files.frames, config.gif_frames, config.epochs, title)
        checkpoints.write_regularly(runner, config.checkpoint_minutes)
    interrupted = stop_on_signals(runner)
    try:
        if runner.epoch < config.epochs:
            runner.train(train_loader, val_loader, epochs=config.epochs - runner.epoch)
        if number := distributed.largest(interrupted[0] if interrupted else 0):  # of a signal, to any of the processes
            if first:
                checkpoints.write(runner)
            distributed.wait_for_all()
            command = shlex.join(distributed.launcher() + sys.argv + ([] if config.resume else ["--resume"]))
            print(f"\ninterrupted after step {runner.step}; to go on: {command}")
            raise SystemExit(128 + number)
        epoch = runner.epoch
        if stopping and stopping.epoch:
            epoch = stopping.epoch
            by = f" by more than {config.min_improvement}" if config.min_improvement else ""
            print(f"after {runner.epoch} epochs: epoch {epoch} was the last to improve validation {config.monitor}{by}")
            if first:
                runner.eval_model.save(files.last, **data.metadata)
            stopping.use_best(runner)
        test_loss, test_accuracy = runner.test(data.loader("test", 500, device, **share))  # once, at the end
        if first:
            results = save_results(runner, data, config, files, title, epoch, test_loss, test_accuracy)
            checkpoints.write(runner, results)
            shutil.rmtree(files.frames, ignore_errors=True)  # only now: a run killed before this needs them again
            tested = f"{data.name}, {len(data.test):,} images"
            print(f"test loss {test_loss:.4f}  test accuracy {test_accuracy:.2%}  ({tested})")
    except (NonFiniteLoss, OSError) as error:
        cli.fail(str(error), code=1)


def save_results(
    runner: Runner,
    data: Dataset,
    config: Config,
    files: Files,
    title: str,
    epoch: int,
    test_loss: float,
    test_accuracy: float,
) -> dict:
    """Write the model, whose weights are `epoch`'s, its figures and pictures; returns the figures."""
    results = {
        "parameters": num_parameters(runner.model),
        "epochs": runner.epoch,
        "tested_epoch": epoch,
        "val_accuracy": runner.metrics["val_accuracy"][epoch - 1],
        "val_loss": runner.metrics["val_loss"][epoch - 1],
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "training_seconds": round(runner.seconds, 1),
        "skipped_steps": runner.skipped,
    }
    runner.eval_model.save(files.model, **data.metadata)
    report = {
        "results": results,
        "config": dataclasses.asdict(config),
        "provenance": cli.provenance(),
        "metrics": runner.metrics,
        "val_seconds": runner.val_seconds,  # spent in training until each validation
    }
    write_bytes(files.report, json.dumps(report, indent=1).encode())
    written = [files.model, files.report] + draw_pictures(runner, data, config, files, title)
    print("wrote " + ", ".join(str(path) for path in written))
    return results


def use_defaults(config: Config) -> None:
    """Fill in what depends on other hyperparameters, so that report and checkpoint say what was used."""
    if config.model.startswith("timm:") and config.optimizer == "muon":
        config.optimizer = "adamw"  # Muon is for our own blocks
    if config.classes:
        config.classes = ",".join(name.strip() for name in config.classes.split(","))
    lr, weight_decay = DEFAULTS[config.optimizer]
    if (config.pretrained or config.pretrained_file) and config.optimizer in ("adam", "adamw"):
        lr = FINE_TUNING_RATE
    config.lr = lr if config.lr is None else config.lr
    config.weight_decay = weight_decay if config.weight_decay is None else config.weight_decay


def check(config: Config) -> None:
    """Refuse what cannot be trained.

    Raises:
        ValueError: naming the hyperparameter.
    """
    parse_augment(config.augment)
    for name in ("epochs", "batch_size", "grad_accum", "lr", "checkpoint_minutes"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    if config.fold and not config.folds:
        raise ValueError("fold is one of --folds: say how many there are")
    for name in ("weight_decay", "patience", "min_improvement", "grad_clip", "gif_frames", "gif_frame_duration"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must not be negative: {getattr(config, name)}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed {config.seed} must be in [0, 2**32)")
    if config.gif_frame_duration > 655_350:
        raise ValueError(
            f"gif_frame_duration {config.gif_frame_duration} is longer than a GIF can: 655350 milliseconds"
        )
    for name in ("warmup", "label_smoothing", "drop_path", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, not {getattr(config, name)}")
    for name in ("layer_decay", "label_fraction"):
        if not 0 < getattr(config, name) <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(config, name)}")
    timm = config.model.startswith("timm:")
    if not timm and config.model not in ("vit", "cnn", "mlp"):
        raise ValueError(f"unknown model {config.model!r}: choose vit, cnn, mlp, or timm:NAME")
    if not timm and (config.pretrained or config.pretrained_file):
        raise ValueError(f"--pretrained is for timm's models: --model {config.model} can start with --init_from")
    if config.freeze == "backbone" and not (config.init_from or config.pretrained or config.pretrained_file):
        raise ValueError("--freeze backbone is for trained weights: say --init_from, --pretrained or --pretrained_file")
    if config.init_from and (config.pretrained or config.pretrained_file):
        raise ValueError("--init_from and --pretrained both say what weights to start from: choose one")
    if config.name is not None and (config.name in ("", "..") or Path(config.name).name != config.name):
        raise ValueError(f"name {config.name!r} must be the name of a file, not a path")


def load_images(config: Config) -> Dataset:
    """The data set, or the part of it that is asked for; the same for all processes."""
    with distributed.one_before_the_others():
        data = load_data(config.dataset, config.data_dir, config.val_fraction, config.split_seed, config.img_size)
    flags = dataclasses.replace(config, data_dir=None, output_dir="")  # machines may differ in these
    distributed.require_same("hyperparameters and images", f"{flags} {data.name} {len(data.train)}")
    if config.folds:
        data = data.fold(config.fold, config.folds, config.split_seed)
    if config.classes is not None:
        data = data.select(config.classes.split(","))
    if config.label_fraction < 1:
        data = data.part_of_labels(config.label_fraction, config.split_seed)
    if config.batch_size * config.grad_accum > len(data.train):
        times = f" times grad_accum {config.grad_accum}" if config.grad_accum > 1 else ""
        raise ValueError(f"batch_size {config.batch_size}{times} is larger than the training set of {len(data.train)}")
    return data


def build_model(config: Config, data: Dataset) -> Module:
    """The model by name, its input and output sizes those of the data.

    Raises:
        ValueError: sizes that do not go together, or for which there is no memory.
    """
    size, classes = data.image_size, len(data.classes)
    try:
        if config.model == "cnn":
            return CNN(size, classes)
        if config.model == "mlp":
            return FeedForward(3 * size**2, config.hidden_size, classes)
        if config.model.startswith("timm:"):
            return TimmModel(config.model.removeprefix("timm:"), size, classes, config.drop_path)
        return VisionTransformer(
            img_size=size,
            hidden_size=config.hidden_size,
            output_size=classes,
            num_heads=config.num_heads,
            num_blocks=config.num_blocks,
            patch_size=config.patch_size,
            mlp_ratio=config.mlp_ratio,
            pooling=config.pooling,
            tokenizer=config.tokenizer,
            tokenizer_depth=config.tokenizer_depth,
            drop_path=config.drop_path,
        )
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"a model of these sizes cannot be made: {str(error).splitlines()[0]}") from None


def build_runner(model: Module, device: torch.device, config: Config, steps: int) -> Runner:
    """The Runner with its optimiser, and a schedule for so many steps."""
    optimizer = build_optimizer(model, config.optimizer, config.lr, config.weight_decay, config.layer_decay)
    runner = Runner(
        model,
        optimizer,
        torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
        device,
        scheduler=build_schedule(optimizer, steps, config.warmup, config.schedule),
        eval_criterion=torch.nn.CrossEntropyLoss(),
        log_every=min(50, steps // config.epochs),
        grad_clip=config.grad_clip or None,
        skip_nonfinite=config.skip_nonfinite,
        precision=config.precision,
        grad_accum=config.grad_accum,
    )
    if config.ema:
        WeightAverage(runner, config.ema)
    return runner


def use_trained_weights(model: Module, data: Dataset, config: Config) -> None:
    """Start from the weights asked for, with images normalised as they were for these, and freeze what is to be."""
    if config.init_from:
        metadata = start_from(model, config.init_from)
        data.mean, data.std = metadata.get("mean", data.mean), metadata.get("std", data.std)
    elif config.pretrained or config.pretrained_file:
        if not config.resume:
            with distributed.one_before_the_others():
                load_timm_weights(model, config.pretrained_file)
        data.mean, data.std = model.mean, model.std
    if config.freeze == "backbone":
        freeze_backbone(model)


# -------------------------------------------------------------------------------------------------------- pictures


def draw_pictures(runner: Runner, data: Dataset, config: Config, files: Files, title: str) -> list[Path]:
    """Training curves, the GIF and, for a ViT, attention maps; returns what was written."""
    utils.draw_curves(runner.metrics, files.curves, title)
    written = [files.curves]
    if any(files.frames.glob("frame_*.png")):  # none are left of a run that had finished and now went on
        utils.write_to_gif(
            files.frames,
            files.gif,
            frame_duration=config.gif_frame_duration,
            max_frames=max(2, config.gif_frames),
            keep_frames=True,
        )
        written.append(files.gif)
    if isinstance(runner.eval_model, TimmModel):
        print("no pictures of attention: timm's models do not give their attention weights")
    if isinstance(runner.eval_model, VisionTransformer):
        utils.draw_attention(runner.eval_model, data.loader("test", 4, runner.device), data.classes, files.attention)
        written.append(files.attention)
    return written


if __name__ == "__main__":
    with distributed.processes():
        main()
