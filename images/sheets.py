"""Sheets of pictures: the first images of each class, and what each augmentation makes of them."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from images.augment import NAMES, Augmentation
from support.figures import add_axes, add_text, new_figure, save_figure


def draw_samples(
    images: torch.Tensor, labels: torch.Tensor, classes: list[str], path: str | Path, columns: int = 10
) -> Figure:
    """Save a sheet with the first `columns` images of each class as a PNG, one row for each class.

    Args:
        images: uint8 `(n, 3, h, w)`.
        labels: `(n,)`, indices into `classes`.
    """
    height, width = images.shape[2:]
    gap = max(1, width // 16)
    sheet = np.full((len(classes) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for row in range(len(classes)):
        for column, index in enumerate((labels == row).nonzero()[:columns, 0].tolist()):
            top, left = row * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = images[index].permute(1, 2, 0).cpu().numpy()
    scale = max(1, 72 // height)
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
    seed: int = 0,
) -> Figure:
    """Save a sheet with what each augmentation makes of the same images as a PNG, one row for each name.

    Args:
        images: uint8 `(n, 3, h, w)`, a column each; nine fill the width of a page.
        labels: int64 `(n,)`, indices into `classes`.
        flip, mean: as of `Augmentation`.
    """
    headings = {"none": 16, "mixup": 30, "cutmix": 30}  # room above a row for labels, of one line or of two
    tile, gap, margin = 88, 6, 124
    height = 40 + sum(tile + gap + headings.get(name, 0) for name in NAMES)
    figure = new_figure(margin + len(images) * (tile + gap) + gap, height, dpi=200)
    add_text(figure, 14, 26, "What each augmentation makes of the same images", size=13, weight="bold")
    top = 40
    for name in NAMES:
        augmentation = Augmentation(name, len(classes), flip, padding=images.shape[-1] // 8, mean=mean)
        draws = augmentation.draw(len(images), 1, torch.Generator().manual_seed(seed))
        pixels, targets = augmentation.apply(images, labels, draws, torch.arange(len(images)), 0)
        pixels = pixels.float().div(255).permute(0, 2, 3, 1).numpy()
        top += headings.get(name, 0)
        add_text(figure, 14, top + tile / 2 + 4, name, size=9.5)
        for i, target in enumerate(targets):
            left = margin + i * (tile + gap)
            axes = add_axes(figure, left, top, tile, tile)
            axes.imshow(pixels[i], interpolation="nearest")
            axes.axis("off")
            if name in headings:
                add_text(figure, left, top - 5, _describe_target(target, classes), size=7.5)
        top += tile + gap
    save_figure(figure, path)
    return figure


def _describe_target(target: torch.Tensor, classes: list[str]) -> str:
    """The class, or on two lines those that were mixed with their percentages."""
    if target.ndim == 0:
        return classes[target]
    shares, indices = target.topk(2)
    return "\n".join(f"{100 * share:.0f} % {classes[i]}" for share, i in zip(shares, indices, strict=True) if share)
