"""Models by name: those of network.py, timm's, and your own file's; and trained weights to start from.

`--model vit`, `--model timm:resnet18`, `--model my_model.py:MyNet`.
"""

import contextlib
import difflib
import functools
import importlib.util
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.nn as nn
import torch.nn.functional as F

from images.augment import import_torchvision
from network import MODELS
from support import cli, schema
from support.files import CheckpointError, find_file, first_line, require_reasonable_size
from support.model import Model, no_larger_than, read_model


def find_model(name: str) -> type[nn.Module]:
    """The class that a name of `--model` stands for; a file of your own is imported.

    Raises:
        ValueError: there is no such model, file, or class in it.
    """
    if name.startswith("timm:"):
        return TimmModel
    if ".py:" in name:
        return import_class(name)
    if name not in MODELS:
        hint = cli.did_you_mean(name.lower(), MODELS) or (
            f"; did you mean {name}:ClassName?" if name.endswith(".py") else ""
        )
        raise ValueError(f"unknown model {name!r}: choose {', '.join(MODELS)}, timm:NAME, or my_model.py:MyNet{hint}")
    return MODELS[name]


def build_model(name: str, hyperparameters: dict, img_size: int, num_classes: int) -> Model:
    """A new model by its name. Its constructor is given, by name, what it asks for: any hyperparameter, and `img_size`,
    `input_size` (numbers in an image) and `output_size` (classes).

    Raises:
        ValueError: sizes that do not go together, or for which there is no memory; a model of your own with logits of
            another shape than `(batch, classes)`.
    """
    sizes = {"img_size": img_size, "input_size": 3 * img_size**2, "output_size": num_classes}
    cls = find_model(name)
    wanted = inspect.signature(cls.__init__).parameters
    arguments = {key: value for key, value in {**hyperparameters, **sizes}.items() if key in wanted}
    if ".py:" in name:
        model = OwnModel(cls.__name__, arguments, cls).eval()
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise ValueError(
                f"{name}: a saved model with nn.LazyLinear or the like cannot be loaded: give it its sizes"
            )
        with torch.no_grad():
            shape = tuple(getattr(model(torch.zeros(2, 3, img_size, img_size)), "shape", ()))
        if shape != (2, num_classes):
            raise ValueError(f"{name}: of 2 images it makes logits {shape}, needed are (2, {num_classes})")
        return model.train()
    if cls is TimmModel:
        arguments["name"] = name.removeprefix("timm:")
    try:
        return cls(**arguments)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"a model of these sizes cannot be made: {first_line(error)}") from None


