"""Pictures: progress frames -> GIF, training curves, attention maps. The style of all figures: support/figures.py."""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from PIL import Image

from runner import eval_mode
from support.figures import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    LIGHT,
    VERMILLION,
    add_axes,
    add_text,
    fit,
    new_figure,
    save_figure,
    to_pixels,
)
from support.files import write_bytes

COLOR_MAP, OPACITY = "inferno", 0.65  # of attention
POINTS = 120  # of a training curve that are drawn, each the mean of as many steps as that takes

# --------------------------------------------------------------------------------------------------- training curves


def draw_curves(metrics: dict[str, list], path: str | Path, title: str) -> Figure:
    """Save loss and accuracy by optimiser step as a PNG, 1800x760 pixels to be shown at half size.

    The axis of the loss ends above its curves, but for a few points far above all others.
    The best validation accuracy is ringed and its value given. `metrics` is what `draw_progress` takes.
    """
    figure = new_figure(900, 380, title)
    _, accuracy_axes = _draw_loss_and_accuracy(figure, metrics, highest_loss(metrics), top=74, height=252, size=10)
    if metrics["val_accuracy"]:
        best, step = max(zip(metrics["val_accuracy"], metrics["val_step"], strict=True), key=lambda pair: pair[0])
        accuracy_axes.plot(step, 100 * best, "o", markersize=11, color=VERMILLION, fillstyle="none", clip_on=False)
        text = f"best validation {100 * best:.1f} % at step {step:,}"
        accuracy_axes.set_title(text, loc="right", size=10, color=VERMILLION)
    save_figure(figure, path)
    return figure


def draw_progress(
    metrics: dict[str, list],
    images: torch.Tensor,
    labels: torch.Tensor,
    probabilities: torch.Tensor,
    classes: list[str],
    title: str,
    path: str | Path | None = None,
    total_steps: int | None = None,
) -> Figure:
    """One frame of 900x420 pixels: loss, accuracy, and up to 6 validation images with their three likeliest classes.

    Axes do not move from frame to frame: the loss goes up to the first one (at least 2.4), accuracy to 100 %, and
    the steps to `total_steps`.

    Args:
        metrics: the lists of `Runner.metrics`; all may be empty.
        images: `(n, 3, h, w)`, floats in [0, 1].
        labels: `(n,)`, the right classes.
        probabilities: `(n, classes)`, predicted.
        path: where the PNG goes, if anywhere.
        total_steps: optimiser steps in the whole training; None ends the axis at the last step so far.
    """
    figure = new_figure(900, 420, dpi=100)
    add_text(figure, 14, 20, title, size=11, weight="bold")
    first_losses = [loss for loss in metrics["train_loss"][:1] + metrics["val_loss"][:1] if math.isfinite(loss)]
    limit = max([2.4, *first_losses])
    _draw_loss_and_accuracy(figure, metrics, limit, top=52, height=134, size=8, total_steps=total_steps)
    caption = "Six images: the right class in green, and the three classes with the highest probability"
    add_text(figure, 14, 240, caption, size=8.5)
    count = min(6, len(images))
    pixels = images[:count].detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()
    top_probabilities, top_classes = probabilities[:count].detach().float().cpu().topk(min(3, len(classes)))
    for i in range(count):
        left, label = 14 + 147 * i, int(labels[i])
        picture = add_axes(figure, left, 264, 96, 96)
        picture.imshow(pixels[i])
        picture.axis("off")
        name = fit(classes[label], 120, 8.5, "bold")
        picture.set_title(name, size=8.5, weight="bold", color=GREEN, pad=2)
        bars = add_axes(figure, left, 364, 137, 50)
        draw_bars(bars, top_probabilities[i].tolist(), top_classes[i].tolist(), label, classes)
    if path is not None:
        save_figure(figure, path)
    return figure


@torch.no_grad()
def plot_progress(runner, loader, path: str | Path | None = None, classes: list[str] | None = None, title: str = ""):
    """`draw_progress` of a Runner and of the first images of `loader`; the model's mode is left as it was."""
    images, labels = next(iter(loader))
    with eval_mode(runner.eval_model):
        probabilities = runner.eval_model(images[:6].to(runner.device)).softmax(dim=1).cpu()
    if classes is None:
        classes = [str(label) for label in range(probabilities.shape[1])]
    pixels = to_pixels(images[:6].cpu(), getattr(loader, "mean", None), getattr(loader, "std", None))
    return draw_progress(
        runner.metrics, pixels, labels[:6].cpu(), probabilities, classes, title, path, total_steps=runner.total_steps
    )


