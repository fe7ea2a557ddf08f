"""What a trained model looks at: attention, rollout, gradient relevance and library attributions.

    python explain.py                                   # saved/VisionTransformer.pt
    python explain.py saved/CNN.pt                      # Grad-CAM, integrated gradients and occlusion
    python explain.py --page                            # a page to point at patches: figures/attention.html
    python explain.py --page photo.jpg another.png      # ... with pictures of your own
    python -m studies.faithfulness                      # do the heat maps name the patches that matter?

Writes figures/<name>_explanations.png, and for a ViT <name>_attention_distance.png and <name>_positions.png; <name> is
the model file's. With --page it writes only the page, figures/<name>_attention.html, or figures/attention.html for
saved/VisionTransformer.pt, the model that comes with the project.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

import utils
from images.reading import ImageError, find_images, read_image, to_array
from network import VisionTransformer
from runner import choose_device, eval_mode
from support import cli
from support.files import figures_folder, home
from support.model import Model
from training.attention_page import write_page
from training.heatmaps import mean_of_patches, methods, patch_grid
from training.trained import data_title, load_model, sample_images, test_loader

AT_ONCE = 2**25  # attention weights: with a copy or two, half a gigabyte
PAGE_IMAGES = 24


@dataclass
class Config:
    """Explain saved models' predictions on test images of the data set that each was trained on."""

    models: tuple[str, ...]  # files that train.py wrote; default: saved/VisionTransformer.pt
    checkpoint: str | None = None  # one of them, as a flag
    model: str | None = None  # my_model.py:MyNet, where the class of a model of your own lies; only for such a model
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str | None = None  # the folder that pictures go to; default: the project's figures/
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    page: tuple[str, ...] | None = None  # a page to look at attention, with these pictures or else 24 test images
    rows: int = 6  # images in the contact sheet: half of them predicted right, half wrong
    seed: int = 0  # of the choice of images


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        if config.rows < 1 or config.seed < 0:
            raise ValueError(f"rows must be positive and seed not negative, not {config.rows} and {config.seed}")
        if config.page is not None and (ignored := config.given & {"rows", "seed"}):
            raise ValueError(f"--page does nothing with {', '.join(f'--{name}' for name in sorted(ignored))}")
        paths = model_files(config.models, config.checkpoint)
        if len({Path(path).stem for path in paths}) < len(paths):
            raise ValueError(f"files of the same name would overwrite each other's pictures: {', '.join(paths)}")
        for path in paths:
            explain(path, config) if config.page is None else draw_page(path, config)


def model_files(models: tuple[str, ...], checkpoint: str | None) -> list[str]:
    """The files that were given, one after another or as a flag; else the model that comes with the project."""
    return [*models, *([checkpoint] if checkpoint else [])] or ["saved/VisionTransformer.pt"]


def draw_page(checkpoint: str, config: Config) -> None:
    """Write the page to look at a ViT's attention, and say what it had no room for. Pictures that cannot be read are
    named and left out, and the exit code is 2.

    Raises:
        ValueError: no ViT, or no picture.
    """
    for name in config.page:
        if name.endswith(".pt"):
            raise ValueError(f"{name} is a model, not a picture: python explain.py {name} --page photo.jpg")
    model = load_model(checkpoint, choose_device(config.device), config.model)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{checkpoint} has no attention for a page to show: it is no Vision Transformer of network.py")
    files, labels = find_images(config.page), None
    read, unreadable = [], []
    for file in cli.progress(files, "reading", "image", least=4):
        try:
            if Path(file).is_dir():
                raise ImageError(f"{file} is a folder with no pictures in it")
            read.append((Path(file).name, torch.from_numpy(to_array(read_image(file), model.image_size))))
        except ImageError as error:
            unreadable.append(str(error))
    if unreadable and not read:
        raise ValueError("; ".join(unreadable))
    if files:
        pixels = torch.stack([pixel for _, pixel in read])
    else:
        pixels, labels = mixed_images(model, PAGE_IMAGES, config.data_dir)
    path = picture_path(config.output_dir, checkpoint, "attention", "html")
    if Path(checkpoint).resolve() == (home() / "saved" / "VisionTransformer.pt").resolve():
        path = path.with_name("attention.html")  # as figures/attention_maps.png
    notes = write_page(model, pixels, path, labels, [name for name, _ in read])
    print(*notes, sep="\n", end="\n" if notes else "")
    cli.say_written([path])
    if unreadable:
        cli.fail(f"not on the page: {'; '.join(unreadable)}")


