"""The one style of all figures, and figures laid out by the pixel.

Figures are made with matplotlib's `Figure` itself, never pyplot: nothing stays open and no screen is needed. Every
file is written beside its destination and then renamed, so that a killed run leaves no half picture.
"""

import contextlib
import functools
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedFormatter, FuncFormatter
from tqdm import tqdm

from support.files import write_bytes
from support.report import shorten

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
_searched: set[str] = set()  # characters that a font has been looked for
_fallbacks: list[str] = []  # families of fonts that have some of them
_replaced: set[str] = set()  # those that none has


class LegibleFigure(Figure):
    """A figure whose characters all are drawn, whoever draws it: `savefig`, the frame of a GIF, TensorBoard."""

    def draw(self, renderer) -> None:
        make_legible(self)
        super().draw(renderer)


def new_figure(width: float, height: float, title: str = "", note: str = "", dpi: int = 200) -> Figure:
    """A white figure laid out in pixels, with a bold title and a note under it where these are given; with 200 dpi it
    is drawn at twice the resolution."""
    figure = LegibleFigure(figsize=(width / 100, height / 100), dpi=dpi)
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


def fit(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text as it can be drawn, with its middle left out where it would be wider than `width` pixels."""
    drawn = Text(text=text, size=size, weight=weight)
    _say_replaced(_make_legible(drawn))
    text, font = drawn.get_text(), drawn.get_fontproperties()
    shorter = text
    for length in range(len(text) - 1, 3, -1):
        if text_to_path.get_text_width_height_descent(shorter, font, ismath=False)[0] * 100 / 72 <= width:
            break
        shorter = shorten(text, length)
    return shorter


def save_figure(figure: Figure, path: str | Path) -> None:
    make_legible(figure)
    for text in figure.texts:  # a long title is made smaller rather than cut off
        while text.get_window_extent().x1 > figure.bbox.width and text.get_fontsize() > 5:
            text.set_fontsize(text.get_fontsize() - 0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    write_bytes(path, buffer.getvalue())


# ------------------------------------------------------------------------------------------------------------ fonts


def make_legible(figure: Figure) -> None:
    """Draw characters that a text's font lacks with an installed font that has them, else as \\u4e2d. The first such
    figure puts a line on stderr."""
    lacking = set()
    for artist in _artists(figure):
        if not isinstance(artist, Axis):
            lacking |= set().union(*map(_make_legible, artist.findobj(Text)))
            continue
        lacking |= _make_legible(artist.label)
        if isinstance(artist.get_major_formatter(), FixedFormatter | FuncFormatter):  # not numbers but names
            labels = artist.get_ticklabels()
            if replaced := set().union(*map(_make_legible, labels)):
                artist.set_ticks(artist.get_ticklocs(), labels=[label.get_text() for label in labels])
                lacking |= replaced
    _say_replaced(lacking)


def _say_replaced(lacking: set[str]) -> None:
    """A line on stderr about the first characters that no font has."""
    if lacking and not _replaced:
        listed = " ".join(sorted(lacking)[:20]) + " ..." * (len(lacking) > 20)
        example = _escape(min(lacking))
        tqdm.write(
            f"warning: no installed font has {listed}, so figures show {example} for such characters; install a font "
            "that has them, for Chinese, Japanese and Korean Noto Sans CJK",
            file=sys.stderr,
        )
    _replaced.update(lacking)


def _artists(figure: Figure) -> Iterator:
    """What may hold a text: axes come in parts, so that one need not look at every tick."""
    for artist in figure.get_children():
        yield from artist.get_children() if isinstance(artist, Axes) else [artist]


def _make_legible(text: Text) -> set[str]:
    """Returns the characters that had to be replaced."""
    string = text.get_text()
    if string.isascii() and string.replace("\n", "").isprintable():
        return set()
    lacking = _lacking(text)
    if lacking - _searched:
        _find_fonts(lacking - _searched)
    if useful := [family for family in _fallbacks if any(ord(character) in _glyphs(family) for character in lacking)]:
        text.set_fontfamily([*text.get_fontfamily(), *useful])
        lacking = _lacking(text)
    for character in lacking:
        string = string.replace(character, _escape(character))
    if lacking:
        text.set_text(string)
    return lacking


def _escape(character: str) -> str:
    """As the terminal shows what it cannot print: \\u4e2d."""
    return character.encode("unicode_escape").decode()


def _lacking(text: Text) -> set[str]:
    """The characters of a text that none of its fonts has."""
    style = text.get_fontproperties()
    glyphs = (_glyphs(family, style.get_weight(), style.get_style()) for family in text.get_fontfamily())
    known = frozenset({ord("\n")}).union(*glyphs)
    return {character for character in text.get_text() if ord(character) not in known}


@functools.cache
def _glyphs(family: str, weight: str | int = "normal", style: str = "normal") -> frozenset[int]:
    properties = font_manager.FontProperties(family=family, weight=weight, style=style)
    return frozenset(font_manager.get_font(font_manager.findfont(properties)).get_charmap())


def _find_fonts(characters: set[str]) -> None:
    """Add the installed fonts that have most of the characters to `_fallbacks`."""
    _searched.update(characters)
    manager = font_manager.fontManager
    known, found = {Path(entry.fname) for entry in manager.ttflist}, {}
    for path in font_manager.findSystemFonts():
        if Path(path) not in known:  # installed since matplotlib made its list
            with contextlib.suppress(Exception):  # of a kind that matplotlib cannot draw with
                manager.addfont(path)
    for entry in manager.ttflist:
        if "Last Resort" in entry.name:  # it has a box for every character
            continue
        with contextlib.suppress(Exception):
            glyphs = font_manager.get_font(entry.fname).get_charmap()
            found.setdefault(entry.name, set()).update(x for x in characters if ord(x) in glyphs)
    while characters := characters & set().union(*found.values()):
        best = max(found, key=lambda name: len(found[name] & characters))
        _fallbacks.append(best)
        characters -= found.pop(best)


# --------------------------------------------------------------------------------------------------------- pixels


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
