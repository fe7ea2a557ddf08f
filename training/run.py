"""What a run is besides its hyperparameters: name and files, lock, device, signals, processes, checkpoint, report."""

import contextlib
import dataclasses
import errno
import math
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout

import utils
from images.augment import parse_augment
from images.loader import Dataset, ImageLoader, join_names, split_names
from network import MODELS, VisionTransformer
from runner import NonFiniteLoss, Runner, choose_device
from support import cli, distributed, schema
from support.files import CheckpointError, write_bytes
from support.model import Model, num_parameters, read_model
from support.report import provenance, read_json, write_json
from training.callbacks import Clock, EarlyStopping, Frames, ProgressBar, TensorBoard
from training.checkpoints import Checkpoints
from training.models import find_model
from training.parallel import OwnNumbers, ParallelRunner
from training.plan import check_minutes


@dataclass
class RunOptions:
    """What concerns a run and not what is learned. All but the precision may change when it is resumed."""

    # the run
    name: str | None = None  # of the files written; default: the model's class, with the data set if not CIFAR-10
    data_dir: str | None = None  # where CIFAR lies or goes; default: the environment's DATA_DIR, else data
    output_dir: str = "."  # the folder that saved/, figures/ and the GIF go to
    resume: bool = False  # go on from the last checkpoint of the run of this name
    resume_changed: bool = False  # ... also where hyperparameters differ from the checkpoint's
    minutes: float | None = None  # in place of epochs: as many as end, with all that the run does, in this time
    checkpoint_minutes: float = 5.0  # a checkpoint is written after every epoch, and this often within one
    device: str = "auto"  # auto (MPS, else CUDA, else CPU), cpu, cuda, cuda:1, mps
    # of the CPU that compute, which changes the last digits of the weights; default: all cores, or OMP_NUM_THREADS
    threads: int | None = None
    # auto is bf16 on GPUs that have it, else fp32; on CPUs with AMX, too, bf16 is up to twice as fast
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False  # torch.compile the model for training, which takes half a minute; on a CPU no step is faster
    gif_frames: int = 40  # pictures in the GIF; 0 for none
    gif_frame_duration: int = 250  # milliseconds that each is shown
    tensorboard: bool = False  # also write scalars and pictures to runs/, for tensorboard --logdir runs


