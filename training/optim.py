"""Optimisers and learning-rate schedules by name: what the hyperparameters in train.py turn into."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from network import Model
from support import schema

Groups = list[dict]  # of parameters, as torch's optimisers take them: `params`, `lr`, `weight_decay`


def muon(groups: Groups, matrices: Groups, lr: float) -> Optimizer:
    """Muon (Jordan et al. 2024) for the hidden matrices, whose updates it orthogonalises, and AdamW for the rest."""
    return MuonAndAdamW(matrices, adamw(groups, [], lr)) if matrices else adamw(groups, [], lr)


def adamw(groups: Groups, matrices: Groups, lr: float) -> Optimizer:
    """Loshchilov & Hutter 2019."""
    return AdamW(groups + matrices, lr=lr, fused=True)


def adam(groups: Groups, matrices: Groups, lr: float) -> Optimizer:
    """Kingma & Ba 2015; weight decay is added to the gradient."""
    return Adam(groups + matrices, lr=lr, fused=True)


def sgd(groups: Groups, matrices: Groups, lr: float) -> Optimizer:
    """Nesterov momentum 0.9 (Sutskever et al. 2013); weight decay is added to the gradient."""
    return SGD(groups + matrices, lr=lr, momentum=0.9, nesterov=True)


# `--optimizer NAME`. Each is given groups of parameters, the hidden matrices apart, and the learning rate.
OPTIMIZERS = {"muon": muon, "adamw": adamw, "adam": adam, "sgd": sgd}


def build_optimizer(
    model: Model, name: str = "muon", lr: float = 8e-3, weight_decay: float = 0.1, layer_decay: float = 1.0
) -> Optimizer:
    """The optimiser for `model` by its name in OPTIMIZERS.

    Norms, biases, the CLS token and positions are not decayed; what wants no gradient is left out. The learning rate of
    each layer is that of the one above it times `layer_decay` (Bao et al. 2022).
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose {', '.join(OPTIMIZERS)}")
    hidden = model.hidden_matrices() if name == "muon" else set()
    undecayed, scales = model.undecayed(), {} if layer_decay == 1 else model.rate_scales(layer_decay)

    def group(parameters: Iterable[nn.Parameter]) -> Groups:
        """One group for each pair of decay and rate, the decayed ones and the higher rates first."""
        members = {}
        for p in parameters:
            members.setdefault((p in undecayed, scales.get(p, 1.0)), []).append(p)
        return [
            {"params": members[spared, scale], "lr": scale * lr, "weight_decay": 0.0 if spared else weight_decay}
            for spared, scale in sorted(members, key=lambda key: (key[0], -key[1]))
        ]

    trained = [p for p in model.parameters() if p.requires_grad]
    others, matrices = group(p for p in trained if p not in hidden), group(p for p in trained if p in hidden)
    return OPTIMIZERS[name](others, matrices, lr)


class MuonAndAdamW(Optimizer):
    """torch's Muon for `groups` of matrices and filters, and an AdamW for the rest, seen from outside as one optimiser.

    torch's Muon takes matrices alone: a convolution's filters `(out, in, height, width)` are given to it as the matrix
    `(out, in * height * width)`. Its updates are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025), so
    one learning rate serves both.
    """

    def __init__(self, groups: list[dict], adamw: AdamW):
        self.matrices = {p: nn.Parameter(p.detach().flatten(1)) for group in groups for p in group["params"]}
        as_matrices = [{**group, "params": [self.matrices[p] for p in group["params"]]} for group in groups]
        self.muon = torch.optim.Muon(as_matrices, adjust_lr_fn="match_rms_adamw")
        self.adamw = adamw
        ours = [{**theirs, "params": g["params"]} for theirs, g in zip(self.muon.param_groups, groups, strict=True)]
        super().__init__(ours + adamw.param_groups, {})
        self._share_groups()

    def _share_groups(self) -> None:
        """AdamW and the whole hold the same group dicts, so that a schedule that sets `lr` here sets it there."""
        self.param_groups[len(self.muon.param_groups) :] = self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self._give_to_muon()
        self.muon.step()
        for weight, matrix in self.matrices.items():
            weight.copy_(matrix.view_as(weight))
        self.adamw.step()

    def _give_to_muon(self) -> None:
        for theirs, ours in zip(self.muon.param_groups, self.param_groups, strict=False):
            theirs.update({**ours, "params": theirs["params"]})
        for weight, matrix in self.matrices.items():
            matrix.data = weight.detach().flatten(1)
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)

    def state_dict(self) -> dict:
        self._give_to_muon()
        return {"parts": [self.muon.state_dict(), self.adamw.state_dict()]}

    def load_state_dict(self, state_dict: dict) -> None:
        self._give_to_muon()  # to have its matrices on the weights' device
        for part, state in zip((self.muon, self.adamw), state_dict["parts"], strict=True):
            part.load_state_dict(state)
        for theirs, ours in zip(self.muon.param_groups, self.param_groups, strict=False):
            ours.update({**theirs, "params": ours["params"]})
        self._share_groups()


