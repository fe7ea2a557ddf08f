"""Are explanations faithful?  The deletion and insertion test: do heat maps name the patches that matter?

    python -m studies.faithfulness                       # of saved/VisionTransformer.pt
    python -m studies.faithfulness saved/CNN.pt
    python -m studies.faithfulness saved/VisionTransformer.pt saved/VisionTransformer_seed1.pt    # the mean of both

Writes figures/<name>_faithfulness.json and .png; <name> is the model file's, with "_and_1_more" where two are given.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

import utils
from explain import choose_images, model_files, picture_path
from runner import choose_device
from support import cli
from support.model import Model
from support.report import provenance, write_results
from support.significance import holm, paired_t
from training.heatmaps import patch_grid, patch_scores
from training.trained import data_title, load_model


@dataclass
class Config:
    """Measure whether saved models' heat maps name the patches that their accuracy rests on."""

    models: tuple[str, ...]  # files that train.py wrote; default: saved/VisionTransformer.pt. Of several, their mean
    checkpoint: str | None = None  # one of them, as a flag
    model: str | None = None  # my_model.py:MyNet, where the class of a model of your own lies: only for such a model
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str | None = None  # the folder that picture and figures go to; default: the project's figures/
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    images: int = 1000  # test images
    steps: int = 16  # in which all patches are removed
    seed: int = 0  # of the choice of images, and of the random ranking


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        cli.require_positive(config, "images", "steps")
        if config.seed < 0:
            raise ValueError(f"seed must not be negative, not {config.seed}")
        device = choose_device(config.device)
        paths = model_files(config.models, config.checkpoint)
        models, images, labels = load_alike(paths, device, config)
        size, _ = patch_grid(models[0], images)
        title, name = f"{models[0].title} on {data_title(models[0].metadata)}", paths[0]
        if len(models) > 1:
            name = f"{Path(name).stem}_and_{len(models) - 1}_more.pt"
            title += f", mean of {len(models)} models"
        scores = [patch_scores(model, images) for model in models]
        report = measure(models, images, labels, scores, size, config.steps, config.seed)
        print(markdown_table(report))
        picture = picture_path(config.output_dir, name, "faithfulness")
        given = {"models": paths} if len(models) > 1 else {"model": paths[0]}
        report = {**given, "dataset": models[0].metadata["dataset"], "seed": config.seed, **report}
        written = write_results(picture.with_suffix(".json"), {**report, "provenance": provenance(device)})
        draw(report, picture, title)
        cli.say_written([picture, picture.with_suffix(".json")] if written else [picture])


def load_alike(
    paths: list[str], device: torch.device, config: Config
) -> tuple[list[Model], torch.Tensor, torch.Tensor]:
    """These models, and the images and labels that all are measured on.

    Raises:
        ValueError: one is given twice, or they differ in more than their weights.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ValueError(f"a model is given twice: {' '.join(paths)}")
    models = [load_model(path, device, config.model) for path in paths]
    loaded = [choose_images(model, config.images, config.seed, config.data_dir) for model in models]
    images, labels = loaded[0]
    for path, model, (others, _) in zip(paths, models, loaded, strict=True):
        if type(model) is not type(models[0]) or model.config != models[0].config:
            raise ValueError(f"{path} is another kind of model than {paths[0]}, or of other sizes: they have no mean")
        if not torch.equal(images, others):
            raise ValueError(f"{path} was trained on other images than {paths[0]}: they have no mean")
    return models, images, labels


def measure(
    models: list[nn.Module],
    images: torch.Tensor,
    labels: torch.Tensor,
    scores: list[dict[str, torch.Tensor]],
    size: int,
    steps: int = 16,
    seed: int = 0,
) -> dict:
    """Deletion and insertion test (Samek et al. 2017, Petsiuk et al. 2018) of rankings, and of a random one.

    Patches are removed in `steps` equal steps, from the highest-ranked down ("deletion") and from the lowest-ranked up
    ("insertion": read from its end, it puts the highest-ranked patches into an empty image first); accuracy is measured
    after each. Removed means replaced by the data set's mean colour: 0, since images are normalised. The area under
    such a curve is its mean height over the part removed: a faithful ranking has a small one in deletion and a large
    one in insertion.

    Args:
        models: one, or several of one kind, of which the mean is taken.
        images, labels: normalised `(n, 3, height, width)` and `(n,)`.
        scores: of each model by name, `(n, patches)`, row after row of a square grid of patches; the highest is removed
            first.
        size: side of a patch in pixels.
        seed: of the random ranking, and of the order of equal scores.

    Returns:
        `images`, `patches`, `removed` (patches, at each point of a curve), and for every name `rankings[name]
        ["deletion" or "insertion"]` with the curve `accuracy`, its `area`, and `versus_random`: the area minus that of
        the random ranking, with the 95 % interval `[difference, low, high]` of the mean over images, paired; of one
        image the ends are not known, None. All are fractions. `pairs` compares each two rankings: see `compare`.
    """
    patches = next(iter(scores[0].values())).shape[1]
    removed = torch.linspace(0, patches, min(steps, patches) + 1).round().long()
    correct = {}  # by name and kind: of each model, `(points, n)`
    for model, its_scores in zip(models, scores, strict=True):
        random = torch.Generator().manual_seed(seed)
        its_scores = {"random": torch.zeros(len(images), patches), **its_scores}
        rankings = {name: rank(values.cpu(), random).to(images.device) for name, values in its_scores.items()}
        for name, ranking in cli.progress(rankings.items(), "removing patches", "ranking"):
            for kind, order in {"deletion": ranking, "insertion": ranking.flip(1)}.items():
                right = remove_patches(model, images, labels, order, removed, size)
                correct.setdefault((name, kind), []).append(right)
    correct = {key: torch.stack(values) for key, values in correct.items()}
    areas = {key: torch.trapezoid(values, removed / patches, dim=1) for key, values in correct.items()}
    found = {}
    for name, kind in areas:
        versus = paired_t(areas[name, kind].mean(dim=0).tolist(), areas["random", kind].mean(dim=0).tolist())
        found.setdefault(name, {})[kind] = {
            "accuracy": correct[name, kind].mean(dim=(0, 2)).tolist(),
            "area": areas[name, kind].mean().item(),
            "versus_random": [versus["difference"], *(versus["interval"] or [None, None])],
        }
    counts = {"images": len(images), "patches": patches, "removed": removed.tolist()}
    return {**counts, "rankings": found, "pairs": compare(areas)}


def compare(areas: dict[tuple[str, str], torch.Tensor]) -> list[dict]:
    """Each two rankings by each test: are they different, on average over the models?

    Args:
        areas: under the curve of a ranking and a test ("deletion" or "insertion"), `(models, n)`.

    Returns:
        Rows with `test`, `ranking` and `other`; `difference` of their areas, its 95 % `interval` and `p` value of
        Student's t test over the images, paired, both None of one image; `by_model`, the difference of each model; and
        `over_models`, the same test over the models. All p values are corrected for the number of rows (Holm 1979).
    """
    rows = []
    for (one, kind), (other, its_kind) in itertools.combinations(areas, 2):
        if kind == its_kind:
            means = [[areas[name, kind].mean(dim=dim).tolist() for name in (one, other)] for dim in (0, 1)]
            by_model = (areas[one, kind] - areas[other, kind]).mean(dim=1).tolist()
            tests = {**paired_t(*means[0]), "by_model": by_model, "over_models": paired_t(*means[1])}
            rows.append({"test": kind, "ranking": one, "other": other, **tests})
    for tested in (rows, [row["over_models"] for row in rows]):
        if tested and tested[0]["p"] is not None:
            for test, p in zip(tested, holm([test["p"] for test in tested]), strict=True):
                test["p"] = p
    return rows


def rank(scores: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Indices of patches, highest score first, `(n, patches)`; equal scores in random order."""
    shuffled = torch.rand(scores.shape, generator=random).argsort(dim=1)
    return shuffled.gather(1, scores.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))