def draw_bars(axes: Axes, probabilities: list[float], indices: list[int], label: int, classes: list[str]) -> None:
    """Horizontal bars from the top down, each with its class on the left and its percentage on the right; of longer
    names the middle is left out."""
    rows = range(len(indices))
    room = 0.94 * axes.get_position().width * 100 * axes.figure.get_size_inches()[0] - 42  # pixels; "100 %" takes 38
    axes.barh(rows, [1] * len(rows), height=0.86, color=LIGHT)
    axes.barh(rows, probabilities, height=0.86, color=[GREEN if index == label else GREY for index in indices])
    for row, index, probability in zip(rows, indices, probabilities, strict=True):
        style = {"size": 8, "color": "black", "va": "center_baseline", "weight": "bold" if index == label else "normal"}
        axes.text(0.03, row, fit(classes[index], room, 8, style["weight"]), **style)
        axes.text(0.97, row, f"{100 * probability:.0f} %", ha="right", **style)
    axes.set(xlim=(0, 1), ylim=(max(3, len(indices)) - 0.5, -0.5))
    axes.axis("off")


def highest_loss(metrics: dict[str, list]) -> float:
    """Where an axis for the drawn losses ends. A few that are more than twice as high as the others are cut off."""
    curves = [smooth(metrics[f"{split}_step"], metrics[f"{split}_loss"])[1] for split in ("train", "val")]
    curves = [curve[np.isfinite(curve)] for curve in curves if np.isfinite(curve).any()]
    if not curves:
        return 2.4
    usual = max(np.percentile(curve, 95) for curve in curves)
    return 1.05 * min(2 * usual, max(curve.max() for curve in curves)) or 1.0


def _draw_loss_and_accuracy(
    figure: Figure,
    metrics: dict[str, list],
    loss_limit: float,
    top: int,
    height: int,
    size: int,
    total_steps: int | None = None,
) -> tuple[Axes, Axes]:
    """Two panels side by side across a figure of 900 pixels."""
    last_step = total_steps or max([*metrics["train_step"], *metrics["val_step"], 1])
    panels = []
    for name, left, factor, limit in (("loss", 50, 1, loss_limit), ("accuracy", 506, 100, 100)):
        axes = add_axes(figure, left, top, 376, height)
        for split, label, color, marker in (("train", "train", BLUE, ""), ("val", "validation", VERMILLION, "o")):
            steps, values = smooth(metrics[f"{split}_step"], metrics[f"{split}_{name}"])
            marker = "o" if len(values) == 1 else marker  # a line through one point would not be seen
            axes.plot(steps, factor * values, color=color, marker=marker, markersize=3, lw=1.4, label=label)
        axes.set(xlim=(0, 1.01 * last_step), ylim=(0, limit))
        axes.set_title(name, size=size + 1)
        axes.set_xlabel("optimiser step", size=size, labelpad=2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(labelsize=size)
        axes.grid()
        panels.append(axes)
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, fontsize=size)
    panels[1].yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    return panels[0], panels[1]


