"""Several processes that train as one: what `torchrun --nproc_per_node=2 train.py` does differently."""

import contextlib

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from runner import Runner, totals_of
from support import distributed


class ParallelRunner(Runner):
    """A Runner in each of several processes, whose loaders give each its part of every batch.

    All count every image once: losses, accuracies and gradients are those of the whole batch, and all stop together.
    """

    def __init__(self, model: nn.Module, *args, **options):
        super().__init__(model, *args, **options)
        share_batch_norm(self.model, self.device)

    def train(self, *args, **options) -> dict[str, list]:
        if not isinstance(self.training_model, DistributedDataParallel):
            device_ids = [self.device] if self.device.type == "cuda" else None
            self.training_model = DistributedDataParallel(
                self.training_model, device_ids=device_ids, gradient_as_bucket_view=True
            )
        return super().train(*args, **options)

    def add_gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        totals, processes = torch.zeros(3, device=self.device), distributed.world_size()
        num_images = distributed.all_reduce(len(labels))
        # as many parts in each process, though one may be empty
        parts = min(self.grad_accum, -(-num_images // processes))
        for part, (x, y) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)):
            # the gradients travel once, with the last part
            with contextlib.nullcontext() if part == parts - 1 else self.training_model.no_sync():
                logits = self.logits(self.training_model, x)
                # the loss of nothing is zero
                loss = self.criterion(logits, y) if len(y) else logits.sum()
                # DistributedDataParallel will divide by the number of processes
                self.scaler.scale(loss * (len(y) * processes / num_images)).backward()
            totals += totals_of(loss, logits, y)
        return self.whole(totals)

    def whole(self, totals: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(totals)
        return totals

    def should_stop(self) -> bool:
        """Whether any process has been asked to: a signal may reach them at different steps."""
        return distributed.all_reduce(self.stop) > 0


class OwnNumbers:
    """Has each process draw other random numbers, for stochastic depth. The first goes on as it would alone; the others
    begin anew in each step, so that a run taken up draws what it would have drawn.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def step_start(self, runner: Runner) -> None:
        if rank := distributed.rank():
            torch.manual_seed(self.seed + 1_000_003 * (rank + 1_000_003 * runner.step))


def share_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Have BatchNorm normalise with the images of all processes, as it would in one, in place.

    Kinds of it that a library derives keep the statistics of each process's own images, as do those without weights,
    momentum or running statistics.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is not nn.BatchNorm2d or not child.affine or None in (child.momentum, child.running_mean):
                continue
            if device.type == "cuda":
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            else:
                child.__class__ = SharedBatchNorm2d  # torch's SyncBatchNorm is for GPUs


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm (Ioffe & Szegedy 2015) over the batches of all processes together, also where some are empty."""

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        count = distributed.all_reduce(x.numel() // x.shape[1])
        mean = SumOverProcesses.apply(x.float().sum(dim=(0, 2, 3))) / count
        centred = x.float() - mean.view(1, -1, 1, 1)
        variance = SumOverProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(1, count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1)).to(x.dtype)


class SumOverProcesses(torch.autograd.Function):
    """Every process has the sum; what it has to do with one's own number it has to do with everyone's."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        if distributed.world_size() > 1:
            dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return SumOverProcesses.forward(None, gradient)
