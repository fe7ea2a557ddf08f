"""Folders of pictures as a data set.

pets/train/cat/*.jpg    one folder for each class; its name is the class's
pets/train/dog/*.jpg
pets/val/... pets/test/...    the same classes; where one of the two is missing it is held out from train
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from images.loader import Split
from images.reading import ImageError, read_image, to_array

TEST_FRACTION, TEST_SEED = 0.2, 0  # fixed: a test image of one run is a training image of no other


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
