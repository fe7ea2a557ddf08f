"""The search that `python -m studies.tune` makes: trials of train.py in a storage that several processes may share.

A trial that was killed stays in the storage as running. It is given up, and its configuration trained again, by the
next process that looks: at once where it can see that the process of the trial is gone (on the same machine), else when
the trial has given no sign of life for GRACE seconds.
"""

import hashlib
import os
import platform
import shlex
import shutil
import signal
import textwrap
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import psutil
from filelock import FileLock
from optuna.distributions import distribution_to_json
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

import train
from runner import NonFiniteLoss, Runner
from studies.tune_space import Space, flags_of
from support import cli
from support.files import first_line

GRACE = 600  # seconds without a sign of life after which a trial on another machine is given up
SIGN = 30  # seconds between two of these
ATTEMPTS = 3  # at one configuration: it may be what kills the process
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)  # towards --trials
PRUNERS: dict[str, Callable[[int, int], BasePruner]] = {  # of the epochs and the trials
    # the best so far is below the median that the trials trained to their end had at the same epoch, from the second on
    "median": lambda epochs, trials: MedianPruner(n_startup_trials=max(2, min(5, trials // 4)), n_warmup_steps=2),
    "hyperband": lambda epochs, trials: HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3),
    "none": lambda epochs, trials: NopPruner(),
}
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)


# ------------------------------------------------------------------------------------------------------- the storage


def open_storage(where: str) -> BaseStorage:
    """Of a URL (sqlite:///tune.db, postgresql://...), or of Optuna's journal in a file.

    Raises:
        ValueError: it cannot be opened.
    """
    try:
        file = where.removeprefix("sqlite:///")
        if "://" not in file and not Path(file).parent.is_dir():  # a disk that is not there, say
            raise ValueError(f"there is no folder {Path(file).parent}")
        if "://" not in where:
            return JournalStorage(JournalFileBackend(where))
        options = {"connect_args": {"timeout": 60}} if where.startswith("sqlite") else {}
        for last in (False, False, True):
            try:
                return RDBStorage(where, engine_kwargs=options)
            except Exception:  # two that make the tables of one new storage may get into each other's way
                if last:
                    raise
                time.sleep(1)
    except Exception as error:  # each kind of storage has its own errors
        reason, cause = cli.without_password(first_line(error)), error.__cause__
        if isinstance(cause, ModuleNotFoundError):  # Optuna does not say which
            reason = f"it needs the module {cause.name}, which is not installed"
        raise ValueError(f"--storage {cli.without_password(where)} cannot be opened: {reason}") from None


def open_study(where: str, name: str, settings: dict, default: dict | None) -> optuna.Study:
    """The search of this name, or a new one, which begins with the choices `default`.

    Args:
        default: None where the search has to be there.

    Raises:
        ValueError: there is none, or it has other settings.
    """
    storage = open_storage(where)
    try:
        if default is None:
            study = optuna.load_study(study_name=name, storage=storage)
        else:
            study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
            for key, value in settings.items():
                study.set_user_attr(key, value)
            study.enqueue_trial(default, user_attrs={"what": "train.py's default"})
    except KeyError:
        raise ValueError(f"no search {name} is stored in {cli.without_password(where)}") from None
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage)
    stored = study.user_attrs
    different = [key for key in settings if key in stored and stored[key] != settings[key]]
    if different:
        listed = ", ".join(f"{key} {stored[key]}" if key != "space" else "another search space" for key in different)
        raise ValueError(f"the search {name} in the storage has {listed}: say so, or choose another --storage")
    return study


def lock_of(where: str) -> AbstractContextManager:
    """Within it one process at a time begins a trial. SQLite does not see to that: two processes that ask at once may
    get the same waiting trial. Servers lock its row, and the journal is in one order for all."""
    return FileLock(f"{where.removeprefix('sqlite:///')}.lock") if where.startswith("sqlite:///") else nullcontext()


def settings_of(space: Space, **others) -> dict:
    """What all trials of a search have in common."""
    return {**others, "space": {name: distribution_to_json(choices) for name, choices in space.items()}}


# ------------------------------------------------------------------------------------------------------- the sampler


