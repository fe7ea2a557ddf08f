"""What the benchmark compares with: a plain reference ViT with its data loading, and CCT-2 with its authors' recipe."""

import dataclasses
import random
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

import train
from images.augment import import_torchvision
from images.loader import Split
from runner import Runner, choose_precision, steps_in
from setup_cifar import load_data
from support import cli
from support.model import num_parameters
from training.callbacks import WithProgress
from training.models import build_model
from training.optim import build_optimizer, build_schedule
from training.presets import PRESETS

REFERENCE_EPOCHS = 20


class ReferenceViT(nn.Module):
    """A ViT as student projects write it: a query, key and value projection per head, each as wide as the whole model,
    MLP ratio 1, positions that start at zero, no final norm. 304,714 parameters with the default sizes."""

    def __init__(self, hidden_size: int = 64, num_heads: int = 4, num_blocks: int = 4, patch_size: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(3, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position = nn.Parameter(torch.zeros(1, (32 // patch_size) ** 2 + 1, hidden_size))
        self.blocks = nn.Sequential(*(ReferenceBlock(hidden_size, num_heads) for _ in range(num_blocks)))
        self.head = nn.Linear(hidden_size, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.blocks(x)[:, 0])


class ReferenceHead(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(3))

    def forward(self, x):
        query, key, value = self.query(x), self.key(x), self.value(x)
        return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value


class ReferenceBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.heads = nn.ModuleList(ReferenceHead(hidden_size) for _ in range(num_heads))
        self.output = nn.Linear(num_heads * hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.output(torch.cat([head(normed) for head in self.heads], dim=-1))
        return x + self.mlp(self.norm2(x))


class PILDataset(TorchDataset):
    """Images as PIL pictures through torchvision's ToTensor and Normalize(0.5, 0.5), one at a time."""

    def __init__(self, split: Split, transform: Callable | None = None):
        transforms = import_torchvision().transforms
        self.images = split.images.permute(0, 2, 3, 1).numpy()
        self.labels = split.labels.tolist()
        self.transform = transform or transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class History:
    """A Runner's callback: after each epoch `rows` has its validation accuracy, and the seconds of training until then,
    by the clock and of the processor, from where this object was made.

    Validation is left out; so is loading, unless `with_loading`. Training ends above `stop_at`.
    """

    def __init__(self, with_loading: bool = True, stop_at: float = 1.0):
        self.with_loading, self.stop_at = with_loading, stop_at
        self.rows, self.seconds, self.started = [], np.zeros(2), self.now()

    def step_start(self, _runner: Runner) -> None:
        if not self.with_loading:
            self.started = self.now()

    def step_end(self, _runner: Runner) -> None:
        now = self.now()
        self.seconds, self.started = self.seconds + now - self.started, now

    def epoch_end(self, runner: Runner) -> None:
        accuracy, (wall, cpu) = runner.metrics["val_accuracy"][-1], self.seconds.tolist()
        self.rows.append({"epoch": runner.epoch, "wall_seconds": wall, "cpu_seconds": cpu, "val_accuracy": accuracy})
        runner.stop = accuracy > self.stop_at
        self.started = self.now()

    def now(self) -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])


def time_run(contender: str, seed: int, stop_at: float, data_dir: str | None, part: float | None = None) -> list[dict]:
    """The history of the reference, or of a preset, until `stop_at` of the validation images are right.

    Args:
        part: epochs to train; default: all of them.

    Raises:
        ValueError: there is no such contender.
    """
    torch.manual_seed(seed)
    data = load_data("cifar10", data_dir)
    history = History(stop_at=stop_at)
    if contender == "reference":
        model, epochs, schedule, precision, smoothing = ReferenceViT(), REFERENCE_EPOCHS, None, "fp32", 0.0
        train_loader = DataLoader(PILDataset(data.train), batch_size=128, shuffle=True)
        val_loader = DataLoader(PILDataset(data.val), batch_size=128)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    elif contender in PRESETS:
        preset = cli.parse(train.Config, ["--preset", contender], train.dependent_defaults, remember=False)
        model, epochs = build_model(preset.model, dataclasses.asdict(preset), data.image_size, 10), preset.epochs
        train.set_first_weights(model, data, preset)
        precision, smoothing = choose_precision(preset.precision, torch.device("cpu")), preset.label_smoothing
        train_loader = data.loader("train", preset.batch_size, shuffle=True, augment=preset.augment, seed=seed)
        val_loader = data.loader("val", 500)
        optimizer = build_optimizer(model, preset.optimizer, preset.lr, preset.weight_decay, momentum=preset.momentum)
        schedule = build_schedule(optimizer, steps_in(epochs, len(train_loader)), preset.warmup, preset.schedule)
    else:
        raise ValueError(f"unknown contender {contender!r}: choose reference, {', '.join(PRESETS)} or cct_2")
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    runner = Runner(model, optimizer, criterion, "cpu", schedule, precision=precision, callbacks=[history])
    if part:
        history.started = history.now()  # else setting up would count once for each part
    runner.train(WithProgress(train_loader, f"{contender}, seed {seed}"), val_loader, part or epochs)
    return history.rows


def train_cct_2(epochs: int, seed: int, data_dir: str | None) -> dict:
    """CCT-2/3x2 of vit-pytorch with the recipe of its authors' repository (configs/datasets/cifar10.yml of
    Compact-Transformers), its 300 epochs with their warm-up and their end of Mixup shortened in proportion.

    Seconds are those of training steps alone: loading and augmenting, which cost it more than they cost ours, are left
    out in its favour.
    """
    import_torchvision()  # timm needs it
    from timm.data import Mixup, create_transform
    from vit_pytorch.cct import cct_2

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    data = load_data("cifar10", data_dir)
    pixels = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), "interpolation": "bicubic"}
    strong = create_transform(
        **{**pixels, "interpolation": "random"},
        input_size=32,
        is_training=True,
        scale=(0.8, 1.0),
        color_jitter=0.0,
        auto_augment="rand-m9-mstd0.5-inc1-mmax9",  # mmax: above 9, timm's posterize asks Pillow for 0 bits, an error
        re_prob=0.25,
        re_mode="pixel",
    )
    plain = create_transform(**pixels, input_size=32, is_training=False, crop_pct=1.0)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=10)

    def mixed(batch: list):
        mixup.mixup_enabled = runner.epoch + 1 <= epochs * 175 / 300
        return mixup(*default_collate(batch))

    train_data = PILDataset(data.train, strong)
    train_loader = DataLoader(train_data, batch_size=128, shuffle=True, drop_last=True, collate_fn=mixed)
    val_loader, test_loader = (DataLoader(PILDataset(part, plain), batch_size=500) for part in (data.val, data.test))
    model = cct_2(img_size=32, num_classes=10, n_conv_layers=2, kernel_size=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=55e-5, weight_decay=6e-2, fused=True)
    schedule = build_schedule(optimizer, epochs * len(train_loader), warmup=10 / 300)
    history = History(with_loading=False)
    runner = Runner(model, optimizer, nn.CrossEntropyLoss(), "cpu", schedule, callbacks=[history])
    runner.train(WithProgress(train_loader, f"cct_2, seed {seed}"), val_loader, epochs)
    _, test_accuracy = runner.test(test_loader)
    print(f"cct_2: test accuracy {test_accuracy:.2%}")
    results = {"epochs": epochs, "seed": seed, "parameters": num_parameters(model)}
    return {**results, "history": history.rows, "test_accuracy": test_accuracy}
