"""What a trained model looks at: attention, rollout, gradient relevance and library attributions, and their test.

    python explain.py                                   # saved/VisionTransformer.pt
    python explain.py --checkpoint saved/CNN.pt         # Grad-CAM, integrated gradients and occlusion
    python explain.py --faithfulness                    # also: do the heat maps name the patches that matter?

Writes figures/explanations.png, for a ViT figures/attention_distance.png and figures/positions.png, and with
--faithfulness figures/faithfulness.json and .png. Of other models than VisionTransformer.pt the file's name is added.

Every method takes normalised images `(batch, 3, height, width)` and returns heat maps `(batch, height, width)` in
[0, 1] on the images' device: 1 is the place that matters most in that image, 0 one that matters least. Where no patch
reaches (the right and bottom edge, if the patch size does not divide the image) they are 0.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from tqdm import tqdm

import utils
from evaluate import load_trained, test_loader
from network import CNN, VisionTransformer
from runner import choose_device
from studies import faithfulness
from support import cli
from support.files import write_bytes


@dataclass
class Config:
    """Explain a saved model's predictions on test images of the data set that it was trained on."""

    checkpoint: str = "saved/VisionTransformer.pt"  # a file that train.py wrote
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str = "figures"  # the folder that pictures and figures go to
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    rows: int = 6  # images in the contact sheet: half of them predicted right, half wrong
    faithfulness: bool = False  # also the deletion and insertion test
    images: int = 1000  # test images for that
    steps: int = 16  # in which all patches are removed
    seed: int = 0  # of the choice of images, and of the random ranking


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        for name in ("rows", "images", "steps"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
        if config.seed < 0:
            raise ValueError(f"seed must not be negative: {config.seed}")
        device = choose_device(config.device)
        model = load_trained(config.checkpoint, device)
        images, labels = choose_images(model, config, device)
        stem = Path(config.checkpoint).stem
        suffix = "" if stem == "VisionTransformer" else f"_{stem}"
        folder = Path(config.output_dir)
        title = f"{model.title} on {model.metadata['dataset']}"

        draw_explanations(model, images, labels, folder / f"explanations{suffix}.png", config.rows)
        written = [folder / f"explanations{suffix}.png"]
        if isinstance(model, VisionTransformer):
            distance = mean_attention_distance(model, images[:256])
            draw_attention_distance(distance, model, folder / f"attention_distance{suffix}.png", title)
            draw_positions(model, folder / f"positions{suffix}.png", title)
            written += [folder / f"{name}{suffix}.png" for name in ("attention_distance", "positions")]
        if config.faithfulness:
            images, labels = images[: config.images], labels[: config.images]
            size, _ = patch_grid(model, images)
            scores = patch_scores(model, images)
            report = faithfulness.measure(model, images, labels, scores, size, config.steps, config.seed)
            print(faithfulness.markdown_table(report))
            report = {"model": config.checkpoint, "dataset": model.metadata["dataset"], "seed": config.seed, **report}
            written += [folder / f"faithfulness{suffix}.{kind}" for kind in ("json", "png")]
            write_bytes(written[-2], json.dumps({**report, "provenance": cli.provenance()}, indent=1).encode())
            faithfulness.draw(report, written[-1], title)
        print("wrote " + ", ".join(str(path) for path in written))


def choose_images(model: nn.Module, config: Config, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images in a seeded random order, normalised, and their labels: as many as any of the pictures needs."""
    loader = test_loader(model, config.data_dir, max(500, config.rows, config.images), device)
    order = torch.randperm(loader.num_images, generator=torch.Generator().manual_seed(config.seed)).to(device)
    loader.images, loader.labels = loader.images[order], loader.labels[order]
    return next(iter(loader))


# --------------------------------------------------------------------------------------- heat maps out of attention


def attention(model: VisionTransformer, images: torch.Tensor, block: int = -1, head: int | None = None) -> torch.Tensor:
    """Heat maps of the attention in one block, of one head or (None) of all heads' mean.

    With a CLS token it is what that token pays to each patch; without, what each patch receives from all, averaged.

    Raises:
        IndexError: no such block or head.
    """
    with torch.no_grad(), _eval_mode(model):
        weights = model(images, return_attention=True)["attention_weights"][block]
    return _heat_of_patches(model, images, _read_out(model, weights.mean(dim=1) if head is None else weights[:, head]))


def rollout(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Heat maps of attention rollout (Abnar & Zuidema 2020): attention followed through all blocks."""
    with torch.no_grad(), _eval_mode(model):
        weights = model(images, return_attention=True)["attention_weights"]
    return _heat_of_patches(model, images, _read_out(model, roll_out(weights)))


def relevance(model: VisionTransformer, images: torch.Tensor, target=None) -> torch.Tensor:
    """Heat maps of gradient-weighted attention for a class (Chefer et al. 2021, "Generic attention-model
    explainability").

    Args:
        target: the class to explain, for all images or `(batch,)`; None means the predicted one.
    """
    weights = []  # of each block, `(batch, heads, tokens, tokens)`, as the logits depend on them

    def keep(module, arguments, output):
        weights.append(output[1])

    hooks = [block.attention.register_forward_hook(keep) for block in model.blocks]
    try:
        with torch.enable_grad(), _eval_mode(model):
            # images that need gradients: then attention has them too, even where the weights are frozen
            logits = model(images.detach().requires_grad_(), return_attention=True)["logits"]
            chosen = logits.gather(1, _target(logits, target)[:, None]).sum()
            gradients = torch.autograd.grad(chosen, weights)
    finally:
        for hook in hooks:
            hook.remove()
    matrix = propagate_relevance(torch.stack(weights).detach(), torch.stack(gradients))
    return _heat_of_patches(model, images, _read_out(model, matrix))


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

    with torch.enable_grad(), _eval_mode(model):
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
    with torch.no_grad(), _eval_mode(model):
        attribution = Occlusion(model).attribute(
            images, window, strides=window, target=_target_of(model, images, target), perturbations_per_eval=8
        )
    attribution = attribution[:, 0].to(images.dtype)  # the same in every channel
    return attribution if signed else _heat_of_evidence(attribution)


def grad_cam(model: CNN, images: torch.Tensor, target=None) -> torch.Tensor:
    """Heat maps of Grad-CAM (Selvaraju et al. 2017) on the CNN's last convolution, after its ReLU.

    Args:
        target: the class to explain, for all images or `(batch,)`; None means the predicted one.
    """
    from captum.attr import LayerGradCam

    with torch.enable_grad(), _eval_mode(model):
        heat = LayerGradCam(model, model.relu2).attribute(
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
    if not ((0 <= target) & (target < logits.shape[1])).all():
        raise ValueError(f"target {target.tolist()}: the model has classes 0 to {logits.shape[1] - 1}")
    return target.expand(len(logits))


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """No stochastic depth and no batch statistics; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def methods(model: nn.Module, signed: bool = False) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The methods that go with a model, by name; with `signed`, those that can tell for from against do so."""
    found = {}
    if isinstance(model, VisionTransformer):
        found |= {"attention": attention, "rollout": rollout, "relevance": relevance}
    if isinstance(model, CNN):
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
    for batch in tqdm(images.split(batch_size), "explaining", unit="batch", leave=False):
        for name, method in methods(model, signed=True).items():
            scores[name].append(_mean_of_patches(method(batch), size, side).flatten(1).cpu())
    return {name: torch.cat(parts) for name, parts in scores.items()}


def _mean_of_patches(heat: torch.Tensor, size: int, side: int) -> torch.Tensor:
    """`(batch, height, width)` -> `(batch, side, side)`."""
    return F.avg_pool2d(heat[:, None, : size * side, : size * side], size)[:, 0]


# --------------------------------------------------------------------------------------------- of the model as a whole


@torch.no_grad()
def mean_attention_distance(model: VisionTransformer, images: torch.Tensor, batch_size: int = 32) -> torch.Tensor:
    """How far each head looks, in pixels: `(num_blocks, heads)` (Dosovitskiy et al. 2021, figure 7, right).

    Distances between the centres of patches, averaged with the attention weights, then over patches and images. A CLS
    token has no place: it is left out, and the attention paid to it shared out among the patches.
    """
    size, side = patch_grid(model, images)
    places = size * torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(images)  # (patches, 2)
    distances = torch.cdist(places, places)
    total = 0
    for batch in tqdm(images.split(batch_size), "attention distance", unit="batch", leave=False):
        with _eval_mode(model):
            weights = model(batch, return_attention=True)["attention_weights"]
        weights = weights[..., -(side**2) :, -(side**2) :]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        total = total + (weights * distances).sum(dim=-1).mean(dim=-1).sum(dim=1)  # over keys, queries, images
    return (total / len(images)).cpu()


@torch.no_grad()
def position_similarity(model: VisionTransformer) -> torch.Tensor:
    """Cosine similarity of the patches' positional embeddings, `(side, side, side, side)`: of the patch in the row and
    column of the first two axes, with all others (Dosovitskiy et al. 2021, figure 7, centre)."""
    side = model.embedding.grid_size
    positions = F.normalize(model.embedding.position[0, -(side**2) :], dim=-1)
    return (positions @ positions.T).view(side, side, side, side).cpu()


@torch.no_grad()
def patch_filters(model: VisionTransformer, count: int = 28) -> torch.Tensor:
    """The first principal components of the filters that embed a patch, `(count, channels, size, size)`, each of norm 1
    (Dosovitskiy et al. 2021, figure 7, left); of a convolutional tokenizer, those of its first convolution."""
    project = model.embedding.project
    filters = (project if isinstance(project, nn.Conv2d) else project[0]).weight
    components = torch.linalg.svd(filters.flatten(1).float().cpu(), full_matrices=False).Vh
    return components[:count].unflatten(1, filters.shape[1:])


# -------------------------------------------------------------------------------------------------------- pictures


def draw_explanations(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, path: Path, rows: int) -> Figure:
    """A contact sheet: a row for each image, the first half predicted right, the others wrong; a column per method."""
    metadata = model.metadata
    with torch.no_grad():
        logits = model(images[:500])
    right = logits.argmax(dim=1) == labels[:500]
    wrong = (~right).nonzero()[: rows // 2, 0]
    chosen = torch.cat([right.nonzero()[: rows - len(wrong), 0], wrong])
    images, labels, logits = images[chosen], labels[chosen], logits[chosen]
    pixels = utils.to_pixels(images, metadata["mean"], metadata["std"])
    size, side = patch_grid(model, images)
    columns = {}  # name -> heat on a grid, and the side of its cells in pixels
    for name, method in tqdm(methods(model).items(), "explaining", unit="method", leave=False):
        heat = method(images).cpu()
        if name in ("integrated gradients", "Grad-CAM"):
            columns[name] = heat, 1
        else:
            columns[name] = _mean_of_patches(heat, size, side), size

    tile, row_height = 128, 156
    figure = utils.new_figure(
        max(740, 20 + (1 + len(columns)) * (tile + 8)), 84 + len(chosen) * row_height + 4, dpi=200
    )
    title = f"{model.title} on {metadata['dataset']}: what does it look at?"
    utils.add_text(figure, 14, 28, title, size=13, weight="bold")
    note = "prediction and its probability: green where right, orange where wrong; brightness is relative to each map"
    utils.add_text(figure, 14, 48, note, size=9.5)
    for column, name in enumerate(["image", *columns]):
        utils.add_text(figure, 14 + column * (tile + 8), 72, name, size=8.5)
    for row in range(len(chosen)):
        top = 98 + row * row_height
        utils.add_text(
            figure, 14, top - 5, *utils.describe_prediction(row, metadata["classes"], labels, logits), size=9.5
        )
        for column, name in enumerate(["image", *columns]):
            axes = utils.add_axes(figure, 14 + column * (tile + 8), top, tile, tile)
            axes.axis("off")
            if column == 0:
                axes.imshow(pixels[row].permute(1, 2, 0).numpy(), interpolation="nearest")
            else:
                heat, cell = columns[name]
                utils.draw_overlay(axes, pixels[row], heat[row], cell, Normalize(0, 1))
    utils.save_figure(figure, path)
    return figure


def draw_attention_distance(distance: torch.Tensor, model: VisionTransformer, path: Path, title: str) -> Figure:
    """A dot for each head, by block, and the distance that uniform attention would have."""
    size, side = model.config["patch_size"], model.embedding.grid_size
    places = size * torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    uniform = torch.cdist(places, places).mean().item()
    blocks, heads = distance.shape
    figure = utils.new_figure(520, 380, dpi=200)
    utils.add_text(figure, 14, 28, f"{title}: attention distance", size=13, weight="bold")
    utils.add_text(figure, 14, 48, "mean distance of a patch from those that it attends to", size=9.5)
    axes = utils.add_axes(figure, 62, 66, 436, 262)
    axes.axhline(uniform, color=utils.DARK, lw=1, ls="--", label=f"uniform attention, {uniform:.1f}")
    for block in range(blocks):
        x = block + 1 + 0.3 * torch.linspace(-1, 1, heads) if heads > 1 else torch.tensor([block + 1.0])
        axes.plot(x, distance[block].sort().values, "o", color=utils.BLUE, markersize=7, alpha=0.85)
        axes.plot([block + 0.6, block + 1.4], [distance[block].mean()] * 2, color=utils.VERMILLION, lw=2)
    axes.plot([], [], "o", color=utils.BLUE, label="head")
    axes.plot([], [], color=utils.VERMILLION, lw=2, label="mean of the block")
    axes.legend(loc="lower right", fontsize=9.5, frameon=False, labelcolor=utils.DARK)
    axes.set(
        xlim=(0.5, blocks + 0.5), ylim=(0, 1.15 * max(uniform, distance.max().item())), xticks=range(1, blocks + 1)
    )
    axes.set_xlabel("block", size=9.5, color=utils.DARK)
    axes.set_ylabel("pixels", size=9.5, color=utils.DARK)
    utils.tidy(axes)
    utils.save_figure(figure, path)
    return figure


def draw_positions(model: VisionTransformer, path: Path, title: str) -> Figure:
    """Principal components of the patch filters, and the similarity of each position with all others."""
    similarity, filters = position_similarity(model), utils.to_pixels(patch_filters(model))
    side = len(similarity)
    columns, tile, gap, area = 4, 42, 6, 336
    figure = utils.new_figure(14 + columns * (tile + gap) + 30 + area + 66, 70 + area + 22, dpi=200)
    utils.add_text(figure, 14, 28, f"{title}: what the embedding learned", size=13, weight="bold")
    utils.add_text(figure, 14, 58, "filters, principal components", size=9.5)
    for i in range(min(len(filters), columns * (area // (tile + gap)))):
        row, column = divmod(i, columns)
        axes = utils.add_axes(figure, 14 + column * (tile + gap), 70 + row * (tile + gap), tile, tile)
        axes.imshow(filters[i].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.axis("off")
    left = 14 + columns * (tile + gap) + 24
    utils.add_text(figure, left, 58, "positions, similarity of each patch with all", size=9.5)
    pitch = area / side
    for row in range(side):
        for column in range(side):
            cell = utils.add_axes(figure, left + column * pitch, 70 + row * pitch, 0.9 * pitch, 0.9 * pitch)
            picture = cell.imshow(similarity[row, column].numpy(), cmap="viridis", vmin=-1, vmax=1)
            cell.axis("off")
    scale = utils.add_axes(figure, left + area + 8, 70, 9, area - 0.1 * pitch)
    figure.colorbar(picture, cax=scale, ticks=[-1, 0, 1]).outline.set_visible(False)
    scale.tick_params(labelsize=9, color=utils.GREY, labelcolor=utils.DARK, length=2)
    scale.set_ylabel("cosine similarity", size=9, color=utils.DARK)
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