def half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


# `--schedule NAME`: the factor on the peak rate after warm-up, from the part of what follows warm-up that is done, and
# the part of all steps. "one_cycle" also warms up differently.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, done: half_cosine(1, 0, progress),  # Loshchilov & Hutter 2017
    "constant": lambda progress, done: 1.0,
    "linear": lambda progress, done: max(0.0, 1 - progress),
    "step": lambda progress, done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),  # He et al. 2016
    "one_cycle": lambda progress, done: half_cosine(1, 1 / 25e4, min(1, progress)),  # Smith & Topin 2019
}


def build_schedule(optimizer: Optimizer, steps: int, warmup: float = 0.1, name: str = "cosine") -> LambdaLR:
    """The learning rate over `steps` optimiser steps, as a factor on its peak; one call a step.

    It rises linearly over the fraction `warmup` of all steps, and then follows the entry of SCHEDULES. "one_cycle"
    rises from a 25th of the peak, along half a cosine; the momentum is left alone.
    """
    return LambdaLR(optimizer, schedule_factor(steps, warmup, name))


def schedule_factor(steps: int, warmup: float, name: str) -> Callable[[float], float]:
    """What the peak rate is multiplied by at each step, from 0; between two steps, too."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose {', '.join(SCHEDULES)}")
    warmup_steps = max(1, round(warmup * steps))
    # one_cycle reaches its peak and its end a step earlier
    first, last = (warmup_steps - 1, steps - 1) if name == "one_cycle" else (warmup_steps, steps)

    def factor(step: float) -> float:
        if step < first:
            return half_cosine(1 / 25, 1, step / first) if name == "one_cycle" else (step + 1) / first
        return SCHEDULES[name]((step - first) / max(1, last - first), step / steps)

    return factor


def set_position(schedule: LambdaLR, step: int) -> None:
    """Put the learning rates of this step in force, from 0, as if the schedule had come to it by itself."""
    schedule.last_epoch = step
    for group, peak, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = peak * factor(step)


# What these optimisers remember of each parameter, besides `step` tensors of its shape.
MEMORY = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, Adam: {"step", "exp_avg", "exp_avg_sq"}}
MEMORY |= {SGD: {"momentum_buffer"}, torch.optim.Muon: {"momentum_buffer"}}


def checked_state(optimizer: Optimizer, state: dict) -> dict:
    """A state for `optimizer.load_state_dict`: what a file remembers of each parameter, and the optimiser's own rates.

    torch takes a state as it comes, and fused AdamW writes beyond the end of tensors that are too small.

    Raises:
        ValueError: it is not that of such an optimiser for these parameters.
    """
    if isinstance(optimizer, MuonAndAdamW):
        schema.check(state, {"parts": [{...: schema.ANYTHING}]}, "optimizer")
        pairs = zip((optimizer.muon, optimizer.adamw), state["parts"], strict=True)
        return {"parts": [checked_state(part, found) for part, found in pairs]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memory = state.get("state") if isinstance(state, dict) else None
    if not isinstance(memory, dict) or not memory.keys() <= set(range(len(parameters))):
        raise ValueError("it remembers other parameters than the optimizer's")
    scalar = torch.zeros((), dtype=torch.float32)
    for number, values in memory.items():
        if not isinstance(values, dict) or values.keys() != MEMORY.get(type(optimizer), values.keys()):
            raise ValueError(f"it does not remember of parameter {number} what {type(optimizer).__name__} does")
        for name, value in values.items():
            wanted = scalar if name == "step" else parameters[number]
            schema.require_like(value, wanted, f"{name} of parameter {number}")
    return {"state": memory, "param_groups": optimizer.state_dict()["param_groups"]}
