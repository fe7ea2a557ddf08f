"""A trained model, ready for use: from its file, with the test images that belong to it, and what it says of them."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from images.loader import Dataset, ImageLoader, Split, join, unpack_seen
from network import Model
from setup_cifar import DATASETS, load_data
from support import cli, schema
from support.files import ROOT, CheckpointError
from training.models import OwnModel, import_class, load_file

SHEET = ROOT / "demos" / "cifar10_samples.png"
SHEET_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load_model(path: str | Path, device: str | torch.device = "cpu", model: str | None = None) -> Model:
    """A model of any class in eval mode, whose metadata says what it was trained on.

    Args:
        model: where the class of a model of your own lies, `my_model.py:MyNet`; of other models nothing is said.

    Raises:
        CheckpointError: no usable file, one of another class, or one without the metadata that train.py writes.
    """
    loaded = load_file(path, import_class(model) if model else None).to(device)
    try:
        schema.check(loaded.metadata, schema.METADATA, "metadata")
        if isinstance(loaded, OwnModel):
            schema.check(loaded.metadata, {"image_size": schema.SIZE}, "metadata")
        arguments, classes = loaded.config.get("arguments", loaded.config), len(loaded.metadata["classes"])
        if arguments.get("output_size", classes) != classes:
            raise ValueError(f"metadata names {classes} classes, and the model knows {arguments['output_size']}")
    except ValueError as error:
        raise CheckpointError(f"{path} does not say what the model was trained on: {error}") from None
    return loaded


def normalise(images: torch.Tensor, metadata: dict) -> torch.Tensor:
    """uint8 `(n, channels, height, width)` as a model with this metadata takes them: float32 of the same shape."""
    mean, std = (torch.tensor(metadata[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def data_title(metadata: dict) -> str:
    """What a model was trained on, for a title: `cifar10`, or `cifar10, cat, dog` where it knows few of its classes."""
    name, classes = metadata["dataset"], metadata["classes"]
    return ", ".join([name, *classes] if name in DATASETS and len(classes) <= 4 else [name])


def load_its_data(model: Model, data_dir: str | None) -> Dataset:
    """The data set that the model was trained on, with the classes that it knows. Its parts need not be those of then.

    Args:
        data_dir: where the data lie; of a model of your own pictures, the folder with them, if it has been moved.

    Raises:
        CheckpointError: the data are not those that the model was trained on, or it is not certain which of them.
    """
    metadata = model.metadata
    source = metadata.get("source", metadata["dataset"])  # files of older models have the name alone
    if metadata["dataset"] in DATASETS:
        data = load_data(metadata["dataset"], data_dir)
    else:
        data = load_pictures(source, data_dir, metadata, model.image_size)
    if data.classes != metadata["classes"]:  # trained on some of them
        if not set(metadata["classes"]) <= set(data.classes):
            raise CheckpointError(f"the classes in {source} are no longer those that the model was trained on")
        data = data.select(metadata["classes"])
    return data


def test_loader(
    model: Model, data_dir: str | None, batch_size: int, device: str | torch.device, others: Iterable[Model] = ()
) -> ImageLoader:
    """The test images of the data set that the model was trained on, normalised as they were in training.

    Of a folder of pictures that has changed since then, those are left out that the model, or one of the `others`, was
    trained or validated on, and it is said how many are left. Arguments and errors as of `load_its_data`.
    """
    data = load_its_data(model, data_dir)
    test = not_trained_on(data, [model, *others]) if data.is_folder else data.test
    return ImageLoader(test, batch_size, model.metadata["mean"], model.metadata["std"], device, flip=data.flip)


def validation_loader(model: Model, data_dir: str | None, batch_size: int, device: str | torch.device) -> ImageLoader:
    """The images that the model was validated on, as far as they are here and it says which they were: perhaps none.
    Arguments and errors as of `load_its_data`."""
    data = load_its_data(model, data_dir)
    nothing = dict.fromkeys(("train", "val"), torch.empty(0))
    known = unpack_seen(model.metadata.get("seen", {})).get(data.collection, nothing)
    images = join([data.train, data.val])
    # what a model that it started from was validated on, it may have been trained on itself
    images = images.subset(torch.isin(images.ids, known["val"]) & ~torch.isin(images.ids, known["train"]))
    return ImageLoader(images, batch_size, model.metadata["mean"], model.metadata["std"], device)


def sample_images(model: Model, count: int = 20, data_dir: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Test images to look at, the first `count` (up to 20) of each class that the model knows: uint8 `(n, 3, h, w)`,
    and their labels `(n,)`, class by class.

    Those of CIFAR-10 come from a sheet in demos/, which is there without the data set. They are too few to measure how
    good a model is.

    Args:
        data_dir: as of `test_loader`.

    Raises:
        CheckpointError, DataError: the model's data set is not on this machine.
    """
    classes = model.metadata["classes"]
    if model.metadata["dataset"] == "cifar10" and SHEET.is_file():
        images, labels = read_sheet()
        order = [SHEET_CLASSES.index(name) for name in classes]
    else:
        test = test_loader(model, data_dir, 500, "cpu")
        images, labels, order = test.images, test.labels, range(len(classes))
    chosen = [(labels == label).nonzero()[:count, 0] for label in order]
    mine = [torch.full_like(places, label) for label, places in enumerate(chosen)]
    return images[torch.cat(chosen)], torch.cat(mine)


