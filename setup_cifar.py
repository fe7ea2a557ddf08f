"""Image data: fetch it, verify it, split it, and serve it in augmented batches.

    python setup_cifar.py                       # CIFAR-10 into data/, verified, with a sample sheet
    python setup_cifar.py --dataset cifar100    # the same for CIFAR-100
    python setup_cifar.py --dataset mnist       # ... for MNIST, FashionMNIST (fashionmnist) and SVHN (svhn)
    python setup_cifar.py --dataset digits      # scikit-learn's handwritten digits: no network needed
    python setup_cifar.py --dataset pets/       # your own pictures, in pets/train/<class>/ (see images/folder.py)
    python setup_cifar.py --augmentations       # also a sheet of what each augmentation does

How images are held and batches made: images/loader.py; what may happen to training images: images/augment.py.
"""

import gzip
import hashlib
import inspect
import os
import pickle
import sys
import tarfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from images.augment import import_torchvision
from images.download import DownloadError, alone, find_or_download
from images.folder import read_folder
from images.loader import DataError, Dataset, Split
from images.sheets import draw_augmentations, draw_samples
from support import cli, distributed
from support.files import figures_folder, home, write_bytes


@dataclass(frozen=True)
class Cifar:
    """One of the two CIFAR archives (Krizhevsky 2009), md5 sums as published with torchvision.datasets."""

    title: str
    url: str
    archive: str
    md5: str  # of the archive
    folder: str  # in the archive and in the data folder
    files: dict[str, str]  # name -> md5: the training images, then the test images, last the class names
    labels: str = ""  # what their names begin with in the files


CIFAR = {
    "cifar10": Cifar(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": Cifar(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        labels="fine_",  # of 100 classes, beside the 20 coarse ones
    ),
}


Parts = tuple[Split, Split, list[str], bool]  # see DATASETS


