"""Optimisers and learning-rate schedules by name: what the hyperparameters in train.py turn into."""

import math
from collections.abc import Iterable

import torch
import torch.nn as nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from network import Module, TimmModel, VisionTransformer

# The peak learning rate and the weight decay of each optimiser where none is given. Adam and SGD add the decay to the
# gradient, where AdamW and Muon take it off the weights, so that one value cannot serve all.
DEFAULTS = {"muon": (8e-3, 0.1), "adamw": (2e-3, 0.05), "adam": (2e-3, 0.0), "sgd": (0.1, 5e-4)}
FINE_TUNING_RATE = 5e-4  # peak rate for AdamW and Adam on timm's published weights, as in BEiT (Bao et al. 2022)


def build_optimizer(
    model: Module,
    name: str = "muon",
    lr: float | None = None,
    weight_decay: float | None = None,
    layer_decay: float = 1.0,
) -> Optimizer:
    """The optimiser for `model`, with the learning rate and weight decay given or those in DEFAULTS.

    "adam" (Kingma & Ba 2015), "adamw" (Loshchilov & Hutter 2019), "sgd" with Nesterov momentum 0.9 (Sutskever et al.
    2013), or "muon" (Jordan et al. 2024), which orthogonalises the updates of the matrices and filters between the
    first layer and the last, and leaves everything else to AdamW; timm's models get AdamW alone. With none of them are
    norms, biases, the CLS token and positions decayed. What wants no gradient is left out. The learning rate of each
    layer is that of the one above it times `layer_decay` (Bao et al. 2022).
    """
    if name not in DEFAULTS:
        raise ValueError(f"unknown optimizer {name!r}: choose {', '.join(DEFAULTS)}")
    lr, weight_decay = (
        default if given is None else given for given, default in zip((lr, weight_decay), DEFAULTS[name], strict=True)
    )
    hidden = set()
    if name == "muon" and not isinstance(model, TimmModel):
        hidden = set([p for p in model.parameters() if p.ndim in (2, 4)][1:-1])
    spared, scales = undecayed(model), {} if layer_decay == 1 else layer_scales(model, layer_decay)

    def group(parameters: Iterable[nn.Parameter]) -> list[dict]:
        """One group for each pair of decay and rate, the decayed ones and the higher rates first."""
        members = {}
        for p in parameters:
            members.setdefault((p in spared, scales.get(p, 1.0)), []).append(p)
        return [
            {"params": members[spare, scale], "lr": scale * lr, "weight_decay": 0.0 if spare else weight_decay}
            for spare, scale in sorted(members, key=lambda key: (key[0], -key[1]))
        ]

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = group(p for p in trained if p not in hidden)
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    if name == "adam":
        return Adam(groups, lr=lr, fused=True)
    adamw = AdamW(groups, lr=lr, fused=True)
    hidden_groups = group(p for p in trained if p in hidden)
    return MuonAndAdamW(hidden_groups, adamw) if hidden_groups else adamw


def undecayed(model: Module) -> set[nn.Parameter]:
    """Norms, biases, CLS token and positions, which have no direction that a pull towards zero would help."""
    if isinstance(model, TimmModel):
        from timm.optim import param_groups_weight_decay

        names = getattr(model.backbone, "no_weight_decay", set)()
        groups = param_groups_weight_decay(model.backbone, weight_decay=1.0, no_weight_decay_list=names)
        return {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    # matrices and convolutions have two and four axes, all else has one or three
    return {p for p in model.parameters() if p.ndim not in (2, 4)}


def layer_scales(model: Module, decay: float) -> dict[nn.Parameter, float]:
    """What each parameter's learning rate is multiplied with: 1 in the head, `decay` in the layer below, and so on."""
    if isinstance(model, TimmModel):
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(model.backbone, layer_decay=decay)
        return {p: group["lr_scale"] for group in groups for p in group["params"]}
    layers = [[module] for module in model.children() if list(module.parameters())]
    if isinstance(model, VisionTransformer):
        *blocks, last = model.blocks
        layers = [[model.embedding], *([block] for block in blocks), [last, model.norm], [model.head]]
    depths = enumerate(reversed(layers))
    return {p: decay**depth for depth, layer in depths for module in layer for p in module.parameters()}


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
