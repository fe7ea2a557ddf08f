"""Classify your own images with a saved model.

    python predict.py photo.jpg                       # one of your own, by saved/VisionTransformer.pt
    python predict.py a.png b.webp --checkpoint saved/CNN.pt
    python predict.py photos/                         # every picture in a folder, and in the folders in it

Prints the five likeliest classes of each and saves figures/<model>_prediction_<name>.png, for a ViT with its attention;
<model> is the model file's name, <name> the picture's. A file that cannot be read, or whose picture cannot be written,
gets one line on stderr, the others are still done, and the exit code is 2.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import utils
from images.reading import ImageError, central_square, find_images, read_image, to_array
from network import Model, VisionTransformer
from runner import choose_device
from support import cli
from support.files import figures_folder
from training.heatmaps import patch_grid, relevance
from training.trained import load_model, normalise


@dataclass
class Config:
    """Classify images of any size and format."""

    images: tuple[str, ...]  # files, or folders of them
    checkpoint: str = "saved/VisionTransformer.pt"  # a file that train.py wrote
    model: str | None = None  # my_model.py:MyNet, where the class of a model of your own lies; only for such a model
    output_dir: str | None = None  # the folder that pictures go to; default: the project's figures/
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        if not config.images:
            raise ValueError("name at least one image: python predict.py photo.jpg")
        for name in config.images:
            if name.endswith(".pt"):
                raise ValueError(f"{name} is a model, not an image: python predict.py photo.jpg --checkpoint {name}")
        model = load_model(config.checkpoint, choose_device(config.device), config.model)
        if not isinstance(model, VisionTransformer):
            print(f"no pictures of attention: {model.title} does not give its attention weights")
        folder, stem = figures_folder(config.output_dir), Path(config.checkpoint).stem
        failed = False
        taken = set()
        names = find_images(config.images)
        for name in cli.progress(names, "predicting", "image", least=4):
            try:
                if Path(name).is_dir():
                    raise ImageError(f"{name} is a folder with no pictures in it")
                image = read_image(name)
                images, probabilities, attention = classify(model, image)
            except (ImageError, OSError) as error:
                say_error(error)
                failed = True
                continue
            path = free_path(folder, f"{stem}_prediction_{Path(name).stem}", taken)
            where = f": {path}"
            try:
                draw_prediction(model, image, images, probabilities, attention, path)
            except OSError as error:  # the answer is there all the same
                say_error(error)
                failed, where = True, ""
            best = probabilities.topk(min(5, len(probabilities)))
            width, height = image.info["size"]
            lines = [f"{name} ({width}x{height}){where}"]
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                lines.append(f"  {100 * probability:5.1f} %  {model.metadata['classes'][index]}")
            tqdm.write("\n".join(lines), file=sys.stdout)
    if failed:
        raise SystemExit(2)


def say_error(error: Exception) -> None:
    reason = getattr(error, "strerror", None) or error  # without the number that Python puts before it
    tqdm.write(f"predict.py: error: {reason}", file=sys.stderr)


def free_path(folder: Path, stem: str, taken: set[str]) -> Path:
    """<stem>.png, numbered if this run has written one of that name; added to `taken`."""
    path, number = folder / f"{stem}.png", 1
    while str(path).casefold() in taken:  # a Mac takes Cat.png and cat.png for one file
        number += 1
        path = folder / f"{stem}_{number}.png"
    taken.add(str(path).casefold())
    return path


def to_input(image: Image.Image, model: Model) -> torch.Tensor:
    """An RGB image as the model takes it, `(1, 3, img_size, img_size)`, normalised as in training."""
    return normalise(torch.from_numpy(to_array(image, model.image_size))[None], model.metadata)


def classify(model: Model, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The model's input `(1, 3, img_size, img_size)`, the probabilities `(classes,)` on the CPU, and of a ViT its
    attention `(num_blocks, 1, heads, tokens, tokens)`."""
    device = next(model.parameters()).device
    images = to_input(image, model).to(device)
    with torch.no_grad():
        if isinstance(model, VisionTransformer):
            output = model(images, return_attention=True)
            logits, attention = output["logits"], output["attention_weights"]
        else:
            logits, attention = model(images), None
    return images, logits[0].float().softmax(dim=0).cpu(), attention


def draw_prediction(
    model: Model,
    image: Image.Image,
    images: torch.Tensor,
    probabilities: torch.Tensor,
    attention: torch.Tensor | None,
    path: Path,
) -> Figure:
    """Side by side: the picture, what the model sees of it, for a ViT where it looks, and the five likeliest classes.

    Args:
        image: as it was read.
        images: `(1, 3, img_size, img_size)`, the model's input.
        attention: `(num_blocks, 1, heads, tokens, tokens)`.
    """
    classes, size = model.metadata["classes"], model.image_size
    scale = max(1, 224 // size)
    tile = scale * size
    photo = np.asarray(central_square(image, tile))
    seen = utils.to_pixels(images, model.metadata["mean"], model.metadata["std"])[0]
    panels = ["central square", f"what the model sees: {size}x{size}"]
    if attention is not None:
        likeliest = utils.fit(classes[probabilities.argmax()], tile - 90, 10.5)
        panels += ["attention, last block", f"relevance for {likeliest}"]
    scale_width = 56 if attention is not None else 0
    figure = utils.new_figure(14 + len(panels) * (tile + 12) + scale_width + 234, 40 + tile + 16)
    for column, heading in enumerate(panels):
        left = 14 + column * (tile + 12) + (scale_width if column == 3 else 0)
        utils.add_text(figure, left, 30, heading, size=10.5)
        axes = utils.add_axes(figure, left, 40, tile, tile)
        axes.axis("off")
        if column == 0:
            axes.imshow(photo)
        elif column == 1:
            axes.imshow(seen.permute(1, 2, 0).numpy())
        elif column == 2:
            heat = utils.attention_of_patches(attention, -1)[0].mean(dim=0)
            norm = Normalize(0, max(2.0, heat.max().item()))
            utils.draw_overlay(axes, seen, heat, model.config["patch_size"], norm)
            utils.draw_scale(utils.add_axes(figure, left + tile + 4, 40, 9, tile), norm)
        else:
            patch, side = patch_grid(model, images)
            heat = relevance(model, images)[0].cpu()[: patch * side : patch, : patch * side : patch]
            utils.draw_overlay(axes, seen, heat, patch, Normalize(0, 1))
    left += tile + 20
    utils.add_text(figure, left, 30, "likeliest classes", size=10.5)
    best = probabilities.topk(min(5, len(classes)))
    axes = utils.add_axes(figure, left, 40, 210, min(150, tile))
    utils.draw_bars(axes, best.values.tolist(), best.indices.tolist(), -1, classes)
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
