"""A page to look at attention: one HTML file with the pictures, what a ViT says of them, and where its tokens look.

The page is attention_page.html with the style and the two scripts beside it put in, and the numbers as JSON. It loads
nothing and needs no server.

Numbers are multiples of uniform: 1 is what a token would get if all got the same. Each map, a table `(tokens, tokens)`
of one image, is stored in 8 bits as the root of each number over that of the map's largest, as the page's colours are
scaled: a step is one of 255 colours.
"""

import base64
import html
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image

from network import VisionTransformer
from runner import eval_mode
from support import cli
from support.files import write_bytes
from training.heatmaps import relevance_of_tokens, roll_out
from training.trained import data_title, normalise
from utils import COLOR_MAP, OPACITY

LIMIT = 3_000_000  # bytes of a page
SMALL = 64  # pixels; pictures of a longer side are stored as JPEG
PARTS = {"html": "attention_page.html", "css": "attention_page.css"}
PARTS |= {"drawing": "attention_drawing.js", "choosing": "attention_choosing.js"}


class Storage(NamedTuple):
    """What a page has room for."""

    images: int
    heads: bool  # of each head its own map, else only the mean of a block's heads
    joined: int  # patches along a side of the squares that are stored as one


def write_page(
    model: VisionTransformer,
    pixels: torch.Tensor,
    path: str | Path,
    labels: torch.Tensor | None = None,
    names: list[str] | None = None,
    limit: int = LIMIT,
) -> list[str]:
    """Write the page of a model that train.py trained, and return a line for each thing that it had no room for.

    Where maps of all heads of all images take too much room, the heads are left out, but for their mean; then images,
    the last ones first; and where a single image takes too much, squares of patches are joined to one.

    Args:
        pixels: uint8 `(n, 3, img_size, img_size)`.
        labels: `(n,)`, the right classes, where they are known.
        names: of the images, such as those of their files; otherwise they are named after their labels.
        limit: bytes of the file at most.

    Raises:
        OSError: the file cannot be written.
    """
    pictures = [picture_address(image) for image in pixels]
    storage = choose_storage(model, pictures, limit)
    notes = notes_on_storage(model, storage, len(pixels))
    pixels = pixels[: storage.images]
    images, worst = [], 0.0
    for i, image in enumerate(cli.progress(pixels, "attention", "image")):
        maps, probabilities = maps_of(model, image, storage)
        stored, largest, error = quantise(maps)
        worst = max(worst, error)
        images.append(
            {
                "name": names[i] if names else "",
                "label": -1 if labels is None else int(labels[i]),
                "probabilities": [round(p, 5) for p in probabilities.tolist()],
                "picture": pictures[i],
                "largest": largest,
                "maps": base64.b64encode(stored.tobytes()).decode(),
            }
        )
    data = {
        **describe(model, storage),
        "notes": notes,
        "error": worst,
        "colors": [bytes(color[:3]).hex() for color in matplotlib.colormaps[COLOR_MAP](range(256), bytes=True)],
        "opacity": OPACITY,
        "images": images,
    }
    parts = read_parts()
    parts["data"] = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no tag can begin in it
    parts["title"] = html.escape(f"{model.title} on {data_title(model.metadata)}")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], parts["html"])
    write_bytes(path, page.encode(errors="backslashreplace"))
    return notes


def read_parts() -> dict[str, str]:
    """What the page is made of: "html" has places for the others."""
    return {part: Path(__file__).with_name(name).read_text(encoding="utf-8") for part, name in PARTS.items()}


def describe(model: VisionTransformer, storage: Storage) -> dict:
    """What the page says of the model, and where its squares lie."""
    return {
        "classes": model.metadata["classes"],
        "size": model.image_size,
        "patch": model.config["patch_size"],
        "grid": model.embedding.grid_size,
        "tokenizer": model.config["tokenizer"],
        "cls": model.pooling == "cls",
        "blocks": model.config["num_blocks"],
        "model_heads": model.config["num_heads"],
        "heads": model.config["num_heads"] if storage.heads else 1,
        "joined": storage.joined,
        "edges": edges(model, storage.joined),
    }


def edges(model: VisionTransformer, joined: int = 1) -> list[int]:
    """Where the page's squares begin along a side, in pixels, and where the last one ends."""
    size, side = model.config["patch_size"], model.embedding.grid_size
    return [size * i for i in range(0, side, joined)] + [size * side]


# ------------------------------------------------------------------------------------------------------------ storage


