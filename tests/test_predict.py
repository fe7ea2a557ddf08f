"""Awkward image files, made here, brought to the model's input or refused in one line."""

import io
import os
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from network import CNN, FeedForward, VisionTransformer
from support import files

LEFT, RIGHT = (200, 30, 40), (20, 60, 220)


def halves(size=(60, 40)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, LEFT)
    image.paste(RIGHT, (size[0] // 2, 0, *size))
    return image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_by_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(halves().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)  # 6: to be turned clockwise


def with_alpha(mode: str) -> Image.Image:
    """The left half red (or its grey), the right half transparent."""
    image = halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (30, 0, 60, 40))
    return image.convert(mode)


def transparent_palette() -> bytes:
    image = Image.new("P", (60, 40), 0)
    image.putpalette([*LEFT, 0, 0, 0])
    image.paste(1, (30, 0, 60, 40))
    return encode(image, "PNG", transparency=1)


def transparent_colour() -> bytes:
    return encode(halves(), "PNG", transparency=RIGHT)


def sixteen_bit() -> Image.Image:
    values = np.full((40, 60), 257 * 50, np.uint16)
    values[:, 30:] = 257 * 210
    return Image.fromarray(values)


def broken_exif(exif: bytes) -> bytes:
    return encode(halves(), "PNG", exif=b"Exif\0\0" + exif)


def big_endian() -> bytes:
    """A TIFF written by hand: Pillow's own conversion to that mode clips."""
    data = np.asarray(sixteen_bit()).astype(">u2").tobytes()
    short, long = 3, 4
    tags = [(256, short, 60), (257, short, 40), (258, short, 16), (259, short, 1), (262, short, 1)]
    tags += [(273, long, 8), (278, short, 40), (279, long, len(data))]
    entries = [struct.pack(">HHII", tag, kind, 1, value << 16 if kind == short else value) for tag, kind, value in tags]
    return (
        b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + struct.pack(">H", len(tags)) + b"".join(entries) + bytes(4)
    )


def integers() -> Image.Image:
    values = np.full((40, 60), -70000, np.int32)
    values[:, 30:] = 100000
    return Image.fromarray(values)


def floats(somewhere: float = -3.5, low: float = -3.5, high: float = 12) -> Image.Image:
    values = np.full((40, 60), low, np.float32)
    values[:, 30:] = high
    values[0, 0] = somewhere
    return Image.fromarray(values)


def animation(kind: str) -> bytes:
    other = Image.new("RGB", (60, 40), (0, 255, 0))
    return encode(halves(), kind, save_all=True, append_images=[other, other], duration=100)


def grey(color) -> tuple[int, int, int]:
    return (Image.new("RGB", (1, 1), color).convert("L").getpixel((0, 0)),) * 3


WHITE = (255, 255, 255)
READABLE = {  # name -> contents, and the colours expected on the left and on the right
    "rgb.png": (encode(halves(), "PNG"), LEFT, RIGHT),
    "photo.jpg": (encode(halves(), "JPEG", quality=98), LEFT, RIGHT),
    "grey.png": (encode(halves().convert("L"), "PNG"), grey(LEFT), grey(RIGHT)),
    "grey_alpha.png": (encode(with_alpha("LA"), "PNG"), grey(LEFT), WHITE),
    "rgba.png": (encode(with_alpha("RGBA"), "PNG"), LEFT, WHITE),
    "rgba.webp": (encode(with_alpha("RGBA"), "WEBP", lossless=True), LEFT, WHITE),
    "palette.png": (encode(halves().quantize(16), "PNG"), LEFT, RIGHT),
    "transparent_palette.png": (transparent_palette(), LEFT, WHITE),
    "transparent_colour.png": (transparent_colour(), LEFT, WHITE),
    "cmyk.jpg": (encode(halves().convert("CMYK"), "JPEG", quality=98), LEFT, RIGHT),
    "cmyk.tif": (encode(halves().convert("CMYK"), "TIFF"), LEFT, RIGHT),
    "sixteen_bit.png": (encode(sixteen_bit(), "PNG"), (50,) * 3, (210,) * 3),
    "sixteen_bit_transparent.png": (encode(sixteen_bit(), "PNG", transparency=257 * 210), (50,) * 3, WHITE),
    "big_endian.tif": (big_endian(), (50,) * 3, (210,) * 3),
    "sixteen_bit.pgm": (b"P5 60 40 65535\n" + np.asarray(sixteen_bit()).astype(">u2").tobytes(), (50,) * 3, (210,) * 3),
    "integers.tif": (encode(integers(), "TIFF"), (0,) * 3, WHITE),
    "floats.tif": (encode(floats(), "TIFF"), (0,) * 3, WHITE),
    "small_floats.tif": (encode(floats(1e-20, 1e-20, 1e-19), "TIFF"), (0,) * 3, WHITE),
    "one_bit.png": (encode(halves().convert("1", dither=Image.Dither.NONE), "PNG"), (0,) * 3, (0,) * 3),
    "garbage_for_exif.png": (broken_exif(b"garbage"), LEFT, RIGHT),
    "truncated_exif.png": (broken_exif(b"II*\0"), LEFT, RIGHT),
    "exif.png": (rotated_by_exif(6), LEFT, RIGHT),
    "animation.gif": (animation("GIF"), LEFT, RIGHT),
    "animation.webp": (animation("WEBP"), LEFT, RIGHT),
    "one_pixel.png": (encode(Image.new("RGB", (1, 1), LEFT), "PNG"), LEFT, LEFT),
    "thin.png": (encode(Image.new("RGB", (3000, 1), LEFT), "PNG"), LEFT, LEFT),
    "misnamed.jpg": (encode(halves(), "BMP"), LEFT, RIGHT),
}


def bomb() -> bytes:
    """A PNG of a few dozen bytes that says it is 30,000 x 30,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
UNREADABLE = {  # name -> contents, and words of the complaint
    "text.png": (b"this is no image\n", "not an image"),
    "empty.jpg": (b"", "not an image"),
    "program.gif": (b"\x7fELF" + bytes(200), "not an image"),
    "truncated.png": (encode(NOISE, "PNG")[:6000], "truncated or damaged"),
    "truncated.jpg": (encode(NOISE, "JPEG")[:1500], "truncated or damaged"),
    "truncated.webp": (encode(NOISE, "WEBP", lossless=True)[:3000], "damaged"),
    "corrupt.png": (encode(NOISE, "PNG")[:60] + b"\xff" * 40 + encode(NOISE, "PNG")[100:], "damaged"),
    "infinite.tif": (encode(floats(np.inf), "TIFF"), "infinite values or NaN"),
    "minus_infinite.tif": (encode(floats(-np.inf), "TIFF"), "infinite values or NaN"),
    "nan.tif": (encode(floats(np.nan), "TIFF"), "infinite values or NaN"),
    "bomb.png": (bomb(), "would unpack to more than 179 megapixels"),
}


@pytest.fixture
def model(digits):
    torch.manual_seed(0)
    model = VisionTransformer(hidden_size=16, num_heads=2, num_blocks=2, pooling="mean").eval()
    torch.nn.init.normal_(model.head.weight)
    model.metadata = {"dataset": "digits", "classes": digits.classes, "mean": digits.mean, "std": digits.std}
    return model


@pytest.fixture
def run(capsys, tmp_path):
    def run(*arguments):
        try:
            code = predict.main([*map(str, arguments), "--output_dir", str(tmp_path / "out")])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code or 0, out, [line for line in err.splitlines() if line.startswith("predict.py")]

    return run


@pytest.mark.parametrize("name", READABLE)
def test_readable(tmp_path, name, model):
    contents, left, right = READABLE[name]
    (tmp_path / name).write_bytes(contents)
    image = predict.read_image(tmp_path / name)
    assert image.mode == "RGB"
    if image.size[1] == 40:
        assert image.size == (60, 40)
    images = predict.to_input(image, model)
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()
    mean, std = (torch.tensor(model.metadata[key]).view(3, 1) for key in ("mean", "std"))
    for column, color in ((3, left), (28, right)):
        pixels = 255 * (images[0, :, 16, column, None] * std + mean)
        tolerance = 6 if name.endswith(("jpg", "webp")) and name != "misnamed.jpg" else 1.01
        torch.testing.assert_close(pixels[:, 0], torch.tensor(color).float(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(tmp_path, name):
    contents, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(predict.ImageError, match=words) as error:
        predict.read_image(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_the_model_sees_what_it_was_trained_on(digits, model):
    """A test image saved as PNG comes to the model exactly as the test set's loader gives it."""
    image = Image.fromarray(digits.test.images[3].permute(1, 2, 0).numpy())
    expected = next(iter(digits.loader("test", 4)))[0][3]
    torch.testing.assert_close(predict.to_input(image, model)[0], expected)


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (96, 32)])
def test_the_shorter_side_is_resized_and_the_centre_cut_out(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    width, height = (side * 32 // min(size) for side in size)
    left, top = (width - 32) // 2, (height - 32) // 2
    expected = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    assert np.abs(np.asarray(predict.central_square(image, 32), int) - np.asarray(expected, int)).max() <= 2


def test_script_does_the_others(tmp_path, model, run, digits):
    """Good and bad files mixed: probabilities of the one, a line on stderr for each of the others, exit code 2."""
    model.save(tmp_path / "model.pt", **model.metadata)
    names = ["text.png", "rgba.png", "bomb.png", "exif.png", "truncated.jpg"]
    for name in names:
        (tmp_path / name).write_bytes((READABLE | UNREADABLE)[name][0])
    (tmp_path / "empty").mkdir()
    files = [tmp_path / name for name in names] + [tmp_path / "nowhere.png", tmp_path / "empty"]
    code, out, err = run(*files, "--checkpoint", tmp_path / "model.pt")
    assert code == 2
    bad = ["text.png", "bomb.png", "truncated.jpg", "nowhere.png"]
    assert len(err) == 5 and all(name in line for name, line in zip(bad, err, strict=False))
    assert "No such file" in err[3]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"model_prediction_{name}.png" for name in ("rgba", "exif")
    }
    lines = out.splitlines()
    assert len(lines) == 12 and lines[0].startswith(str(tmp_path / "rgba.png"))
    with torch.no_grad():
        probabilities = model(predict.to_input(predict.read_image(tmp_path / "rgba.png"), model))[0].softmax(dim=0)
    best = probabilities.topk(5)
    for line, value, index in zip(lines[1:6], best.values, best.indices, strict=True):
        assert line.split() == [f"{100 * value:.1f}", "%", digits.classes[index]]


@pytest.mark.parametrize("other", [CNN(), FeedForward(hidden_size=8)], ids=lambda model: type(model).__name__)
def test_script_of_models_without_attention(tmp_path, model, other, run):
    other.save(tmp_path / "other.pt", **model.metadata)
    for folder in ("a", "b"):  # two files of the same name, and two pictures
        (tmp_path / folder).mkdir()
        halves().save(tmp_path / folder / "same.png")
    halves().save(tmp_path / "b" / "Same.png")  # which is another file, but not for a Mac
    files = [tmp_path / "a" / "same.png", tmp_path / "b" / "same.png", tmp_path / "b" / "Same.png"]
    code, _, err = run(*files, "--checkpoint", tmp_path / "other.pt")
    assert code == 0 and err == []
    written = {f"other_prediction_{name}.png" for name in ("same", "same_2", "Same_3")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == written


@pytest.mark.parametrize("options", [{"pooling": "cls", "patch_size": 6}, {"tokenizer": "conv", "pooling": "mean"}])
def test_pictures_of_other_vits(tmp_path, model, options):
    metadata = model.metadata
    model = VisionTransformer(hidden_size=16, num_heads=2, num_blocks=1, **options).eval()
    model.metadata = metadata
    images, probabilities, attention = predict.classify(model, halves())
    predict.draw_prediction(model, halves(), images, probabilities, attention, tmp_path / "picture.png")
    assert probabilities.sum() == pytest.approx(1)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 1000


def test_a_picture_that_cannot_be_written_does_not_stop_the_others(tmp_path, model, run):
    model.save(tmp_path / "model.pt", **model.metadata)
    names = [
        f"{'n' * 245}.png",
        "folder.png",
        "good.png",
    ]  # with model_prediction_ the first is too long for a file system
    for name in names:
        halves().save(tmp_path / name)
    (tmp_path / "out" / "model_prediction_folder.png").mkdir(parents=True)
    code, out, err = run(*(tmp_path / name for name in names), "--checkpoint", tmp_path / "model.pt")
    # the answers are there, of those without a picture too
    assert code == 2 and len(out.splitlines()) == 18 and "folder.png (60x40)\n" in out
    assert f"good.png (60x40): {tmp_path / 'out' / 'model_prediction_good.png'}" in out
    assert len(err) == 2 and "cannot write" in err[0] and names[0][:-4] in err[0] and "folder" in err[1]
    assert not any(line.startswith("predict.py: error: [Errno") for line in err)
    assert (tmp_path / "out" / "model_prediction_good.png").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode")
def test_a_name_that_is_not_utf_8(tmp_path, model, run):
    model.save(tmp_path / "model.pt", **model.metadata)
    for name in (b"\xff.png", b"\xfe.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"no picture" if name == b"\xfe.png" else encode(halves(), "PNG"))
    files = [tmp_path / os.fsdecode(name) for name in (b"\xff.png", b"\xfe.png")]
    code, out, err = run(*files, "--checkpoint", tmp_path / "model.pt")
    assert code == 2 and len(err) == 1 and "\\udcfe.png is not an image" in err[0]
    assert out.startswith(f"{tmp_path}/\\udcff.png (60x40)")
    assert os.listdir(os.fsencode(tmp_path / "out")) == [b"model_prediction_\xff.png"]  # noqa: PTH208


def test_a_folder_stands_for_the_pictures_in_it(tmp_path, model, run):
    model.save(tmp_path / "model.pt", **model.metadata)
    photos = tmp_path / "photos"
    for name in ("b.PNG", "a/c.webp", "a/.hidden.png", ".thumbnails/d.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        halves().save(photos / name)
    (photos / "notes.txt").write_text("no picture")
    code, out, err = run(photos, "--checkpoint", tmp_path / "model.pt")
    assert code == 0 and err == [] and "left out 1 of 3 files, no pictures by name (.txt)" in out
    found = [line.split(" (60x40)")[0] for line in out.splitlines() if "(60x40)" in line]
    assert found == [str(photos / "a" / "c.webp"), str(photos / "b.PNG")]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"model_prediction_{name}.png" for name in "bc"}
    (tmp_path / "empty").mkdir()
    code, out, err = run(tmp_path / "empty", "--checkpoint", tmp_path / "model.pt")
    assert code == 2 and out == "" and len(err) == 1 and "no pictures" in err[0]


def test_two_models_write_two_pictures(tmp_path, model, run):
    halves().save(tmp_path / "photo.png")
    for name in ("one", "two"):
        model.save(tmp_path / f"{name}.pt", **model.metadata)
        assert run(tmp_path / "photo.png", "--checkpoint", tmp_path / f"{name}.pt")[0] == 0
    names = {"one_prediction_photo.png", "two_prediction_photo.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_a_model_is_not_taken_for_an_image(tmp_path, model, run):
    model.save(tmp_path / "model.pt", **model.metadata)
    code, out, err = run(tmp_path / "model.pt")
    assert code == 2 and out == "" and len(err) == 1 and f"--checkpoint {tmp_path / 'model.pt'}" in err[0]


def test_from_another_folder_the_projects_model_is_found(tmp_path, monkeypatch, capsys):
    """... and its figures/ written to, unless a folder is said, which is then one here."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "saved", elsewhere):
        folder.mkdir(parents=True)
    for name in ("VisionTransformer.pt", "CNN.pt"):
        shutil.copy(files.ROOT / "saved" / name, project / "saved" / name)
    monkeypatch.setattr(files, "ROOT", project)
    monkeypatch.chdir(elsewhere)
    halves().save("photo.png")
    predict.main(["photo.png"])
    assert (project / "figures" / "VisionTransformer_prediction_photo.png").is_file()
    predict.main(["photo.png", "--checkpoint", "saved/CNN.pt", "--output_dir", "here"])
    assert (elsewhere / "here" / "CNN_prediction_photo.png").is_file()


def test_without_images_or_model(tmp_path, run):
    for arguments in ([], [tmp_path / "a.png", "--checkpoint", tmp_path / "none.pt"]):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and len(err) == 1
