"""Heat maps of what a model looks at: attention, rollout, gradient relevance, and library attributions.

Every method takes normalised images `(batch, 3, height, width)` and returns heat maps `(batch, height, width)` in
[0, 1] on the images' device: 1 is the place that matters most in that image, 0 one that matters least. Where no patch
reaches (the right and bottom edge, if the patch size does not divide the image) they are 0.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from network import CNN, ResNet20, VisionTransformer
from runner import eval_mode
from support import cli

# --------------------------------------------------------------------------------------- heat maps out of attention


def attention(model: VisionTransformer, images: torch.Tensor, block: int = -1, head: int | None = None) -> torch.Tensor:
    """Heat maps of the attention in one block, of one head or (None) of all heads' mean.

    With a CLS token it is what that token pays to each patch; without, what each patch receives from all, averaged.

    Raises:
        IndexError: no such block or head.
    """
    with torch.no_grad(), eval_mode(model):
        weights = model(images, return_attention=True)["attention_weights"][block]
    return _heat_of_patches(model, images, _read_out(model, weights.mean(dim=1) if head is None else weights[:, head]))


def rollout(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Heat maps of attention rollout (Abnar & Zuidema 2020): attention followed through all blocks."""
    with torch.no_grad(), eval_mode(model):
        weights = model(images, return_attention=True)["attention_weights"]
    return _heat_of_patches(model, images, _read_out(model, roll_out(weights)))


def relevance(model: VisionTransformer, images: torch.Tensor, target=None) -> torch.Tensor:
    """Heat maps of gradient-weighted attention for a class (Chefer et al. 2021, "Generic attention-model
    explainability").

    Args:
        target: the class to explain, for all images or `(batch,)`; None means the predicted one.
    """
    return _heat_of_patches(model, images, _read_out(model, relevance_of_tokens(model, images, target)))


def relevance_of_tokens(model: VisionTransformer, images: torch.Tensor, target=None) -> torch.Tensor:
    """Gradient-weighted attention for a class, `(batch, tokens, tokens)`: what `propagate_relevance` gives.

    Args:
        target: as of `relevance`.
    """
    weights = []  # of each block, `(batch, heads, tokens, tokens)`, as the logits depend on them

    def keep(_module, _arguments, output):
        weights.append(output[1])

    hooks = [block.attention.register_forward_hook(keep) for block in model.blocks]
    try:
        with torch.enable_grad(), eval_mode(model):
            # images that need gradients: then attention has them too, even where the weights are frozen
            logits = model(images.detach().requires_grad_(), return_attention=True)["logits"]
            chosen = logits.gather(1, _target(logits, target)[:, None]).sum()
            gradients = torch.autograd.grad(chosen, weights)
    finally:
        for hook in hooks:
            hook.remove()
    return propagate_relevance(torch.stack(weights).detach(), torch.stack(gradients))


def roll_out(attention_weights: torch.Tensor) -> torch.Tensor:
    """`(num_blocks, batch, heads, tokens, tokens)` -> `(batch, tokens, tokens)`: how much of each input token (last
    axis) each output token holds.

    A block passes on half of each token as it is, along the residual connection, and half as its heads, averaged, mix
    it (Abnar & Zuidema 2020).
    """
    identity = torch.eye(attention_weights.shape[-1]).to(attention_weights)
    matrix = identity.expand_as(attention_weights[0, :, 0])
    for weights in attention_weights.mean(dim=2):
        matrix = (0.5 * weights + 0.5 * identity) @ matrix
    return matrix