def mixed_images(model: Model, count: int, data_dir: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` test images, uint8 `(n, 3, h, w)`, the first of each class, then the second ..., and their labels."""
    pixels, labels = sample_images(model, -(-count // len(model.metadata["classes"])), data_dir)
    ranks = torch.stack([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    order = ranks.argsort(stable=True)[:count]
    return pixels[order], labels[order]


def explain(checkpoint: str, config: Config) -> None:
    """Draw everything about one model, and say which files it is in."""
    model = load_model(checkpoint, choose_device(config.device), config.model)
    images, labels = choose_images(model, max(500, config.rows), config.seed, config.data_dir)
    title = f"{model.title} on {data_title(model.metadata)}"
    written = [picture_path(config.output_dir, checkpoint, "explanations")]
    draw_explanations(model, images, labels, written[0], config.rows)
    if isinstance(model, VisionTransformer):
        written += [picture_path(config.output_dir, checkpoint, name) for name in ("attention_distance", "positions")]
        draw_attention_distance(mean_attention_distance(model, images[:256]), model, written[1], title)
        draw_positions(model, written[2], title)
    else:
        print(f"no pictures of attention: {model.title} does not give its attention weights")
    cli.say_written(written)


def picture_path(folder: str | None, checkpoint: str, what: str, ending: str = "png") -> Path:
    """Where a picture of a model goes: `<name>_<what>.png`, by default in the project's figures/."""
    return figures_folder(folder) / f"{Path(checkpoint).stem}_{what}.{ending}"


def choose_images(model: Model, count: int, seed: int, data_dir: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` test images in a seeded random order, normalised, on the model's device, and their labels."""
    loader = test_loader(model, data_dir, count, next(model.parameters()).device)
    order = torch.randperm(loader.num_images, generator=torch.Generator().manual_seed(seed)).to(loader.images.device)
    loader.images, loader.labels = loader.images[order], loader.labels[order]
    return next(iter(loader))


@torch.no_grad()
def mean_attention_distance(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """How far each head looks, in pixels: `(num_blocks, heads)` (Dosovitskiy et al. 2021, figure 7, right).

    Distances between the centres of patches, averaged with the attention weights, then over patches and images. A CLS
    token has no place: it is left out, and the attention paid to it shared out among the patches.
    """
    distances = patch_distances(model).to(images)
    weights_of_an_image = model.config["num_blocks"] * model.config["num_heads"] * len(distances) ** 2
    batch_size, total = max(1, min(32, AT_ONCE // weights_of_an_image)), 0
    for batch in cli.progress(images.split(batch_size), "attention distance", "batch"):
        with eval_mode(model):
            weights = model(batch, return_attention=True)["attention_weights"]
        weights = weights[..., -len(distances) :, -len(distances) :]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        total = total + (weights * distances).sum(dim=-1).mean(dim=-1).sum(dim=1)  # over keys, queries, images
    return (total / len(images)).cpu()


def patch_distances(model: VisionTransformer) -> torch.Tensor:
    """Between the centres of all patches, in pixels, `(patches, patches)`."""
    steps = torch.arange(model.embedding.grid_size)
    places = model.config["patch_size"] * torch.cartesian_prod(steps, steps).float()
    return torch.cdist(places, places)


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
    filters = next(m for m in model.embedding.project.modules() if isinstance(m, nn.Conv2d)).weight
    components = torch.linalg.svd(filters.flatten(1).float().cpu(), full_matrices=False).Vh
    return components[:count].unflatten(1, filters.shape[1:])


def draw_explanations(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, path: Path, rows: int) -> Figure:
    """A contact sheet: a row for each image, the first half predicted right, the others wrong; a column per method."""
    metadata = model.metadata
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(500)])
    right = logits.argmax(dim=1) == labels
    wrong = (~right).nonzero()[: max(rows // 2, rows - int(right.sum())), 0]
    chosen = torch.cat([right.nonzero()[: rows - len(wrong), 0], wrong])
    images, labels, logits = images[chosen], labels[chosen], logits[chosen]
    pixels = utils.to_pixels(images, metadata["mean"], metadata["std"])
    size, side = patch_grid(model, images)
    columns = {}  # name -> heat on a grid, and the side of its cells in pixels
    for name, method in cli.progress(methods(model).items(), "explaining", "method"):
        heat = method(images).cpu()
        if name in ("integrated gradients", "Grad-CAM"):
            columns[name] = heat, 1
        else:
            columns[name] = mean_of_patches(heat, size, side), size

    tile, row_height = 128, 156
    title = f"{model.title} on {data_title(metadata)}: what does it look at?"
    note = "prediction and its probability: green where right, orange where wrong; brightness is relative to each map"
    width, height = max(740, 20 + (1 + len(columns)) * (tile + 8)), 84 + len(chosen) * row_height + 4
    figure = utils.new_figure(width, height, title, note)
    for column, name in enumerate(["image", *columns]):
        utils.add_text(figure, 14 + column * (tile + 8), 72, name, size=8.5)
    for row in range(len(chosen)):
        top = 98 + row * row_height
        utils.add_text(figure, 14, top - 5, *utils.describe_prediction(row, metadata["classes"], labels, logits))
        for column, name in enumerate(["image", *columns]):
            axes = utils.add_axes(figure, 14 + column * (tile + 8), top, tile, tile)
            axes.axis("off")
            if column == 0:
                axes.imshow(pixels[row].permute(1, 2, 0).numpy())
            else:
                heat, cell = columns[name]
                utils.draw_overlay(axes, pixels[row], heat[row], cell, Normalize(0, 1))
    utils.save_figure(figure, path)
    return figure


def draw_attention_distance(distance: torch.Tensor, model: VisionTransformer, path: Path, title: str) -> Figure:
    """A dot for each head, by block, and the distance that uniform attention would have."""
    uniform = patch_distances(model).mean().item()
    blocks, heads = distance.shape
    note = "mean distance of a patch from those that it attends to"
    figure = utils.new_figure(520, 380, f"{title}: attention distance", note)
    axes = utils.add_axes(figure, 62, 66, 436, 262)
    axes.axhline(uniform, color=utils.DARK, lw=1, ls="--", label=f"uniform attention, {uniform:.1f}")
    for block in range(blocks):
        x = block + 1 + 0.3 * torch.linspace(-1, 1, heads) if heads > 1 else torch.tensor([block + 1.0])
        axes.plot(x, distance[block].sort().values, "o", color=utils.BLUE, markersize=7, alpha=0.85)
        axes.plot([block + 0.6, block + 1.4], [distance[block].mean()] * 2, color=utils.VERMILLION, lw=2)
    axes.plot([], [], "o", color=utils.BLUE, label="head")
    axes.plot([], [], color=utils.VERMILLION, lw=2, label="mean of the block")
    axes.legend(loc="lower right")
    highest = max(uniform, distance.max().item()) or 1  # of a single patch there is no distance
    axes.set(xlim=(0.5, blocks + 0.5), ylim=(0, 1.15 * highest))
    axes.set(xticks=range(1, blocks + 1), xlabel="block", ylabel="pixels")
    axes.grid()
    utils.save_figure(figure, path)
    return figure


def draw_positions(model: VisionTransformer, path: Path, title: str) -> Figure:
    """Principal components of the patch filters, and the similarity of each position with all others."""
    similarity, filters = position_similarity(model), utils.to_pixels(patch_filters(model))
    side = len(similarity)
    columns, tile, gap, area = 4, 42, 6, 336
    width = 14 + columns * (tile + gap) + 30 + area + 66
    figure = utils.new_figure(width, 70 + area + 22, f"{title}: what the embedding learned")
    utils.add_text(figure, 14, 58, "filters, principal components")
    for i in range(min(len(filters), columns * (area // (tile + gap)))):
        row, column = divmod(i, columns)
        axes = utils.add_axes(figure, 14 + column * (tile + gap), 70 + row * (tile + gap), tile, tile)
        axes.imshow(filters[i].permute(1, 2, 0).numpy())
        axes.axis("off")
    left = 14 + columns * (tile + gap) + 24
    utils.add_text(figure, left, 58, "positions, similarity of each patch with all")
    pitch = area / side
    for row in range(side):
        for column in range(side):
            cell = utils.add_axes(figure, left + column * pitch, 70 + row * pitch, 0.9 * pitch, 0.9 * pitch)
            picture = cell.imshow(similarity[row, column].numpy(), cmap="viridis", vmin=-1, vmax=1)
            cell.axis("off")
    scale = utils.add_axes(figure, left + area + 8, 70, 9, area - 0.1 * pitch)
    figure.colorbar(picture, cax=scale, ticks=[-1, 0, 1]).outline.set_visible(False)
    scale.tick_params(length=2)
    scale.set_ylabel("cosine similarity")
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