def choose_precision(name: str, device: torch.device) -> str:
    """The precision by name; "auto" takes bf16 on a GPU that computes in it, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return name if name != "auto" else "bf16" if has_bf16 else "fp32"


class Run:
    """One run of train.py, from `with Run(config) as run:` to its report.

    Within, errors that a user can cause are one line, and of several processes (torchrun) all end together.
    """

    def __init__(self, config):
        self.config = config
        self.clock = Clock()
        self.progress = ProgressBar(self.clock)
        self.lock = None  # on the name, once the run has begun
        self.signals = []  # that were received

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(distributed.processes())
            contexts.enter_context(cli.one_line_errors())
            self.device = choose_device(distributed.device_name(self.config.device))
            self.config.precision = choose_precision(self.config.precision, self.device)
            if self.config.threads is not None:
                if not 1 <= self.config.threads <= 1024:
                    raise ValueError(f"threads {self.config.threads} must be from 1 to 1024")
                torch.set_num_threads(self.config.threads)
            self.share = {"rank": distributed.rank(), "world_size": distributed.world_size()}  # of each batch
            self.first = distributed.rank() == 0  # of several processes it alone writes
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.progress.close()
        if self.lock:
            self.lock.release()
        with self._contexts:
            if isinstance(error, NonFiniteLoss) or (self.lock and isinstance(error, OSError)):
                cli.fail(str(error), code=1)
            if error is not None:
                raise error

    @property
    def hyperparameters(self) -> dict:
        """All of the config that does not concern the run alone, by name."""
        own = {field.name for field in dataclasses.fields(RunOptions)} - {"precision"}
        return {name: value for name, value in dataclasses.asdict(self.config).items() if name not in own}

    def describe(self, model: Model, data: Dataset) -> None:
        """Say what is trained on what, and name the files after it; nothing is written yet."""
        config, self.data = self.config, data
        distributed.require_same(
            "hyperparameters and images", f"{self.hyperparameters} {data.name} {data.fingerprints}"
        )
        names = data.classes if config.classes else []
        chosen = names if len(names) <= 4 else [f"{len(names)}classes"]
        suffix = ("" if data.name == "cifar10" else f"_{data.name}") + "".join(f"_{name}" for name in chosen)
        label = Path(config.name).name if config.name else None
        short = config.model if config.model in MODELS else model.title
        self.paths = Paths(
            Path(config.output_dir),
            config.name or model.title + suffix,
            gif=f"animation_{label or short + suffix}.gif",
            attention=f"attention_maps_{label}.png" if label else f"attention_maps{suffix}.png",
        )
        self.title = f"{model.title} on {data.name}" + (f", {', '.join(chosen)}" if chosen else "")
        processes = f", in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        size = f"{num_parameters(model):,} parameters, {len(data.train):,} training images"
        print(f"{self.title}: {size}, on {self.device}{processes}", flush=True)

    def runner(self, model: Model, optimizer: torch.optim.Optimizer, **options) -> Runner:
        """A Runner with clock and progress bar, for as many processes as there are."""
        kind = ParallelRunner if distributed.world_size() > 1 else Runner
        options |= {"device": self.device, "precision": self.config.precision, "verbose": False}
        callbacks = [OwnNumbers(self.config.seed), self.clock, self.progress]
        return kind(model, optimizer, callbacks=callbacks, **options)

    def callbacks(self, val_loader: Iterable) -> list[object]:
        """Those that write files: the GIF's frames, TensorBoard, and, last, the checkpoint."""
        config, paths = self.config, self.paths
        settings = dataclasses.asdict(config)
        self.checkpoints = Checkpoints(paths.checkpoint, settings, config.checkpoint_minutes, self.data)
        if not self.first:
            return []
        found = []
        if config.gif_frames:
            found.append(Frames(val_loader, self.data.classes, paths.frames, config.gif_frames, self.title))
        if config.tensorboard:
            found.append(TensorBoard(paths.tensorboard, val_loader, self.data.classes))
        return [*found, self.checkpoints]

    def start(self, runner: Runner, train_loader: ImageLoader) -> bool:
        """Claim the name, then go on from the checkpoint (--resume) or set that of an interrupted run aside. False
        where the run that is to be resumed had finished."""
        if self.config.resume:
            groups = cli.flag_groups(type(self.config))
            images = {name for name, (title, _) in groups.items() if title == "data"}
            free = {name for name in groups if name not in self.hyperparameters}
            results = self.checkpoints.resume(runner, train_loader, images, free, self.config.resume_changed)
            if results and self.has_written(runner, results):
                print(f"this run has finished: test accuracy {results['test_accuracy']:.2%}, {self.paths.model}")
                return False
        if self.first:
            self.lock = self.paths.claim()
            if not self.config.resume:
                self.checkpoints.set_interrupted_run_aside()
                for path in (self.paths.best, self.paths.last):  # of the run before, if any: this one may write none
                    path.unlink(missing_ok=True)
        self.stop_on_signals(runner)
        return True

    def has_written(self, runner: Runner, results: dict) -> bool:
        """Whether model and report of the run, which ended with these results, are there and whole."""
        try:
            report, model = read_json(self.paths.report, schema.REPORT), read_model(self.paths.model)
        except CheckpointError:
            return False
        same_images = model["metadata"].get("fingerprints", self.data.fingerprints) == self.data.fingerprints
        return report["results"] == results and model["model"] == type(runner.model).__name__ and same_images

    def save_best(self, runner: Runner) -> None:
        """Write the weights of the best epoch until now, for early stopping."""
        if self.first:
            runner.eval_model.save(self.paths.best, **self.data.metadata)

    def stop_on_signals(self, runner: Runner) -> None:
        """Ctrl-C or SIGTERM stops the runner after its step; a second one ends the program at once."""

        def stop(number, _frame):
            self.signals.append(number)
            runner.stop = True
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def exit_if_interrupted(self, runner: Runner) -> None:
        """After a signal, to any of the processes: write a checkpoint, say how to go on, and end with its exit code."""
        number = distributed.all_reduce(self.signals[0] if self.signals else 0, "max")
        if not number:
            return
        if self.first:
            self.checkpoints.write(runner)
        distributed.barrier()
        command = shlex.join(distributed.launcher() + cli.again() + ([] if self.config.resume else ["--resume"]))
        self.progress.close()
        print(f"\ninterrupted after step {runner.step}; to go on: {command}")
        raise SystemExit(128 + number)

    def finish(self, runner: Runner, test_loader: Iterable) -> None:
        """Test once, then write the model, its report and the pictures."""
        config, epoch = self.config, runner.epoch
        for stopping in [callback for callback in runner.callbacks if isinstance(callback, EarlyStopping)]:
            epoch = stopping.epoch
            by = f" by more than {config.min_improvement}" if config.min_improvement else ""
            print(f"after {runner.epoch} epochs: epoch {epoch} was the last to improve validation {config.monitor}{by}")
            if self.first:
                runner.eval_model.save(self.paths.last, **self.data.metadata)
            stopping.use_best(runner)
        test_loss, test_accuracy = runner.test(test_loader)
        if not math.isfinite(test_loss):
            raise NonFiniteLoss(f"the test loss is {test_loss}: the model is of no use on some of the test images")
        if not self.first:
            return
        results = {
            "parameters": num_parameters(runner.model),
            "epochs": min(runner.epoch, config.epochs),
            "tested_epoch": epoch,
            "val_accuracy": runner.metrics["val_accuracy"][epoch - 1],
            "val_loss": runner.metrics["val_loss"][epoch - 1],
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "training_seconds": round(self.clock.seconds, 1),
            "skipped_steps": runner.skipped,
        }
        runner.eval_model.save(self.paths.model, **self.data.metadata)
        report = {
            "results": results,
            "config": dataclasses.asdict(config),
            "provenance": provenance(),
            "images": self.data.fingerprint(),
            "metrics": runner.metrics,
            "val_seconds": self.clock.val_seconds,  # spent in training until each validation
        }
        write_json(self.paths.report, report)
        written = [self.paths.model, self.paths.report, *self.draw_pictures(runner)]
        print("wrote " + ", ".join(str(path) for path in written))
        self.checkpoints.write(runner, results)
        shutil.rmtree(self.paths.frames, ignore_errors=True)  # only now: a run killed before this needs them again
        tested = f"{self.data.name}, {len(self.data.test):,} images"
        print(f"test loss {test_loss:.4f}  test accuracy {test_accuracy:.2%}  ({tested})")

    def draw_pictures(self, runner: Runner) -> list[Path]:
        """Training curves, the GIF and, for a ViT, attention maps; returns what was written."""
        paths, config = self.paths, self.config
        utils.draw_curves(runner.metrics, paths.curves, self.title)
        written = [paths.curves]
        if any(paths.frames.glob("frame_*.png")):  # none are left of a run that had finished and now went on
            frames, duration = max(2, config.gif_frames), config.gif_frame_duration
            utils.write_to_gif(paths.frames, paths.gif, duration, frames, keep_frames=True)
            written.append(paths.gif)
        if isinstance(runner.eval_model, VisionTransformer):
            loader = self.data.loader("test", 4, runner.device)
            utils.draw_attention(runner.eval_model, loader, self.data.classes, paths.attention)
            written.append(paths.attention)
        elif config.model not in MODELS:
            print(f"no pictures of attention: {runner.eval_model.title} does not give its attention weights")
        return written


