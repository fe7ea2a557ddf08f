"""Optimisers and learning-rate schedules by name: what the hyperparameters in train.py turn into."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from network import Model
from runner import has_bf16
from support import schema

Groups = list[dict]  # of parameters, as torch's optimisers take them: `params`, `lr`, `weight_decay`


def muon(groups: Groups, matrices: Groups, lr: float, momentum: float) -> Optimizer:
    """Muon (Jordan et al. 2024) for the hidden matrices, whose updates it orthogonalises, and AdamW for the rest."""
    rest = adamw(groups, [], lr, 0.9)
    return MuonAndAdamW(Muon(matrices, momentum), rest) if matrices else rest


def adamw(groups: Groups, matrices: Groups, lr: float, momentum: float) -> Optimizer:
    """Loshchilov & Hutter 2019."""
    return AdamW(groups + matrices, lr=lr, betas=(momentum, 0.999), fused=True)


def adam(groups: Groups, matrices: Groups, lr: float, momentum: float) -> Optimizer:
    """Kingma & Ba 2015; weight decay is added to the gradient."""
    return Adam(groups + matrices, lr=lr, betas=(momentum, 0.999), fused=True)


def sgd(groups: Groups, matrices: Groups, lr: float, momentum: float) -> Optimizer:
    """With Nesterov's momentum (Sutskever et al. 2013); weight decay is added to the gradient."""
    return SGD(groups + matrices, lr=lr, momentum=momentum, nesterov=momentum > 0)


# `--optimizer NAME`. Each is given groups of parameters, the hidden matrices apart, the learning rate and the momentum.
OPTIMIZERS = {"muon": muon, "adamw": adamw, "adam": adam, "sgd": sgd}


def build_optimizer(
    model: Model,
    name: str = "muon",
    lr: float = 6e-3,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    momentum: float = 0.95,
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
    return OPTIMIZERS[name](others, matrices, lr, momentum)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) as torch's, with these differences: a convolution's filters `(out, in, height, width)`
    are the matrix `(out, in * height * width)`, and matrices of one shape are orthogonalised together.

    Updates are scaled to the size of AdamW's (Liu et al. 2025), so one learning rate serves both.
    """

    def __init__(self, groups: Groups, momentum: float = 0.95):
        super().__init__(groups, {"momentum": momentum})  # Nesterov's

    @torch.no_grad()
    def step(self, closure=None):
        alike = {}  # by shape: the parameters, with their group and what is to be orthogonalised
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"]).flatten(1)
                alike.setdefault(update.shape, []).append((p, group, update))
        for shape, members in alike.items():
            updates = orthogonalize(torch.stack([update for *_, update in members]))
            for (p, group, _), update in zip(members, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Of each of the matrices `(n, rows, columns)`, about the nearest with orthonormal rows or columns: five steps of
    a Newton-Schulz iteration with the coefficients of Jordan et al. 2024, which make singular values 0.7 to 1.2."""
    x = matrices.to(torch.bfloat16 if has_bf16(matrices.device) else torch.float32)
    high = x.shape[1] > x.shape[2]
    x = x.mT if high else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return (x.mT if high else x).to(matrices.dtype)


class MuonAndAdamW(Optimizer):
    """Muon for some parameters and AdamW for the rest, seen from outside as one optimiser."""

    def __init__(self, muon: Muon, adamw: AdamW):
        self.parts = [muon, adamw]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """The parts and the whole hold the same group dicts, so that a schedule that sets `lr` here sets it there."""
        self.param_groups[:] = [group for part in self.parts for group in part.param_groups]

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


# `--schedule NAME`: the factor on the peak rate after warm-up, from the part of what follows warm-up that is done, and
# the part of all steps. "one_cycle" also warms up differently.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, done: half_cosine(1, 0, progress),  # Loshchilov & Hutter 2017
    "constant": lambda progress, done: 1.0,
    "linear": lambda progress, done: 1 - progress,
    "step": lambda progress, done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),  # He et al. 2016
    "one_cycle": lambda progress, done: half_cosine(1, 1 / 25e4, progress),  # Smith & Topin 2019
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
        return SCHEDULES[name](min(1, (step - first) / max(1, last - first)), step / steps)

    return factor


def set_position(schedule: LambdaLR, step: int) -> None:
    """Put the learning rates of this step in force, from 0, as if the schedule had come to it by itself."""
    schedule.last_epoch = step
    for group, peak, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = peak * factor(step)


RATES_OF_A_GROUP = ("params", "lr", "initial_lr", "weight_decay", "momentum", "betas")  # which a run sets itself
# What these optimisers remember of each parameter, besides `step` tensors of its shape.
MEMORY = {AdamW: {"step", "exp_avg", "exp_avg_sq"}, Adam: {"step", "exp_avg", "exp_avg_sq"}}
MEMORY |= {SGD: {"momentum_buffer"}, Muon: {"momentum_buffer"}}


def checked_state(optimizer: Optimizer, state: dict) -> dict:
    """A state for `optimizer.load_state_dict`: what a file remembers of each parameter, and the optimiser's own rates.

    torch takes a state as it comes, and fused AdamW writes beyond the end of tensors that are too small. What an
    optimiser of your own remembers is not known here, so it is taken as it comes.

    Raises:
        ValueError: it is not that of such an optimiser for these parameters.
    """
    if isinstance(optimizer, MuonAndAdamW):
        schema.check(state, {"parts": [{...: schema.ANYTHING}]}, "optimizer")
        pairs = zip(optimizer.parts, state["parts"], strict=True)
        return {"parts": [checked_state(part, found) for part, found in pairs]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    memory = state.get("state") if isinstance(state, dict) else None
    if not isinstance(memory, dict) or not memory.keys() <= set(range(len(parameters))):
        raise ValueError("it remembers other parameters than the optimizer's")
    groups, known = optimizer.state_dict()["param_groups"], MEMORY.get(type(optimizer))
    if known is None:
        schema.check(state.get("param_groups"), [{...: schema.ANYTHING}], "param_groups")
        pairs = zip(state["param_groups"], groups, strict=True)
        groups = [{**before, **{key: now[key] for key in RATES_OF_A_GROUP if key in now}} for before, now in pairs]
        return {"state": memory, "param_groups": groups}
    if any(group.get("amsgrad") for group in groups):
        known = known | {"max_exp_avg_sq"}
    scalar = torch.zeros((), dtype=torch.float32)
    for number, values in memory.items():
        if not isinstance(values, dict) or values.keys() != known:
            raise ValueError(f"it does not remember of parameter {number} what {type(optimizer).__name__} does")
        for name, value in values.items():
            wanted = scalar if name == "step" else parameters[number]
            schema.require_like(value, wanted, f"{name} of parameter {number}")
    return {"state": memory, "param_groups": groups}
