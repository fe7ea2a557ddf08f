"""Image data: fetch it, verify it, split it, and serve it in augmented batches.

    python setup_cifar.py                       # CIFAR-10 into data/, verified, with a sample sheet
    python setup_cifar.py --dataset digits      # scikit-learn's handwritten digits: no network needed

Images are held as uint8 tensors `(images, 3, height, width)` on the training device; a batch is cropped, flipped and
normalised there by a few vectorised operations. What happens to an image is a function of (seed, epoch, image) alone.
"""

import dataclasses
import hashlib
import http.client
import os
import pickle
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cli
import utils

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_ARCHIVE = ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_FILES = {  # name -> md5, as published with torchvision.datasets.CIFAR10
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}


class DataError(ValueError):
    """The data set cannot be had, or what is there is not what it should be; the message says what to do."""


@dataclass
class Split:
    """`images` uint8 `(n, 3, height, width)` and `labels` int64 `(n,)`."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> "Split":
        return Split(self.images[indices], self.labels[indices])


@dataclass
class Dataset:
    """Train, validation and test split, with what is needed to use a model trained on them.

    `mean` and `std` are per channel, of the training split's pixels scaled to [0, 1]. `flip` says whether a mirrored
    image still belongs to its class (true of photographs, not of digits).
    """

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    flip: bool

    def __post_init__(self):
        pixels = self.train.images.float() / 255
        self.mean = pixels.mean(dim=(0, 2, 3)).tolist()
        self.std = pixels.std(dim=(0, 2, 3)).tolist()

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    @property
    def metadata(self) -> dict:
        """What a saved model needs to say about its data, so that it can be used."""
        return {"dataset": self.name, "classes": self.classes, "mean": self.mean, "std": self.std}

    def select(self, names: list[str]) -> "Dataset":
        """The images of these classes alone, labelled 0, 1, ... in the order given.

        Raises:
            DataError: a class that is not there or is named twice, or fewer than two.
        """
        missing = [name for name in names if name not in self.classes]
        if missing:
            raise DataError(f"{self.name} has no class {', '.join(missing)}: its classes are {', '.join(self.classes)}")
        if len(set(names)) < max(2, len(names)):
            raise DataError(f"classes must be at least two, and none named twice: {', '.join(names)}")
        wanted = torch.tensor([self.classes.index(name) for name in names])

        def choose(split: Split) -> Split:
            matches = split.labels[:, None] == wanted  # (n, classes)
            kept = matches.any(dim=1)
            return Split(split.images[kept], matches[kept].int().argmax(dim=1))

        splits = {name: choose(getattr(self, name)) for name in ("train", "val", "test")}
        return dataclasses.replace(self, classes=names, **splits)

    def part_of_labels(self, fraction: float, seed: int = 0) -> "Dataset":
        """With `fraction` of the training images of each class, at least one; a smaller part is part of a larger."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        shuffled = self.train.labels[order]
        members = [order[shuffled == label] for label in range(len(self.classes))]
        kept = torch.cat([images[: max(1, round(fraction * len(images)))] for images in members])
        return dataclasses.replace(self, train=self.train.subset(kept.sort().values))

    def loader(self, split: Literal["train", "val", "test"], batch_size: int, device="cpu", **options) -> "ImageLoader":
        """Batches of one split, normalised with the training split's mean and standard deviation."""
        options = {"flip": self.flip, **options}
        return ImageLoader(getattr(self, split), batch_size, self.mean, self.std, device=device, **options)