class Paths:
    """Where a run writes.

    Args:
        root: the folder that holds all of it.
        name: of the run; it may have a folder in front.
        gif, attention: names of these two files.
    """

    def __init__(self, root: Path, name: str, gif: str, attention: str):
        self.name = name
        saved, figures = root / "saved" / name, root / "figures" / name
        self.model = saved.with_name(f"{saved.name}.pt")  # the weights that the test figures belong to
        self.best = saved.with_name(f"{saved.name}.best.pt")  # with --patience: the best until now
        self.last = saved.with_name(f"{saved.name}.last.pt")  # and those that training ended with
        self.report = saved.with_name(f"{saved.name}.json")
        self.checkpoint = saved.with_name(f"{saved.name}.checkpoint")
        self.lock = saved.with_name(f"{saved.name}.lock")
        self.curves = figures.with_name(f"{figures.name}_curves.png")
        self.frames = figures.with_name(f"{figures.name}_frames")
        self.attention = figures.with_name(attention)
        self.gif = root / gif
        self.tensorboard = root / "runs" / name

    def claim(self) -> FileLock:
        """Make the folders, make sure now that they can be written, and lock the name.

        The lock is also released when this process ends, however it ends.

        Raises:
            OSError: a folder that cannot be written.
            ValueError: another run of this name is under way.
        """
        longest = {}  # name in each folder
        for path in vars(self).values():
            if isinstance(path, Path) and path != self.tensorboard:
                known = longest.get(path.parent, path)
                longest[path.parent] = max(known, path, key=lambda path: len(os.fsencode(path.name)))
        for path in longest.values():
            probe = path.with_name(f"{path.name}.tmp")  # as it is called while it is written
            try:
                write_bytes(probe, b"")
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                raise ValueError(f"{path.name} is too long for a file here: choose a shorter --name") from None
            probe.unlink()
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run named {self.name} is under way here: choose another --name") from None
        return lock


