"""Pictures from files: any size and format brought to RGB squares, and folders of them as a data set.

pets/train/cat/*.jpg    one folder for each class; its name is the class's
pets/train/dog/*.jpg
pets/val/... pets/test/...    the same classes; where one of the two is missing it is held out from train
"""

import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from images.loader import Split

TEST_FRACTION, TEST_SEED = 0.2, 0  # fixed: a test image of one run is a training image of no other


class ImageError(ValueError):
    """A file that cannot be read as an image, or a folder that is no data set, with the reason in one line."""


def read_image(path: str | Path) -> Image.Image:
    """The image in a file as upright 8-bit RGB, of several (an animation) the first, on white where transparent.

    Raises:
        ImageError: no such file, no image, truncated or damaged, or so large that it might be a decompression bomb.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # Pillow warns of large pictures, and of oddities that it can read
            with Image.open(file) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image of a format that Pillow reads") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise ImageError(f"{path} would unpack to more than {limit:.0f} megapixels: a decompression bomb?") from None
    except Exception as error:  # Pillow's many readers answer a damaged file with many kinds of exception
        if isinstance(error, OSError) and error.strerror:  # the system's word: no such file, a folder, not permitted
            raise ImageError(f"cannot read {path}: {error.strerror}") from None
        raise ImageError(f"{path} is truncated or damaged ({' '.join(str(error).split())})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB: 16-bit greys scaled to 8, floats and other integers stretched from their lowest to
    their highest value, transparent pixels put on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = values.min(), values.max()
        if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high < 65536):
            low, high = 0, 65535  # mode I is also how Pillow gives a 16-bit PGM
        values = (values - low) / max(high - low, 1e-12)
        return Image.fromarray((255 * values).round().astype(np.uint8)).convert("RGB")
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


def read_folder(folder: Path, side: int, val_fraction: float, split_seed: int) -> tuple[list[str], dict[str, Split]]:
    """The pictures below `train`, `val` and `test` in `folder`, each brought to `side` by `side` pixels.

    Where there is no `val`, the part `val_fraction` of the training pictures is held out, chosen by `split_seed`; where
    there is no `test`, a fifth of them before that, always the same. Of each class at least one is held out. Files
    that cannot be read are listed on stderr and left out; hidden ones (.name) do not count.

    Returns:
        The names of the classes, and the splits "train", "val" and "test", each in a random order that is always the
        same.

    Raises:
        ImageError: no `train`, fewer than two classes, other classes below `val` or `test`, or a class without a
            picture that can be read or with too few to hold some out.
    """
    if side < 1:
        raise ImageError(f"img_size is the side in pixels that pictures are brought to: {side} is not positive")
    if not (folder / "train").is_dir():
        raise ImageError(f"{folder} has no folder train, with a folder of pictures for each class in it")
    classes = subfolders(folder / "train")
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no folder"
        raise ImageError(
            f"{folder / 'train'} has {found}: a model needs two classes or more, each a folder of pictures"
        )
    splits = {}
    for name in ("train", "val", "test"):
        if not (folder / name).is_dir():
            continue
        if different := set(classes) ^ set(subfolders(folder / name)):
            listed = ", ".join(map(repr, sorted(different)))
            raise ImageError(
                f"{folder / name} and {folder / 'train'} must have the same classes: {listed} is in one alone"
            )
        splits[name] = read_split(folder / name, classes, side)
    for name, fraction, seed in (("test", TEST_FRACTION, TEST_SEED), ("val", val_fraction, split_seed)):
        if name not in splits:
            splits["train"], splits[name] = hold_out(splits["train"], fraction, seed, classes, folder / name)
    return classes, splits


def subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_split(folder: Path, classes: list[str], side: int) -> Split:
    """All pictures that can be read below `folder/<class>`, and a line on stderr for each other file."""
    files = [(path, label) for label, name in enumerate(classes) for path in pictures(folder / name)]
    random.Random(0).shuffle(files)
    images, labels, unreadable = [], [], []
    for path, label in tqdm(files, f"reading {folder}", unit="img", leave=False):
        try:
            images.append(to_array(read_image(path), side))
            labels.append(label)
        except ImageError as error:
            unreadable.append(str(error))
    for line in sorted(unreadable):
        print(f"skipped: {line}", file=sys.stderr)
    if unreadable:
        print(f"skipped {len(unreadable):,} of {len(files):,} files in {folder}, see above", file=sys.stderr)
    for label, name in enumerate(classes):
        if label not in labels:
            raise ImageError(f"the class {folder / name} is empty: it has no picture that can be read")
    return Split(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def pictures(folder: Path) -> list[Path]:
    """Files at any depth below `folder`, hidden ones left out, in an order that is the same on every system."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    return [folder / path for path in sorted(visible, key=Path.as_posix)]


def hold_out(split: Split, fraction: float, seed: int, classes: list[str], missing: Path) -> tuple[Split, Split]:
    """What is kept and what is held out: the `fraction` of each class, at least one image, chosen by `seed`."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(split), dtype=torch.bool)
    for label, name in enumerate(classes):
        members = order[split.labels[order] == label]
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise ImageError(
                f"the class {name!r} has {len(members)} training picture(s), too few to hold out {count}: add some, or "
                f"make {missing}"
            )
        held[members[:count]] = True
    return split.subset(~held), split.subset(held)
