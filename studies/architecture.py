"""A drawing of the default ViT, from a picture to the probabilities of its classes.

    python -m studies.architecture

The picture is a test image of demos/cifar10_samples.png, the probabilities are those that saved/VisionTransformer.pt
gives it, and all sizes are read off that model. Writes figures/architecture.png.
"""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from network import VisionTransformer
from support import cli
from support.figures import BLUE, DARK, GREY, LIGHT, add_axes, new_figure, save_figure
from support.files import figures_folder
from training.trained import load_model, normalise, sample_images

IMAGE, MIDDLE = 147, 206  # a horse that could be a deer; the line that the tokens go along, in pixels from the top


@dataclass
class Config:
    """Draw the default ViT with what it makes of a picture."""

    output_dir: str | None = None  # the folder that the drawing goes to; default: the project's figures/


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        model = load_model("saved/VisionTransformer.pt")
        path = figures_folder(config.output_dir) / "architecture.png"
        save_figure(draw(model, sample_images(model)[0][IMAGE]), path)
        cli.say_written([path])


@torch.no_grad()
def draw(model: VisionTransformer, image: torch.Tensor) -> Figure:
    """From left to right: picture and patches, embedding, a block, what follows the last one, probabilities."""
    embedding, block, norm = model.embedding, model.blocks[0], "LayerNorm"
    grid, (tokens, width) = embedding.grid_size, embedding.position.shape[1:]
    channels, (side, _) = embedding.project.in_channels, embedding.project.kernel_size
    heads, wide, classes = block.attention.num_heads, block.mlp[0].out_features, model.head.out_features
    note = f"saved/{model.title}.pt: {sum(p.numel() for p in model.parameters()):,} parameters"
    figure = new_figure(940, 318, "The default ViT, from a picture to the probabilities of its classes", note)
    canvas = add_axes(figure, 0, 0, 940, 318)
    canvas.set(xlim=(0, 940), ylim=(318, 0))
    canvas.axis("off")
    pixels = image.permute(1, 2, 0).numpy()
    canvas.imshow(pixels, extent=(30, 94, 126, 62))
    write(canvas, 104, 94, f"picture\n{channels} × {pixels.shape[0]} × {pixels.shape[1]}", ha="left")
    arrow(canvas, (62, 130), (62, 154))
    canvas.imshow(pixels, extent=(14, 110, MIDDLE + 48, MIDDLE - 48))
    canvas.vlines([14 + 96 * k / grid for k in range(1, grid)], MIDDLE - 49, MIDDLE + 49, "white", lw=1.6)
    canvas.hlines([MIDDLE - 48 + 96 * k / grid for k in range(1, grid)], 13, 111, "white", lw=1.6)
    write(canvas, 62, 284, f"{grid} × {grid} patches\nof {channels} × {side} × {side}")
    arrow(canvas, (112, MIDDLE), (134, MIDDLE))
    box(canvas, 136, 90, f"patch\nembedding\n{channels * side**2} → {width}\n+ learned\npositions")
    write(canvas, 181, 284, f"{tokens} tokens\nof {width}")
    box(canvas, 248, 340, height=192, color=LIGHT)
    write(canvas, 418, 98, f"transformer block, × {len(model.blocks)}", weight="bold")
    write(canvas, 418, 284, f"{tokens} × {width} goes in, {tokens} × {width} comes out")
    write(canvas, 347, 137, "residual", color=BLUE)
    arrow(canvas, (228, MIDDLE), (274, MIDDLE))
    attention = f"attention\n{heads} heads\nof {width // heads}"
    for left, text in ((276, attention), (436, f"MLP\n{width} → {wide}\nGELU\n{wide} → {width}")):
        box(canvas, left, 22, norm, rotation=90)
        arrow(canvas, (left + 24, MIDDLE), (left + 34, MIDDLE))
        box(canvas, left + 36, 74, text)
        arrow(canvas, (left + 112, MIDDLE), (left + 122, MIDDLE))
        canvas.plot([left - 14] * 2 + [left + 131] * 2, [MIDDLE, 124, 124, MIDDLE - 8], color=BLUE, lw=1.4)
        write(canvas, left + 131, MIDDLE, "+", color=BLUE, size=15, weight="bold")
        arrow(canvas, (left + 139, MIDDLE), (left + (158 if text == attention else 168), MIDDLE))
    for left, text in ((606, norm), (644, f"mean over\n{tokens} patches"), (700, f"linear head\n{width} → {classes}")):
        across = 22 if text == norm else 40
        box(canvas, left, across, text, rotation=90)
        arrow(canvas, (left + across + 2, MIDDLE), (left + across + 14, MIDDLE))
    write(canvas, 673, 284, f"{tokens} × {width}\nto {width} to {classes}")
    shares = 100 * model(normalise(image[None], model.metadata))[0].softmax(dim=0)
    for row, (name, share) in enumerate(zip(model.metadata["classes"], shares.tolist(), strict=True)):
        y = MIDDLE + 16 * (row - (classes - 1) / 2)
        write(canvas, 830, y, name, ha="right")
        canvas.barh(y, 0.66 * share, 11, left=834, color=BLUE)
        write(canvas, 839 + 0.66 * share, y, f"{share:.0f} %", ha="left")
    write(canvas, 830, 300, "probabilities of the classes")
    return figure


def box(canvas: Axes, left: float, width: float, text="", height: float = 104, color="white", **style) -> None:
    corner = (left, MIDDLE - height / 2)
    canvas.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=5", fc=color, ec=GREY))
    write(canvas, left + width / 2, MIDDLE, text, **style)


def write(canvas: Axes, x: float, y: float, text: str, **style) -> None:
    canvas.text(x, y, text, **{"ha": "center", "va": "center", "color": DARK, **style})


def arrow(canvas: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    canvas.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": DARK, "shrinkA": 0, "shrinkB": 0})


if __name__ == "__main__":
    main()
