"""Optimisers and learning-rate schedules by name: what the hyperparameters in train.py turn into."""

import math

import torch
import torch.nn as nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from network import Module, TransformerBlock


def build_optimizer(model: Module, name: str = "muon", lr: float = 6e-3, weight_decay: float = 0.05) -> Optimizer:
    """The optimiser for `model`: "adamw" (Loshchilov & Hutter 2019) or "muon" (Jordan et al. 2024).

    "muon" orthogonalises the updates of the transformer blocks' matrices and leaves everything else to AdamW; a model
    without blocks gets AdamW alone. Norms, biases, the CLS token and positions are not decayed.
    """
    matrices = []
    if name == "muon":
        blocks = [block for block in model.modules() if isinstance(block, TransformerBlock)]
        matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    elif name != "adamw":
        raise ValueError(f"unknown optimizer {name!r}: choose muon or adamw")
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    # matrices and convolutions have two and four axes; norms, biases, CLS token and positions have one or three
    groups = [
        {"params": [p for p in rest if p.ndim in (2, 4)], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    adamw = AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
    return MuonAndAdamW(matrices, adamw, lr, weight_decay) if matrices else adamw


class MuonAndAdamW(Optimizer):
    """torch's Muon for `matrices` and an AdamW for the rest, seen from outside as one optimiser.

    Muon's updates are scaled to the size of AdamW's (`match_rms_adamw`, Liu et al. 2025), so one learning rate serves
    both.
    """

    def __init__(self, matrices: list[nn.Parameter], adamw: AdamW, lr: float, weight_decay: float):
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, adamw]
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self._share_groups()

    def _share_groups(self) -> None:
        """The parts and the whole hold the same group dicts, so that a schedule that sets `lr` here sets it there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def build_schedule(optimizer: Optimizer, steps: int, warmup: float = 0.1) -> LambdaLR:
    """Linear warm-up over the fraction `warmup` of all `steps`, then half a cosine down to zero; one call a step."""
    warmup_steps = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    return LambdaLR(optimizer, factor)
