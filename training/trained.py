"""A trained model, ready for use: from its file, with the test images that belong to it, and what it says of them."""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from images.loader import ImageLoader
from network import Model
from setup_cifar import load_data
from support.files import CheckpointError
from training.models import import_class, load_file


def load_model(path: str | Path, device: str | torch.device = "cpu", model: str | None = None) -> Model:
    """A model of any class in eval mode, whose metadata says what it was trained on.

    Args:
        model: where the class of a model of your own lies, `my_model.py:MyNet`; of other models nothing is said.

    Raises:
        CheckpointError: no usable file, one of another class, or one without the metadata that train.py writes.
    """
    loaded = load_file(path, import_class(model) if model else None).to(device)
    missing = [name for name in ("dataset", "classes", "mean", "std") if name not in loaded.metadata]
    if missing:
        raise CheckpointError(f"{path} does not say what the model was trained on: no {', '.join(missing)} in it")
    return loaded


def test_loader(model: Model, data_dir: str | None, batch_size: int, device: str | torch.device) -> ImageLoader:
    """The test images of the data set that the model was trained on, normalised as they were in training."""
    metadata = model.metadata
    source = metadata.get("source", metadata["dataset"])  # a folder's path; files of older models have the name alone
    data = load_data(source, data_dir, img_size=model.image_size)
    if data.classes != metadata["classes"]:  # trained on some of them
        if not set(metadata["classes"]) <= set(data.classes):
            raise CheckpointError(f"the classes in {source} are no longer those that the model was trained on")
        data = data.select(metadata["classes"])
    return ImageLoader(data.test, batch_size, metadata["mean"], metadata["std"], device)


@torch.no_grad()
def predict(model: Model, loader: ImageLoader, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(n, classes)` and labels `(n,)` of all images, on the CPU. With `flip` each image's are the logarithm of
    its and its mirror image's mean probabilities."""

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        return mean_probabilities([model(images), model(images.flip(-1))]) if flip else model(images)

    batches = [
        (logits_of(images).cpu(), labels.cpu()) for images, labels in tqdm(loader, "testing", unit="batch", leave=False)
    ]
    logits, labels = zip(*batches, strict=True)
    return torch.cat(logits), torch.cat(labels)


def mean_probabilities(logits: list[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean of the probabilities that these logits `(n, classes)` stand for."""
    return torch.stack([x.log_softmax(dim=1) for x in logits]).logsumexp(dim=0) - math.log(len(logits))
