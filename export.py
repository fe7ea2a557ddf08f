"""A trained model for use without this project: as ONNX, and as a torch.export program.

    python export.py saved/VisionTransformer.pt               # .onnx, .pt2 and .int8.onnx beside it
    python export.py saved/CNN.pt --output_dir out --no_latency

Both files take plain RGB images, uint8 `(batch, 3, height, width)` with values 0 to 255, of the side that the model was
trained on and in any number; normalisation is inside. They give logits, float32 `(batch, classes)`. Class names and the
rest of what a user needs to know are in the ONNX file's metadata.

Nothing is written unless ONNX Runtime and the program, read back, answer as the PyTorch model does on test images. A
third file has its matrices in 8 bits (dynamic quantisation: activations are scaled as they come); it is kept only where
it loses no more than half a percentage point of the accuracy on the validation images: test images measure, and decide
nothing. Sizes, accuracy and latency, side by side, are printed and stored in figures/<name>_export.json.

Where the model's data set is not on this machine, nothing is downloaded: answers are compared on other pictures, no
accuracy is measured, and the file in 8 bits is not kept. Everything runs on the CPU. Needs onnx, onnxscript and
onnxruntime.
"""

import importlib.metadata
import importlib.util
import io
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.export import ExportedProgram

from images.augment import import_torchvision
from images.loader import ImageLoader, Split
from network import Model
from setup_cifar import is_here
from support import cli
from support.files import figures_folder, find_file, first_line, write_bytes
from support.report import plain_table, provenance, write_results
from training.trained import SHEET, load_model, predict, read_sheet, test_loader, validation_loader

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # largest difference of logits, as a part of the largest logit: rounding makes some 1e-6 of it
LOSS_ALLOWED = 0.005  # of validation accuracy, a fraction, for which the file in 8 bits is still kept
BATCH_SIZES = (1, 128)  # whose latency is measured

Predictor = Callable[[torch.Tensor], torch.Tensor]  # uint8 images to logits, both on the CPU


@dataclass
class Config:
    """Export a saved model to ONNX and torch.export, checked against PyTorch, with a version in 8 bits."""

    checkpoint: str  # a file that train.py wrote
    model: str | None = None  # my_model.py:MyNet, where the class of a model of your own lies; only for such a model
    output_dir: str | None = None  # the folder that the exported files go to; default: that of the model
    figures_dir: str | None = None  # where the table goes, as JSON; default: --output_dir, else the project's figures/
    data_dir: str | None = None  # where CIFAR-10 lies or goes; default: the environment's DATA_DIR, else data
    images: int = 1000  # on so many test images the exported files must agree with the model
    latency: bool = True  # milliseconds at batch 1 and 128
    repeats: int = 50  # timed turns of each
    threads: int = 1  # of torch and of ONNX Runtime


class Disagreement(ArithmeticError):
    """An exported file does not answer as the model does."""


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        cli.require_positive(config, "images", "repeats", "threads")
        require_packages()
        torch.set_num_threads(config.threads)
        model = load_model(config.checkpoint, model=config.model)
        loader, validation, stand_in = images_to_check(model, config.data_dir)
        try:
            export(model, loader, validation, config, stand_in)
        except Disagreement as error:
            cli.fail(str(error), code=1)