@torch.no_grad()
def remove_patches(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    order: torch.Tensor,
    removed: torch.Tensor,
    size: int,
    batch_size: int = 500,
) -> torch.Tensor:
    """1 where the prediction is right, else 0, `(points, n)` on the CPU, after `removed[point]` patches are replaced
    by zeros. The model must be in eval mode.

    Args:
        order: `(n, patches)`, indices of patches as they are removed.
        removed: `(points,)`, how many are at each point.
        size: side of a patch in pixels.
    """
    side = math.isqrt(order.shape[1])
    place = order.argsort(dim=1).view(-1, 1, side, side)  # of each patch, when it is removed
    place = place.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    rest = images.shape[-1] - size * side
    place = F.pad(place, (0, rest, 0, rest), value=order.shape[1])  # the edge that no patch covers stays
    correct = []
    for count in removed.tolist():
        for batch, when, right in zip(*(x.split(batch_size) for x in (images, place, labels)), strict=True):
            correct.append((model(batch * (when >= count)).argmax(dim=1) == right).float().cpu())
    return torch.cat(correct).view(len(removed), len(images))


def markdown_table(report: dict) -> str:
    """Areas under the curves in percent, with their difference from the random ranking and its 95 % interval."""
    lines = [
        "| ranking | deletion (lower is better) | minus random | insertion (higher is better) | minus random |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, curves in report["rankings"].items():
        cells = []
        for kind in ("deletion", "insertion"):
            difference, *ends = curves[kind]["versus_random"]
            interval = "" if None in ends else " ({:+.1f} to {:+.1f})".format(*(100 * end for end in ends))
            versus = "" if name == "random" else f"{100 * difference:+.1f}{interval}"
            cells += [f"{100 * curves[kind]['area']:.1f}", versus]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(report: dict, path: Path, title: str) -> Figure:
    """Accuracy as patches are removed, the highest-ranked first and the lowest-ranked first."""
    colors = [utils.VERMILLION, "#CC79A7", utils.BLUE, utils.GREEN, "#E69F00"]  # of Okabe and Ito
    percent = [100 * count / report["patches"] for count in report["removed"]]
    note = f"accuracy on {report['images']:,} test images; removed patches get the mean colour"
    figure = utils.new_figure(960, 420, f"{title}: are the explanations faithful?", note)
    headings = ("highest-ranked first: lower is better", "lowest-ranked first: higher is better")
    for panel, (kind, place) in enumerate((("deletion", "upper right"), ("insertion", "lower left"))):
        axes = utils.add_axes(figure, 56 + 476 * panel, 84, 410, 278)
        for i, (name, curves) in enumerate(report["rankings"].items()):
            style = {"color": utils.DARK, "ls": "--"} if name == "random" else {"color": colors[i - 1]}
            accuracy = [100 * value for value in curves[kind]["accuracy"]]
            axes.plot(percent, accuracy, lw=1.8, label=f"{name}: {100 * curves[kind]['area']:.1f}", **style)
        axes.set_title(headings[panel], size=10.5)
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="patches removed, %", ylabel="accuracy, %")
        axes.legend(loc=place, title="area under the curve", title_fontsize=8.5, fontsize=8.5, handlelength=1.4)
        axes.grid()
    utils.save_figure(figure, path)
    return figure


if __name__ == "__main__":
    main()
