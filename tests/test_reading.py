"""Large pictures: made smaller while they are read, in little memory, and like the plain way."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from images import reading
from images.reading import ImageError, read_image

SIZE = (700, 530)


def photo(mode: str) -> Image.Image:
    """Something smooth with noise, in which no part is like another."""
    y, x = np.mgrid[: SIZE[1], : SIZE[0]].astype(float)
    noise = np.random.default_rng(0).normal(0, 6, (SIZE[1], SIZE[0], 4))
    waves = np.stack([x / 3, y / 3, 120 + 100 * np.sin(x / 50), 255 * (x + y < 800)], axis=2)
    pixels = np.clip(waves + noise, 0, 255).astype(np.uint8)
    grey = pixels[..., 0].astype(float) + pixels[..., 1]
    if mode == "I;16":
        return Image.fromarray((100 * grey).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((1000 * grey - 70000).astype(np.int32))
    if mode == "F":
        return Image.fromarray((grey / 7 - 20).astype(np.float32))
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def large(monkeypatch):
    """Whatever has more than 100,000 pixels counts as large, and is brought to a shorter side of 132 pixels."""
    monkeypatch.setattr(reading, "LARGE", 100_000)
    monkeypatch.setattr(reading, "SHORTER", 132)
    monkeypatch.setattr(reading, "PIECE", 5000)


MODES = "1 L I;16 I F P RGB RGBA LA CMYK".split()
FILES = [(mode, "TIFF") for mode in MODES] + [(mode, "PNG") for mode in MODES if mode not in ("I", "F", "CMYK")]
FILES += [("RGB", "WEBP"), ("RGB", "BMP"), ("L", "GIF"), ("P", "GIF"), ("L", "JPEG2000")]


def save(path, image, kind, orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode, kind", FILES)
def test_a_large_picture_is_the_plain_one_reduced(tmp_path, monkeypatch, large, mode, kind, orientation):
    save(tmp_path / "photo", photo(mode), kind, orientation)
    image = read_image(tmp_path / "photo")
    monkeypatch.setattr(reading, "LARGE", 10**9)
    plain = read_image(tmp_path / "photo")
    turned = orientation == 6 and kind not in ("BMP", "GIF", "JPEG2000")  # these have no EXIF
    assert image.info["size"] == plain.info["size"] == plain.size == (SIZE[::-1] if turned else SIZE)
    assert image.size == ((133, 175) if turned else (175, 133)) and image.mode == "RGB"
    if turned and kind != "TIFF":  # which Pillow turns; others are reduced before they are turned
        expected = plain.transpose(Image.Transpose.ROTATE_90).reduce(4).transpose(Image.Transpose.ROTATE_270)
    else:
        expected = plain.reduce(4)
    difference = np.abs(np.asarray(image, int) - np.asarray(expected, int))
    assert difference.max() <= 1 and np.asarray(image).std() > 20


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch, large, mode, progressive, orientation):
    save(tmp_path / "photo", photo(mode), "JPEG", orientation, quality=95, progressive=progressive)
    image = read_image(tmp_path / "photo")
    monkeypatch.setattr(reading, "LARGE", 10**9)
    plain = read_image(tmp_path / "photo")
    assert image.info["size"] == plain.info["size"] == plain.size
    assert image.size == ((133, 175) if orientation == 6 else (175, 133))
    difference = np.abs(np.asarray(image, int) - np.asarray(plain.reduce(4), int))[2:-2, 2:-2]
    assert difference.mean() < 2 and difference.max() < 25


def test_transparency_and_palettes_of_large_pictures(tmp_path, large):
    image = photo("L").quantize(8)
    for name, color in (("palette", 0), ("first", 3)):
        image.save(tmp_path / f"{name}.png", transparency=color)
        with Image.open(tmp_path / f"{name}.png") as plain:
            expected = reading.to_rgb(plain).reduce(4)
        assert np.array_equal(np.asarray(read_image(tmp_path / f"{name}.png")), np.asarray(expected))


def test_up_to_the_limit_no_pixel_is_changed(tmp_path, large, monkeypatch):
    monkeypatch.setattr(reading, "LARGE", SIZE[0] * SIZE[1])
    photo("RGB").save(tmp_path / "photo.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "photo.png")), np.asarray(photo("RGB")))


@pytest.mark.parametrize("size", [(200_000, 1), (1, 200_000), (3, 50_000)])
def test_a_long_and_narrow_one(tmp_path, large, size, monkeypatch):
    monkeypatch.setattr(reading, "MOST", 60_000)
    Image.new("I;16", size, 257 * 40).save(tmp_path / "line.png")
    image = read_image(tmp_path / "line.png")
    assert image.info["size"] == size and image.width * image.height <= 60_000
    assert reading.to_array(image, 8).tolist() == [[[40] * 8] * 8] * 3


@pytest.mark.parametrize("kind, options", [
    ("JPEG", {"progressive": True, "subsampling": 0}),
    ("TIFF", {"compression": "tiff_lzw", "tiffinfo": {278: SIZE[1]}}),
    ("WEBP", {}),
    ("AVIF", {}),
    ("JPEG2000", {}),
])  # fmt: skip
def test_what_cannot_be_decoded_in_little_memory_is_refused_by_its_size(tmp_path, monkeypatch, large, kind, options):
    pixels = SIZE[0] * SIZE[1]
    if f".{kind.lower()}" not in Image.registered_extensions() and kind != "JPEG2000":
        pytest.skip(f"this Pillow has no {kind}")
    photo("RGB").save(tmp_path / "photo", kind, **options)
    monkeypatch.setattr(reading, "MEMORY", 5 * pixels)
    monkeypatch.setattr(Image.Image, "crop", None)  # nothing is decoded
    with pytest.raises(ImageError, match=f"photo is too large: to unpack 700x530 pixels of this kind of {kind}"):
        read_image(tmp_path / "photo")
    monkeypatch.undo()
    assert read_image(tmp_path / "photo").size == SIZE


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory otherwise")
def test_a_large_picture_takes_less_than_a_gigabyte(tmp_path):
    """The 16-bit PNG took 5 GB."""
    side = 13_300
    Image.new("I;16", (side, side), 257 * 99).save(tmp_path / "grey.png", compress_level=1)
    code = (
        "import resource, sys\nfrom images.reading import read_image\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = peak()\n"
        "image = read_image(sys.argv[1])\n"
        "print(peak() - before, *image.size, *image.info['size'], *image.getpixel((5, 5)))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, tmp_path / "grey.png"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    kilobytes, *rest = map(int, done.stdout.split())
    assert kilobytes < 1 << 20
    assert rest == [2217, 2217, side, side, 99, 99, 99]


def test_a_picture_that_is_a_program_is_not_run(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "drawing.eps")
    with pytest.raises(ImageError, match="is an EPS file"):
        read_image(tmp_path / "drawing.eps")
