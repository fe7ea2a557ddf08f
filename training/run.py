"""What a run is besides its hyperparameters: name and files, lock, device, signals, processes, checkpoint, report."""

import contextlib
import dataclasses
import math
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import utils
from images.loader import Dataset, ImageLoader, agree
from network import MODELS, VisionTransformer
from runner import NonFiniteLoss, Runner, choose_device, choose_precision, has_bf16, keep_freed_memory
from support import cli, distributed, schema
from support.files import CheckpointError, home, short
from support.model import Model, num_parameters, read_model
from support.report import code_version, provenance, read_json, write_json
from training.callbacks import Clock, EarlyStopping, ProgressBar, WeightAverage
from training.checkpoints import Checkpoints, nothing_to_resume, read_checkpoint
from training.live import Frames, LiveResults, TensorBoard
from training.options import hyperparameters, name_of, same_hyperparameters
from training.parallel import OwnNumbers, ParallelRunner
from training.paths import Paths, release

FEW = 100  # validation images, of which one is a point of accuracy or more


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
            for number in (signal.SIGINT, signal.SIGTERM):  # they do again what they did once all processes are through
                contexts.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
            contexts.enter_context(distributed.processes())
            contexts.enter_context(cli.one_line_errors())
            code_version()  # as it is now, not when the run ends
            self.device = choose_device(distributed.device_name(self.config.device))
            self.config.precision = self.choose_precision()
            if self.config.threads is not None:
                if not 1 <= self.config.threads <= 1024:
                    raise ValueError(f"threads {self.config.threads} must be from 1 to 1024")
                torch.set_num_threads(self.config.threads)
            if self.device.type == "cpu":
                keep_freed_memory()
            self.share = {"rank": distributed.rank(), "world_size": distributed.world_size()}  # of each batch
            self.first = distributed.rank() == 0  # of several processes it alone writes
            self._contexts = contexts.pop_all()
        return self

    def choose_precision(self) -> str:
        """What is asked for; that of a stored run (--config) was its machine's choice, and may be slow on this one."""
        asked = self.config.precision
        if (
            self.config.config
            and "precision" not in self.config.given
            and asked == "bf16"
            and not has_bf16(self.device)
        ):
            print("precision is fp32 here: bf16, which the stored run had, would be slower")
            return "fp32"
        return choose_precision(asked, self.device)

    def __exit__(self, kind, error, traceback) -> None:
        self.progress.close()
        if self.lock:
            release(self.lock)
        with self._contexts:
            if isinstance(error, NonFiniteLoss) or (self.lock and isinstance(error, OSError)):
                cli.fail(str(error), code=1)
            if error is not None:
                raise error

    def describe(self, model: Model, data: Dataset, usual: dict[str, Any]) -> None:
        """Say what is trained on what, and name the files after it; nothing is written yet.

        Args:
            usual: hyperparameters that go without saying; those that differ are in the name.
        """
        config, self.data = self.config, data
        distributed.require_same(
            "hyperparameters and images", f"{hyperparameters(config)} {data.name} {data.fingerprints}"
        )
        name = config.name or name_of(model.title, data, config, usual)
        self.paths = Paths(Path(config.output_dir or home()), name)
        chosen = f", {', '.join(data.classes)}" if config.classes and len(data.classes) <= 4 else ""
        self.title = f"{model.title} on {data.name}{chosen}"
        processes = f", in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        size = f"{num_parameters(model):,} parameters, {len(data.train):,} images"
        print(f"{self.title}: {size}, on {self.device} in {config.precision}{processes}", flush=True)
        if not len(data.val):
            print("nothing is validated, so nothing can be chosen")
        elif len(data.val) < FEW:
            points = 100 / len(data.val)
            print(f"only {len(data.val)} validation images, {points:.2g} points of accuracy each: they say little")

    def runner(self, model: Model, optimizer: torch.optim.Optimizer, **options) -> Runner:
        """A Runner with clock and progress bar, for as many processes as there are."""
        kind = ParallelRunner if distributed.world_size() > 1 else Runner
        options |= {"device": self.device, "precision": self.config.precision, "verbose": False}
        callbacks = [OwnNumbers(self.config.seed), self.progress, self.clock]
        return kind(model, optimizer, callbacks=callbacks, **options)

    def callbacks(self, val_loader: Iterable) -> list[object]:
        """Those that write files: results as they come, the GIF's frames, TensorBoard, and, last, the checkpoint."""
        config, paths = self.config, self.paths
        settings = dataclasses.asdict(config)
        self.checkpoints = Checkpoints(paths.checkpoint, settings, config.checkpoint_minutes, self.data)
        if not self.first:
            return []
        # the pictures show images that are held out, or where none are, the first of those that are trained on
        loader = val_loader if len(self.data.val) else self.data.loader("train", 500, self.device)
        self.live = LiveResults(paths.table, paths.curves, self.title)
        found = [self.live]
        if config.gif_frames:
            found.append(Frames(loader, self.data.classes, paths.frames, config.gif_frames, self.title))
        if config.tensorboard:
            found.append(TensorBoard(paths.tensorboard, loader, self.data.classes))
        return [*found, self.checkpoints]

    def start(self, runner: Runner, train_loader: ImageLoader) -> bool:
        """Claim the name, then go on from the checkpoint (--resume) or set another run of that name aside. False where
        the run that is to be resumed had finished."""
        if self.config.resume:
            ended = self.finished()
            results = ended or self.resume(runner, train_loader)
            if results and distributed.broadcast(self.has_written, runner, results):
                print(f"this run has finished: {accuracy_of(results)}, {self.paths.model}")
                if self.config.test and "test_accuracy" not in results:
                    print(f"it has not seen the test images; to test it: python evaluate.py {short(self.paths.model)}")
                return False
            if ended:
                read_json(self.paths.report, schema.REPORT, "; run without --resume to train it anew")
                raise CheckpointError(
                    f"{self.paths.name} has ended without a checkpoint, and {self.paths.model} is missing, damaged or "
                    "of other images: run without --resume to train it anew"
                )
        if self.first:
            self.lock = self.paths.claim()
            if not self.config.resume:
                self.set_aside()
                for path in (self.paths.best, self.paths.last):  # of the run before, if any: this one may write none
                    path.unlink(missing_ok=True)
        if self.config.resume and not results:
            self.checkpoints.say_resumed(runner)
        self.stop_on_signals(runner)
        return True

    def finished(self) -> dict | None:
        """The results of this run, if it has ended and left no checkpoint."""

        def read() -> dict | None:
            if self.paths.checkpoint.exists() or not self.paths.report.exists():
                return None
            report = read_json(self.paths.report, schema.STORED_RUN)
            return report["results"] if same_hyperparameters(report["config"], self.config) else None

        return distributed.broadcast(read)

    def resume(self, runner: Runner, train_loader: ImageLoader) -> dict | None:
        """Go on from the checkpoint; returns the results of a run that has ended."""
        if not distributed.broadcast(self.paths.checkpoint.exists):
            if distributed.broadcast(self.paths.report.exists):
                raise CheckpointError(
                    f"the run {self.paths.name} has ended, and its checkpoint was deleted: it cannot go on "
                    "(--keep_checkpoint would have kept it)"
                )
            raise nothing_to_resume(self.paths.checkpoint, self.paths.name)
        groups = cli.flag_groups(type(self.config))
        images = {name for name, (title, _) in groups.items() if title == "data"}
        free = {name for name in groups if name not in hyperparameters(self.config)}
        defaults = dataclasses.asdict(type(self.config)())
        return self.checkpoints.resume(runner, train_loader, images, free, self.config.resume_changed, defaults)

    def set_aside(self) -> None:
        """Rename what an interrupted run of this name has written, and one that learned something else, before it is
        overwritten. The same run again takes its place."""
        paths, folder, why = self.paths, short(self.paths.model.parent), None
        try:
            interrupted = not read_checkpoint(paths.checkpoint)["results"]
        except CheckpointError:
            interrupted = paths.checkpoint.exists()  # what is damaged may be precious too
        if interrupted:
            name = paths.set_aside(unfinished=True)
            print(
                f"an interrupted run had the name {paths.name}\nand is now called {name} in {folder}; to go on with it:"
            )
            print(cli.for_shell([*self.launcher(), "--resume", "--name", name]))
        if paths.model.exists() or paths.report.exists():
            try:
                report = read_json(paths.report, schema.STORED_RUN)
                same = same_hyperparameters(report["config"], self.config)
                if not (same and agree(report, self.data.marks)):
                    why = "another run, with other hyperparameters or images,"
            except CheckpointError:
                why = "a model whose report is missing or damaged"
        if why:
            print(f"{why} had the name {paths.name}\nand is now called {paths.set_aside()} in {folder}")

    def launcher(self) -> list[str]:
        """What starts this script again in the same way, without its flags."""
        where = ["--output_dir", self.config.output_dir] if self.config.output_dir else []
        return [*distributed.launcher(), cli.script(), *where]

    def has_written(self, runner: Runner, results: dict) -> bool:
        """Whether model and report of the run, which ended with these results, are there and whole."""
        try:
            report, model = read_json(self.paths.report, schema.REPORT), read_model(self.paths.model)
        except CheckpointError:
            return False
        same_images = agree(model["metadata"].get("fingerprints", {}), self.data.fingerprints)
        return report["results"] == results and model["model"] == type(runner.model).__name__ and same_images

    def save_best(self, runner: Runner) -> None:
        """Write the weights of the best epoch until now, for early stopping."""
        if self.first:
            runner.eval_model.save(self.paths.best, **self.data.metadata)

    def stop_on_signals(self, runner: Runner) -> None:
        """Until the run is over Ctrl-C or SIGTERM stops the runner after its step; a second one ends the program."""

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
            if runner.steps_per_epoch or not runner.step:  # else training has not gone on, and nothing is new
                self.live.append(runner)
            self.checkpoints.write(runner)
        distributed.barrier()
        command = cli.for_shell([*self.launcher(), "--resume", "--name", self.paths.name])
        self.progress.close()
        print(f"\ninterrupted after step {runner.step}; to go on: {command}")
        raise SystemExit(128 + number)

    def finish(self, runner: Runner, test_loader: Iterable) -> None:
        """Test once, if that is asked for, then write the model, its report and the pictures."""
        config, epoch = self.config, runner.epoch
        for callback in runner.callbacks:
            if isinstance(callback, EarlyStopping | WeightAverage) and not callback.has_begun:
                raise ValueError("--ema, --patience and --monitor need an epoch of training: raise --epochs")
        for frames in [callback for callback in runner.callbacks if isinstance(callback, Frames)]:
            frames.draw_end(runner)
        for stopping in [callback for callback in runner.callbacks if isinstance(callback, EarlyStopping)]:
            epoch = stopping.epoch
            by = f" by more than {config.min_improvement}" if config.min_improvement else ""
            print(f"after {runner.epoch} epochs: epoch {epoch} was the last to improve validation {config.monitor}{by}")
            if self.first:
                runner.eval_model.save(self.paths.last, **self.data.metadata)
            stopping.use_best(runner)
        runner.precision = "fp32"  # in which evaluate.py and the others compute
        tested = {}
        if config.test:
            loss, accuracy = runner.test(test_loader)
            tested = {"tested_epoch": epoch, "test_accuracy": accuracy, "test_loss": loss}
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the test loss is {loss}: the model is of no use on some of the test images")
        if not self.first:
            return
        validated, processor = bool(runner.metrics["val_loss"]), self.clock.processor_seconds
        results = {
            "parameters": num_parameters(runner.model),
            "epochs": min(runner.epoch, config.epochs),
            "validated": validated,
            "tested": config.test,
            "val_accuracy": runner.metrics["val_accuracy"][epoch - 1] if validated else None,
            "val_loss": runner.metrics["val_loss"][epoch - 1] if validated else None,
            **tested,
            "training_seconds": round(self.clock.seconds, 1),
            "processor_seconds": None if processor is None else round(processor, 1),
            "skipped_steps": runner.skipped,
        }
        runner.eval_model.save(self.paths.model, **self.data.metadata)
        report = {
            "results": results,
            "config": dataclasses.asdict(config),
            "provenance": provenance(self.device),
            **self.data.marks,
            "metrics": runner.metrics,
            "val_seconds": self.clock.val_seconds,  # spent in training until each validation
        }
        write_json(self.paths.report, report)
        written = [self.paths.model, self.paths.report, self.paths.table, *self.draw_pictures(runner)]
        cli.say_written([*written, self.paths.tensorboard] if config.tensorboard else written)
        self.checkpoints.write(runner, results)
        shutil.rmtree(self.paths.frames, ignore_errors=True)  # only now: a run killed before this needs them again
        if not config.keep_checkpoint:
            self.paths.checkpoint.unlink(missing_ok=True)
        images = f"{self.data.name}, {len(self.data.test if tested else self.data.val):,} images"
        if tested:
            print(f"test loss {loss:.4f}  {accuracy_of(results)}  ({images}{'' if validated else '; no validation'})")
        elif validated:
            print(f"validation loss {results['val_loss']:.4f}  {accuracy_of(results)}  ({images}; not tested)")
        else:
            print("neither validated nor tested")

    def draw_pictures(self, runner: Runner) -> list[Path]:
        """Training curves, the GIF and, for a ViT, attention maps; returns what was written."""
        paths, config = self.paths, self.config
        utils.draw_curves(runner.metrics, paths.curves, self.title)
        written = [paths.curves]
        # none are left of a run that had finished and now went on
        if config.gif_frames and any(paths.frames.glob("frame_*.png")):
            frames, duration = max(2, config.gif_frames), config.gif_frame_duration
            utils.write_to_gif(paths.frames, paths.gif, duration, frames, keep_frames=True)
            written.append(paths.gif)
        if isinstance(runner.eval_model, VisionTransformer):
            part = "test" if config.test else "val" if len(self.data.val) else "train"
            loader = self.data.loader(part, 4, runner.device)
            utils.draw_attention(runner.eval_model, loader, self.data.classes, paths.attention)
            written.append(paths.attention)
        elif config.model not in MODELS:
            print(f"no pictures of attention: {runner.eval_model.title} does not give its attention weights")
        return written


def accuracy_of(results: dict[str, Any]) -> str:
    """That of a run which has ended, in words."""
    if results.get("test_accuracy") is not None:
        return f"test accuracy {results['test_accuracy']:.2%}"
    return "not validated" if results["val_accuracy"] is None else f"validation accuracy {results['val_accuracy']:.2%}"