def load_data(
    dataset: str = "auto",
    data_dir: str | Path | None = None,
    val_fraction: float = 0.2,
    split_seed: int = 0,
    img_size: int = 32,
    test: bool = True,
) -> Dataset:
    """The data set by name, with a seeded random train/validation split.

    Args:
        dataset: a name of DATASETS, "auto" (CIFAR-10 where it is available, else digits with a warning), or a folder of
            pictures, laid out as images/folder.py says.
        data_dir: where the data lie or go; None means the environment's DATA_DIR, else the project's `data`.
        val_fraction: the part of the training images that is held out for validation, where a folder has none; with 0
            all are trained on, and nothing is validated.
        split_seed: which images these are. It does not change with the training seed, so that validation images of
            one run are never training images of another.
        img_size: side in pixels that a folder's pictures are brought to; the other data sets have 32.
        test: whether to load the test images; without, that split is empty, and the others are as they are with it.

    Raises:
        DataError: unknown name, a damaged file, or one that cannot be downloaded; nothing half-written is left.
        ImageError: a folder that is no data set.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(
            f"val_fraction is the part held out for validation, 0 or more and below 1: {val_fraction} is not"
        )
    folder = data_folder(data_dir)
    if dataset == "auto":
        try:
            return load_data("cifar10", folder, val_fraction, split_seed, img_size, test)
        except DownloadError as error:
            warn_about_digits(error)
            dataset = "digits"
    if dataset not in DATASETS:
        return load_folder(dataset, img_size, val_fraction, split_seed, test)
    if img_size != 32:
        raise DataError(f"img_size {img_size} is for folders of pictures: the images of {dataset} have 32 pixels")
    if (Path(dataset) / "train").is_dir():
        print(f"{dataset} is the data set of that name; for the folder {dataset} say ./{dataset}", file=sys.stderr)
    read = DATASETS[dataset]
    leave_out = {} if test or "test" not in inspect.signature(read).parameters else {"test": False}
    train, tested, classes, flip = read(folder, **leave_out)
    for split in (train, tested):
        shape, kinds = split.images.shape, (split.images.dtype, split.labels.dtype)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or kinds != (torch.uint8, torch.int64):
            raise DataError(
                f"{dataset} has images {tuple(shape)} of {kinds[0]} and labels of {kinds[1]}: needed are images "
                "(n, 3, side, side) of torch.uint8 and labels of torch.int64"
            )
    train.ids, tested.ids = torch.arange(len(train)), len(train) + torch.arange(len(tested))  # which never change
    tested = tested if test else tested.subset(slice(0))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(split_seed))
    num_val = round(len(train) * val_fraction)
    if val_fraction and not 0 < num_val < len(train):
        raise DataError(f"val_fraction {val_fraction} of {len(train)} images leaves a split empty")
    return Dataset(dataset, classes, train.subset(order[num_val:]), train.subset(order[:num_val]), tested, flip)


def data_folder(data_dir: str | Path | None) -> Path:
    """Where the data lie or go: as it is said, or by the environment's DATA_DIR, else the project's `data`."""
    return Path(data_dir or os.environ.get("DATA_DIR") or home() / "data")


def load_folder(dataset: str, img_size: int, val_fraction: float, split_seed: int, test: bool = True) -> Dataset:
    """Your own pictures, under the name of their folder."""
    folder = Path(dataset)
    if not folder.is_dir():
        raise DataError(
            f"dataset {dataset!r} is neither a known name nor a folder: choose auto, {', '.join(DATASETS)}, "
            f"or a folder with train/<class>/*.jpg in it{cli.did_you_mean(dataset, ['auto', *DATASETS])}"
        )
    classes, splits = read_folder(folder, img_size, val_fraction, split_seed, test)
    # of a link its own name, not its target's; . and .. have none
    name = (folder if folder.name.strip(".") else folder.resolve()).name or "pictures"
    folder = folder.resolve()
    if name.lower() in DATASETS:
        name += "_folder"  # so that what is written is not taken for results on the genuine data
    data = Dataset(name, classes, **splits, flip=True, source=str(folder))
    for channel, values in zip(("red", "green", "blue"), data.train.images.unbind(dim=1), strict=True):
        if values.min() == values.max():
            print(f"{folder}: {channel} is {values.max()} everywhere in the training pictures", file=sys.stderr)
    return data


def warn_about_digits(error: Exception) -> None:
    if distributed.rank() > 0:
        return
    line = "!" * 79
    text = (
        f"WARNING: this is NOT CIFAR-10. {error}. Going on with scikit-learn's handwritten DIGITS instead; every file "
        "and title says so. `--dataset cifar10` makes this an error."
    )
    words = textwrap.fill(text, 79, initial_indent="!!  ", subsequent_indent="!!  ", break_on_hyphens=False)
    print(line, words, line, sep="\n", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- CIFAR


def read_cifar(cifar: Cifar, data_dir: Path, test: bool = True) -> Parts:
    """The 50,000 training and 10,000 test images (without `test` none) and the class names, each file md5-checked.

    Looks for the folder (`cifar-10-batches-py`) in `data_dir`, else unpacks the archive there, else downloads it.
    """
    folder = data_dir / cifar.folder
    *_, test_file, _ = cifar.files
    needed = [name for name in cifar.files if test or name != test_file]
    if any(not (folder / name).exists() for name in needed):
        try:
            archive = data_dir / cifar.archive
            url = os.environ.get(f"{cifar.title.replace('-', '')}_URL", cifar.url)  # CIFAR10_URL, CIFAR100_URL
            with alone(folder):
                find_or_download(archive, [url], cifar.md5, f" (or the folder {cifar.folder})")
                unpack(cifar, archive, folder)
        except DownloadError as error:
            missing = [name for name in cifar.files if not (folder / name).exists()]
            if len(missing) < len(cifar.files):  # a broken folder is an error; no folder may fall back to digits
                raise DataError(f"{folder} lacks {', '.join(missing)}, and {error}") from None
            raise
    read = {name: pickle.loads(read_verified(folder / name, cifar.files[name]), encoding="latin1") for name in needed}
    *train, meta = (contents for name, contents in read.items() if name != test_file)

    def split(parts: list[dict]) -> Split:
        images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([part[f"{cifar.labels}labels"] for part in parts])
        return Split(torch.from_numpy(images), torch.from_numpy(labels))

    images, classes = split(train), meta[f"{cifar.labels}label_names"]
    return images, split([read[test_file]]) if test else images.subset(slice(0)), classes, True


def read_verified(path: Path, md5: str) -> bytes:
    """The bytes of one CIFAR file, only if its md5 is the published one: a pickle is code until it is verified."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.md5(contents).hexdigest() != md5:
        raise DataError(
            f"{path} is damaged or not the genuine file (its md5 differs): delete it and run python setup_cifar.py"
        )
    return contents


