"""Train a model on CIFAR-10, from data to pictures.

    python train.py                                   # the Vision Transformer, 20 epochs
    python train.py --model cnn --epochs 5            # every hyperparameter below is also a flag
    python train.py --minutes 10                      # as many epochs as this computer trains in ten minutes
    python train.py --resume --name CNN_epochs5       # go on with an interrupted run
    python train.py --config saved/CNN_epochs5.json   # do again what a run did
    torchrun --nproc_per_node=2 train.py              # in two processes, on two cores or GPUs

Writes saved/<name>.pt (the model), .json (the figures and how they came about) and .csv (every step, while it trains),
and figures/<name>_curves.png, <name>_attention_maps.png and <name>_animation.gif; without flags the last two are
figures/attention_maps.png and animation_vit.gif. The name says what is not default.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from images.loader import Dataset, split_names
from network import Model
from runner import steps_in
from setup_cifar import load_data
from support import cli, distributed
from training.callbacks import EarlyStopping, WeightAverage, WithProgress, compile_training
from training.models import build_model, freeze_backbone, load_timm_weights, start_from
from training.optim import OPTIMIZERS, SCHEDULES, build_optimizer, build_schedule
from training.options import RunOptions, check, drop_without_effect, hyperparameters, stored_values, whole
from training.plan import plan
from training.presets import PRESETS
from training.run import Run


@dataclass
class Config(RunOptions):
    """Train a model on CIFAR-10: data, model, Runner, pictures. Every hyperparameter is here, with its default."""

    preset: Literal[(*PRESETS, "auto")] = "default"  # other aims: training/presets.py; auto chooses by the minutes

    # data
    # auto (CIFAR-10 where it is available, else digits), cifar10, cifar100, mnist, fashionmnist, svhn, digits, a folder
    dataset: str = "auto"
    img_size: int = 32  # side in pixels that a folder's pictures are brought to; the other data sets have 32
    val_fraction: float = 0.2  # part of the training images held out for validation: an 80/20 split; 0: none
    split_seed: int = 0  # which images these are; the same for every --seed, so that runs can be compared
    fold: str | None = None  # for cross-validation, in place of val_fraction: 0/5 holds out the first of five parts
    # names with commas between, cat,dog say, of those to train and test on; default: all. A name that has a comma
    # itself is put in double quotes
    classes: str | None = None
    label_fraction: float = 1.0  # part of the training images that is used, the same of each class

    # model
    # vit, cnn, resnet20, mlp, a model of timm (timm:vit_tiny_patch16_224), or your own (my_model.py:MyNet)
    model: str = "vit"
    hidden_size: int = 64  # width of a ViT's tokens, or of the MLP's hidden layer
    num_heads: int = 4  # attention heads in each ViT block; must divide hidden_size
    num_blocks: int = 4  # transformer blocks
    patch_size: int = 4  # side of a patch in pixels: 4 on 32x32 images gives 64 patches
    mlp_ratio: float = 4.0  # width of a ViT block's hidden layer over hidden_size
    pooling: Literal["mean", "cls"] = "mean"  # what the ViT's head reads: the patches' mean, or a CLS token
    # one strided convolution; a stack of 3x3 convolutions; the same after whitening, with residual branches
    tokenizer: Literal["patch", "conv", "whitened"] = "patch"
    tokenizer_depth: int = 1  # with conv and whitened: convolutions in each stage (each halving of the image)
    drop_path: float = 0.0  # probability of skipping a branch of the last block, rising from 0 at the first block

    # weights to start from
    # begin ViT, CNN and ResNet with first filters whose answers to the training images are uncorrelated
    whiten: bool = True
    init_from: str | None = None  # a file of saved/ with a model like this one; its head is left out
    pretrained: bool = False  # a timm model's published weights, which are downloaded
    pretrained_file: str | None = None  # ... or taken from this file (.safetensors, .pth, .npz)
    freeze: Literal["none", "backbone"] = "none"  # backbone: train the head alone

    # optimisation
    # of initial weights, order and augmentation: the same seed gives the same weights, bit for bit, on CPUs of one kind
    # with as many threads and the same versions
    seed: int = 0
    epochs: float = 20  # passes over the training images; the last of 1.6, say, ends early
    batch_size: int = 128  # images in a step; several processes share them
    grad_accum: int = 1  # batches whose gradients are summed for a step, which is that of a batch so much larger
    # none, or crop_flip, and with it one or several (randaugment+cutmix) of randaugment, trivialaugment, autoaugment,
    # random_erasing, mixup, cutmix
    augment: str = "crop_flip"
    optimizer: Literal[tuple(OPTIMIZERS)] = "muon"  # muon for hidden matrices and filters, AdamW for the rest
    lr: float = 6e-3  # peak learning rate, after warm-up: muon's; of the others see RATES in train.py
    weight_decay: float = 0.05  # on matrices alone: muon's; of the others see RATES in train.py
    momentum: float = 0.95  # part of earlier gradients kept at each step: muon's, see RATES; Adam's first beta
    schedule: Literal[tuple(SCHEDULES)] = "cosine"  # of the rate, after warm-up
    warmup: float = 0.1  # part of all steps in which the learning rate rises to its peak
    layer_decay: float = 1.0  # each layer's rate over that of the layer above; below 1 spares what trained weights know
    label_smoothing: float = 0.1  # probability spread over the other classes in the training targets
    ema: float = 0.0  # decay of a moving average of the weights, 0.999 say, validated and saved in their place; 0: none
    grad_clip: float = 0.0  # largest norm of all gradients together; 0 leaves them alone
    skip_nonfinite: bool = False  # step over batches whose loss or gradient is not finite, where else training stops
    patience: int = 0  # epochs without improvement after which to stop and use the best epoch's weights; 0: never
    monitor: Literal["loss", "accuracy"] = "loss"  # of the validation images: what has to improve
    min_improvement: float = 0.0  # the least that counts: of the loss in nats, of the accuracy as a fraction

    def __post_init__(self):
        self.epochs = whole(self.epochs)


# What takes the place of Config's lr, weight_decay and momentum, which are Muon's, with another `--optimizer`. Adam and
# SGD add the decay to the gradient, AdamW and Muon take it off the weights, so that one value cannot serve all.
RATES = {
    "adamw": {"lr": 2e-3, "weight_decay": 0.05, "momentum": 0.9},
    "adam": {"lr": 2e-3, "weight_decay": 0.0, "momentum": 0.9},
    "sgd": {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9},
}
# The same for `--dataset digits`, which has 1,150 training images where CIFAR-10 has 40,000.
DIGITS = {"epochs": 12, "batch_size": 16}
FINE_TUNING_RATE = 5e-4  # of AdamW and Adam on timm's published weights, as in BEiT (Bao et al. 2022)


def main(args: list[str] | None = None, callbacks: Iterable[object] = ()) -> None:
    config = with_defaults(cli.parse(Config, args, dependent_defaults, stored_values))
    with Run(config) as run:  # sets up processes, device and precision; prints an error as one line
        check(config)
        data = load_images(config)
        deadline = plan(run, data, lambda preset: with_defaults(config, preset=preset))  # --minutes chooses the epochs
        drop_without_effect(config, data)

        torch.manual_seed(config.seed)
        model = build_model(config.model, hyperparameters(config), data.image_size, len(data.classes))
        set_first_weights(model, data, config)
        run.describe(model, data, usual=dependent_defaults(config))

        options = {"shuffle": True, "augment": config.augment, "seed": config.seed}
        train_loader = data.loader("train", config.batch_size * config.grad_accum, run.device, **options, **run.share)
        val_loader, test_loader = (data.loader(part, 500, run.device, **run.share) for part in ("val", "test"))
        validation = WithProgress(val_loader, "validating") if len(data.val) else None

        optimizer = build_optimizer(
            model, config.optimizer, config.lr, config.weight_decay, config.layer_decay, config.momentum
        )
        schedule = build_schedule(optimizer, steps_in(config.epochs, len(train_loader)), config.warmup, config.schedule)
        runner = run.runner(
            model,
            optimizer,
            criterion=nn.CrossEntropyLoss(label_smoothing=config.label_smoothing),
            scheduler=schedule,
            eval_criterion=nn.CrossEntropyLoss(),
            grad_clip=config.grad_clip or None,
            skip_nonfinite=config.skip_nonfinite,
            grad_accum=config.grad_accum,
        )
        if config.ema:
            runner.callbacks.append(WeightAverage(runner, config.ema))
        if config.patience:
            best = EarlyStopping(config.monitor, config.patience, config.min_improvement, run.save_best)
            runner.callbacks.append(best)
        if deadline:
            runner.callbacks.append(deadline)
        runner.callbacks += callbacks
        runner.callbacks += run.callbacks(val_loader)  # live results, the GIF's frames, TensorBoard, checkpoints

        if not run.start(runner, train_loader):  # it had finished already
            return
        if config.compile:
            compile_training(runner, train_loader)
            run.exit_if_interrupted(runner)
        if runner.epoch < config.epochs:
            runner.train(train_loader, validation, config.epochs - runner.epoch)
        run.exit_if_interrupted(runner)
        run.finish(runner, WithProgress(test_loader, "testing"))  # tests once; model, report, pictures


def dependent_defaults(config: Config) -> dict:
    """What takes the place of defaults because of other flags: the values of an optimiser, a data set, a preset."""
    values, optimizer = {}, config.optimizer
    if config.model.startswith("timm:") and optimizer == "muon":
        values["optimizer"] = optimizer = "adamw"  # Muon is for the project's own blocks
    if optimizer != Config.optimizer:
        values |= RATES.get(optimizer, {})
    if (config.pretrained or config.pretrained_file) and optimizer in ("adam", "adamw"):
        values["lr"] = FINE_TUNING_RATE
    preset = PRESETS.get(config.preset, {})
    if optimizer != Config.optimizer:  # a preset's rates are Muon's
        preset = {name: value for name, value in preset.items() if name not in ("lr", "weight_decay", "momentum")}
    return {**values, **preset, **(DIGITS if config.dataset == "digits" else {})}


def with_defaults(config: Config, **changes) -> Config:
    """The config with these changes, and what comes with them where neither flags nor an earlier run say otherwise."""
    changed = copy.copy(config)
    vars(changed).update(changes)
    values = {name: value for name, value in dependent_defaults(changed).items() if name not in config.settled}
    vars(changed).update(values)
    return changed


def load_images(config: Config) -> Dataset:
    """The data set, or the part of it that is asked for; the same for all processes."""
    val_fraction = config.val_fraction if config.fold is None else Config.val_fraction  # folds are cut from this split
    with distributed.main_process_first():
        data = load_data(config.dataset, config.data_dir, val_fraction, config.split_seed, config.img_size, config.test)
    if config.dataset == "auto":
        vars(config).update(vars(with_defaults(config, dataset=data.name)))
    if config.fold is not None:
        number, folds = map(int, config.fold.split("/"))
        data = data.fold(number, folds, config.split_seed)
    if config.classes is not None:
        data = data.select(split_names(config.classes))
    if config.label_fraction < 1:
        data = data.part_of_labels(config.label_fraction, config.split_seed)
    if not len(data.val) and (config.val_fraction or config.fold):
        raise ValueError(f"no image of {data.name} is held out for validation: raise --val_fraction, or add pictures")
    if not len(data.val) and config.patience:
        raise ValueError("--patience needs validation images: leave it out, or raise --val_fraction")
    if config.batch_size * config.grad_accum > len(data.train):
        config.batch_size = max(1, len(data.train) // (4 * config.grad_accum))  # four steps in each epoch
        print(f"batch_size is {config.batch_size} here, as there are only {len(data.train)} training images")
    return data


def set_first_weights(model: Model, data: Dataset, config: Config) -> None:
    """Start from trained weights that are asked for, with images normalised as they were for these, or from filters
    that the images give; and freeze what is to be."""
    if config.init_from:
        metadata = start_from(model, config.init_from)
        data.start_after(metadata, config.init_from)
        data.mean, data.std = metadata.get("mean", data.mean), metadata.get("std", data.std)
    elif config.pretrained or config.pretrained_file:
        if not config.resume:
            with distributed.main_process_first():
                load_timm_weights(model, config.pretrained_file)
        data.mean, data.std = model.mean, model.std
    elif config.whiten and hasattr(model, "whiten"):
        images = 5000 * min(1, (32 / data.image_size) ** 2)  # of larger ones fewer, which have as many patches
        model.whiten(next(iter(data.loader("train", max(1, int(images)))))[0])
    if config.freeze == "backbone":
        freeze_backbone(model)


if __name__ == "__main__":
    main()
