"""Pictures from files: any size and format brought to RGB, and to the squares that a model sees.

A large picture is made smaller while it is read, piece by piece, so that reading takes less than 1 GiB of memory.
"""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

LARGE = 16_000_000  # pixels; what has more is made smaller
SHORTER = 2048  # pixels that the shorter side of a large picture keeps at least, so long as it is not very long
MOST = 32_000_000  # pixels that a picture keeps at most
MEMORY = 900_000_000  # bytes that Pillow may take to decode a large picture
PIECE = 1 << 20  # pixels that are worked on at a time

ORIENTATION = 0x0112  # in EXIF: how a picture has to be turned
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """A file that cannot be read as an image, or a folder that is no data set, with the reason in one line."""


def find_images(names: Iterable[str]) -> list[str]:
    """The files as they are named; for a folder the pictures in it, sorted, by their ending. How many other files it
    has is printed. A folder without a picture stays in the list."""
    endings, found = readable_endings(), []
    for name in names:
        if not Path(name).is_dir():
            found.append(name)
            continue
        inside = sorted(path.relative_to(name) for path in Path(name).rglob("*") if path.is_file())
        files = [Path(name) / path for path in inside if not any(part.startswith(".") for part in path.parts)]
        pictures = [str(path) for path in files if path.suffix.lower() in endings]
        found += pictures or [name]
        if pictures and len(pictures) < len(files):
            others = sorted({path.suffix for path in files if str(path) not in pictures})
            kinds = ", ".join(ending or "no ending" for ending in others)
            print(f"{name}: left out {len(files) - len(pictures)} of {len(files)} files, no pictures by name ({kinds})")
    return found


def readable_endings() -> set[str]:
    """Of the names of files that Pillow reads: .jpg, .png, .webp and many more."""
    known_by_name_only = {".eps", ".ps", ".h5", ".hdf", ".mpg", ".mpeg", ".grib", ".bufr"}
    known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return (known | {".mpo"}) - known_by_name_only  # an MPO is opened as the JPEG that it begins with


