"""Pictures as a user finds them: files read back with Pillow, figures looked into with matplotlib."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from images.sheets import draw_samples

CLASSES = ["cat", "dog", "frog", "ship"]
EMPTY = {f"{split}_{name}": [] for split in ("train", "val") for name in ("loss", "accuracy", "step")}
METRICS = {
    "train_loss": [3.0, 1.5, 1.0],
    "train_accuracy": [0.1, 0.5, 0.6],
    "train_step": [1, 50, 100],
    "val_loss": [1.4, 1.1],
    "val_accuracy": [0.512, 0.487],
    "val_step": [50, 100],
}


def attention(batch=1, heads=2, tokens=17, blocks=3) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(blocks, batch, heads, tokens, tokens, generator=random).mul(2).softmax(dim=-1)


def rand_images(n: int, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def texts(figure) -> list[str]:
    """Every text that the figure shows, in whatever part of it."""
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
        found += [axes.get_title(loc) for loc in ("left", "center", "right")]
    return [text for text in found if text]


def overlays(figure) -> list:
    """The heat maps over the images, row after row, as matplotlib's image objects."""
    return [axes.images[1] for axes in figure.axes if len(axes.images) == 2]


# ---------------------------------------------------------------------------------------------------------------- GIF


def make_frames(folder: Path, count: int, size=(90, 42)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture = Image.new("RGB", size, "white")
        picture.paste((0, 114, 178), (0, 0, 2 + i, 20))  # a bar that grows: no two frames are equal
        picture.save(folder / f"frame_{i:06d}.png")
    return folder


def read_gif(path: Path) -> tuple[list[int], list[int], int]:
    """Durations in ms, the width of the blue bar in each frame, and how often it repeats (0: for ever)."""
    durations, bars = [], []
    with Image.open(path) as gif:
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            bars.append(int((np.asarray(gif.convert("RGB"))[5, :, 0] < 128).sum()))
        return durations, bars, gif.info["loop"]


def test_gif_has_the_frames_in_order_and_their_durations(tmp_path):
    path = utils.write_to_gif(make_frames(tmp_path / "frames", 5), tmp_path / "new" / "a.gif", frame_duration=200)
    assert path == tmp_path / "new" / "a.gif"
    assert read_gif(path) == ([1000, 200, 200, 200, 3000], [2, 3, 4, 5, 6], 0)


def test_gif_is_thinned_evenly_and_keeps_the_first_and_the_last(tmp_path):
    path = utils.write_to_gif(make_frames(tmp_path / "frames", 41), tmp_path / "a.gif", max_frames=5)
    assert read_gif(path)[1] == [2, 12, 22, 32, 42]


def test_gif_of_one_frame(tmp_path):
    path = utils.write_to_gif(make_frames(tmp_path / "frames", 1), tmp_path / "a.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 1


@pytest.mark.parametrize("keep_frames", [False, True])
def test_gif_leaves_nothing_but_what_it_should(tmp_path, keep_frames):
    frames = make_frames(tmp_path / "frames", 3)
    utils.write_to_gif(frames, tmp_path / "a.gif", keep_frames=keep_frames)
    assert sorted(file.name for file in tmp_path.iterdir()) == (["a.gif", "frames"] if keep_frames else ["a.gif"])
    assert not keep_frames or len(list(frames.iterdir())) == 3


def test_gif_spares_a_folder_with_other_files(tmp_path):
    frames = make_frames(tmp_path / "frames", 2)
    (frames / "notes.txt").write_text("mine", encoding="utf-8")
    utils.write_to_gif(frames, tmp_path / "a.gif")
    assert [file.name for file in frames.iterdir()] == ["notes.txt"]


def test_gif_without_frames_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no frame"):
        utils.write_to_gif(tmp_path / "nowhere", tmp_path / "a.gif")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not a picture"])
def test_gif_names_the_frame_it_cannot_read_and_keeps_everything(tmp_path, damage):
    frames = make_frames(tmp_path / "frames", 3)
    bad = frames / "frame_000001.png"
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.raises(ValueError, match="frame_000001.png is not a readable picture"):
        utils.write_to_gif(frames, tmp_path / "a.gif")
    assert [file.name for file in tmp_path.iterdir()] == ["frames"]
    assert len(list(frames.iterdir())) == 3


def test_gif_refuses_frames_of_different_sizes_and_a_maximum_of_one(tmp_path):
    frames = make_frames(tmp_path / "frames", 3)
    with pytest.raises(ValueError, match="max_frames 1"):
        utils.write_to_gif(frames, tmp_path / "a.gif", max_frames=1)
    Image.new("RGB", (10, 10)).save(frames / "frame_000001.png")
    with pytest.raises(ValueError, match="frame_000001.png is"):
        utils.write_to_gif(frames, tmp_path / "a.gif")


def test_gif_of_real_frames_is_small_and_keeps_its_colours(tmp_path):
    images, labels = rand_images(6), torch.arange(6) % 4  # noise: photographs are easier
    for i in range(12):
        share = 0.25 + 0.06 * i
        probabilities = torch.tensor([share, *[(1 - share) / 3] * 3]).expand(6, 4)
        metrics = {key: values[: i // 4] for key, values in METRICS.items()}
        path = tmp_path / "frames" / f"frame_{i:06d}.png"
        utils.draw_progress(metrics, images, labels, probabilities, CLASSES, f"step {i}", path, total_steps=100)
    with Image.open(path) as frame:
        assert frame.size == (900, 420)
        expected = np.asarray(frame.convert("RGB")).astype(int)
    gif_path = utils.write_to_gif(tmp_path / "frames", tmp_path / "a.gif")
    assert gif_path.stat().st_size * 60 / 12 < 3_000_000
    with Image.open(gif_path) as gif:
        gif.seek(11)
        difference = np.abs(np.asarray(gif.convert("RGB")).astype(int) - expected)
    assert difference.mean() < 5
    assert (difference[expected.min(axis=2) == 255] == 0).all()  # white stays white


# ----------------------------------------------------------------------------------------------- progress and curves


def draw_progress(metrics, n=6, **options):
    probabilities = torch.tensor([0.1, 0.6, 0.25, 0.05]).expand(n, 4)
    return utils.draw_progress(metrics, rand_images(n), torch.zeros(n).long(), probabilities, CLASSES, "run", **options)


def test_progress_axes_stay_where_they_are():
    early = {key: values[:1] for key, values in METRICS.items()}
    for metrics in (early, METRICS):
        loss, accuracy = draw_progress(metrics, total_steps=1000).axes[:2]
        assert loss.get_ylim() == (0, 3.0)  # the first loss
        assert accuracy.get_ylim() == (0, 100)
        assert loss.get_xlim() == accuracy.get_xlim()
        assert 1000 <= loss.get_xlim()[1] <= 1020
    assert draw_progress(EMPTY).axes[0].get_ylim() == (0, 2.4)
    assert draw_progress({**METRICS, "train_loss": [float("nan")] * 3}).axes[0].get_ylim() == (0, 2.4)


def test_progress_draws_what_was_measured():
    loss, accuracy = draw_progress(METRICS).axes[:2]
    train, validation = accuracy.lines[:2]
    assert np.allclose(train.get_xydata(), [(1, 10), (50, 50), (100, 60)])
    assert np.allclose(validation.get_xydata(), [(50, 51.2), (100, 48.7)])
    assert np.allclose(loss.lines[1].get_ydata(), [1.4, 1.1])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "validation"]


def test_progress_shows_the_three_likeliest_classes_and_the_right_one():
    found = texts(draw_progress(EMPTY, n=1))
    assert found[-6:] == ["dog", "60 %", "frog", "25 %", "cat", "10 %"]
    assert "cat" in found[:-6]


@pytest.mark.parametrize(("n", "shown"), [(2, 2), (9, 6)])
def test_progress_shows_up_to_six_images(n, shown):
    assert sum(len(axes.images) for axes in draw_progress(EMPTY, n=n).axes) == shown


def test_curves_mark_the_best_validation_accuracy(tmp_path):
    figure = utils.draw_curves(METRICS, tmp_path / "new" / "curves.png", "A title")
    assert "best validation 51.2 % at step 50" in texts(figure)
    assert "A title" in texts(figure)
    ring = figure.axes[1].lines[-1]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (50, pytest.approx(51.2))
    with Image.open(tmp_path / "new" / "curves.png") as picture:
        assert picture.size == (1800, 760)
    utils.draw_curves(EMPTY, tmp_path / "empty.png", "Nothing yet")


@pytest.mark.parametrize(
    ("train_loss", "val_loss", "low", "high"),
    [
        ([6.0, 5.0, 4.0], [4.5, 4.0], 6.0, 6.6),  # a hundred classes
        ([0.69, 0.5, 0.3], [0.6, 0.4], 0.69, 0.8),  # two
        ([1.0] * 30 + [0.1] * 70, np.linspace(1, 6, 20).tolist(), 6.0, 6.6),  # it learns by heart
        ([2.0] * 60 + [5000.0] + [1.5] * 60, [1.6], 2.0, 5.0),  # one step leaps
        ([2.0, float("nan"), float("inf")], [], 2.0, 2.2),
        ([0.0, 0.0], [0.0], 0.1, 2.4),
    ],
)
def test_a_curve_of_the_loss_is_not_cut_off(tmp_path, train_loss, val_loss, low, high):
    metrics = {"train_loss": train_loss, "val_loss": val_loss}
    for split in ("train", "val"):
        length = len(metrics[f"{split}_loss"])
        metrics |= {f"{split}_accuracy": [0.5] * length, f"{split}_step": list(range(1, length + 1))}
    figure = utils.draw_curves(metrics, tmp_path / "curves.png", "A title")
    assert low <= figure.axes[0].get_ylim()[1] <= high


# ------------------------------------------------------------------------------------------------------------ samples


def test_samples_have_a_row_for_each_class(tmp_path):
    labels = torch.tensor([1, 0, 1, 1])
    images = torch.arange(4, dtype=torch.uint8).mul(50).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    figure = draw_samples(images, labels, ["cat", "dog"], tmp_path / "samples.png", columns=2)
    sheet = figure.axes[0].images[0].get_array()
    assert sheet.shape == (17, 17, 3)
    assert [sheet[0, 0, 0], sheet[0, 16, 0], sheet[16, 0, 0], sheet[16, 16, 0]] == [50, 255, 0, 100]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog"]
    with Image.open(tmp_path / "samples.png") as picture:
        picture.load()
    assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]


def test_to_pixels_undoes_the_normalisation():
    pixels, mean, std = rand_images(2), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(utils.to_pixels(normalised, mean, std), pixels, atol=1e-6)
    stretched = utils.to_pixels(normalised)
    assert stretched.amin(dim=(1, 2, 3)).tolist() == [0, 0]
    assert stretched.amax(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1])
    assert utils.to_pixels(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).max() == 1
    assert utils.to_pixels(torch.full((1, 3, 2, 2), 7.0)).isfinite().all()


# ---------------------------------------------------------------------------------------------------- attention maps


def test_attention_runs_with_images_and_weights_alone(tmp_path):
    figure = utils.visualize_attention_maps(rand_images(2), attention(batch=2, heads=3))
    assert len(overlays(figure)) == 2 * (1 + 3)
    assert texts(figure) == ["Attention from the CLS token, block 3 of 3", "image", "mean of heads"] + [
        f"head {head}" for head in (1, 2, 3)
    ]


def test_attention_works_with_one_image_one_block_and_gradients():
    weights = attention()[0].half().requires_grad_()
    assert len(overlays(utils.visualize_attention_maps(rand_images(1), weights))) == 3
    assert len(overlays(utils.visualize_attention_maps(rand_images(12), attention(batch=12), max_images=2))) == 6


@pytest.mark.parametrize(("tokens", "patch_size", "covered"), [(26, None, 30), (25, 6, 30), (65, 4, 32), (10, 9, 27)])
def test_attention_covers_exactly_the_pixels_of_the_patches(tokens, patch_size, covered):
    figure = utils.visualize_attention_maps(rand_images(1), attention(tokens=tokens), patch_size=patch_size)
    for axes in figure.axes:
        for image in axes.images[1:]:
            assert tuple(image.get_extent()) == (-0.5, covered - 0.5, covered - 0.5, -0.5)
            assert axes.get_xlim() == (-0.5, 31.5)  # the whole image is shown
            assert axes.get_ylim() == (31.5, -0.5)


@pytest.mark.parametrize("cls_token", [True, False])
def test_attention_peak_lies_on_the_patch_attended_to(cls_token):
    patch, first = 5 * 1 + 3, int(cls_token)  # second row, fourth column of 5x5
    tokens = 25 + first
    weights = torch.full((1, 1, 1, tokens, tokens), 0.5 / (tokens - 1))
    weights[..., 0 if cls_token else slice(None), first + patch] = 0.5
    (mean, head) = overlays(utils.visualize_attention_maps(rand_images(1), weights))
    for overlay in (mean, head):
        heat = np.asarray(overlay.get_array())
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        pixel = heat.shape[0] / 30
        assert 6 <= row / pixel < 12
        assert 18 <= column / pixel < 24
        assert heat.max() == pytest.approx(0.5 * tokens, rel=0.05)  # in units of uniform attention
        assert heat.min() == pytest.approx(0.5 * tokens / (tokens - 1), rel=1e-4)


def test_attention_without_cls_token_is_averaged_over_the_queries():
    weights = torch.zeros(1, 1, 1, 4, 4)
    weights[0, 0, 0, :3, 0] = 1
    weights[0, 0, 0, 3, 3] = 1
    figure = utils.visualize_attention_maps(rand_images(1, 8), weights)
    heat = np.asarray(overlays(figure)[1].get_array())
    assert [heat[0, 0], heat[0, -1], heat[-1, 0], heat[-1, -1]] == [3, 0, 0, 1]
    assert texts(figure)[0] == "Attention from all patches, averaged, block 1 of 1"


def test_attention_scale_is_common_to_the_heads_of_an_image():
    weights = attention(batch=2, heads=3)
    drawn = overlays(utils.visualize_attention_maps(rand_images(2), weights))
    for i, row in enumerate((drawn[:4], drawn[4:])):
        strongest = 17 * weights[-1, i, :, 0, 1:].max().item()
        assert all(overlay.get_clim() == (0, pytest.approx(strongest)) for overlay in row)


def test_uniform_attention_looks_uniform():
    drawn = overlays(utils.visualize_attention_maps(rand_images(1), torch.full((1, 1, 2, 17, 17), 1 / 17)))
    assert all(overlay.get_clim() == (0, 2) for overlay in drawn)
    assert all(np.allclose(overlay.get_array(), 1) for overlay in drawn)


def test_attention_shows_the_chosen_block():
    weights = attention()
    chosen, last = (overlays(utils.visualize_attention_maps(rand_images(1), weights, block=block)) for block in (1, -1))
    alone = overlays(utils.visualize_attention_maps(rand_images(1), weights[1]))
    assert np.array_equal(chosen[1].get_array(), alone[1].get_array())
    assert not np.array_equal(chosen[1].get_array(), last[1].get_array())


def test_attention_titles():
    logits, labels = torch.tensor([[0.83, 0.17, 1e-9, 1e-9]] * 2).log(), torch.tensor([1, 0])

    def titles(**options):
        figure = utils.visualize_attention_maps(rand_images(2), attention(batch=2), **options)
        return [text for text in texts(figure) if "head" not in text][2:]

    assert titles(classes=CLASSES, labels=labels, logits=logits) == ["cat 83 % (is: dog)", "cat 83 % (is: cat)"]
    assert titles(classes=CLASSES, labels=labels) == ["dog", "cat"]
    assert titles(logits=logits) == ["class 0 83 %"] * 2


def test_attention_is_saved(tmp_path):
    path = tmp_path / "new" / "attention.png"
    utils.visualize_attention_maps(rand_images(1), attention(), path=path)
    with Image.open(path) as picture:
        picture.load()
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert [file.name for file in path.parent.iterdir()] == ["attention.png"]


@pytest.mark.parametrize(
    ("images", "weights", "options", "message"),
    [
        ((2, 3, 32, 32), (3, 2, 2, 17, 17), {"block": 3}, "no block 3: the attention weights are of 3"),
        ((2, 3, 32, 32), (3, 2, 2, 17, 17), {"block": -4}, "no block -4"),
        ((2, 3, 32, 32), (3, 4, 2, 17, 17), {}, "2 images .* attention weights of 4"),
        ((2, 3, 32, 32), (3, 2, 2, 17, 16), {}, "attention weights must be"),
        ((2, 3, 32, 32), (2, 17, 17), {}, "attention weights must be"),
        ((2, 3, 32, 32), (3, 2, 2, 19, 19), {}, "19 tokens are neither"),
        ((2, 3, 32, 32), (3, 2, 2, 26, 26), {"patch_size": 4}, "8x8 patches, but the attention weights are of 5x5"),
        ((2, 3, 32, 32), (3, 2, 2, 50, 50), {}, "but the attention weights are of 7x7"),
        ((2, 1, 32, 32), (3, 2, 2, 17, 17), {}, "images must be"),
        ((3, 32, 32), (3, 2, 2, 17, 17), {}, "images must be"),
        ((2, 3, 32, 32), (3, 2, 2, 17, 17), {"labels": torch.zeros(3)}, "3 labels for 2 images"),
        ((2, 3, 32, 32), (3, 2, 2, 17, 17), {"mean": [0.5] * 3}, "mean and std belong together"),
        ((2, 3, 32, 32), (3, 2, 2, 17, 17), {"patch_size": 0}, "patch_size 0 must be"),
    ],
)
def test_attention_errors_are_one_line(images, weights, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        utils.visualize_attention_maps(torch.zeros(images), torch.zeros(weights), **options)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- files


def test_a_failing_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        utils.draw_curves(METRICS, path, "A title")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_no_pyplot_figure_is_opened(tmp_path):
    script = (
        "import sys, torch, utils\n"
        "utils.visualize_attention_maps(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 1, 5, 5), path=sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'imported'\n"
        "import matplotlib.pyplot\n"
        "assert matplotlib.pyplot.get_fignums() == []\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.png")], cwd=Path(utils.__file__).parent, check=True)


def test_a_long_title_is_made_smaller_rather_than_cut_off(tmp_path):
    figure = utils.new_figure(300, 60, dpi=100)
    for left, text in ((14, "a title that is far too long for a picture of this width"), (14, "short")):
        utils.add_text(figure, left, 28, text, size=13)
    utils.save_figure(figure, tmp_path / "picture.png")
    long, short = figure.texts
    assert long.get_window_extent().x1 <= 300 and long.get_fontsize() < 13 and short.get_fontsize() == 13


def test_curves_of_every_step_are_smoothed_and_short_ones_left_alone():
    steps, values = list(range(1, 6261)), [float(step) for step in range(1, 6261)]
    x, y = utils.smooth(steps, values)
    assert len(x) == len(y) == utils.POINTS and x[-1] == 6260
    assert max(x[1:] - x[:-1]) - min(x[1:] - x[:-1]) <= 1  # no last point of a few steps
    ends = [0, *x.tolist()]
    assert y == pytest.approx([np.mean(values[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)])
    assert [part.tolist() for part in utils.smooth([1, 2], [0.5, 0.25])] == [[1, 2], [0.5, 0.25]]
    assert [part.tolist() for part in utils.smooth([], [])] == [[], []]