def choose_storage(model: VisionTransformer, pictures: list[str], limit: int) -> Storage:
    """What fits into a page of `limit` bytes with these pictures, as addresses."""
    blocks, heads, classes = model.config["num_blocks"], model.config["num_heads"], model.metadata["classes"]
    room = limit - sum(map(len, read_parts().values())) - len(json.dumps(classes)) - 10_000  # and some for sentences
    beside = [len(picture) + 9 * len(classes) + 2000 for picture in pictures]  # probabilities, and a long name
    for joined in range(1, model.embedding.grid_size + 1):
        for each_head in (True, False):
            maps = blocks * (heads if each_head else 1) + 2
            totals = np.cumsum(beside) + bytes_of_maps(model, maps, joined) * np.arange(1, len(beside) + 1)
            most = int((totals <= room).sum())
            if most == len(beside) or (most and not each_head):
                return Storage(most, each_head, joined)
    return Storage(1, False, model.embedding.grid_size)


def bytes_of_maps(model: VisionTransformer, maps: int, joined: int = 1) -> int:
    """Of one image, with base64's four letters for three bytes."""
    tokens = math.ceil(model.embedding.grid_size / joined) ** 2 + (model.pooling == "cls")
    return 4 * math.ceil(maps * tokens**2 / 3) + 12 * maps


def notes_on_storage(model: VisionTransformer, storage: Storage, given: int) -> list[str]:
    """What is left out, and why, in sentences."""
    notes = []
    blocks, heads = model.config["num_blocks"], model.config["num_heads"]
    if not storage.heads and heads > 1:
        needed = given * bytes_of_maps(model, blocks * heads + 2) / 1e6
        notes.append(f"Each head's attention would take {needed:.1f} MB: here is the mean of a block's heads.")
    if storage.joined > 1:
        squares = f"{storage.joined}x{storage.joined}"
        notes.append(f"The {model.embedding.grid_size**2} patches are joined in squares of {squares}, by their means.")
    if storage.images < given:
        notes.append(f"There was room for {storage.images} of {given} images.")
    return notes


def quantise(maps: torch.Tensor) -> tuple[np.ndarray, list[float], float]:
    """Maps `(n, tokens, tokens)` as uint8, the largest number of each map, and the largest error.

    A number is `largest * (stored / 255) ** 2`.
    """
    maps = maps.double().numpy()
    largest = [float(f"{value:.7g}") for value in maps.max(axis=(1, 2))]
    scale = np.array(largest)[:, None, None]
    shares = np.divide(maps, scale, out=np.zeros_like(maps), where=scale > 0)
    stored = (255 * np.sqrt(shares)).round().clip(0, 255).astype(np.uint8)
    return stored, largest, float(np.abs(scale * (stored / 255) ** 2 - maps).max())


# --------------------------------------------------------------------------------------------------------------- maps


def maps_of(model: VisionTransformer, pixels: torch.Tensor, storage: Storage) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one image, uint8 `(3, img_size, img_size)`, all maps in multiples of uniform, `(maps, tokens, tokens)`, and
    the probabilities `(classes,)`.

    The maps are those of each block's heads (or of their mean), then rollout, then relevance for the predicted class
    without the 1 that each token has for itself. Rows are the tokens that look; a CLS token comes first.
    """
    device = next(model.parameters()).device
    image = normalise(pixels[None], model.metadata).to(device)
    with torch.no_grad(), eval_mode(model):
        output = model(image, return_attention=True)
    weights = output["attention_weights"]  # (blocks, 1, heads, tokens, tokens)
    relevance = relevance_of_tokens(model, image) - torch.eye(weights.shape[-1], device=device)
    heads = weights[:, 0] if storage.heads else weights[:, 0].mean(dim=1, keepdim=True)
    maps = torch.cat([heads.flatten(0, 1), roll_out(weights), relevance]).float().cpu()
    maps = maps / maps.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    maps = join_patches(maps, model.embedding.grid_size, storage.joined)
    return maps.clamp(min=0), output["logits"][0].float().softmax(dim=0).cpu()


def join_patches(maps: torch.Tensor, side: int, joined: int) -> torch.Tensor:
    """The means over squares of `joined` x `joined` patches, in the tokens that look and in those looked at; at the
    right and bottom edge squares may be cut. A CLS token in front is kept."""
    if joined == 1:
        return maps
    along = torch.arange(side) // joined
    cells = along[:, None] * (int(along[-1]) + 1) + along
    extra = maps.shape[-1] - side**2  # 1 with a CLS token
    groups = torch.cat([torch.arange(extra), cells.flatten() + extra])
    member = torch.nn.functional.one_hot(groups).T.float()
    member = member / member.sum(dim=1, keepdim=True)
    return member @ maps @ member.T


def picture_address(pixels: torch.Tensor) -> str:
    """An image, uint8 `(3, height, width)`, as a data: address."""
    kind, options = ("PNG", {"optimize": True}) if pixels.shape[-1] <= SMALL else ("JPEG", {"quality": 90})
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