def count_flops(step: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and convolutions in `step()`, a multiplication and an addition counted as two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # torch counts nothing for the CPU's fused attention: here it is computed as two products of matrices
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------- your own model


def import_class(where: str) -> type[nn.Module]:
    """The class that `my_model.py:MyNet` names. What goes wrong in that file keeps its traceback.

    Raises:
        ValueError: there is no such file, or no such `nn.Module` in it.
    """
    if ".py:" not in where:
        raise ValueError(
            f"--model {where}: that is for a class of your own, my_model.py:MyNet; a file that train.py wrote is given "
            "as --checkpoint, or without a flag"
        )
    file, _, name = where.rpartition(":")
    path = find_file(file).resolve()
    if not path.is_file():
        raise ValueError(f"--model {where}: there is no file {file}")
    cli.own_files.add(str(path))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # the file may import what lies beside it
    cls = getattr(_import(path, path.stat().st_mtime_ns), name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"--model {where}: {file} has no nn.Module of the name {name!r}")
    return cls


@functools.cache
def _import(path: Path, _changed: int) -> types.ModuleType:
    """The file as a module, executed once however often it is asked for."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and the like look themselves up
    spec.loader.exec_module(module)
    return module


class OwnModel(Model):
    """A plain `nn.Module` of your own, `(batch, 3, height, width)` images to logits `(batch, classes)`.

    A file remembers its class's name and constructor arguments, but never where the class lies: who loads the file says
    `--model my_model.py:MyNet`, so that a stranger's file cannot choose code to run.
    """

    def __init__(self, name: str, arguments: dict, own_class: type[nn.Module] | None = None):
        super().__init__()
        if own_class is None:
            raise ValueError(f"{name} is a class of your own: say where it lies, --model my_model.py:{name}")
        self.config = {"name": name, "arguments": arguments}
        self.module = own_class(**arguments)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.module(images)

    @property
    def title(self) -> str:
        return self.config["name"]

    @property
    def image_size(self) -> int:
        return self.metadata["image_size"]

    def layers(self) -> list[list[nn.Module]]:
        return [[child] for child in self.module.children() if list(child.parameters())]


def load_file(path: str | Path, own_class: type[nn.Module] | None = None) -> Model:
    """The model in a file, in eval mode on the CPU; of a class of your own where that is given.

    Raises:
        CheckpointError: no usable file, or one with a model of another class.
    """
    path = find_file(path)
    if path.suffix == ".json":
        raise CheckpointError(f"{path} is a run's report; its model is in {path.with_suffix('.pt')}")
    if own_class is None:
        return Model.load(path)
    contents = read_model(path)
    config = contents["config"]
    name = config.get("name") if contents["model"] == OwnModel.__name__ else contents["model"]
    if contents["model"] != OwnModel.__name__ or name != own_class.__name__:
        raise CheckpointError(f"{path} holds a {name}, not a {own_class.__name__} of your own")
    try:
        schema.check(config, {"name": schema.TEXT, "arguments": {...: schema.ANYTHING}}, "config")
        inspect.signature(own_class).bind(**config["arguments"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit {name}: {error}") from None
    with no_larger_than(contents["weights"]):
        model = OwnModel(name, config["arguments"], own_class)
    return model.fill(contents, path)


# ------------------------------------------------------------------------------------------------- timm's models


class TimmModel(Model):
    """A model of the timm library (Wightman 2019) by its name, with random weights and a new head.

    Images `(batch, 3, img_size, img_size)` are brought to the size the model was made for by bicubic interpolation.
    Logits `(batch, output_size)`. timm's models do not give their attention weights.

    `mean` and `std` are what the model's published weights expect images to be normalised with.

    Raises:
        ValueError: timm is not installed, or has no such model.
    """

    def __init__(self, name: str, img_size: int = 32, output_size: int = 10, drop_path: float = 0.0):
        super().__init__()
        if img_size < 1 or output_size < 1:
            raise ValueError(f"img_size {img_size} and output_size {output_size} must be positive")
        self.backbone = create_timm_model(name, output_size, drop_path)
        published = self.backbone.pretrained_cfg
        self.input_size = published["input_size"][-1]
        self.mean, self.std = list(published["mean"]), list(published["std"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images.shape[-1]
        if side != self.input_size:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size, mode="bicubic", antialias=side > self.input_size)
        return self.backbone(images)

    @property
    def title(self) -> str:
        return self.config["name"]

    def get_classifier(self) -> nn.Module:
        head = self.backbone.get_classifier()
        return nn.ModuleList(head) if isinstance(head, tuple) else head  # those that learn from a teacher have two

    def rate_scales(self, decay: float) -> dict[nn.Parameter, float]:
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(self.backbone, layer_decay=decay)
        return {p: group["lr_scale"] for group in groups for p in group["params"]}

    def undecayed(self) -> set[nn.Parameter]:
        from timm.optim import param_groups_weight_decay

        names = getattr(self.backbone, "no_weight_decay", set)()
        groups = param_groups_weight_decay(self.backbone, weight_decay=1.0, no_weight_decay_list=names)
        return {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}

    def hidden_matrices(self) -> set[nn.Parameter]:
        return set()  # they get AdamW alone


def create_timm_model(name: str, output_size: int, drop_path: float = 0.0) -> nn.Module:
    """A model as timm makes it, with random weights; timm is imported only now, since nothing else needs it.

    Raises:
        ValueError: timm is not installed, or has no such model, or one without stochastic depth where that is wanted.
    """
    try:
        import_torchvision()
        import timm
    except ImportError as error:
        raise ValueError(f"models of timm need the package {error.name}: pip install timm") from None
    if not timm.is_model(name):
        similar = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3)) or "there are none"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; similar names: {similar}")
    try:
        return timm.create_model(name, num_classes=output_size, drop_path_rate=drop_path or None)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"timm's {name} cannot be made so: {error}") from None


# ------------------------------------------------------------------------------------- trained weights to start from

PATIENCE = 5  # seconds in which the server with timm's weights has to answer
FREE = ("img_size", "output_size", "drop_path")  # arguments in which a model may differ from the one it starts from


def start_from(model: Model, path: str | Path) -> dict:
    """Give `model` the weights in a file that `Model.save` wrote, all but its head's, which stays new.

    Where the images have another size, the positional embeddings are interpolated to the new grid of patches. Returns
    the file's metadata: images want the normalisation that these weights were trained with.

    Raises:
        CheckpointError: the file cannot be used.
        ValueError: it holds a model of another class or of other sizes.
    """
    source = load_file(path, type(model.module) if isinstance(model, OwnModel) else None)
    try:
        schema.check(source.metadata, schema.optional({}, **schema.NORMALISATION, **schema.ORIGIN), "metadata")
    except ValueError as error:
        raise CheckpointError(f"{path} is not as train.py writes it: {error}") from None
    if type(source) is not type(model) or source.title != model.title:
        raise ValueError(f"{path} holds a {source.title}, which cannot start a {model.title}")
    mine, theirs = (m.config.get("arguments", m.config) for m in (model, source))
    different = [
        f"{name} is {theirs[name]} there and {value} here"
        for name, value in mine.items()
        if name in theirs and name not in FREE and theirs[name] != value  # your own class may have got a new argument
    ]
    if different:
        raise ValueError(f"{path} does not fit: {', '.join(different)}")
    new, weights = model.state_dict(), source.state_dict()
    head = {id(tensor) for tensor in model.get_classifier().parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in head:
            weights[name] = new[name]
        elif name == "embedding.position":
            weights[name] = resize_positions(weights[name], parameter.shape[1], source.embedding.cls_token is not None)
    try:
        schema.require_like(weights, new, "weights")
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}") from None
    model.load_state_dict(weights)
    return source.metadata


def resize_positions(position: torch.Tensor, tokens: int, cls_token: bool) -> torch.Tensor:
    """Positional embeddings `(1, tokens before, hidden_size)` for a square grid of another size, by bicubic
    interpolation (Dosovitskiy et al. 2021); that of the CLS token, which has no place in the grid, is kept."""
    if position.shape[1] == tokens:
        return position
    before, after = (round((n - cls_token) ** 0.5) for n in (position.shape[1], tokens))
    grid = position[:, cls_token:].unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (after, after), mode="bicubic", antialias=True)
    return torch.cat([position[:, :cls_token], grid.flatten(2).transpose(1, 2)], dim=1)


def load_timm_weights(model: TimmModel, path: str | None = None) -> None:
    """Give `model` timm's published weights, all but its head's, which stays new.

    Args:
        path: a file with them (.safetensors, .pth, .npz); None downloads them, or finds them in timm's cache.

    Raises:
        ValueError: they are not available, or do not fit.
    """
    import timm

    name = model.config["name"]
    path = None if path is None else str(find_file(path))
    if path is not None and not Path(path).is_file():
        raise ValueError(f"the weights of {name} are not available from {path}: there is no such file")
    if path is not None:
        require_reasonable_size(path)
    overlay = None if path is None else {"file": path, "custom_load": Path(path).suffix == ".npz"}
    source = path or "the network"
    print(f"weights of {name} from {source}" + ("" if path else " or timm's cache ..."), flush=True)
    for chatty in ("huggingface_hub", "timm"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    on_hub = path is None and model.backbone.pretrained_cfg.get("hf_hub_id")
    silence = hub_silence() if on_hub else ""
    try:  # with its own head: with another one, timm would take a file of which nothing fits
        with from_cache_alone() if silence else contextlib.nullcontext():
            trained = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the libraries below have many ways of saying that it did not work
        reason = silence or first_line(error)
        advice = "" if path else ". Without a network, --pretrained_file takes them from a file"
        raise ValueError(f"the weights of {name} are not available from {source}: {reason}{advice}") from None
    head = {id(tensor) for tensor in model.get_classifier().parameters()}
    new = {name: p for name, p in model.backbone.named_parameters() if id(p) in head}
    model.backbone.load_state_dict({**trained.state_dict(), **new})


def hub_silence() -> str:
    """Why the server that timm's weights lie on cannot be asked for them; empty where it answers.

    Without a network the library that asks it tries again and again, in silence, for a minute.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    host, errors = urlsplit(constants.ENDPOINT).netloc, []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception as error:
            errors.append(error)

    # in a thread, because looking up an address may take longer than any limit
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        return f"{host} has not answered for {PATIENCE} seconds, and timm's cache does not have them"
    return f"{host} cannot be reached, and timm's cache does not have them" if errors else ""


@contextlib.contextmanager
def from_cache_alone() -> Iterator[None]:
    """Within, huggingface_hub asks no server."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def freeze_backbone(model: Model) -> None:
    """Leave only the head to be trained."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