def unpack(cifar: Cifar, archive: Path, folder: Path) -> None:
    """Write the known members of the archive that `folder` lacks; no name inside the archive becomes a path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as tar:
        for name in tqdm(cifar.files, desc=f"unpacking {cifar.title}", unit="file"):
            if (folder / name).exists():
                continue
            write_bytes(folder / name, tar.extractfile(f"{cifar.folder}/{name}").read())


# ------------------------------------------------------------------------------------------- torchvision's data sets


def read_mnist(name: str, data_dir: Path, flip: bool) -> Parts:
    """MNIST (LeCun et al. 1998) or FashionMNIST (Xiao et al. 2017) by the name of torchvision's class: 60,000 training
    and 10,000 test images, 28x28 greys, in the middle of black 3x32x32. Lies in `data_dir`/<name>/raw."""
    import_torchvision()
    from torchvision import datasets

    kind = getattr(datasets, name)
    folder = data_dir / name / "raw"
    for file, md5 in tqdm(kind.resources, f"reading {name}", unit="file", leave=False, delay=1):
        path = folder / file
        find_or_download(path, addresses(name, file, kind.mirrors), md5)
        contents, unpacked = gzip.decompress(path.read_bytes()), path.with_suffix("")
        if not unpacked.exists() or unpacked.read_bytes() != contents:  # torchvision does not check what is unpacked
            write_bytes(unpacked, contents)

    earlier = data_dir / name / "processed"  # which torchvision would take in place of these files, unchecked
    if earlier.is_dir():
        raise DataError(f"{earlier} is of an earlier torchvision, and nobody can tell whether it is genuine: delete it")

    def split(train: bool) -> Split:
        data = kind(data_dir, train=train)
        return Split(F.pad(data.data, (2, 2, 2, 2))[:, None].repeat(1, 3, 1, 1), data.targets)

    return split(True), split(False), list(kind.classes), flip


def read_svhn(data_dir: Path) -> Parts:
    """Street View House Numbers (Netzer et al. 2011): 73,257 training and 26,032 test images, 3x32x32, each of a digit
    and parts of its neighbours; without the "extra" ones. The files lie in `data_dir` itself, as torchvision's do."""
    import_torchvision()
    from torchvision import datasets

    parts = []
    for part in tqdm(("train", "test"), "reading SVHN", unit="file", leave=False, delay=1):
        url, file, md5 = datasets.SVHN.split_list[part]
        find_or_download(data_dir / file, addresses("SVHN", file, [url.rpartition("/")[0]]), md5)
        data = datasets.SVHN(data_dir, split=part)
        parts.append(Split(torch.from_numpy(np.ascontiguousarray(data.data)), torch.from_numpy(data.labels)))
    return *parts, [str(digit) for digit in range(10)], False


def addresses(name: str, file: str, folders: list[str]) -> list[str]:
    """Of a file of torchvision's data sets; MNIST_URL, FASHIONMNIST_URL and SVHN_URL name another folder."""
    place = os.environ.get(f"{name.upper()}_URL")
    return [f"{folder.rstrip('/')}/{file}" for folder in ([place] if place else folders)]


# --------------------------------------------------------------------------------------------------------- digits


