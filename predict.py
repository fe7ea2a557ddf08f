"""Classify your own images with a saved model.

    python predict.py photo.jpg                       # by saved/VisionTransformer.pt
    python predict.py a.png b.webp --checkpoint saved/CNN.pt

Prints the five likeliest classes of each and saves figures/<name>_prediction.png, for a ViT with its attention. A file
that cannot be read gets one line on stderr, the others are still done, and the exit code is 1.
"""

import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from tyro.conf import Positional

import cli
import explain
import utils
from evaluate import load_trained
from network import Module, TimmModel, VisionTransformer
from runner import choose_device


@dataclass
class Config:
    """Classify images of any size and format."""

    images: Positional[tuple[str, ...]]  # files
    checkpoint: str = "saved/VisionTransformer.pt"  # a file that train.py wrote
    output_dir: str = "figures"  # the folder that pictures go to
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps


class ImageError(ValueError):
    """A file that cannot be read as an image, with the reason in one line."""


def main() -> None:
    config = cli.parse(Config)
    with cli.one_line_errors():
        if not config.images:
            raise ValueError("name at least one image: python predict.py photo.jpg")
        model = load_trained(config.checkpoint, choose_device(config.device))
        if isinstance(model, TimmModel):
            print("no pictures of attention: timm's models do not give their attention weights")
        failed = False
        taken = set()
        for name in tqdm(config.images, "predicting", unit="image", leave=False, disable=len(config.images) < 4):
            try:
                image = read_image(name)
            except ImageError as error:
                tqdm.write(f"predict.py: error: {error}", file=sys.stderr)
                failed = True
                continue
            path = free_path(Path(config.output_dir), Path(name).stem, taken)
            probabilities = classify(model, image, path)
            best = probabilities.topk(min(5, len(probabilities)))
            lines = [f"{name} ({image.width}x{image.height}): {path}"]
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                lines.append(f"  {100 * probability:5.1f} %  {model.metadata['classes'][index]}")
            tqdm.write("\n".join(lines), file=sys.stdout)
    if failed:
        raise SystemExit(1)


def free_path(folder: Path, stem: str, taken: set[Path]) -> Path:
    """<stem>_prediction.png, numbered if this run has written one of that name; added to `taken`."""
    path, number = folder / f"{stem}_prediction.png", 1
    while path in taken:
        number += 1
        path = folder / f"{stem}_{number}_prediction.png"
    taken.add(path)
    return path


# ------------------------------------------------------------------------------------------- from a file to the model


def read_image(path: str | Path) -> Image.Image:
    """The image in a file as upright 8-bit RGB, of several (an animation) the first, on white where transparent.

    Raises:
        ImageError: no such file, no image, truncated or damaged, or so large that it might be a decompression bomb.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # Pillow warns of large pictures, and of oddities that it can read
            with Image.open(file) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image of a format that Pillow reads") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise ImageError(f"{path} would unpack to more than {limit:.0f} megapixels: a decompression bomb?") from None
    except Exception as error:  # Pillow's many readers answer a damaged file with many kinds of exception
        if isinstance(error, OSError) and error.strerror:  # the system's word: no such file, a folder, not permitted
            raise ImageError(f"cannot read {path}: {error.strerror}") from None
        raise ImageError(f"{path} is truncated or damaged ({' '.join(str(error).split())})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes to RGB: 16-bit greys scaled to 8, floats and other integers stretched from their lowest to
    their highest value, transparent pixels put on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = values.min(), values.max()
        if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high < 65536):
            low, high = 0, 65535  # mode I is also how Pillow gives a 16-bit PGM
        values = (values - low) / max(high - low, 1e-12)
        return Image.fromarray((255 * values).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def central_square(image: Image.Image, side: int) -> Image.Image:
    """The shorter side resized to `side` pixels, and the centre cut out of the longer one, in one step."""
    shorter = min(image.size)
    left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
    box = (left, top, left + shorter, top + shorter)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def image_size(model: Module) -> int:
    """Side in pixels of the images that a model takes."""
    return model.config.get("img_size") or math.isqrt(model.config["input_size"] // 3)


def to_input(image: Image.Image, model: Module) -> torch.Tensor:
    """An RGB image as the model takes it, `(1, 3, img_size, img_size)`, normalised as in training."""
    pixels = torch.from_numpy(np.array(central_square(image, image_size(model)))).permute(2, 0, 1)[None]
    mean, std = (torch.tensor(model.metadata[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------ prediction, picture


def classify(model: Module, image: Image.Image, path: Path) -> torch.Tensor:
    """Save the picture of a prediction at `path`; returns the probabilities `(classes,)` on the CPU."""
    device = next(model.parameters()).device
    images = to_input(image, model).to(device)
    with torch.no_grad():
        if isinstance(model, VisionTransformer):
            output = model(images, return_attention=True)
            logits, attention = output["logits"], output["attention_weights"]
        else:
            logits, attention = model(images), None
    probabilities = logits[0].float().softmax(dim=0).cpu()
    draw_prediction(model, image, images, probabilities, attention, path)
    return probabilities


def draw_prediction(
    model: Module,
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
    classes, size = model.metadata["classes"], image_size(model)
    scale = max(1, 224 // size)
    tile = scale * size
    photo = np.asarray(central_square(image, tile))
    seen = utils.to_pixels(images, model.metadata["mean"], model.metadata["std"])[0]
    panels = ["central square", f"what the model sees: {size}x{size}"]
    if attention is not None:
        panels += ["attention, last block", f"relevance for {classes[probabilities.argmax()]}"]
    scale_width = 56 if attention is not None else 0
    figure = utils.new_figure(14 + len(panels) * (tile + 12) + scale_width + 234, 40 + tile + 16, dpi=200)
    for column, heading in enumerate(panels):
        left = 14 + column * (tile + 12) + (scale_width if column == 3 else 0)
        utils.add_text(figure, left, 30, heading, size=10.5)
        axes = utils.add_axes(figure, left, 40, tile, tile)
        axes.axis("off")
        if column == 0:
            axes.imshow(photo, interpolation="nearest")
        elif column == 1:
            axes.imshow(seen.permute(1, 2, 0).numpy(), interpolation="nearest")
        elif column == 2:
            heat = utils.attention_of_patches(attention, -1)[0].mean(dim=0)
            norm = Normalize(0, max(2.0, heat.max().item()))
            utils.draw_overlay(axes, seen, heat, model.config["patch_size"], norm)
            utils.draw_scale(utils.add_axes(figure, left + tile + 4, 40, 9, tile), norm)
        else:
            patch, side = explain.patch_grid(model, images)
            heat = explain.relevance(model, images)[0].cpu()[: patch * side : patch, : patch * side : patch]
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
