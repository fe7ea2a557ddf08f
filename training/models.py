"""Start from trained weights: those of another model of this project, or the published ones of a timm model."""

import logging
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from network import Module, TimmModel

FREE = ("img_size", "output_size", "drop_path")  # arguments in which a model may differ from the one it starts from


def start_from(model: Module, path: str | Path) -> dict:
    """Give `model` the weights in a file that `Module.save` wrote, all but its head's, which stays new.

    Where the images have another size, the positional embeddings are interpolated to the new grid of patches. Returns
    the file's metadata: images want the normalisation that these weights were trained with.

    Raises:
        CheckpointError: the file cannot be used.
        ValueError: it holds a model of another class or of other sizes.
    """
    source = Module.load(path)
    if type(source) is not type(model):
        raise ValueError(f"{path} holds a {type(source).__name__}, which cannot start a {type(model).__name__}")
    different = [
        f"{name} is {source.config[name]} there and {value} here"
        for name, value in model.config.items()
        if name not in FREE and source.config[name] != value
    ]
    if different:
        raise ValueError(f"{path} does not fit: {', '.join(different)}")
    new, weights = model.state_dict(), source.state_dict()
    head = {id(tensor) for tensor in head_of(model).parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in head:
            weights[name] = new[name]
        elif name == "embedding.position":
            weights[name] = resize_positions(weights[name], parameter.shape[1], source.embedding.cls_token is not None)
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
        ValueError: they cannot be had, or do not fit.
    """
    import timm

    name = model.config["name"]
    if path is not None and not Path(path).is_file():
        raise ValueError(f"the weights of {name} cannot be had from {path}: there is no such file")
    overlay = None if path is None else {"file": path, "custom_load": Path(path).suffix == ".npz"}
    source = path or "the network"
    print(f"weights of {name} from {source}" + ("" if path else " or timm's cache (without either, a minute's wait)"))
    for chatty in ("huggingface_hub", "timm"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:  # with its own head: with another one, timm would take a file of which nothing fits
        trained = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the libraries below have many ways of saying that it did not work
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        advice = "" if path else ". Without a network, --pretrained_file takes them from a file"
        raise ValueError(f"the weights of {name} cannot be had from {source}: {reason}{advice}") from None
    head = {id(tensor) for tensor in head_of(model).parameters()}
    new = {name: p for name, p in model.backbone.named_parameters() if id(p) in head}
    model.backbone.load_state_dict({**trained.state_dict(), **new})


def freeze_backbone(model: Module) -> None:
    """Leave only the head to be trained."""
    model.requires_grad_(False)
    head_of(model).requires_grad_(True)


def head_of(model: Module) -> nn.Module:
    """The last linear layer, which belongs to the classes."""
    return model.output if hasattr(model, "output") else model.head
