"""Images in memory: a data set's three splits, and batches of them.

Images are held as uint8 tensors `(images, 3, height, width)` on the training device, or beside it where they do not
fit. A batch is cropped, flipped and normalised there by a few vectorised operations.
"""

import base64
import csv
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from images.augment import Augmentation


class DataError(ValueError):
    """The data set is not available, or its files are not what they should be; the message says what to do."""


MANY = 1 << 28  # values whose mean is taken in parts, since all at once as floats would take a gigabyte
HASHES = 1 << 62  # ids from here on are hashes of pictures, those below are places in a data set's files


@dataclass
class Split:
    """`images` uint8 `(n, 3, height, width)` and `labels` int64 `(n,)`.

    `ids` int64 `(n,)` say which images these are: their places in the data set's files, or hashes of their contents.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor | None = None

    def __post_init__(self):
        if self.ids is None:
            self.ids = torch.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: torch.Tensor | slice) -> "Split":
        return Split(self.images[indices], self.labels[indices], self.ids[indices])


def agree(marks: dict[str, str], others: dict[str, str]) -> bool:
    """Whether these fingerprints by name are equal as far as both are known."""
    return all(marks[name] == others[name] for name in marks.keys() & others.keys())


def join(splits: list[Split]) -> Split:
    return Split(*(torch.cat([getattr(split, name) for split in splits]) for name in ("images", "labels", "ids")))


def mean_and_std(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each channel of uint8 `(n, channels, height, width)`, scaled to [0, 1]: float32 `(channels,)` each."""
    if images.numel() <= MANY:
        pixels = images.float().div_(255)
        return pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))
    total, squares, count = 0, 0, images.numel() // images.shape[1]
    for part in images.split(max(1, (1 << 22) // images[0].numel())):
        values = part.double() / 255
        total, squares = total + values.sum(dim=(0, 2, 3)), squares + values.square().sum(dim=(0, 2, 3))
    mean = total / count
    return mean.float(), ((squares - count * mean**2) / (count - 1)).clamp(min=0).sqrt().float()


def split_names(text: str) -> list[str]:
    """The names in `cat,dog`; one that has a comma itself stands in double quotes."""
    return [name.strip() for name in next(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True), [])]


def join_names(names: list[str]) -> str:
    """What `split_names` splits."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="").writerow(names)
    return text.getvalue()


def pack_ids(ids: torch.Tensor) -> str:
    """Ids as text, to be stored with a model: places as a mask with a bit for each, hashes one after another."""
    sorted_ids = ids.unique().numpy()
    if len(sorted_ids) and sorted_ids[-1] >= HASHES:
        return "hashes " + base64.b64encode(sorted_ids.astype("<i8").tobytes()).decode()
    mask = np.zeros(sorted_ids.max(initial=-1) + 1, dtype=bool)
    mask[sorted_ids] = True
    return "mask " + base64.b64encode(np.packbits(mask).tobytes()).decode()


def unpack_ids(text: str) -> torch.Tensor:
    """What `pack_ids` was given, sorted and each once.

    Raises:
        ValueError: it was not made by `pack_ids`.
    """
    kind, _, packed = text.partition(" ")
    contents = base64.b64decode(packed, validate=True)
    if kind == "hashes":
        return torch.from_numpy(np.frombuffer(contents, dtype="<i8").astype(np.int64))
    if kind == "mask":
        return torch.from_numpy(np.unpackbits(np.frombuffer(contents, dtype=np.uint8)).nonzero()[0])
    raise ValueError(f"unknown kind of ids {kind!r}")


Seen = dict[str, dict[str, torch.Tensor]]  # ids by collection (see Dataset.collection), and "train" or "val"


def unpack_seen(stored: dict[str, dict[str, str]]) -> Seen:
    """Of a model's metadata."""
    return {name: {part: unpack_ids(ids) for part, ids in parts.items()} for name, parts in stored.items()}


@dataclass
class Dataset:
    """Train, validation and test split, with what is needed to use a model trained on them.

    `mean` and `std` are per channel, of the training split's pixels scaled to [0, 1]. `flip` says whether a mirrored
    image still belongs to its class (true of photographs, not of digits). `source` is what `load_data` finds the data
    by again: the absolute path of a folder of pictures, otherwise the name. `before` are the ids that a model has been
    trained and validated on before, of each collection of images: see `start_after`.

    Raises:
        DataError: all training images have one and the same colour.
    """

    name: str
    classes: list[str]
    train: Split
    val: Split
    test: Split
    flip: bool
    source: str | None = None
    before: Seen = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.source = self.source or self.name
        mean, std = mean_and_std(self.train.images)
        images = self.train.images
        varies = images.amax(dim=(0, 2, 3)) > images.amin(dim=(0, 2, 3))
        if not varies.any():
            raise DataError(f"all training images of {self.name} have one and the same colour: nothing can be learned")
        # a channel that never varies is not scaled
        self.mean, self.std = mean.tolist(), std.where(varies, torch.ones(())).tolist()

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    @property
    def metadata(self) -> dict:
        """What a saved model needs to say about its data, so that it can be used and its test images be found."""
        names = {"dataset": self.name, "source": self.source, "classes": self.classes, "image_size": self.image_size}
        packed = {name: {part: pack_ids(ids) for part, ids in parts.items()} for name, parts in self.seen.items()}
        return {**names, "mean": self.mean, "std": self.std, "fingerprints": self.fingerprints, "seen": packed}

    @property
    def is_folder(self) -> bool:
        """Whether these are a person's own pictures, which may change, and whose ids are hashes."""
        return bool(self.train.ids[0] >= HASHES)

    @property
    def collection(self) -> str:
        """What the ids belong to: the name of a data set, or all pictures that there are."""
        return "pictures" if self.is_folder else self.name

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each part how many images it has, and a hash of which these are and of their classes; not of test images
        that are not loaded."""
        parts = ("train", "val", "test") if len(self.test) else ("train", "val")
        return {part: self.fingerprint(getattr(self, part)) for part in parts}

    @property
    def marks(self) -> dict[str, str]:
        """Fingerprints of the images together, whichever part is held out: of all, and of those to learn from."""
        learned = {"images_but_test": self.fingerprint(join([self.train, self.val]))}
        return {"images": self.fingerprint(), **learned} if len(self.test) else learned

    def fingerprint(self, split: Split | None = None) -> str:
        """Of a split, or of all images together, whichever part is held out; in whatever order."""
        split = split or join([self.train, self.val, self.test])
        order = np.lexsort((split.labels.numpy(), split.ids.numpy()))
        digest = hashlib.sha256(repr((self.collection, self.classes)).encode())
        digest.update(split.ids.numpy()[order].tobytes() + split.labels.numpy()[order].tobytes())
        return f"{len(split)} images {digest.hexdigest()[:16]}"

    @property
    def seen(self) -> Seen:
        """The ids of what a model has been trained on ("train") and validated on ("val") when this training ends."""
        now = {"train": self.train.ids, "val": self.val.ids}
        before = self.before.get(self.collection)
        together = {part: torch.cat([ids, before[part]]) for part, ids in now.items()} if before else now
        return {**self.before, self.collection: together}

    def start_after(self, metadata: dict, path: str | Path) -> None:
        """Take into account what a model was trained on from which this training starts.

        Raises:
            DataError: that is used to validate or test here, which would make accuracies too high.
        """
        if "seen" not in metadata:
            print(f"{path} does not say which images it was trained on: if it saw these, accuracies are too high")
            return
        self.before = unpack_seen(metadata["seen"])
        if (known := self.before.get(self.collection)) is None:
            return  # it was trained on other images
        for part, before in (("val", known["train"]), ("test", torch.cat(list(known.values())))):
            ids = getattr(self, part).ids
            if count := int(torch.isin(ids, before).sum()):
                what = {"val": "validation", "test": "test"}[part]
                raise DataError(
                    f"{path} was trained on {count:,} of the {len(ids):,} {what} images, which would make accuracies "
                    "too high: split as it did (--val_fraction, --split_seed, --fold), or start from another model"
                )

    def select(self, names: list[str]) -> "Dataset":
        """The images of these classes alone, labelled 0, 1, ... in the order given.

        Raises:
            DataError: a class that is not there or is named twice, or fewer than two.
        """
        missing = [name for name in names if name not in self.classes]
        if missing:
            raise DataError(
                f"{self.name} has no class {', '.join(missing)}: its classes are {join_names(self.classes)}"
            )
        if len(set(names)) < max(2, len(names)):
            raise DataError(f"classes must be at least two, and none named twice: {', '.join(names)}")
        wanted = torch.tensor([self.classes.index(name) for name in names])

        def choose(split: Split) -> Split:
            matches = split.labels[:, None] == wanted  # (n, classes)
            kept = matches.any(dim=1)
            return Split(split.images[kept], matches[kept].int().argmax(dim=1), split.ids[kept])

        splits = {name: choose(getattr(self, name)) for name in ("train", "val", "test")}
        return dataclasses.replace(self, classes=names, **splits)

    def fold(self, number: int, folds: int, seed: int = 0) -> "Dataset":
        """Training and validation images together, cut into `folds` parts with equal shares of each class; part
        `number`, from 0, is for validation and the others are for training. The test images stay apart.

        Raises:
            DataError: no such fold, or a class with fewer images than there are folds.
        """
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

        together = join([self.train, self.val])
        labels = together.labels
        fewest = torch.bincount(labels, minlength=len(self.classes)).min().item()
        if not 2 <= folds <= fewest:
            raise DataError(f"folds must be between 2 and {fewest}, the images of the smallest class, not {folds}")
        if not 0 <= number < folds:
            raise DataError(f"fold must be between 0 and {folds - 1}, not {number}")
        # copies of a picture are a group, and stay together
        kind, groups = (StratifiedGroupKFold, together.ids) if self.is_folder else (StratifiedKFold, None)
        splitter = kind(folds, shuffle=True, random_state=seed)
        parts = [torch.from_numpy(part) for part in list(splitter.split(labels, labels, groups))[number]]
        return dataclasses.replace(self, train=together.subset(parts[0]), val=together.subset(parts[1]))

    def part_of_labels(self, fraction: float, seed: int = 0) -> "Dataset":
        """With `fraction` of the training images of each class, at least one; a smaller part is part of a larger."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        shuffled = self.train.labels[order]
        members = [order[shuffled == label] for label in range(len(self.classes))]
        kept = torch.cat([images[: max(1, round(fraction * len(images)))] for images in members])
        return dataclasses.replace(self, train=self.train.subset(kept.sort().values))

    def loader(self, split: Literal["train", "val", "test"], batch_size: int, device="cpu", **options) -> "ImageLoader":
        """Batches of one split, normalised with the training split's mean and standard deviation."""
        options = {"flip": self.flip, "num_classes": len(self.classes), **options}
        return ImageLoader(getattr(self, split), batch_size, self.mean, self.std, device=device, **options)


class ImageLoader:
    """Iterates over `(images, labels)` batches: float32 `(batch, 3, height, width)` normalised, int64 `(batch,)`.

    With `shuffle` the order changes every epoch. `augment` names what is done to the images (images/augment.py): they
    are padded by `padding` pixels (default an eighth of their side: 4 for 32) before they are cropped, and mirrored
    where `flip` is set. Mixup and cutmix need `num_classes` and turn labels into probabilities, float32 `(batch,
    classes)`.

    Order and augmentation depend on `(seed, epoch, image)` only, not on the batch size, nor on where an epoch was taken
    up again; mixup and cutmix on the batch too, but not on where the epoch was taken up.

    Of `world_size` processes each has a loader, which gives the share of process `rank` of every batch of `batch_size`:
    together they give what one loader would, each image once. A share is empty where there are too few for all.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mean: list[float],
        std: list[float],
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        augment: str = "none",
        flip: bool = True,
        num_classes: int | None = None,
        padding: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.device = torch.device(device)
        place = self.device if fits(split.images, self.device) else "cpu"
        self.images = split.images.to(place)
        self.labels = split.labels.to(place)
        self.batch_size = batch_size
        self.mean, self.std = mean, std
        padding = self.images.shape[-1] // 8 if padding is None else padding
        self.augmentation = Augmentation(augment, num_classes, flip, padding, mean)
        # (x / 255 - mean) / std, as one multiplication and one addition
        mean, std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.scale = (1 / (255 * std)).view(1, -1, 1, 1)
        self.shift = (-mean / std).view(1, -1, 1, 1)
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
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
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_images, generator=random) if self.shuffle else torch.arange(self.num_images)
        draws = self.augmentation.draw(self.num_images, len(self), random)
        first_batch = self.first_batch
        self.set_epoch(self.epoch + 1)  # for a caller who never says which epoch it is
        for number in range(first_batch, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            start, end = (len(batch) * rank // self.world_size for rank in (self.rank, self.rank + 1))
            # an image is mixed with the one before it, which may be another process's
            spare = int(self.augmentation.mix is not None and self.world_size > 1)
            members = batch[torch.arange(start - spare, end) % len(batch)]
            here = members.to(self.images.device)
            images, labels = self.images[here], self.labels[here]
            if here.device.type != self.device.type:  # through pinned memory, while the GPU works on the batch before
                images, labels = (x.pin_memory().to(self.device, non_blocking=True) for x in (images, labels))
            images, labels = self.augmentation.apply(images, labels, draws, members, number)
            yield torch.addcmul(self.shift, images[spare:], self.scale), labels[spare:]


def fits(images: torch.Tensor, device: torch.device) -> bool:
    """Whether the images can lie on the device: on a GPU they may take half of the memory that is free."""
    return device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
