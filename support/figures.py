"""The one style of all figures, and figures laid out by the pixel.

Figures are made with matplotlib's `Figure` itself, never pyplot: nothing stays open and no screen is needed. Every
file is written beside its destination and then renamed, so that a killed run leaves no half picture.
"""

import io
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support.files import write_bytes

BLUE, GREEN, VERMILLION = "#0072B2", "#009E73", "#D55E00"  # of Okabe and Ito, for every kind of colour vision
DARK, GREY, LIGHT = "#222222", "#C4C4C4", "#F0F0F0"
STYLE = {  # of all figures, in force as soon as this module is imported
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor"), DARK),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), DARK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "text.parse_math"), False),  # a class may be called $5
    "axes.axisbelow": True,
    "grid.color": LIGHT,
    "image.interpolation": "nearest",
}
matplotlib.rcParams.update(STYLE)


def new_figure(width: float, height: float, title: str = "", note: str = "", dpi: int = 200) -> Figure:
    """A white figure laid out in pixels, with a bold title and a note under it where these are given; with 200 dpi it
    is drawn at twice the resolution."""
    figure = Figure(figsize=(width / 100, height / 100), dpi=dpi)
    if title:
        add_text(figure, 14, 28, title, size=13, weight="bold")
    if note:
        add_text(figure, 14, 48, note)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    figure_width, figure_height = 100 * figure.get_size_inches()
    bottom = figure_height - top - height
    return figure.add_axes((left / figure_width, bottom / figure_height, width / figure_width, height / figure_height))


def add_text(figure: Figure, left: float, baseline: float, text: str, color: str = DARK, **style) -> None:
    figure_width, figure_height = 100 * figure.get_size_inches()
    figure.text(left / figure_width, 1 - baseline / figure_height, text, color=color, **style)


def save_figure(figure: Figure, path: str | Path) -> None:
    for text in figure.texts:  # a long title is made smaller rather than cut off
        while text.get_window_extent().x1 > figure.bbox.width and text.get_fontsize() > 5:
            text.set_fontsize(text.get_fontsize() - 0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    write_bytes(path, buffer.getvalue())


def to_pixels(images: torch.Tensor, mean=None, std=None) -> torch.Tensor:
    """Images `(n, 3, h, w)` for display: float32 in [0, 1] on the CPU.

    uint8 images are divided by 255. Of float images the normalisation with `mean` and `std` (a value for each
    channel) is undone; without these each image is stretched to reach from 0 to 1.

    Raises:
        ValueError: not `(n, 3, h, w)`, or only one of `mean` and `std`.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (n, 3, height, width), not {tuple(images.shape)}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: give both or neither")
    pixels = images.detach().float().cpu()
    if images.dtype == torch.uint8:
        return pixels / 255
    if mean is not None:
        mean, std = (torch.as_tensor(x, dtype=torch.float32).cpu().view(1, -1, 1, 1) for x in (mean, std))
        return (pixels * std + mean).clamp(0, 1)
    low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
    return (pixels - low) / (high - low).clamp(min=1e-8)
