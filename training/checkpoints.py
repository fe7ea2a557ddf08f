"""Checkpoints: what is written so that a run can be taken up again, and how it is stopped and taken up."""

import signal
import time
from pathlib import Path

from runner import Runner
from support import distributed
from support.files import CheckpointError, read_file, write_file
from training.optim import rates_and_decays, set_rates_and_decays

CHANGEABLE = (  # hyperparameters that may differ from the checkpoint's: they do not change what is learned
    "data_dir",
    "device",
    "name",
    "output_dir",
    "tensorboard",
    "resume",
    "resume_changed",
    "checkpoint_minutes",
    "compile",
)
DATA = (  # that may not: what was trained on could become what is validated on
    "dataset",
    "img_size",
    "val_fraction",
    "split_seed",
    "folds",
    "fold",
    "classes",
    "label_fraction",
)


class Checkpoints:
    """The checkpoint of one run: model, optimiser, schedule, random state, place in the epoch, metrics.

    Args:
        path: the file, which is written anew each time.
        hyperparameters: the run's, by name.
    """

    def __init__(self, path: Path, hyperparameters: dict):
        self.path, self.hyperparameters = path, hyperparameters

    def write(self, runner: Runner, results: dict | None = None) -> None:
        """All that is needed to go on; `results` are the figures of a run that has ended."""
        write_file(self.path, {"runner": runner.state_dict(), "config": self.hyperparameters, "results": results})

    def write_regularly(self, runner: Runner, minutes: float) -> None:
        """Have the runner write a checkpoint after every epoch, and every few minutes within one."""
        last = [time.monotonic()]

        def write(runner: Runner) -> None:
            self.write(runner)
            last[0] = time.monotonic()

        def write_when_due(runner: Runner) -> None:
            if time.monotonic() - last[0] > 60 * minutes:
                write(runner)

        runner.callbacks["step_end"].append(write_when_due)
        runner.callbacks["epoch_end"].append(write)

    def resume(self, runner: Runner) -> dict | None:
        """Bring the runner to where the checkpoint was written; of a run that has ended return its results instead.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to a run with other hyperparameters, which
                only the hyperparameter `resume_changed` allows, and not of those in DATA.
        """
        checkpoint = distributed.from_the_first(self._read)
        changed = {
            name: f"{name} was {before!r} and is {now!r}"
            for name, now in self.hyperparameters.items()
            if (before := checkpoint["config"].get(name)) != now and name not in CHANGEABLE
        }
        if data := [changed[name] for name in DATA if name in changed]:
            raise CheckpointError(f"{'; '.join(data)}: a run goes on with its images; choose another --name for others")
        if changed and not self.hyperparameters["resume_changed"]:
            raise CheckpointError(f"{'; '.join(changed.values())}: --resume_changed goes on with the change")
        if checkpoint["results"] is not None and not changed:
            return checkpoint["results"]
        if checkpoint["config"].get("optimizer") != self.hyperparameters["optimizer"]:
            raise CheckpointError(f"{self.path} does not fit: it holds the state of another optimizer")
        wanted = rates_and_decays(runner.optimizer)
        try:
            runner.load_state_dict(checkpoint["runner"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{self.path} does not fit this model: {reason}") from None
        if changed:  # the checkpoint brought its learning rate and decay along: what was asked for now is to hold
            set_rates_and_decays(runner.optimizer, runner.scheduler, wanted)
        print(f"resuming after epoch {runner.epoch}, step {runner.step}")
        return None

    def _read(self) -> dict:
        if not self.path.exists():
            raise CheckpointError(f"there is no {self.path} to resume from: run without --resume")
        checkpoint = read_file(self.path)
        if not {"runner", "config", "results"} <= checkpoint.keys() or not isinstance(checkpoint["config"], dict):
            raise CheckpointError(f"{self.path} is not a checkpoint of a run")
        return checkpoint

    def set_interrupted_run_aside(self) -> None:
        """Rename the checkpoint of an interrupted run, rather than have the new run of that name overwrite it."""
        if is_of_interrupted_run(self.path):
            aside = self.path.with_name(self.path.name + ".previous")
            self.path.replace(aside)
            print(f"an interrupted run of this name is now {aside}; to go on with it, rename it back and use --resume")


def is_of_interrupted_run(path: Path) -> bool:
    """Whether there is a whole checkpoint at `path`, of a run that has not ended."""
    try:
        return path.exists() and read_file(path).get("results") is None
    except CheckpointError:
        return False


def stop_on_signals(runner: Runner) -> list[int]:
    """Ctrl-C or SIGTERM stops the runner after its step; a second one ends the program at once.

    Returns a list that the signal's number is put into.
    """
    received = []

    def stop(number, frame):
        received.append(number)
        runner.stop = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return received