# ------------------------------------------------------------------------------------- what cannot be trained

POSITIVE = ("epochs", "minutes", "batch_size", "grad_accum", "lr", "checkpoint_minutes")
NOT_NEGATIVE = ("weight_decay", "patience", "min_improvement", "grad_clip", "gif_frames", "gif_frame_duration")
BELOW_ONE = ("warmup", "label_smoothing", "ema")  # and at least 0
FRACTIONS = ("layer_decay", "label_fraction")  # above 0 and at most 1


def check(config) -> None:
    """Refuse what cannot be trained, before data are loaded; what is not refused here, constructors refuse before
    anything is written.

    Raises:
        ValueError: naming the hyperparameter.
    """
    for names, holds, what in (
        (POSITIVE, lambda x: 0 < x < math.inf, "must be positive"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "must not be negative"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "must be at least 0 and less than 1"),
        (FRACTIONS, lambda x: 0 < x <= 1, "must be above 0 and at most 1"),
        (("seed",), lambda x: 0 <= x < 2**32, "must be in [0, 2**32)"),
        (("gif_frame_duration",), lambda x: x <= 655_350, "is longer than a GIF can: 655350 milliseconds"),
    ):
        for name in names:
            if getattr(config, name) is not None and not holds(getattr(config, name)):
                raise ValueError(f"{name} {getattr(config, name)} {what}")
    check_minutes(config)
    parse_augment(config.augment)
    find_model(config.model)
    if config.fold is not None and not re.fullmatch(r"\d+/\d+", config.fold):
        raise ValueError(f"fold {config.fold} must be a number and how many there are: 0/5 is the first of five")
    if config.classes:
        config.classes = join_names(split_names(config.classes))
    timm, weights = config.model.startswith("timm:"), config.pretrained or config.pretrained_file
    if timm and config.optimizer == "muon":
        raise ValueError("--optimizer muon is for the project's own blocks: choose adamw, adam or sgd for timm's")
    if weights and not timm:
        raise ValueError(f"--pretrained is for timm's models: --model {config.model} can start with --init_from")
    if weights and config.init_from:
        raise ValueError("--init_from and --pretrained both say what weights to start from: choose one")
    if config.freeze == "backbone" and not (config.init_from or weights):
        raise ValueError("--freeze backbone is for trained weights: say --init_from, --pretrained or --pretrained_file")
    parts = re.split(r"[/\\]", "name" if config.name is None else config.name)
    if {"", ".", ".."} & set(parts):
        raise ValueError(f"name {config.name!r} must be that of a file in saved/, with or without folders before it")
