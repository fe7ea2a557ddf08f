"""What whole models share: saving, loading, first filters that whiten, and what they say of themselves."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.module import register_module_parameter_registration_hook

from support import schema
from support.files import CheckpointError, first_line, read_file, write_file


class Model(nn.Module):
    """What every whole model shares: it remembers its constructor's arguments in `config`, so that a file can rebuild
    it, and says of itself what the optimiser and fine-tuning need to know."""

    def __new__(cls, *args, **kwargs):
        """Note the constructor's arguments in `config`."""
        model = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(model, *args, **kwargs)
        bound.apply_defaults()
        model.__dict__["config"] = {name: value for name, value in bound.arguments.items() if name != "self"}
        model.__dict__["metadata"] = {}  # what `load` found in the file: class names, normalisation
        return model

    # ---- for a new model these are right as they are, or are overridden

    @property
    def title(self) -> str:
        """What it is called in pictures and in the names of files."""
        return type(self).__name__

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it takes."""
        return self.config["img_size"]

    def get_classifier(self) -> nn.Module:
        """The last linear layer, which belongs to the classes.

        Raises:
            ValueError: there is none.
        """
        linear = [module for module in self.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"{self.title} has no nn.Linear, so nobody knows which part of it belongs to the classes")
        return linear[-1]

    def layers(self) -> list[list[nn.Module]]:
        """Its layers from the images to the logits, each a list of modules, for `--layer_decay`."""
        return [[child] for child in self.children() if list(child.parameters())]

    def rate_scales(self, decay: float) -> dict[nn.Parameter, float]:
        """What each parameter's learning rate is multiplied with: 1 in the last layer, `decay` in the one below, and
        so on (Bao et al. 2022)."""
        depths = enumerate(reversed(self.layers()))
        return {p: decay**depth for depth, layer in depths for module in layer for p in module.parameters()}

    def undecayed(self) -> set[nn.Parameter]:
        """Norms, biases, CLS token and positions, which have no direction that weight decay would help."""
        # matrices and convolutions have two and four axes, all else has one or three
        return {p for p in self.parameters() if p.ndim not in (2, 4)}

    def hidden_matrices(self) -> set[nn.Parameter]:
        """The matrices and filters between the first layer and the last, which Muon may orthogonalise."""
        return set([p for p in self.parameters() if p.ndim in (2, 4)][1:-1])

    # ---- mode, saving and loading

    def train(self, mode: bool = True) -> "Model":
        """As torch's, but what is frozen (no parameter wants a gradient) stays in eval mode: a BatchNorm in it keeps
        its statistics, and no branch is skipped."""
        super().train(mode)
        for module in self.modules() if mode else ():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Write weights, constructor arguments and `metadata` (plain values: class names, normalisation) to `path`.

        Raises:
            OSError: the folder cannot be written; what was at `path` is untouched.
        """
        weights = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        write_file(
            path, {"model": type(self).__name__, "config": self.config, "weights": weights, "metadata": metadata}
        )

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Model":
        """The model that `save` wrote, in eval mode, its metadata in `model.metadata`.

        Called on `Model` itself it takes a file of any class; called on a class it insists on that class. Nothing that
        a file names is ever imported: it can only choose among the classes that are loaded already.

        Raises:
            CheckpointError: the file is missing, damaged, not a model, or of another class.
        """
        contents = read_model(path)
        name, known = contents["model"], {kind.__name__: kind for kind in (*_subclasses(Model), *_subclasses(cls))}
        if name not in known:
            raise CheckpointError(f"{path} holds a model {name!r}, which this version does not know")
        if not issubclass(known[name], cls):
            raise CheckpointError(f"{path} holds a {name}, not a {cls.__name__}: use {name}.load")
        try:
            with no_larger_than(contents["weights"]):
                model = known[name](**contents["config"])
        except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
            raise CheckpointError(f"{path} does not fit {name}: {first_line(error)}") from None
        return model.fill(contents, path).to(device)

    def fill(self, contents: dict, path: str | Path) -> "Model":
        """Take weights and metadata from the contents of a file, and go into eval mode.

        Raises:
            CheckpointError: the weights are those of another model.
        """
        try:
            schema.require_like(contents["weights"], dict(self.state_dict()), "weights")
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit {self.title}: {error}") from None
        self.load_state_dict(contents["weights"])
        self.metadata = contents["metadata"]
        return self.eval()


@contextlib.contextmanager
def no_larger_than(weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within, no model can be made that is much larger than these weights: it is refused when it registers the
    parameter that is too much, before that is filled and takes memory.

    Raises:
        ValueError: it is.
    """
    # a constructor may make a layer, a head say, and put another one in its place
    tensors, numbers = 2 * len(weights) + 100, 2 * sum(tensor.numel() for tensor in weights.values()) + 50_000_000

    def count(_module, _name, parameter):
        nonlocal tensors, numbers
        tensors, numbers = tensors - 1, numbers - (0 if parameter is None else parameter.numel())
        if tensors < 0 or numbers < 0:
            raise ValueError("its config describes a larger model than its weights are of")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def read_model(path: str | Path) -> dict:
    """The contents of a file that `Model.save` wrote.

    Raises:
        CheckpointError: it is missing, damaged, or of another kind.
    """
    return read_file(path, schema.MODEL, "holds no model of this project")


def whitening_filters(images: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Filters `(channels * size**2, channels, size, size)` whose answers to the patches of these images are
    uncorrelated and have about the variance 1, those of the largest variance before that first.

    They are the eigenvectors of the patches' covariance, each over the root of its eigenvalue (Page 2018, Jordan 2024);
    0.01 more, so that what hardly varies is not blown up.
    """
    patches = F.unfold(images.float(), size, stride=stride).transpose(1, 2).flatten(0, 1).double()
    variances, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (variances + 0.01).sqrt()).T.flip(0)
    return filters.float().view(-1, images.shape[1], size, size)


@torch.no_grad()
def begin_with(convolution: nn.Conv2d, filters: torch.Tensor) -> None:
    """Put these in the place of its first filters; of too many, the last ones are left out."""
    count = min(len(filters), convolution.out_channels)
    convolution.weight[:count] = filters[:count].to(convolution.weight.device)


def num_parameters(model: nn.Module) -> int:
    """How many numbers its weights are, with those that are frozen."""
    return sum(p.numel() for p in model.parameters())


def _subclasses(cls: type) -> list[type]:
    """It and all that are made from it; of those of one name the one that was defined last comes last."""
    return [cls, *(kind for subclass in cls.__subclasses__() for kind in _subclasses(subclass))]