def read_sheet() -> tuple[torch.Tensor, torch.Tensor]:
    """The sheet's 200 test images of CIFAR-10, uint8 `(200, 3, 32, 32)`, and their labels, 20 of each class."""
    pixels = np.asarray(Image.open(SHEET).convert("RGB"))  # a row for each class
    images = pixels.reshape(10, 32, 20, 32, 3).transpose(0, 2, 4, 1, 3).reshape(200, 3, 32, 32)
    return torch.from_numpy(images.copy()), torch.arange(10).repeat_interleave(20)


def load_pictures(source: str, data_dir: str | None, metadata: dict, img_size: int) -> Dataset:
    """The folder of pictures that a model was trained on, as it is now."""
    if "pictures" not in metadata.get("seen", {}):
        raise CheckpointError(
            f"an earlier version saved this model, which does not say which pictures in {source} it was trained on, so "
            "that it cannot be tested on the others: train it again"
        )
    folder = data_dir if data_dir and (Path(data_dir) / "train").is_dir() else source
    if not Path(folder).is_dir():
        raise CheckpointError(f"the pictures that the model was trained on are not in {folder}: --data_dir says where")
    return load_data(str(Path(folder).resolve()), val_fraction=0, img_size=img_size)


def not_trained_on(data: Dataset, models: list[Model]) -> Split:
    """The test pictures that none of the models was trained or validated on."""
    seen = torch.cat([ids for model in models for ids in unpack_seen(model.metadata["seen"])["pictures"].values()])
    if not torch.isin(data.train.ids, seen).any():
        raise CheckpointError(f"none of the pictures that the model was trained on is in {data.source}")
    known = torch.isin(data.test.ids, seen)
    if known.all():
        raise CheckpointError(f"no picture in {data.source} is left to test on: the model was trained on all of them")
    now = data.fingerprints["test"]
    # a model that was trained without its test images does not know which they were
    if known.any() or models[0].metadata.get("fingerprints", {"test": None}).get("test", now) != now:
        print(
            f"the pictures in {data.source} have changed since training: tested on {int((~known).sum()):,} of "
            f"{len(known):,}, none of which was trained on"
        )
    return data.test.subset(~known)


@torch.no_grad()
def predict(
    model: Model, loader: ImageLoader, flip: bool = False, shift: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(n, classes)` and labels `(n,)` of all images, on the CPU. With `flip` or `shift` each image's are the
    logarithm of the mean probabilities of its `views`."""
    logits, labels = [], []
    for images, batch_labels in cli.progress(loader, "testing", "batch"):
        answers = [model(view) for view in views(images, flip, shift)]
        logits.append((mean_probabilities(answers) if flip or shift else answers[0]).cpu())
        labels.append(batch_labels.cpu())
    return torch.cat(logits), torch.cat(labels)


def views(images: torch.Tensor, flip: bool, shift: bool) -> list[torch.Tensor]:
    """These images `(n, 3, h, w)`, with `shift` also moved by a pixel to the upper left and to the lower right, edges
    reflected (Jordan 2024), and with `flip` all of them mirrored too."""
    seen = [images]
    if shift:
        height, width = images.shape[-2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        seen += [padded[..., 2:, 2:], padded[..., :height, :width]]
    return seen + [view.flip(-1) for view in seen] * flip


def mean_probabilities(logits: list[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean of the probabilities that these logits `(n, classes)` stand for."""
    return torch.stack([x.log_softmax(dim=1) for x in logits]).logsumexp(dim=0) - math.log(len(logits))
