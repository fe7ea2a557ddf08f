"""Sheets of pictures: the first images of each class, and what each augmentation makes of them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from images.augment import NAMES, Augmentation, Draws
from support.figures import add_axes, add_text, fit, new_figure, save_figure

LARGEST, MOST = 72, 100  # pixels of a side in the sheet of samples, and classes: a larger sheet would not be looked at
VISIBLE = 12  # of 255: mean change of a pixel from which on one sees that an image was changed


def draw_samples(
    images: torch.Tensor, labels: torch.Tensor, classes: list[str], path: str | Path, columns: int = 10
) -> Figure:
    """Save a sheet with the first `columns` images of each class as a PNG, one row for each class; of many classes the
    first hundred, and large images made smaller.

    Args:
        images: uint8 `(n, 3, h, w)`.
        labels: `(n,)`, indices into `classes`.
    """
    classes = classes[:MOST]
    height, width = (min(side, LARGEST) for side in images.shape[2:])
    gap = max(1, width // 16)
    sheet = np.full((len(classes) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for row in range(len(classes)):
        examples = images[(labels == row).nonzero()[:columns, 0]]
        if images.shape[2:] != (height, width):
            examples = F.interpolate(examples.float(), (height, width), mode="area").to(torch.uint8)
        for column, example in enumerate(examples):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = example.permute(1, 2, 0).cpu().numpy()
    scale = max(1, LARGEST // height)
    sheet_height, sheet_width = (side * scale for side in sheet.shape[:2])
    margin = 26 + 8 * max(len(name) for name in classes)
    figure = new_figure(margin + sheet_width + 10, sheet_height + 20, dpi=100)
    axes = add_axes(figure, margin, 10, sheet_width, sheet_height)
    axes.imshow(sheet)
    axes.set_xticks([])
    axes.set_yticks([row * (height + gap) + (height - 1) / 2 for row in range(len(classes))], classes)
    axes.tick_params(length=0, labelsize=11, pad=8)
    axes.spines[:].set_visible(False)
    save_figure(figure, path)
    return figure


def draw_augmentations(
    images: torch.Tensor,
    labels: torch.Tensor,
    classes: list[str],
    path: str | Path,
    flip: bool,
    mean: list[float],
    seed: int = 22,
) -> Figure:
    """Save a sheet with what each augmentation makes of the same images as a PNG, one row for each name.

    Chance is drawn anew until it can be seen: some augmentations leave half of the images as they are.

    Args:
        images: uint8 `(n, 3, h, w)`, a column each; ten fill the width of a page.
        labels: int64 `(n,)`, indices into `classes`.
        flip, mean: as of `Augmentation`.
        seed: by default one with which no example of CIFAR-10 is blank and each mixture is mostly its own column
    """
    headings = {"none": 16, "mixup": 30, "cutmix": 30}  # room above a row for labels, of one line or of two
    tile, gap, margin = 88, 6, 124
    height = 60 + sum(tile + gap + headings.get(name, 0) for name in NAMES)
    note = "chance was drawn until it changed something; each row but the first begins with the crops of the second"
    width = margin + len(images) * (tile + gap) + gap
    figure = new_figure(width, height, "What each augmentation makes of the same images", note)
    top, random = 60, torch.Generator().manual_seed(seed)
    before = draws = None
    for name in NAMES:
        augmentation = Augmentation(name, len(classes), flip, padding=images.shape[-1] // 8, mean=mean)
        draws = draws or augmentation.draw(len(images), 1, random)
        if name == "none":
            pixels, targets = images, labels
        else:
            draws, pixels, targets = _draw_visibly(name, augmentation, images, labels, draws, before, random)
        if name in ("none", "crop_flip"):
            before = pixels
        pixels = pixels.float().div(255).permute(0, 2, 3, 1).numpy()
        top += headings.get(name, 0)
        add_text(figure, 14, top + tile / 2 + 4, name, size=9.5)
        for i, target in enumerate(targets):
            left = margin + i * (tile + gap)
            axes = add_axes(figure, left, top, tile, tile)
            axes.imshow(pixels[i])
            axes.axis("off")
            if name in headings:
                text = "\n".join(fit(line, tile + gap - 1, 7.5) for line in _describe_target(target, classes))
                add_text(figure, left, top - 5, text, size=7.5)
        top += tile + gap
    save_figure(figure, path)
    return figure


def _draw_visibly(
    name: str,
    augmentation: Augmentation,
    images: torch.Tensor,
    labels: torch.Tensor,
    draws: Draws,
    before: torch.Tensor,
    random: torch.Generator,
) -> tuple[Draws, torch.Tensor, torch.Tensor]:
    """Draws of what this augmentation decides by chance that make every image differ from `before`, if some of 50 do;
    then the images and labels that they give."""
    decided = {"crop_flip": ("offsets", "mirrored"), "mixup": ("batch_seeds",), "cutmix": ("batch_seeds",)}
    draws = draws._replace(image_seeds=augmentation.draw(len(images), 1, random).image_seeds)  # no row like the last
    for _ in range(50):
        pixels, targets = augmentation.apply(images, labels, draws, torch.arange(len(images)), 0)
        unchanged = (pixels.float() - before.float()).abs().mean(dim=(1, 2, 3)) < VISIBLE
        if not unchanged.any():
            break
        new = augmentation.draw(len(images), 1, random)._asdict()
        for field in decided.get(name, ("image_seeds",)):
            again = unchanged.any() if field == "batch_seeds" else unchanged
            draws = draws._replace(**{field: torch.where(again, new[field], getattr(draws, field))})
    return draws, pixels, targets


def _describe_target(target: torch.Tensor, classes: list[str]) -> list[str]:
    """A line with the class, or two with those that were mixed and their percentages."""
    if target.ndim == 0:
        return [classes[target]]
    shares, indices = target.topk(2)
    return [f"{100 * share:.0f} % {classes[i]}" for share, i in zip(shares, indices, strict=True) if share]