def smooth(steps: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS means over nearly equal numbers of steps, each at the last step that it is the mean of."""
    count = max(1, min(len(values), POINTS))
    ends = [part[-1] for part in np.array_split(steps, count) if len(part)]
    means = [part.mean() for part in np.array_split(values, count) if len(part)]
    return np.array(ends), np.array(means)


# -------------------------------------------------------------------------------------------------------- animation


def write_to_gif(
    frames_dir: str | Path,
    path: str | Path = "animation.gif",
    frame_duration: int = 300,
    max_frames: int = 60,
    hold_first: int = 1000,
    hold_last: int = 3000,
    keep_frames: bool = False,
) -> Path:
    """Assemble every `*.png` in `frames_dir`, in the order of their names, into a GIF that repeats for ever.

    Args:
        frame_duration, hold_first, hold_last: milliseconds that a frame, the first, and the last one is shown.
        max_frames: of more frames an even selection is taken, with the first and the last.
        keep_frames: otherwise the frames are deleted once the GIF is written, and their folder if that empties it.

    Returns:
        `path`.

    Raises:
        ValueError: there is no frame, one is not readable or of another size, or `max_frames` is below 2. Nothing is
            written or deleted then.
    """
    frames_dir, path = Path(frames_dir), Path(path)
    names = sorted(frames_dir.glob("*.png"))
    if not names:
        raise ValueError(f"no frame (*.png) in {frames_dir}")
    if max_frames < 2:
        raise ValueError(f"max_frames {max_frames} must be at least 2: the first and the last frame")
    chosen = np.linspace(0, len(names) - 1, min(len(names), max_frames)).round().astype(int)
    frames = [_read_frame(names[i]) for i in chosen]
    for i, frame in zip(chosen, frames, strict=True):
        if frame.size != frames[0].size:
            raise ValueError(f"frame {names[i]} is {frame.size} pixels, unlike the first one, {frames[0].size}")
    palette = _common_palette(frames)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [hold_first] + [frame_duration] * (len(frames) - 2) + [hold_last]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations[-len(frames) :], loop=0)
    write_bytes(path, buffer.getvalue())
    if not keep_frames:
        for name in names:
            name.unlink()
        if not any(frames_dir.iterdir()):
            frames_dir.rmdir()
    return path


def _read_frame(path: Path) -> Image.Image:
    try:
        with Image.open(path) as frame:
            return frame.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"frame {path} is not a readable picture") from None


def _common_palette(frames: list[Image.Image]) -> Image.Image:
    """255 colours for all frames; the 256th is left for "as in the frame before", which keeps the file small."""
    width, height = frames[0].size
    few = [frames[i] for i in sorted({0, len(frames) // 2, len(frames) - 1})]
    together = Image.new("RGB", (width, height * len(few)))
    for i, frame in enumerate(few):
        together.paste(frame, (0, i * height))
    return together.quantize(colors=255, method=Image.Quantize.MAXCOVERAGE)


# ---------------------------------------------------------------------------------------------------- attention maps


def visualize_attention_maps(
    images: torch.Tensor,
    attention_weights: torch.Tensor,
    block: int = -1,
    patch_size: int | None = None,
    mean=None,
    std=None,
    classes: list[str] | None = None,
    labels: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
    path: str | Path | None = None,
    max_images: int = 8,
) -> Figure:
    """Where one block looks: a row for each image with the image, the mean over heads, and each head.

    Shown is the attention that the CLS token (token 0) pays to each patch; where there is none (the number of tokens is
    a perfect square), the attention each patch receives, averaged over all tokens. The unit is uniform attention: 1 is
    what each token has when all have the same. The scale is common to all maps of an image, begins at 0, and reaches at
    least to 2, so that near-uniform attention looks like that. Pixels that no patch covers are left plain.

    Args:
        images: `(batch, 3, h, w)`, as given to the model.
        attention_weights: `(num_blocks, batch, heads, tokens, tokens)`, or one block's
            `(batch, heads, tokens, tokens)`; the last axis, the tokens looked at, sums to 1.
        block: which block, negative counted from the last.
        patch_size: side of a patch in pixels; None means `h // grid`, right for every size that divides the image.
        mean, std: the normalisation to be undone for display, a value for each channel (see `to_pixels`).
        classes: class names.
        labels, logits: `(batch,)` right classes and `(batch, classes)`, for the prediction and its probability.
        path: where a PNG goes, if anywhere.
        max_images: rows at most; further images are left out.

    Raises:
        ValueError: shapes which do not go together, or no such block.
    """
    maps = attention_of_patches(attention_weights, block)
    shape, grid = tuple(images.shape), maps.shape[-1]
    pixels = to_pixels(images[:max_images], mean, std)
    if len(images) == 0 or len(images) != len(maps):
        raise ValueError(f"{len(images)} images {shape} but attention weights of {len(maps)}")
    for name, values in (("labels", labels), ("logits", logits)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{len(values)} {name} for {len(images)} images")
    height, width = shape[2:]
    if patch_size is None:
        patch_size = max(1, height // grid)
    if patch_size < 1:
        raise ValueError(f"patch_size {patch_size} must be at least 1")
    if (height // patch_size, width // patch_size) != (grid, grid):
        raise ValueError(
            f"patches of {patch_size} pixels cut {height}x{width} images into {height // patch_size}x"
            f"{width // patch_size} patches, but the attention weights are of {grid}x{grid}"
        )
    rows, heads = len(pixels), maps.shape[1]
    maps = torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1)[:rows]  # (rows, 1 + heads, grid, grid)
    headings = ["image", "mean of heads", *(f"head {head + 1}" for head in range(heads))]
    titles = [describe_prediction(row, classes, labels, logits) for row in range(rows)]

    tile = height * max(1, (128 if heads <= 4 else 96) // height)  # whole screen pixels for each pixel
    row_height = tile + (26 if labels is not None or logits is not None else 14)
    figure_width = max(480, 14 + len(headings) * (tile + 8) + 62)
    figure = new_figure(figure_width, 54 + rows * row_height + 12)
    source = "from the CLS token" if attention_weights.shape[-1] > grid**2 else "from all patches, averaged"
    which = f", block {block % len(attention_weights) + 1} of {len(attention_weights)}" * (attention_weights.ndim == 5)
    add_text(figure, 14, 24, f"Attention {source}{which}", size=12, weight="bold")
    for row in range(rows):
        top = 54 + (row + 1) * row_height - tile
        norm = PowerNorm(0.5, 0, max(2.0, maps[row].max().item()))  # roots: what little attention there is shows, too
        for column, heading in enumerate(headings):
            axes = add_axes(figure, 14 + column * (tile + 8), top, tile, tile)
            axes.axis("off")
            if column == 0:
                axes.imshow(pixels[row].permute(1, 2, 0).numpy())
            else:
                draw_overlay(axes, pixels[row], maps[row, column - 1], patch_size, norm)
            if row == 0:
                add_text(figure, 14 + column * (tile + 8), 52, heading, size=9)
        draw_scale(add_axes(figure, 16 + len(headings) * (tile + 8), top, 9, tile), norm)
        add_text(figure, 14, top - 4, *titles[row])
    if path is not None:
        save_figure(figure, path)
    return figure


def draw_attention(model, loader, classes: list[str], path: str | Path | None = None, images: int = 4) -> Figure:
    """Attention maps of a Vision Transformer's last block on the first images of an ImageLoader."""
    batch, labels = next(iter(loader))
    batch, labels = batch[:images].to(next(model.parameters()).device), labels[:images]
    with torch.no_grad(), eval_mode(model):
        output = model(batch, return_attention=True)
    return visualize_attention_maps(
        batch.cpu(),
        output["attention_weights"].cpu(),
        patch_size=model.config["patch_size"],
        mean=loader.mean,
        std=loader.std,
        classes=classes,
        labels=labels.cpu(),
        logits=output["logits"].cpu(),
        path=path,
    )


def attention_of_patches(attention_weights: torch.Tensor, block: int) -> torch.Tensor:
    """Of one block: `(batch, heads, grid, grid)` over the patches, in units of uniform attention."""
    shape = tuple(attention_weights.shape)
    if len(shape) not in (4, 5) or shape[-1] != shape[-2] or 0 in shape:
        raise ValueError(f"attention weights must be ([num_blocks,] batch, heads, tokens, tokens), not {shape}")
    num_blocks = shape[0] if len(shape) == 5 else 1
    if not -num_blocks <= block < num_blocks:
        raise ValueError(f"no block {block}: the attention weights are of {num_blocks}")
    attention = (attention_weights[block] if len(shape) == 5 else attention_weights).detach().float().cpu()
    tokens = shape[-1]
    grid = math.isqrt(tokens)
    if grid**2 == tokens:
        to_patches = attention.mean(dim=2)
    elif grid**2 == tokens - 1:
        to_patches = attention[:, :, 0, 1:]
    else:
        raise ValueError(f"{tokens} tokens are neither a square of patches nor one with a CLS token")
    return tokens * to_patches.unflatten(2, (grid, grid))


def draw_overlay(axes: Axes, pixels: torch.Tensor, heat: torch.Tensor, patch_size: int, norm: Normalize) -> None:
    """The image in grey and over it `heat` `(grid, grid)`, on exactly the pixels that the patches cover."""
    covered = heat.shape[0] * patch_size
    heat = F.interpolate(heat[None, None], scale_factor=patch_size * 4, mode="bilinear")[0, 0].numpy()
    axes.imshow(pixels.mean(dim=0).numpy(), cmap="gray", vmin=-0.3, vmax=1.6)  # with little contrast
    extent = (-0.5, covered - 0.5, covered - 0.5, -0.5)  # pixel i reaches from i - 0.5 to i + 0.5
    axes.imshow(heat, cmap=COLOR_MAP, norm=norm, alpha=OPACITY, extent=extent)
    axes.set(xlim=(-0.5, pixels.shape[2] - 0.5), ylim=(pixels.shape[1] - 0.5, -0.5))


def draw_scale(axes: Axes, norm: Normalize) -> None:
    """The colour bar of one row of maps, over a middling grey as the maps are over the image."""
    bar = axes.figure.colorbar(ScalarMappable(norm, COLOR_MAP), cax=axes, alpha=OPACITY, ticks=MaxNLocator(4))
    bar.outline.set_visible(False)
    axes.set_facecolor("0.4")
    axes.tick_params(labelsize=8, length=2, pad=2)
    axes.set_ylabel("× uniform", size=8)
    axes.yaxis.set_label_coords(5, 0.5)


def describe_prediction(i: int, classes: list[str] | None, labels, logits) -> tuple[str, str]:
    """Image i's title, "cat 83 % (is: dog)" as far as it is known, and its colour: green where it is right."""

    def name(index: int) -> str:
        return fit(classes[index], 200, 9.5) if classes is not None else f"class {index}"

    label = None if labels is None else int(labels[i])
    if logits is None:
        return ("" if label is None else name(label)), DARK
    probability, prediction = logits[i].detach().float().softmax(dim=0).max(dim=0)
    title = f"{name(int(prediction))} {100 * probability:.0f} %"
    if label is None:
        return title, DARK
    return f"{title} (is: {name(label)})", GREEN if int(prediction) == label else VERMILLION