def propagate_relevance(attention_weights: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Relevance `(batch, tokens, tokens)` of each input token (last axis) to each output token.

    R = 1, and in each block R <- R + A R, where A is the heads' mean of attention times its gradient, without what is
    negative (Chefer et al. 2021, equations 5 and 6).

    Args:
        attention_weights, gradients: `(num_blocks, batch, heads, tokens, tokens)`; gradients of a class's logit.
    """
    matrix = torch.eye(attention_weights.shape[-1]).to(attention_weights)
    for weighted in (attention_weights * gradients).clamp(min=0).mean(dim=2):
        matrix = matrix + weighted @ matrix
    return matrix


def _read_out(model: VisionTransformer, matrix: torch.Tensor) -> torch.Tensor:
    """Of `(batch, tokens, tokens)` what reaches the classifier: the CLS token's row, or the mean of the patches'."""
    return matrix[:, 0, 1:] if model.pooling == "cls" else matrix.mean(dim=1)


def _heat_of_patches(model: VisionTransformer, images: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Scores `(batch, patches)`, stretched to [0, 1] in each image, on the pixels of their patches."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    size, side = patch_grid(model, images)
    heat = ((scores - low) / (high - low).clamp(min=1e-12)).unflatten(1, (side, side))
    heat = heat.repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)
    return F.pad(heat, (0, images.shape[3] - heat.shape[2], 0, images.shape[2] - heat.shape[1]))


def patch_grid(model: nn.Module, images: torch.Tensor) -> tuple[int, int]:
    """Side of a patch in pixels and patches along a side; for models without patches, an eighth of the image."""
    if isinstance(model, VisionTransformer):
        return model.config["patch_size"], model.embedding.grid_size
    size = max(1, images.shape[-1] // 8)
    return size, images.shape[-1] // size


# --------------------------------------------------------------------------------------------- heat maps by Captum


def integrated_gradients(
    model: nn.Module, images: torch.Tensor, target=None, steps: int = 16, signed: bool = False
) -> torch.Tensor:
    """Heat maps of integrated gradients (Sundararajan et al. 2017), from the mean colour (zeros) to the image.

    Args:
        target: the class to explain, for all images or `(batch,)`; None means the predicted one.
        steps: at which the gradient is taken along the way.
        signed: give the attribution itself, which adds up to the logit's difference between the image and the mean
            colour. Otherwise heat is what speaks for the class, and 1 the 99th percentile of it.
    """
    from captum.attr import IntegratedGradients

    with torch.enable_grad(), eval_mode(model):
        attribution = IntegratedGradients(model).attribute(
            images, target=_target_of(model, images, target), n_steps=steps, internal_batch_size=max(128, len(images))
        )
    attribution = attribution.detach().sum(dim=1).to(images.dtype)
    return attribution if signed else _heat_of_evidence(attribution, quantile=0.99)


def occlusion(model: nn.Module, images: torch.Tensor, target=None, signed: bool = False) -> torch.Tensor:
    """Heat maps of occlusion (Zeiler & Fergus 2014): how far the logit falls when a patch gets the mean colour.

    Args:
        target: the class to explain, for all images or `(batch,)`; None means the predicted one.
        signed: give the fall of the logit itself, negative where it rises. Otherwise heat is 0 there.
    """
    from captum.attr import Occlusion

    size, _ = patch_grid(model, images)
    window = (images.shape[1], size, size)
    with torch.no_grad(), eval_mode(model):
        attribution = Occlusion(model).attribute(
            images, window, strides=window, target=_target_of(model, images, target), perturbations_per_eval=8
        )
    attribution = attribution[:, 0].to(images.dtype)  # the same in every channel
    return attribution if signed else _heat_of_evidence(attribution)


LAST_MAP = {CNN: lambda model: model.relu2, ResNet20: lambda model: model.blocks[-1]}  # what Grad-CAM looks at


def grad_cam(model: CNN | ResNet20, images: torch.Tensor, target=None) -> torch.Tensor:
    """Heat maps of Grad-CAM (Selvaraju et al. 2017) on the model's last map, after its ReLU.

    Args:
        target: the class to explain, for all images or `(batch,)`; None means the predicted one.
    """
    from captum.attr import LayerGradCam

    with torch.enable_grad(), eval_mode(model):
        heat = LayerGradCam(model, LAST_MAP[type(model)](model)).attribute(
            images, target=_target_of(model, images, target), relu_attributions=True
        )
    return _heat_of_evidence(F.interpolate(heat.detach(), images.shape[2:], mode="bilinear")[:, 0])


def _heat_of_evidence(attribution: torch.Tensor, quantile: float = 1.0) -> torch.Tensor:
    """The positive part of `(batch, height, width)`, in each image over its maximum (or `quantile`)."""
    evidence = attribution.clamp(min=0)
    high = evidence.flatten(1).quantile(quantile, dim=1).clamp(min=1e-12)
    return (evidence / high[:, None, None]).clamp(max=1)


def _target_of(model: nn.Module, images: torch.Tensor, target) -> torch.Tensor:
    with torch.no_grad():
        return _target(model(images), target)


def _target(logits: torch.Tensor, target) -> torch.Tensor:
    """The classes to explain `(batch,)`: those given, or the predicted ones.

    Raises:
        ValueError: no such class.
    """
    if target is None:
        return logits.argmax(dim=1)
    target = torch.as_tensor(target, device=logits.device)
    if not ((target >= 0) & (target < logits.shape[1])).all():
        raise ValueError(f"target {target.tolist()}: the model has classes 0 to {logits.shape[1] - 1}")
    return target.expand(len(logits))


def methods(model: nn.Module, signed: bool = False) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The methods that go with a model, by name; with `signed`, those that can tell for from against do so."""
    found = {}
    if isinstance(model, VisionTransformer):
        found |= {"attention": attention, "rollout": rollout, "relevance": relevance}
    if type(model) in LAST_MAP:
        found |= {"Grad-CAM": grad_cam}
    found |= {
        "integrated gradients": partial(integrated_gradients, signed=signed),
        "occlusion": partial(occlusion, signed=signed),
    }
    return {name: partial(method, model) for name, method in found.items()}


def patch_scores(model: nn.Module, images: torch.Tensor, batch_size: int = 50) -> dict[str, torch.Tensor]:
    """Of every method its mean score for the predicted class in each patch, `(n, patches)` on the CPU."""
    size, side = patch_grid(model, images)
    scores = {name: [] for name in methods(model)}
    for batch in cli.progress(images.split(batch_size), "explaining", "batch"):
        for name, method in methods(model, signed=True).items():
            scores[name].append(mean_of_patches(method(batch), size, side).flatten(1).cpu())
    return {name: torch.cat(parts) for name, parts in scores.items()}


def mean_of_patches(heat: torch.Tensor, size: int, side: int) -> torch.Tensor:
    """`(batch, height, width)` -> `(batch, side, side)`."""
    return F.avg_pool2d(heat[:, None, : size * side, : size * side], size)[:, 0]