class ImageLoader:
    """Iterates over `(images, labels)` batches: float32 `(batch, 3, height, width)` normalised, int64 `(batch,)`.

    With `shuffle` the order changes every epoch. With `augment` each image is padded by `padding` pixels (reflected;
    default an eighth of its side: 4 for 32) and cropped at a random place, and mirrored half of the time where `flip`
    is set. Order, crop and mirroring depend on `(seed, epoch, image)` only: not on the batch size, nor on where an
    epoch was taken up again.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mean: list[float],
        std: list[float],
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        augment: bool = False,
        flip: bool = True,
        padding: int | None = None,
        seed: int = 0,
    ):
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size = batch_size
        self.mean, self.std = mean, std
        # (x / 255 - mean) / std, as one multiplication and one addition
        mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.scale = (1 / (255 * std)).view(1, -1, 1, 1)
        self.shift = (-mean / std).view(1, -1, 1, 1)
        self.shuffle, self.augment, self.flip, self.seed = shuffle, augment, flip, seed
        self.padding = self.images.shape[-1] // 8 if padding is None else padding
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches in an epoch; the last one may be smaller."""
        return -(-len(self.labels) // self.batch_size)

    @property
    def num_images(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Say which epoch the next iteration is, and at which of its batches to begin."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        n, device = self.num_images, self.images.device
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(n, generator=random) if self.shuffle else torch.arange(n)
        offsets = torch.randint(0, 2 * self.padding + 1, (2, n), generator=random).to(device)
        mirrored = (torch.rand(n, generator=random) < 0.5).to(device)
        order = order[self.first_batch * self.batch_size :].to(device)
        self.set_epoch(self.epoch + 1)  # for a caller who never says which epoch it is
        if not len(order):  # taken up again after the last batch; and `split` would give one empty batch
            return
        for batch in order.split(self.batch_size):
            images = self.images[batch]
            if self.augment:
                images = random_crop(images, self.padding, *offsets[:, batch])
                if self.flip:
                    images = torch.where(mirrored[batch].view(-1, 1, 1, 1), images.flip(3), images)
            yield torch.addcmul(self.shift, images, self.scale), self.labels[batch]


def random_crop(images: torch.Tensor, padding: int, top: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Pad `(batch, channels, height, width)` images by reflection and cut image i back out at `(top[i], left[i])`."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (padding,) * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (batch, channels, tops, lefts, height, width): a view
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def load_data(
    dataset: str = "auto", data_dir: str | Path | None = None, val_fraction: float = 0.2, split_seed: int = 0
) -> Dataset:
    """The data set by name, with a seeded random train/validation split.

    Args:
        dataset: "cifar10", "digits", or "auto": CIFAR-10 where it can be had, else digits with a warning.
        data_dir: where CIFAR-10 lies or goes; None means the environment's DATA_DIR, else `data`.
        val_fraction: the part of the training images that is held out for validation.
        split_seed: which images these are. It does not change with the training seed, so that validation images of
            one run are never training images of another.

    Raises:
        DataError: unknown name, a damaged file, or CIFAR-10 cannot be downloaded; nothing half-written is left.
    """
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is the part held out for validation, between 0 and 1: {val_fraction} is not")
    folder = Path(data_dir or os.environ.get("DATA_DIR") or "data")
    if dataset == "auto":
        try:
            return load_data("cifar10", folder, val_fraction, split_seed)
        except DownloadError as error:
            warn_about_digits(error)
            dataset = "digits"
    if dataset == "cifar10":
        train, test, classes = read_cifar10(folder)
    elif dataset == "digits":
        train, test, classes = read_digits()
    else:
        raise DataError(f"unknown dataset {dataset!r}: choose auto, cifar10 or digits")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(split_seed))
    num_val = round(len(train) * val_fraction)
    if not 0 < num_val < len(train):
        raise DataError(f"val_fraction {val_fraction} of {len(train)} images leaves a split empty")
    return Dataset(
        dataset,
        classes,
        train=train.subset(order[num_val:]),
        val=train.subset(order[:num_val]),
        test=test,
        flip=dataset != "digits",
    )


def warn_about_digits(error: Exception) -> None:
    line = "!" * 100
    print(
        f"{line}\n!!  WARNING: this is NOT CIFAR-10. {error}\n"
        "!!  Going on with scikit-learn's handwritten DIGITS instead; every file and title says so.\n"
        f"!!  `--dataset cifar10` makes this an error.\n{line}",
        file=sys.stderr,
    )


# ------------------------------------------------------------------------------------------------------- CIFAR-10


class DownloadError(DataError):
    """The archive could not be fetched."""


def read_cifar10(data_dir: Path) -> tuple[Split, Split, list[str]]:
    """CIFAR-10's 50,000 training and 10,000 test images and its class names (Krizhevsky 2009), each file md5-checked.

    Looks for `cifar-10-batches-py` in `data_dir`, else unpacks `cifar-10-python.tar.gz` there, else downloads it.
    """
    folder = data_dir / CIFAR10_FOLDER
    if any(not (folder / name).exists() for name in CIFAR10_FILES):
        try:
            unpack(find_or_download_archive(data_dir), folder)
        except DownloadError as error:
            missing = [name for name in CIFAR10_FILES if not (folder / name).exists()]
            if len(missing) < len(CIFAR10_FILES):  # a broken folder is an error; no folder may fall back to digits
                raise DataError(f"{folder} lacks {', '.join(missing)}, and {error}") from None
            raise
    contents = {name: pickle.loads(read_verified(folder / name), encoding="latin1") for name in CIFAR10_FILES}

    def split(names: list[str]) -> Split:
        images = np.concatenate([contents[name]["data"] for name in names]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([contents[name]["labels"] for name in names])
        return Split(torch.from_numpy(images), torch.from_numpy(labels))

    train = split([f"data_batch_{i}" for i in range(1, 6)])
    return train, split(["test_batch"]), contents["batches.meta"]["label_names"]


def read_verified(path: Path) -> bytes:
    """The bytes of one CIFAR-10 file, only if its md5 is the published one: a pickle is code until it is verified."""
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.md5(contents).hexdigest() != CIFAR10_FILES[path.name]:
        raise DataError(
            f"{path} is damaged or not the genuine file (its md5 differs): delete it and run python setup_cifar.py"
        )
    return contents


def find_or_download_archive(data_dir: Path) -> Path:
    name, md5 = CIFAR10_ARCHIVE
    archive = data_dir / name
    if archive.exists():
        if file_md5(archive) != md5:
            raise DataError(f"{archive} is damaged or incomplete (its md5 differs): delete it and try again")
    else:
        download(os.environ.get("CIFAR10_URL", CIFAR10_URL), archive, md5)
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Write the known members of the archive that `folder` lacks; no name inside the archive becomes a path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as tar:
        for name in tqdm(CIFAR10_FILES, desc="unpacking CIFAR-10", unit="file"):
            if (folder / name).exists():
                continue
            contents = tar.extractfile(f"{CIFAR10_FOLDER}/{name}").read()
            part = folder / f"{name}.part"
            part.write_bytes(contents)
            part.replace(folder / name)


def file_md5(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.md5()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, path: Path, md5: str, attempts: int = 4, timeout: float = 20, wait: float = 2) -> None:
    """Fetch `url` to `path` with a progress bar; a broken transfer goes on from where it stopped.

    The bytes collect in `<path>.part`, which becomes `path` only once its md5 is right. A hanging server is given
    `timeout` seconds, and `wait` seconds (doubling) lie between attempts.

    Raises:
        DownloadError: after the last attempt, with the reason and the ways out.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    for attempt in range(attempts):
        if attempt:
            print(f"download interrupted ({reason}); trying again ({attempt + 1} of {attempts})", file=sys.stderr)
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            transfer(url, part, timeout)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # nothing beyond what we have: the partial file is not a beginning of this one
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break
        except urllib.error.URLError as error:
            reason = str(error.reason)
            if not part.exists():  # no connection at all: waiting longer will not help
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        else:
            if file_md5(part) == md5:
                part.replace(path)
                return
            reason = "what arrived is not the genuine file: its md5 differs"
            part.unlink()
    raise DownloadError(
        f"CIFAR-10 could not be downloaded from {url} ({reason}). Put {path.name} (or the folder {CIFAR10_FOLDER}) "
        f"into {path.parent}, name its place with --data_dir or DATA_DIR, or use --dataset digits."
    )


def transfer(url: str, part: Path, timeout: float) -> None:
    """One attempt: append to `part` what is missing, or start anew where the server ignores Range."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        total = None if length is None else int(length) + (have if resumed else 0)
        bar = tqdm(desc="downloading CIFAR-10", total=total, initial=have if resumed else 0, unit="B", unit_scale=True)
        with open(part, "ab" if resumed else "wb") as file, bar:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size < total:
        raise ConnectionError("the connection broke off")


# --------------------------------------------------------------------------------------------------------- digits


def read_digits() -> tuple[Split, Split, list[str]]:
    """scikit-learn's 1,797 handwritten digits (8x8, 16 greys), enlarged to 3x32x32; every fifth is for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().mul(255 / 16)[:, None]
    images = F.interpolate(images, size=(32, 32), mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    everything = Split(images, torch.from_numpy(digits.target).long())
    is_test = torch.arange(len(everything)) % 5 == 0
    return everything.subset(~is_test), everything.subset(is_test), [str(digit) for digit in range(10)]


# ---------------------------------------------------------------------------------------------------- torchvision


def import_torchvision():
    """The module `torchvision`, also where its compiled operators do not fit the installed torch.

    A torchvision wheel is built for one build of torch; beside another (a CPU-only torch, say) importing it fails with
    "operator torchvision::nms does not exist". Transforms need no such operator, so it is enough to declare them.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        import torchvision
    return torchvision


# ------------------------------------------------------------------------------------------------------ as a script


@dataclass
class Config:
    """Prepare and verify the data, say what was found, and save a sheet of sample images."""

    dataset: Literal["auto", "cifar10", "digits"] = "cifar10"  # auto: CIFAR-10 where it can be had, else digits
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    figures_dir: str = "figures"  # where the sample sheet goes


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        data = load_data(config.dataset, config.data_dir)
        print(f"{data.name}: {data.image_size}x{data.image_size} RGB images of {len(data.classes)} classes, verified")
        for name in ("train", "val", "test"):
            counts = torch.bincount(getattr(data, name).labels, minlength=len(data.classes)).tolist()
            print(f"  {name:5s} {sum(counts):6,d} images;  per class: {min(counts):,d} to {max(counts):,d}")
        print(f"  mean {[round(x, 4) for x in data.mean]}  standard deviation {[round(x, 4) for x in data.std]}")
        sheet = Path(config.figures_dir) / f"samples_{data.name}.png"
        utils.draw_samples(data.train.images, data.train.labels, data.classes, sheet)
        print(f"  sample sheet: {sheet}")


if __name__ == "__main__":
    main()