class SamplerByNumber(BaseSampler):
    """Tree-structured Parzen estimator (Bergstra et al. 2011), of all hyperparameters together, with a seed of its own
    for each trial: what is tried depends on the seed, on how many configurations were tried before and on the trials
    that have ended, but not on how often the search was interrupted; and two processes never draw the same. Trials that
    still run count as bad ones, so that others keep away from them ("constant liar", Ginsbourger et al. 2010).

    Args:
        startup: trials at the beginning that are drawn at random.
    """

    def __init__(self, seed: int, startup: int):
        self.seed, self.startup = seed, startup

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        before = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        number = sum("again" not in other.user_attrs for other in before)  # of its configuration: see put_back
        seed = int(hashlib.sha256(f"{self.seed} {number}".encode()).hexdigest()[:8], 16)
        self.tpe = TPESampler(n_startup_trials=self.startup, multivariate=True, constant_liar=True, seed=seed)
        self.tpe.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        return self.tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Space) -> dict:
        return self.tpe.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution):
        return self.tpe.sample_independent(study, trial, param_name, param_distribution)


# -------------------------------------------------------------------------------------------------------- the trials


class Stopped(Exception):
    """Training was stopped from outside; the message says why."""


class Watch:
    """A callback that gives the trial each epoch's validation accuracy, stops it where it is pruned, out of time,
    interrupted or orphaned, and gives signs of life."""

    def __init__(self, trial: optuna.Trial, deadline: float, parent: int | None):
        self.trial, self.deadline, self.parent, self.signed = trial, deadline, parent, time.monotonic()

    def step_end(self, runner: Runner) -> None:
        if runner.stop or self.parent not in (None, os.getppid()):
            raise Stopped(INTERRUPTED)
        if time.monotonic() > self.deadline:
            raise Stopped(OUT_OF_TIME)
        if time.monotonic() > self.signed + SIGN:
            self.signed = time.monotonic()
            self.trial.set_user_attr("seen", round(time.time()))

    def epoch_end(self, runner: Runner) -> None:
        self.trial.report(runner.metrics["val_accuracy"][-1], runner.epoch)
        if runner.epoch < runner.total_epochs:
            if self.trial.should_prune():
                raise optuna.TrialPruned
            self.step_end(runner)


INTERRUPTED, OUT_OF_TIME, DIVERGED = "interrupted", "out of time", "diverged"


@dataclass
class Search:
    """One process's part of a search.

    Args:
        common: flags to train.py of all trials.
        trials: of the search in all, whichever process makes them.
        deadline: of `time.monotonic()`, after which nothing is trained.
        folder: for what trials write, which is deleted when they end.
        parent: the process that started this one, if it is to end with that.
        lock: see `lock_of`.
    """

    study: optuna.Study
    space: Space
    common: str
    trials: int
    deadline: float
    folder: Path
    parent: int | None = None
    lock: AbstractContextManager = field(default_factory=nullcontext)

    def run(self) -> None:
        """Train trials until there are as many as asked for, counting those of other processes, or time is over.

        Raises:
            KeyboardInterrupt: by Ctrl-C or SIGTERM; the trial that was under way will be trained again.
            SystemExit: train.py could not train, and has said why.
        """
        while time.monotonic() < self.deadline:
            with self.lock:
                give_up_dead(self.study, self.folder)
                if len(counted(self.study)) >= self.trials:
                    return
                trial = self.study.ask(self.space)
                trial.set_user_attr("worker", this_process())
            if reason := self.superfluous(trial):
                trial.set_user_attr("why", reason)
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            self.train(trial)

    def superfluous(self, trial: optuna.Trial) -> str | None:
        """Why a trial need not be trained: other processes began theirs at the same moment, and the lower number goes
        first."""
        others = [other for other in counted(self.study) if other.number < trial.number]
        twins = [other.number for other in others if other.params == trial.params]
        return f"the same as trial {twins[0]}" if twins else "one too many" if len(others) >= self.trials else None

    def train(self, trial: optuna.Trial) -> None:
        folder = self.folder / f"trial{trial.number}"
        try:
            state, why, error = self.outcome(trial, folder)
            if why:
                trial.set_user_attr("why", why)
            values = frozen(self.study, trial.number).intermediate_values
            self.study.tell(trial, values[max(values)] if state == TrialState.COMPLETE else None, state)
            if why in (INTERRUPTED, OUT_OF_TIME):
                put_back(self.study, trial, trial.user_attrs.get("attempt", 1))
            print(describe(frozen(self.study, trial.number), self.study), flush=True)
        except (UpdateFinishedTrialError, ValueError):  # as storages and studies say it
            if frozen(self.study, trial.number).state == TrialState.RUNNING:
                raise
            print(f"trial {trial.number} had been given up by another process, which took this one for dead")
            error = None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if error:
            raise error

    def outcome(self, trial: optuna.Trial, folder: Path) -> tuple[TrialState, str, BaseException | None]:
        """Train; returns how it ended, why, and what ends the search with it."""
        try:
            chosen = flags_of(trial.params, self.common)
            trial.set_user_attr("command", f"python train.py {self.common} {chosen}")
            begun = sum(other.number <= trial.number for other in counted(self.study))
            title, width = f"trial {trial.number} ({begun} of {self.trials})", shutil.get_terminal_size().columns
            print("\n" + textwrap.fill(f"{title}: {chosen}", width, subsequent_indent="  ", break_on_hyphens=False))
            flags = [*shlex.split(f"{self.common} {chosen}"), "--gif_frames", "0", "--output_dir", str(folder)]
            with cli.calling_another():
                train.main(flags, [Watch(trial, self.deadline, self.parent)])
        except optuna.TrialPruned:
            return TrialState.PRUNED, "", None
        except Stopped as stopped:
            return TrialState.FAIL, str(stopped), KeyboardInterrupt() if str(stopped) == INTERRUPTED else None
        except KeyboardInterrupt as interrupt:
            return TrialState.FAIL, INTERRUPTED, interrupt
        except SystemExit as stop:
            if isinstance(stop.__context__, NonFiniteLoss):
                return TrialState.PRUNED, DIVERGED, None
            if stop.code in (130, 143):
                return TrialState.FAIL, INTERRUPTED, KeyboardInterrupt()
            return TrialState.FAIL, "train.py ended with an error", stop
        return TrialState.COMPLETE, "", None