def read_image(path: str | Path) -> Image.Image:
    """The image in a file as upright 8-bit RGB, of several (an animation) the first, on white where transparent.

    One of more than LARGE pixels is made smaller; `info["size"]` is the width and height of what is in the file.

    Raises:
        ImageError: no such file, no image, truncated or damaged, with values that are no numbers, or so large that it
            would take too much memory or might be a decompression bomb.
        OSError: memory is short.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # Pillow warns of large pictures, and of oddities that it can read
            with Image.open(file) as image:
                if image.format == "EPS":  # a program, which Pillow has Ghostscript run
                    raise ImageError("is an EPS file, a program that draws: save it as a PNG")
                with _quiet_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
                    return _upright_rgb(image)
    except ImageError as error:
        raise ImageError(f"{path} {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image of a format that Pillow reads") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise ImageError(f"{path} would unpack to more than {limit:.0f} megapixels: a decompression bomb?") from None
    except MemoryError:
        raise OSError(f"{path}: there is not enough memory to unpack it") from None
    except Exception as error:  # Pillow's many readers answer a damaged file with many kinds of exception
        if isinstance(error, OSError) and error.strerror:  # the system's word: no such file, a folder, not permitted
            raise ImageError(f"cannot read {path}: {error.strerror}") from None
        raise ImageError(f"{path} is truncated or damaged ({' '.join(str(error).split())})") from None


@contextlib.contextmanager
def _quiet_libtiff() -> Iterator[None]:
    """libtiff itself writes to stderr what it thinks of a damaged file; the one line of an ImageError is enough."""
    try:
        stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stderr
        yield
        return
    sys.stderr.flush()
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _upright_rgb(image: Image.Image) -> Image.Image:
    size, factor, drafted = image.size, 1, None
    large = math.prod(size) > LARGE
    if large:
        factor = max(1, min(size) // SHORTER)
        while math.prod(-(-side // factor) for side in size) > MOST:
            factor += 1
        drafted = image.draft(None, (size[0] // factor, size[1] // factor))  # a JPEG is decoded smaller
        _check_memory(image, size)
    image.load()
    if drafted is None:
        size = image.size  # a TIFF has been turned by Pillow
    factor = max(1, factor * image.width // size[0])  # what is left to do
    rgb = _reduce(image, factor) if large else to_rgb(image)
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF says nothing
        turn = None
    if turn is not None:
        turned = rgb.transpose(turn)
        size = size if (turned.width < turned.height) == (rgb.width < rgb.height) else size[::-1]
        rgb = turned
    rgb.info["size"] = size
    return rgb


def _check_memory(image: Image.Image, size: tuple[int, int]) -> None:
    """Refuse what Pillow cannot decode in MEMORY; `size` is the image's before it was drafted.

    Raises:
        ImageError: without the file's name.
    """
    bytes_each = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    pixels, result = math.prod(size), bytes_each * math.prod(image.size)
    if image.format in ("JPEG", "MPO"):  # of a progressive one all coefficients are held
        needed = result + 2 * len(image.getbands()) * pixels * ("progressive" in image.info)
    elif image.format == "TIFF":
        tags = image.tag_v2
        turned = tags.get(ORIENTATION, 1) != 1
        needed = result * (1 + turned)
        if tags.get(259, 1) != 1:  # compressed: libtiff maps the file and unpacks strip by strip, or tile by tile
            width, rows = (tags[322], tags[323]) if 322 in tags else (size[0], min(tags.get(278, size[1]), size[1]))
            needed += width * rows * max(4, sum(tags.get(258, (1,))) / 8) + os.fstat(image.fp.fileno()).st_size
    elif image.format in ("PNG", "GIF", "BMP", "PPM"):  # decoded where they are to lie
        needed = result
    else:  # WebP, AVIF and JPEG 2000 are decoded into copies of 32 bits
        needed = 20 * pixels
    if needed > MEMORY:
        raise ImageError(
            f"is too large: to unpack {size[0]}x{size[1]} pixels of this kind of {image.format} takes "
            f"{needed / 1e9:.1f} GB of memory; make it smaller, or save it as an uncompressed PNG"
        )


def _pieces(size: tuple[int, int], factor: int = 1) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of about PIECE pixels that cover an image; all but the last have sides that are multiples of `factor`."""
    width = factor * math.ceil(min(size[0], PIECE) / factor)
    height = factor * max(1, PIECE // width // factor)
    for top in range(0, size[1], height):
        for left in range(0, size[0], width):
            yield left, top, min(left + width, size[0]), min(top + height, size[1])


def _reduce(image: Image.Image, factor: int) -> Image.Image:
    """`to_rgb(image).reduce(factor)`, pixel for pixel, without the whole image in RGB."""
    limits = value_range(image)
    reduced = Image.new("RGB", tuple(math.ceil(side / factor) for side in image.size))
    for box in _pieces(image.size, factor):
        reduced.paste(to_rgb(image.crop(box), limits).reduce(factor), (box[0] // factor, box[1] // factor))
    return reduced


def value_range(image: Image.Image) -> tuple[float, float] | None:
    """What is to become black and white of a mode that has no fixed range; None for other modes.

    Raises:
        ImageError: infinite values or NaN; without the file's name.
    """
    if image.mode.startswith("I;16"):
        return 0, 65535
    if image.mode not in ("I", "F"):
        return None
    low, high = np.inf, -np.inf
    for box in _pieces(image.size):
        values = np.asarray(image.crop(box))
        if not np.isfinite(values).all():
            raise ImageError("has infinite values or NaN among its pixels, which no grey can stand for")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    if image.mode == "I" and low >= 0 and 255 < high < 65536:
        return 0, 65535  # this is also how Pillow gives a 16-bit PGM
    return low, high


def to_rgb(image: Image.Image, limits: tuple[float, float] | None = None) -> Image.Image:
    """Any of Pillow's modes to RGB: 16-bit greys scaled to 8, floats and other integers stretched from their lowest to
    their highest value (or between `limits`, where the image is a piece), transparent pixels put on white."""
    limits = limits or value_range(image)
    if limits is not None:
        low, high = limits
        values = np.asarray(image, dtype=np.float64)
        greys = (255 * ((values - low) / ((high - low) or 1))).round().astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):  # a 16-bit PNG may have one such value
            greys[values == transparent] = 255
        return Image.fromarray(greys).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def central_square(image: Image.Image, side: int) -> Image.Image:
    """The shorter side resized to `side` pixels, and the centre cut out of the longer one, in one step."""
    shorter = min(image.size)
    left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
    box = (left, top, left + shorter, top + shorter)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def to_array(image: Image.Image, side: int) -> np.ndarray:
    """The pixels that a model sees of an RGB image: uint8 `(3, side, side)`, its central square."""
    return np.array(central_square(image, side)).transpose(2, 0, 1)