def export(
    model: Model, loader: ImageLoader, validation: ImageLoader | None, config: Config, stand_in: str | None = None
) -> dict:
    """Make, check, measure and write everything; returns what is stored in `<name>_export.json`.

    Args:
        loader: the test images, normalised as they were in training.
        validation: the validation images, None where there are none: 8 bits are not kept then.
        stand_in: what `loader` has where that is not the test images: no accuracy is measured then.

    Raises:
        Disagreement: an exported file gives other answers than the model; nothing has been written then.
    """
    model_path = find_file(config.checkpoint)
    name = model_path.stem
    prefix = Path(config.output_dir or model_path.parent) / name
    onnx_path, program_path, small_path = (prefix.with_name(name + end) for end in (".onnx", ".pt2", ".int8.onnx"))
    print(f"exporting {config.checkpoint}, {model.title} ...", flush=True)
    program = to_program(model)
    onnx_bytes, program_bytes = to_onnx(program, model), save_program(program, model)
    small_bytes = quantise(onnx_bytes)

    predictors = {
        "PyTorch": WithNormalisation(model),
        "ONNX Runtime": onnx_predictor(onnx_bytes, config.threads),
        "ExportedProgram": load_program(program_bytes),
        "ONNX Runtime, 8 bits": onnx_predictor(small_bytes, config.threads),
    }
    sizes = [model_path.stat().st_size, len(onnx_bytes), len(program_bytes), len(small_bytes)]
    rows = {who: {"bytes": size} for who, size in zip(predictors, sizes, strict=True)}
    for who, answers in compare_all(predictors, model, loader, config.images, measure=not stand_in).items():
        rows[who] |= answers
    lost = lost_accuracy(predictors["ONNX Runtime, 8 bits"], model, validation) if validation else None
    if config.latency:
        for batch_size in BATCH_SIZES:
            images = loader.images.repeat(-(-batch_size // len(loader.images)), 1, 1, 1)[:batch_size]
            for who, seconds in latency(predictors, images, config.repeats).items():
                rows[who][f"milliseconds_batch_{batch_size}"] = 1e3 * seconds

    report = {
        "model": config.checkpoint,
        "dataset": model.metadata["dataset"],
        **({"compared_on": stand_in} if stand_in else {"test_images": len(loader.images)}),
        "threads": config.threads,
        "validation_images": len(validation.images) if validation else 0,
        "validation_accuracy_lost_in_8_bits": lost,
        "8_bits_kept": lost is not None and lost <= LOSS_ALLOWED,
        "rows": rows,
        "provenance": provenance() | versions(),
    }
    written = {onnx_path: onnx_bytes, program_path: program_bytes}
    if report["8_bits_kept"]:
        written[small_path] = small_bytes
    print(f"\n{as_table(rows)}\n")
    if lost is None:
        print("8 bits: not kept, as without validation images nobody knows what they cost")
    else:
        print(f"8 bits change validation accuracy by {round(-100 * lost, 2) + 0.0:+.2f} percentage points;")
        print(f"{-100 * LOSS_ALLOWED} are allowed: {'kept' if report['8_bits_kept'] else 'not kept'}")
    if not report["8_bits_kept"]:
        small_path.unlink(missing_ok=True)  # of an earlier export: it would pass for this model's
    for path, contents in written.items():
        write_bytes(path, contents)
    report_path = figures_folder(config.figures_dir or config.output_dir) / f"{name}_export.json"
    timings = tuple(f"milliseconds_batch_{size}" for size in BATCH_SIZES)
    stored = [report_path] if write_results(report_path, report, timings) else []
    cli.say_written([*written, *stored])
    return report


def images_to_check(model: Model, data_dir: str | None) -> tuple[ImageLoader, ImageLoader | None, str | None]:
    """The test images of the model's data set, its validation images or None where it has none, and None; where the
    data set is not on this machine, other pictures, None, and what they are. Nothing is downloaded."""
    metadata = model.metadata
    if is_here(metadata, data_dir):
        validation = validation_loader(model, data_dir, 500, "cpu")
        return test_loader(model, data_dir, 500, "cpu"), validation if len(validation) else None, None
    if metadata["dataset"] == "cifar10" and SHEET.is_file():
        (images, _), what = read_sheet(), "the 200 test images of demos/cifar10_samples.png"
    else:
        generator = torch.Generator().manual_seed(0)
        shape = (200, 3, model.image_size, model.image_size)
        images, what = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), "200 images of noise"
    print(f"{metadata['dataset']} is not on this machine: no accuracy is measured,")
    print(f"and answers are compared on {what}")
    labels = torch.zeros(len(images), dtype=torch.long)
    return ImageLoader(Split(images, labels), 500, metadata["mean"], metadata["std"], "cpu"), None, what


# -------------------------------------------------------------------------------------------------- what is exported


class WithNormalisation(nn.Module):
    """Plain images in, logits out: uint8 `(batch, 3, height, width)` to float32 `(batch, classes)`."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(model.metadata[name]).view(1, -1, 1, 1))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model((images.float() / 255 - self.mean) / self.std)


def to_program(model: Model) -> ExportedProgram:
    """The model with its normalisation as one graph, for any number of images.

    Raises:
        ValueError: torch.export cannot follow the model.
    """
    images = torch.zeros(2, 3, model.image_size, model.image_size, dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                WithNormalisation(model), (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}
            )
    except Exception as error:  # the exporters have many ways of saying that they cannot
        raise ValueError(f"{model.title} cannot be exported: {first_line(error)}") from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of code, with the paths they have on this machine
    return program


def to_onnx(program: ExportedProgram, model: Model) -> bytes:
    """The program as an ONNX file: input `images`, output `logits`, both with the axis `batch`.

    Raises:
        ValueError: the ONNX exporter cannot translate it.
    """
    import_torchvision()  # the exporter imports it where it is installed
    import onnx_ir

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: "batch"}},
                verbose=False,
            )
    except Exception as error:
        raise ValueError(f"{model.title} cannot be exported to ONNX: {first_line(error)}") from None
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(exported.model)  # the exporter's notes, with paths again
    exported.model.metadata_props.update({name: json.dumps(value) for name, value in metadata_of(model).items()})
    return exported.model_proto.SerializeToString()


def metadata_of(model: Model) -> dict:
    """What a user of the file needs to know; in both files each value is JSON."""
    return {
        "model": model.title,
        "dataset": model.metadata["dataset"],
        "classes": model.metadata["classes"],
        "input": "images: RGB, uint8, (batch, 3, height, width), 0 to 255; normalisation is inside",
        "image_size": model.image_size,
        "output": "logits: float32, (batch, classes); their softmax is the probabilities",
    }


def save_program(program: ExportedProgram, model: Model) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata_of(model))})
    return buffer.getvalue()


def quantise(onnx_bytes: bytes) -> bytes:
    """The ONNX file with its constant matrices in 8 bits, a scale for each column; activations are scaled as they come.

    Convolutions stay as they are: in 8 bits, ONNX Runtime took two and a half times as long for those of the CNN.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load_from_string(onnx_bytes)
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # advice on preparing the graph, which the exporter has done
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            # weights take 7 of the 8 bits: sums of two products overflow on processors without VNNI otherwise
            quantize_dynamic(model, path, ["MatMul"], per_channel=True, weight_type=QuantType.QInt8, reduce_range=True)
            return path.read_bytes()
    finally:
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------------- reading it back, checks


def onnx_predictor(onnx_bytes: bytes, threads: int = 1) -> Predictor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def load_program(program_bytes: bytes) -> Predictor:
    return torch.export.load(io.BytesIO(program_bytes)).module()


@torch.no_grad()
def predict_plain(predictor: Predictor, images: torch.Tensor, who: str, batch_size: int = 500) -> torch.Tensor:
    """Logits `(n, classes)` for plain images, uint8 `(n, 3, height, width)`."""
    batches = cli.progress(images.split(batch_size), f"checking {who}", "batch")
    return torch.cat([predictor(batch) for batch in batches])


def compare_all(
    predictors: dict[str, Predictor], model: Model, loader: ImageLoader, most: int, measure: bool
) -> dict[str, dict]:
    """How far each is from the model: those in full precision on `most` images, the others on all of them and, where
    the labels are known (`measure`), with their accuracy.

    Raises:
        Disagreement: one in full precision gives other answers than the model.
    """
    logits, labels = predict(model, loader)
    rows = {}
    for who, predictor in predictors.items():
        exact = who in ("ONNX Runtime", "ExportedProgram")
        count = min(most, len(labels)) if exact else len(labels)
        answers = predict_plain(predictor, loader.images[:count], who)
        rows[who] = compare(logits[:count], answers)
        if exact:
            check_agreement(who, rows[who])
        elif measure:
            rows[who]["accuracy"] = (answers.argmax(dim=1) == labels).float().mean().item()
    return rows


def lost_accuracy(predictor: Predictor, model: Model, validation: ImageLoader) -> float:
    """By how much less of the validation images it is right than the model, as a fraction."""
    logits, labels = predict(model, validation)
    answers = predict_plain(predictor, validation.images, "8 bits on validation images")
    right = [(given.argmax(dim=1) == labels).double().mean().item() for given in (logits, answers)]
    return right[0] - right[1]


def compare(expected: torch.Tensor, logits: torch.Tensor) -> dict:
    """How far `logits` are from `expected`, both `(n, classes)`: the largest difference, and how often the top class is
    the same."""
    return {
        "images_compared": len(logits),
        "largest_logit": expected.abs().max().item(),
        "largest_difference": (logits - expected).abs().max().item(),
        "same_top_1": int((logits.argmax(dim=1) == expected.argmax(dim=1)).sum()),
    }


def check_agreement(who: str, row: dict) -> None:
    """
    Raises:
        Disagreement: the top class differs on an image, or a logit by more than TOLERANCE of the largest (or of 1).
    """
    difference, images = row["largest_difference"], row["images_compared"]
    allowed = TOLERANCE * max(1.0, row["largest_logit"])
    if not difference <= allowed or row["same_top_1"] < images:  # not <=: neither is a difference that is not a number
        raise Disagreement(
            f"{who} does not answer as the model does, so nothing was written: logits differ by up to {difference:.2g} "
            f"(allowed: {allowed:.2g}), and the top class is the same on {row['same_top_1']} of {images} images"
        )


@torch.no_grad()
def latency(predictors: dict[str, Predictor], images: torch.Tensor, repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each for these images, in turns, so that a machine whose speed drifts is the same to all."""
    seconds = {who: [] for who in predictors}
    for turn in cli.progress(range(warmup + repeats), f"timing batch {len(images)}", "turn"):
        for who, predictor in predictors.items():
            started = time.perf_counter()
            predictor(images)
            if turn >= warmup:
                seconds[who].append(time.perf_counter() - started)
    return {who: statistics.median(values) for who, values in seconds.items()}


# ------------------------------------------------------------------------------------------------------------ the table


def as_table(rows: dict[str, dict]) -> str:
    """A column for each predictor; what was not measured stays empty."""
    lines = {
        "file, kB": "{kilobytes:,.0f}",
        "difference of logits": "{largest_difference:.1g}",
        "same top-1": "{same_top_1:,} of {images_compared:,}",
        "test accuracy": "{accuracy:.2%}",
        **{f"batch {size}, ms": f"{{milliseconds_batch_{size}:.2f}}" for size in BATCH_SIZES},
    }
    columns = {"": list(lines)}
    for who, row in rows.items():
        known = {**row, "kilobytes": row["bytes"] / 1000}
        if who == "PyTorch":  # what the others are compared with
            del known["largest_difference"], known["same_top_1"]
        cells = columns[who.replace("ONNX Runtime", "ONNX")] = []
        for text in lines.values():
            try:
                cells.append(text.format(**known))
            except KeyError:
                cells.append("")
    return plain_table(columns, left=[""])


def require_packages() -> None:
    """
    Raises:
        ValueError: naming what is not installed, and the command that does it.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"exporting needs {' and '.join(missing)}: pip install {' '.join(PACKAGES)}")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


if __name__ == "__main__":
    main()
