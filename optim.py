"""Optimisers and learning-rate schedules by name: what the hyperparameters in train.py turn into."""

import math

import torch
import torch.nn as nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from network import Module

# The peak learning rate and the weight decay of each optimiser where none is given. Adam and SGD add the decay to the
# gradient, where AdamW and Muon take it off the weights, so that one value cannot serve all.
DEFAULTS = {"muon": (8e-3, 0.1), "adamw": (2e-3, 0.05), "adam": (2e-3, 0.0), "sgd": (0.1, 5e-4)}


def build_optimizer(
    model: Module, name: str = "muon", lr: float | None = None, weight_decay: float | None = None
) -> Optimizer:
    """The optimiser for `model`, with the learning rate and weight decay given or those in DEFAULTS.

    "adam" (Kingma & Ba 2015), "adamw" (Loshchilov & Hutter 2019), "sgd" with Nesterov momentum 0.9 (Sutskever et al.
    2013), or "muon" (Jordan et al. 2024), which orthogonalises the updates of the matrices and filters between the
    first layer and the last, and leaves everything else to AdamW. With none of them are norms, biases, the CLS token
    and positions decayed.
    """
    if name not in DEFAULTS:
        raise ValueError(f"unknown optimizer {name!r}: choose {', '.join(DEFAULTS)}")
    lr, weight_decay = (
        default if given is None else given for given, default in zip((lr, weight_decay), DEFAULTS[name], strict=True)
    )
    # matrices and convolutions have two and four axes; norms, biases, CLS token and positions have one or three
    weights = [p for p in model.parameters() if p.ndim in (2, 4)]
    hidden = weights[1:-1] if name == "muon" else []
    taken = {id(p) for p in hidden}
    groups = [
        {"params": [p for p in weights if id(p) not in taken], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    if name == "adam":
        return Adam(groups, lr=lr, fused=True)
    adamw = AdamW(groups, lr=lr, fused=True)
    return MuonAndAdamW(hidden, adamw, lr, weight_decay) if hidden else adamw


class MuonAndAdamW(Optimizer):
    """torch's Muon for `weights` and an AdamW for the rest, seen from outside as one optimiser.

    torch's Muon takes matrices alone: a convolution's filters `(out, in, height, width)` are given to it as the matrix
    `(out, in * height * width)`. Its updates are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025), so
    one learning rate serves both.
    """

    def __init__(self, weights: list[nn.Parameter], adamw: AdamW, lr: float, weight_decay: float):
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in weights]
        self.muon = torch.optim.Muon(self.matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = adamw
        super().__init__([{**self.muon.param_groups[0], "params": weights}, *adamw.param_groups], {})
        self.param_groups[1:] = adamw.param_groups  # the same dicts: a schedule that sets `lr` here sets it there

    @torch.no_grad()
    def step(self, closure=None):
        self._give_to_muon()
        self.muon.step()
        for weight, matrix in zip(self.param_groups[0]["params"], self.matrices, strict=True):
            weight.copy_(matrix.view_as(weight))
        self.adamw.step()

    def _give_to_muon(self) -> None:
        self.muon.param_groups[0].update({**self.param_groups[0], "params": self.matrices})
        for weight, matrix in zip(self.param_groups[0]["params"], self.matrices, strict=True):
            matrix.data = weight.detach().flatten(1)
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)

    def state_dict(self) -> dict:
        self._give_to_muon()
        return {"parts": [self.muon.state_dict(), self.adamw.state_dict()]}

    def load_state_dict(self, state_dict: dict) -> None:
        self._give_to_muon()  # to have its matrices on the weights' device
        for part, state in zip((self.muon, self.adamw), state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups[0].update({**self.muon.param_groups[0], "params": self.param_groups[0]["params"]})
        self.param_groups[1:] = self.adamw.param_groups


SCHEDULES = ("cosine", "constant", "linear", "step", "one_cycle")


def build_schedule(optimizer: Optimizer, steps: int, warmup: float = 0.1, name: str = "cosine") -> LambdaLR:
    """The learning rate over `steps` steps, as a factor on its peak; one call a step.

    It rises linearly over the fraction `warmup` of all steps, and then
    - "cosine": falls to zero along half a cosine (Loshchilov & Hutter 2017),
    - "linear": falls to zero along a line,
    - "step": is cut to a tenth at half and at three quarters of all steps (He et al. 2016),
    - "constant": stays.
    "one_cycle" (Smith & Topin 2019) rises from a 25th and then falls to nearly zero, both along half a cosine; the
    momentum is left alone.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose {', '.join(SCHEDULES)}")
    warmup_steps = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if name == "one_cycle":
            peak = warmup_steps - 1
            if step < peak:
                return half_cosine(1 / 25, 1, step / peak)
            return half_cosine(1, 1 / 25e4, min(1, (step - peak) / max(1, steps - 1 - peak)))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        if name == "cosine":
            return half_cosine(1, 0, progress)
        if name == "linear":
            return max(0.0, 1 - progress)
        if name == "step":
            return 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
        return 1.0

    return LambdaLR(optimizer, factor)


def half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def rates_and_decays(optimizer: Optimizer) -> list[tuple[float, float]]:
    """Peak learning rate and weight decay of each group; the optimiser has a schedule."""
    return [(group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups]


def set_rates_and_decays(optimizer: Optimizer, schedule: LambdaLR, wanted: list[tuple[float, float]]) -> None:
    """Put other peak learning rates and weight decays in force, from the step on that the schedule has come to."""
    schedule.base_lrs = [lr for lr, _ in wanted]
    for group, factor, (lr, decay) in zip(optimizer.param_groups, schedule.lr_lambdas, wanted, strict=True):
        group.update(initial_lr=lr, lr=lr * factor(schedule.last_epoch), weight_decay=decay)
