"""Augmentation by name: what is done to training images, a batch at a time.

    none             nothing
    crop_flip        a crop at a random place of the image padded by an eighth, mirrored half of the time
    randaugment      two of 14 operations of fixed strength (Cubuk et al. 2020)
    trivialaugment   one operation of any strength (Müller & Hutter 2021)
    autoaugment      the operations found for CIFAR-10 (Cubuk et al. 2019)
    random_erasing   a rectangle wiped out, half of the time (Zhong et al. 2020)
    mixup            each image blended with its neighbour in the batch, and so their labels (Zhang et al. 2018)
    cutmix           a rectangle taken from the neighbour, and that share of its label (Yun et al. 2019)

All but `none` crop and mirror first. Several are joined by a plus, `randaugment+cutmix`, and done in the order above;
of mixup and cutmix together each batch gets one. Everything but crop and flip is torchvision's, with its defaults.

Chance is seeded for each image and each batch of an epoch (`Draws`), so that it can be repeated: what happens to an
image depends on (seed, epoch, image) alone. Only mixup and cutmix look further: how much is mixed depends on (seed,
epoch, number of the batch), and with what on the order of the images in the batch.
"""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

from support import cli

# What torchvision does to each image, and to a batch and its labels: functions of torchvision's module, the colour that
# fills what is left empty, and the number of classes.
OF_IMAGES = {
    "randaugment": lambda v2, fill, _: v2.RandAugment(fill=fill),
    "trivialaugment": lambda v2, fill, _: v2.TrivialAugmentWide(fill=fill),
    "autoaugment": lambda v2, fill, _: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=fill),
    "random_erasing": lambda v2, fill, _: v2.RandomErasing(value=fill),
}
OF_BATCHES = {
    "mixup": lambda v2, _, num_classes: v2.MixUp(num_classes=num_classes),
    "cutmix": lambda v2, _, num_classes: v2.CutMix(num_classes=num_classes),
}
NAMES = ("none", "crop_flip", *OF_IMAGES, *OF_BATCHES)


def parse_augment(augment: str) -> list[str]:
    """The names in `randaugment+cutmix`.

    Raises:
        ValueError: a name that is not known, or `none` with others.
    """
    names = augment.split("+")
    for name in names:
        if name not in NAMES:
            hint = cli.did_you_mean(name, NAMES)
            raise ValueError(f"unknown augment {name!r}: choose {', '.join(NAMES)}, or several joined by +{hint}")
    if "none" in names and len(names) > 1:
        raise ValueError(f"augment {augment!r} makes no sense: none stands alone")
    return names


class Draws(NamedTuple):
    """All that chance decides in an epoch, for every image and batch of it, whichever of them are then asked for."""

    offsets: torch.Tensor  # (2, images), top and left of the crop in the padded image
    mirrored: torch.Tensor  # (images,), bool
    image_seeds: torch.Tensor  # (images,), of what torchvision does to each
    batch_seeds: torch.Tensor  # (batches,), of the mixing


class Augmentation:
    """What is done to batches of training images.

    Args:
        augment: a name of `NAMES`, or several joined by +.
        num_classes: needed for mixup and cutmix.
        flip: whether a mirrored image still belongs to its class.
        padding: pixels around the image before it is cropped, reflected.
        mean: of the training images, 0 to 1 for each channel: the colour of what is erased, shifted in or turned in.

    Raises:
        ValueError: an unknown name, or torchvision is needed and not installed.
    """

    def __init__(
        self,
        augment: str = "crop_flip",
        num_classes: int | None = None,
        flip: bool = True,
        padding: int = 4,
        mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5),
    ):
        names = parse_augment(augment)
        self.crop = augment != "none"
        self.flip, self.padding = flip, padding
        self.each = self.mix = None
        if {"none", "crop_flip"}.issuperset(names):
            return
        import_torchvision()
        from torchvision.transforms import v2

        fill = [round(255 * value) for value in mean]
        if chosen := [make(v2, fill, num_classes) for name, make in OF_IMAGES.items() if name in names]:
            self.each = v2.Compose(chosen)
        if chosen := [make(v2, fill, num_classes) for name, make in OF_BATCHES.items() if name in names]:
            self.mix = v2.RandomChoice(chosen)

    def draw(self, images: int, batches: int, random: torch.Generator) -> Draws:
        """Chance for an epoch of so many images in so many batches."""
        return Draws(
            torch.randint(0, 2 * self.padding + 1, (2, images), generator=random),
            torch.rand(images, generator=random) < 0.5,
            torch.randint(2**62, (images,), generator=random),
            torch.randint(2**62, (batches,), generator=random),
        )

    def apply(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Draws, members: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Batch number `batch` of an epoch, augmented.

        Args:
            images: uint8 `(n, 3, height, width)`.
            labels: int64 `(n,)`.
            members: `(n,)`, the images' numbers in the epoch, on the CPU.

        Returns:
            Images of the same shape, uint8 or float32 from 0 to 255, and the labels; after mixup or cutmix these are
            probabilities, float32 `(n, classes)`.
        """
        if self.crop:
            images = random_crop(images, self.padding, *draws.offsets[:, members].to(images.device))
            if self.flip:
                mirrored = draws.mirrored[members].to(images.device)
                images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        if self.each:
            images = self._transform_each(images, draws.image_seeds[members].tolist())
        if self.mix:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(draws.batch_seeds[batch].item())
                images, labels = self.mix(images.float(), labels)
        return images, labels

    def _transform_each(self, images: torch.Tensor, seeds: list[int]) -> torch.Tensor:
        # on the CPU: a dozen tiny operations for each image would keep an accelerator waiting
        transformed = images.to("cpu", torch.uint8)
        with torch.random.fork_rng(devices=[]):
            for i, seed in enumerate(seeds):
                torch.default_generator.manual_seed(seed)
                transformed[i] = self.each(transformed[i])
        return transformed.to(images.device)


def random_crop(images: torch.Tensor, padding: int, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Pad `(batch, channels, height, width)` images by reflection and cut image i back out at `(top[i], left[i])`."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (batch, channels, tops, lefts, height, width): a view
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def import_torchvision():
    """The module `torchvision`, also where its compiled operators do not fit the installed torch.

    A torchvision wheel is built for one build of torch; beside another (a CPU-only torch, say) importing it fails with
    "operator torchvision::nms does not exist". Transforms need no such operator, so it is enough to declare them.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import torchvision
    except ModuleNotFoundError:
        raise ValueError("this needs torchvision, which is not installed: pip install -r requirements.txt") from None
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        import torchvision
    return torchvision
