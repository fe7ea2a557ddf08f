"""Characters that the font of figures lacks: drawn by another font, or replaced and said so once. The architecture."""

import io
import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg

import utils
from images.sheets import draw_augmentations, draw_samples
from network import VisionTransformer
from studies import architecture
from support import figures
from training.evaluation_figures import draw_mistakes
from training.trained import load_model, sample_images

NAMES = ["cat", "кот", "Größe, 50 %", "中文"]  # the default font has all but the last


@pytest.fixture(autouse=True)
def fonts(monkeypatch):
    """Those that come with matplotlib alone, and no figure drawn before; a warning is an error."""
    bundled = [font for font in font_manager.fontManager.ttflist if "mpl-data" in str(font.fname)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", bundled)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    monkeypatch.setattr(figures, "_searched", set())
    monkeypatch.setattr(figures, "_replaced", set())
    monkeypatch.setattr(figures, "_fallbacks", [])
    figures._glyphs.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write_font(path, characters):
    """A font in which each of the characters is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    glyphs = {ord(character): f"uni{ord(character):04X}" for character in characters}
    names = [".notdef", *glyphs.values()]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap(glyphs)
    font.setupGlyf(dict.fromkeys(names, square))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=1000, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


def attention_figure():
    weights = torch.full((1, 1, 1, 17, 17), 1 / 17)
    labels = torch.tensor([3])
    return utils.visualize_attention_maps(torch.rand(1, 3, 8, 8), weights, classes=NAMES, labels=labels)


def sheet_labels(path, names=NAMES):
    """The classes at the ticks of an axis."""
    images = torch.zeros(len(names), 3, 8, 8, dtype=torch.uint8)
    figure = draw_samples(images, torch.arange(len(names)), names, path, 1)
    return figure.axes[0].yaxis.get_ticklabels()


def draw(figure):
    """The pixels, drawn by a canvas as TensorBoard's writer does."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_without_a_font_they_are_replaced_with_one_warning(tmp_path, capsys):
    figure = attention_figure()
    figure.savefig(io.BytesIO(), format="png")  # by the caller
    assert "\\u4e2d\\u6587" in [text.get_text() for text in figure.texts]
    labels = sheet_labels(tmp_path / "sheet.png")  # by save_figure
    assert [label.get_text() for label in labels] == [*NAMES[:3], "\\u4e2d\\u6587"]
    figure = utils.new_figure(300, 60)
    utils.add_text(figure, 14, 28, "\udcff 一\t丁\nnext")
    draw(figure)
    assert figure.texts[0].get_text() == "\\udcff \\u4e00\\t\\u4e01\nnext"
    (line,) = capsys.readouterr().err.splitlines()
    assert "no installed font has 中 文" in line and "install a font" in line and "Noto" in line


@pytest.mark.parametrize("listed", [True, False], ids=["in matplotlib's list", "installed since that was made"])
def test_an_installed_font_draws_them(tmp_path, capsys, monkeypatch, listed):
    path = tmp_path / "squares.ttf"
    write_font(path, "中文")
    if listed:
        font_manager.fontManager.addfont(path)
    else:
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path)])
    figure = attention_figure()
    (text,) = [text for text in figure.texts if text.get_text() == NAMES[3]]
    pixels = draw(figure)
    assert text.get_text() == NAMES[3] and text.get_fontfamily()[-1] == "Squares"
    assert str(font_manager.findfont(text.get_fontfamily()[-1])) == str(path)
    box = text.get_window_extent()
    top, left, right = pixels.shape[0] - int(box.y1), int(box.x0), int(box.x1)
    assert pixels[top + 6 : top + int(box.height) - 6, left + 4 : right - 4, :3].max() < 60  # two squares: no gap
    label = sheet_labels(tmp_path / "sheet.png")[3]
    assert label.get_text() == NAMES[3] and label.get_fontfamily()[-1] == "Squares"
    assert capsys.readouterr().err == ""