@contextmanager
def signals_as_before(sigterm: Callable) -> Iterator[None]:
    """Afterwards Ctrl-C and SIGTERM do what they did before.

    Args:
        sigterm: what SIGTERM does within.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGTERM, sigterm)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=COUNTED)


def frozen(study: optuna.Study, number: int) -> FrozenTrial:
    return study.get_trials(deepcopy=False)[number]


def put_back(study: optuna.Study, trial: optuna.Trial | FrozenTrial, attempt: int) -> None:
    """Have the same configuration trained by whoever asks next."""
    study.enqueue_trial(trial.params, user_attrs={"again": trial.number, "attempt": attempt})


def give_up_dead(study: optuna.Study, folder: Path) -> None:
    """End the trials whose process is gone, and have them trained again, unless that has been tried often enough."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not is_dead(trial):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (UpdateFinishedTrialError, ValueError):  # another process has just done so
            continue
        shutil.rmtree(folder / f"trial{trial.number}", ignore_errors=True)
        attempt = trial.user_attrs.get("attempt", 1)
        if trial.params and attempt < ATTEMPTS:
            put_back(study, trial, attempt + 1)
            print(f"trial {trial.number} was killed; its configuration is trained again")
        else:
            print(f"trial {trial.number} was killed, and is left out")


def is_dead(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker and worker[0] == this_process()[0]:
        return not is_alive(*worker[1:])
    began = trial.datetime_start.timestamp() if trial.datetime_start else 0
    return time.time() - trial.user_attrs.get("seen", began) > GRACE


def this_process() -> tuple[str, int, float]:
    """A mark of this machine, which does not say its name; and of the process its number and when it was started."""
    address = uuid.getnode()
    address = 0 if address >> 40 & 1 else address  # without a network Python draws one for each process, with this bit
    machine = hashlib.sha256(f"{platform.node()} {address}".encode()).hexdigest()[:12]
    return machine, os.getpid(), psutil.Process().create_time()


def is_alive(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """Of those that were trained to their end the most accurate, and of equals the first."""
    ended = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(ended, key=lambda trial: (trial.value, -trial.number), default=None)


def describe(trial: FrozenTrial, study: optuna.Study) -> str:
    """A line about a trial that has ended."""
    accuracies, why = trial.intermediate_values, trial.user_attrs.get("why", "")
    epochs = f"epoch {max(accuracies)}: {accuracies[max(accuracies)]:.2%}" if accuracies else "no epoch"
    how = {TrialState.COMPLETE: "", TrialState.PRUNED: why or "pruned", TrialState.FAIL: why or "killed"}[trial.state]
    best = best_of(study.get_trials(deepcopy=False))
    parts = [f"trial {trial.number}: {epochs}", how, f"best {best.value:.2%}, trial {best.number}" if best else ""]
    return "; ".join(filter(None, parts))
