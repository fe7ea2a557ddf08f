"""Folders of pictures as a data set.

pets/train/cat/*.jpg    one folder for each class; its name is the class's
pets/train/dog/*.jpg
pets/val/... pets/test/...    the same classes; where one of the two is missing it is held out from train

What is held out depends on each picture alone, by a hash of its file's content: a picture more or less, or other names,
move no other picture from one part to another, and copies of a picture are all in one part.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import torch

from images.loader import HASHES, Split
from images.reading import ImageError, read_image, to_array
from support import cli

TEST_FRACTION = 0.2  # fixed: a test image of one run is a training image of no other


def read_folder(
    folder: Path, side: int, val_fraction: float, split_seed: int, test: bool = True
) -> tuple[list[str], dict[str, Split]]:
    """The pictures below `train`, `val` and `test` in `folder`, each brought to `side` by `side` pixels.

    Where there is no `test`, a fifth of the training pictures is held out, always the same ones; where there is no
    `val`, then about the part `val_fraction` of the others, chosen by `split_seed`. Pictures of `val` and `test` that
    are also in `train` are left out, and files that cannot be read; how many is said on stderr. Hidden files (.name) do
    not count. Without `test` those of that folder are not read, and the split "test" is empty.

    Returns:
        The names of the classes, and the splits "train", "val" and "test", each in a random order that depends on the
        pictures alone. A picture's id is the hash of its content.

    Raises:
        ImageError: no `train`, fewer than two classes, other classes below `val` or `test`, a class without a picture
            to train on, or nothing to test on.
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
    say_unused(folder)
    splits = {}
    for name in ("train", "val", "test"):
        if not (folder / name).is_dir() or (name == "test" and not test):
            continue
        if different := set(classes) ^ set(subfolders(folder / name)):
            listed = ", ".join(map(repr, sorted(different)))
            raise ImageError(
                f"{folder / name} and {folder / 'train'} must have the same classes: {listed} is in one alone"
            )
        splits[name] = read_split(folder / name, classes, side)
    for name, fraction, draw in (("test", TEST_FRACTION, "test"), ("val", val_fraction, f"val {split_seed}")):
        if not (folder / name).is_dir():
            held = [position(identity, draw) < fraction for identity in splits["train"].ids.tolist()]
            held = torch.tensor(held, dtype=torch.bool)
            splits["train"], splits[name] = splits["train"].subset(~held), splits["train"].subset(held)
    splits["val"] = without(splits["val"], [splits["train"]], folder / "val")
    if test:
        splits["test"] = without(splits["test"], [splits["train"], splits["val"]], folder / "test")
    else:
        splits["test"] = splits["train"].subset(slice(0))
    for name in ("train", "val", "test")[: 3 if test else 2]:
        require_pictures(name, splits[name], classes, folder)
    return classes, splits


def say_unused(folder: Path) -> None:
    """Name on stderr what a person may take for a part of the data, and is none."""
    used = [folder / part for part in ("train", "val", "test") if (folder / part).is_dir()]
    # by the file system, for which Test may be test
    unused = [name for name in subfolders(folder) if not any(path.samefile(folder / name) for path in used)]
    if unused:
        print(f"{folder}: not used: {', '.join(unused)} (known are train, val and test)", file=sys.stderr)
    for path in used:
        if files := [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]:
            print(f"{path}: not used: {len(files):,} files in no folder of a class", file=sys.stderr)


def position(identity: int, draw: str) -> float:
    """A number in [0, 1) that is random from picture to picture, and always the same for one picture and draw."""
    digest = hashlib.sha256(f"{identity} {draw}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 256**7


def without(split: Split, others: list[Split], folder: Path) -> Split:
    """The pictures of `split` that are in none of the others."""
    copies = torch.isin(split.ids, torch.cat([other.ids for other in others]))
    if copies.any():
        print(
            f"left out: {int(copies.sum()):,} of the {len(copies):,} pictures in {folder}, which are the same files as "
            "some to train or validate on, and would make its accuracy too high",
            file=sys.stderr,
        )
    return split.subset(~copies)


def require_pictures(name: str, split: Split, classes: list[str], folder: Path) -> None:
    """Say which classes a part lacks.

    Raises:
        ImageError: it is empty, or the training part lacks one.
    """
    if name == "val" and not len(split):
        return  # as it was asked for, or train.py refuses it
    counts = torch.bincount(split.labels, minlength=len(classes))
    missing = ", ".join(repr(classes[label]) for label in (counts == 0).nonzero()[:, 0].tolist())
    if missing and (name == "train" or (name == "test" and not len(split))):
        lacking = folder / name
        if name == "train":  # what is missing there is held out
            lacking = folder / ("val" if (folder / "test").is_dir() else "test")
        which = f"of {missing} is left to train on" if name == "train" else f"is held out for {name}"
        raise ImageError(f"{folder} has too few pictures, and none {which}: add some, or make the folder {lacking}")
    if missing:
        print(f"{folder}: there is no picture of {missing} among the {len(split):,} of {name}", file=sys.stderr)


def subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_split(folder: Path, classes: list[str], side: int) -> Split:
    """All pictures that can be read below `folder/<class>`, and a line on stderr for each other file."""
    files = [(path, label) for label, name in enumerate(classes) for path in pictures(folder / name)]
    found, unreadable = [], []
    for path, label in cli.progress(files, f"reading {folder}", "img"):
        try:
            pixels = to_array(read_image(path), side)
            found.append((content_hash(path), label, pixels))
        except ImageError as error:
            unreadable.append(str(error))
    for line in sorted(unreadable):
        print(f"skipped: {line}", file=sys.stderr)
    if unreadable:
        print(f"skipped {len(unreadable):,} of {len(files):,} files in {folder}, see above", file=sys.stderr)
    present = {label for _, label, _ in found}
    for label, name in enumerate(classes):
        if label not in present:
            raise ImageError(f"the class {folder / name} is empty: it has no picture that can be read")
    found.sort(key=lambda picture: picture[:2])
    ids, labels, images = zip(*found, strict=True)
    return Split(torch.from_numpy(np.stack(images)), torch.tensor(labels), torch.tensor(ids))


def content_hash(path: Path) -> int:
    """What identifies a picture: 62 bits of the SHA-256 of its file."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    return HASHES + int.from_bytes(digest[:8], "big") // 4


def pictures(folder: Path) -> list[Path]:
    """Files at any depth below `folder`, hidden ones left out, in an order that is the same on every system."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    visible = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    return [folder / path for path in sorted(visible, key=Path.as_posix)]