def read_digits() -> Parts:
    """scikit-learn's 1,797 handwritten digits (8x8, 16 greys), enlarged to 3x32x32; every fifth is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().mul(255 / 16)[:, None]
    images = F.interpolate(images, size=(32, 32), mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    everything = Split(images, torch.from_numpy(digits.target).long())
    is_test = torch.arange(len(everything)) % 5 == 0
    return everything.subset(~is_test), everything.subset(is_test), [str(digit) for digit in range(10)], False


# `--dataset NAME`: a function of the data folder that gives training and test images, the names of the classes, and
# whether a mirrored image still belongs to its class. One that takes `test` too can do without the test images.
DATASETS: dict[str, Callable[..., Parts]] = {
    "cifar10": lambda data_dir, test=True: read_cifar(CIFAR["cifar10"], data_dir, test),
    "cifar100": lambda data_dir, test=True: read_cifar(CIFAR["cifar100"], data_dir, test),
    "mnist": lambda data_dir: read_mnist("MNIST", data_dir, flip=False),
    "fashionmnist": lambda data_dir: read_mnist("FashionMNIST", data_dir, flip=True),  # a left shoe is a shoe
    "svhn": read_svhn,
    "digits": lambda data_dir: read_digits(),
}


LAST_FILES = {  # that are downloaded of torchvision's data sets, in the data folder
    "mnist": "MNIST/raw/t10k-labels-idx1-ubyte.gz",
    "fashionmnist": "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz",
    "svhn": "test_32x32.mat",
}


def is_here(metadata: dict, data_dir: str | None) -> bool:
    """Whether the data set that a model was trained on can be read without a download."""
    dataset = metadata["dataset"]
    if cifar := CIFAR.get(dataset):
        folder = data_folder(data_dir)
        unpacked = all((folder / cifar.folder / name).exists() for name in cifar.files)
        return unpacked or (folder / cifar.archive).exists()
    if dataset in DATASETS:
        return dataset not in LAST_FILES or (data_folder(data_dir) / LAST_FILES[dataset]).exists()
    folders = [Path(metadata.get("source", dataset)), *([Path(data_dir) / "train"] if data_dir else [])]
    return any(folder.is_dir() for folder in folders)


# ------------------------------------------------------------------------------------------------------ as a script


@dataclass
class Config:
    """Prepare and verify the data, say what was found, and save a sheet of sample images."""

    dataset: str = "cifar10"  # auto (cifar10 or digits), cifar10, cifar100, mnist, fashionmnist, svhn, digits, a folder
    data_dir: str | None = None  # where the data lie or go; default: the environment's DATA_DIR, else data
    img_size: int = 32  # side in pixels that a folder's pictures are brought to
    figures_dir: str | None = None  # where the sample sheet goes; default: the project's figures/
    augmentations: bool = False  # also draw what each augmentation does to the same images


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        data = load_data(config.dataset, config.data_dir, img_size=config.img_size)
        print(f"{data.name}: {data.image_size}x{data.image_size} RGB images of {len(data.classes)} classes, verified")
        for name in ("train", "val", "test"):
            counts = torch.bincount(getattr(data, name).labels, minlength=len(data.classes)).tolist()
            print(f"  {name:5s} {sum(counts):6,d} images;  per class: {min(counts):,d} to {max(counts):,d}")
        print(f"  mean {[round(x, 4) for x in data.mean]}  standard deviation {[round(x, 4) for x in data.std]}")
        folder = figures_folder(config.figures_dir)
        sheet = folder / f"samples_{data.name}.png"
        draw_samples(data.train.images, data.train.labels, data.classes, sheet)
        print(f"  sample sheet: {sheet}")
        if config.augmentations:
            sheet = folder / f"augmentations{'' if data.name == 'cifar10' else '_' + data.name}.png"
            # the seventh: of CIFAR-10's first ones, the cat cannot be told
            one_of_each = [(data.train.labels == label).nonzero()[:7][-1, 0] for label in range(len(data.classes))]
            shown = torch.stack(one_of_each[:10])
            images, labels = data.train.images[shown], data.train.labels[shown]
            draw_augmentations(images, labels, data.classes, sheet, data.flip, data.mean)
            print(f"  augmentations: {sheet}")


if __name__ == "__main__":
    main()