def test_fonts_are_not_looked_at_for_plain_names(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_lacking", None)  # to call it would be an error
    assert sheet_labels(tmp_path / "sheet.png", ["cat", "dog"])[1].get_text() == "dog"


def test_the_sheet_of_many_large_classes_is_of_bounded_size(tmp_path):
    images, names = torch.zeros(150, 3, 224, 224, dtype=torch.uint8), [f"class {i}" for i in range(150)]
    images[7] = 200
    figure = draw_samples(images, torch.arange(150), names, tmp_path / "sheet.png")
    sheet = figure.axes[0].images[0].get_array()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names[:100]
    assert sheet.shape[0] < 8000 and sheet[7 * 76 + 30, 30].tolist() == [200] * 3


LONG = [f"{'W' * 20} {letter} {'m' * 20}" for letter in "ab"] + ["中文" * 10]


def in_mistakes(images, path):
    wrong = torch.eye(3)[[1, 2, 0] * 4]
    return draw_mistakes(images, wrong, torch.arange(12) % 3, LONG, path, "title")


def in_augmentations(images, path):
    return draw_augmentations(images[:3], torch.arange(3), LONG, path, flip=True, mean=[0.5] * 3)


def in_progress(images, path):
    metrics = {f"{part}_{what}": [] for part in ("train", "val") for what in ("step", "loss", "accuracy")}
    probabilities = torch.eye(3)[torch.arange(12) % 3]
    return utils.draw_progress(metrics, images / 255, torch.arange(12) % 3, probabilities, LONG, "title", path)


@pytest.mark.parametrize("drawn", [in_mistakes, in_augmentations, in_progress])
def test_names_of_classes_however_long_do_not_cover_one_another(tmp_path, drawn):
    images = torch.randint(0, 255, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    figure = drawn(images, tmp_path / "figure.png")
    draw(figure)
    texts = [*figure.texts, *(text for axes in figure.axes for text in (*axes.texts, axes.title))]
    written = [text for text in texts if text.get_text()]
    assert sum("..." in text.get_text() for text in written) >= 6
    boxes = [text.get_window_extent() for text in written]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_the_architecture_names_the_sizes_of_the_model_and_no_text_covers_another(tmp_path):
    architecture.main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "architecture.png").read_bytes().startswith(b"\x89PNG")
    model = load_model("saved/VisionTransformer.pt")
    drawing = architecture.draw(model, sample_images(model)[0][architecture.IMAGE])
    draw(drawing)
    written = [text for axes in drawing.axes for text in axes.texts if text.get_text()]
    texts = [text.get_text() for text in written]
    assert {"LayerNorm", "attention\n4 heads\nof 16", "MLP\n64 → 256\nGELU\n256 → 64"} < set(texts)
    assert {"picture\n3 × 32 × 32", "8 × 8 patches\nof 3 × 4 × 4", "64 tokens\nof 64"} < set(texts)
    assert "transformer block, × 4" in texts and texts.count("LayerNorm") == 3
    assert sum(float(text.removesuffix(" %")) for text in texts if text.endswith(" %")) == pytest.approx(100, abs=3)
    assert {"airplane", "cat", "truck"} < set(texts)
    boxes = [text.get_window_extent() for text in [*written, *drawing.texts]]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= drawing.bbox.width for box in boxes)

    other = VisionTransformer(hidden_size=48, num_heads=6, num_blocks=3, patch_size=8, mlp_ratio=2.0, pooling="mean")
    other.metadata = {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": list("abcdefghij")}
    drawing = architecture.draw(other, torch.zeros(3, 32, 32, dtype=torch.uint8))
    texts = " ".join(text.get_text() for axes in drawing.axes for text in axes.texts)
    for size in ("4 × 4 patches", "192 → 48", "16 tokens", "× 3", "6 heads\nof 8", "48 → 96", "48 → 10", "10 %"):
        assert size in texts
