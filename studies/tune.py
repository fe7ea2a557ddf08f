"""Tuning: search hyperparameters of the ViT or the CNN, then compare the best with the default.

    python -m studies.tune --model cnn --trials 25           # Ctrl-C, and the same command goes on from there
    python -m studies.tune --model vit --epochs 3 --jobs 2           # two trainings at a time
    python -m studies.tune --model vit --epochs 3 --minutes 60       # no longer than an hour of searching, today
    python -m studies.tune --model cnn --storage postgresql://user@host/tune --no_report     # on further machines
    python -m studies.tune --model cnn --trials 25 --no_train                    # table and pictures of what is stored
    python -m studies.tune --model cnn --dataset digits --epochs 2 --trials 6    # all of it in miniature

What is searched stands in studies/tune_space.py. Each trial is one `python train.py`, whose command is stored with it;
all have the same epochs, so that they can be compared at each, and those that fall behind are pruned. What counts is
the accuracy on the validation images; the test images are not touched. Trials lie in saved/studies/tune_<model>.db,
an SQLite file that optuna-dashboard opens, or in any --storage that Optuna takes. When there are as many as --trials,
the best configuration and the default are trained at train.py's full length with three other seeds, and compared.
Writes figures/tune_<model>.md, .json, _history.png and _importance.png.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from studies import runs, tune_figures
from studies.tune_search import (
    PRUNERS,
    SamplerByNumber,
    Search,
    best_of,
    counted,
    describe,
    lock_of,
    open_study,
    settings_of,
    signals_as_before,
)
from studies.tune_space import SPACES, default_params, flags_of, usual
from support import cli
from support.files import ROOT
from support.significance import holm, interval_text, paired_t, points, verdict

WORKER = "STUDIES_TUNE_WORKER"  # set in the environment of the processes that --jobs starts
SHOWN = 8  # rows of the table
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.FAIL: "given up",
}


@dataclass
class Config(runs.StudyOptions):
    """Search hyperparameters of the ViT or the CNN, then compare the best with the default."""

    # the search
    model: Literal[tuple(SPACES)] = "vit"  # whose hyperparameters
    trials: int = 30  # of the search in all, pruned ones and those of other processes among them
    epochs: int = 5  # of each trial, and so of the whole search
    minutes: float | None = None  # of searching, from now on; what is then under way is begun anew next time
    pruner: Literal[tuple(PRUNERS)] = "median"  # which trials end early, by their validation accuracy after each epoch
    # what Optuna stores the search in: a URL, or a file for its journal; default: saved/studies/tune_<model>.db
    storage: str | None = None
    seed: int = 0  # of what is tried; the trials themselves all train with seed 0
    # the best against the default
    seeds: int = 3  # runs of each when the search is complete, with seeds 1, 2, ...; 0: none
    compare: tuple[int, ...] = ()  # numbers of further trials to compare with the default
    full_epochs: int | None = None  # of these runs; default: train.py's
    report: bool = True  # comparison, table and pictures, which one of the machines that share a search writes

    @property
    def name(self) -> str:
        return f"tune_{self.model}{self.suffix}"

    @property
    def where(self) -> str:
        """The storage."""
        return self.storage or f"sqlite:///{(self.saved / self.name).as_posix()}.db"

    @property
    def common(self) -> str:
        """Flags to train.py of all trials."""
        return f"--model {self.model} --dataset {self.dataset} --epochs {self.epochs} --seed 0 --no_test"


def main(args: list[str] | None = None) -> None:
    config = cli.parse(Config, args)
    with cli.one_line_errors():
        cli.require_positive(config, "trials", "epochs", "full_epochs", "jobs")
        if config.minutes is not None and not 0 < config.minutes < 1e6:
            raise ValueError(f"minutes must be positive, not {config.minutes}")
        if config.seeds < 0:
            raise ValueError(f"seeds must not be negative: {config.seeds}")
        study = open_search(config)
        if config.train:
            search(config, study)
        if config.report:
            report(config, study)


def open_search(config: Config) -> optuna.Study:
    space = SPACES[config.model]
    place = config.where.removeprefix("sqlite:///")  # a file, or the URL of a server
    if config.train and not config.storage:
        config.saved.mkdir(parents=True, exist_ok=True)
    elif not config.train and "://" not in place and not Path(place).exists():
        raise ValueError(f"no search is stored in {place}")
    settings = settings_of(space, dataset=config.dataset, epochs=config.epochs)
    default = default_params(space, config.common) if config.train else None
    study = open_study(config.where, config.name, settings, default)
    study.sampler = SamplerByNumber(config.seed, startup=max(2, min(10, config.trials // 3)))
    study.pruner = PRUNERS[config.pruner](config.epochs, config.trials)
    return study


# -------------------------------------------------------------------------------------------------------- the search


def search(config: Config, study: optuna.Study) -> None:
    """Train trials until there are enough, in this process or in several."""
    there = len(counted(study))
    print(f"{config.name}: {config.trials} trials asked for, {there} of them stored or under way", flush=True)
    if there >= config.trials:  # but some of them may have been killed
        config = dataclasses.replace(config, jobs=1)
    try:
        if config.jobs > 1:
            search_side_by_side(config, study)
        else:
            search_here(config, study)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def interrupt(_number: int, _frame) -> None:
    """What SIGTERM does: the same as Ctrl-C."""
    raise KeyboardInterrupt


def search_here(config: Config, study: optuna.Study) -> None:
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    parent = os.getppid() if WORKER in os.environ else None
    if config.data_dir is not None:  # not as a flag: a command that is stored need not say where data lay
        os.environ["DATA_DIR"] = config.data_dir
    folder = config.saved / f"{config.name}_trials"
    lock = lock_of(config.where)
    try:
        with signals_as_before(sigterm=interrupt):
            Search(study, SPACES[config.model], config.common, config.trials, deadline, folder, parent, lock).run()
    finally:
        with contextlib.suppress(OSError):  # it is not there, or another process has a trial in it
            folder.rmdir()


def search_side_by_side(config: Config, study: optuna.Study) -> None:
    """In `--jobs` processes, each of which is this command once more, with its output in a log; says what they do."""
    environment = {**os.environ, WORKER: "1", "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.jobs)))
    command = [sys.executable, *cli.command_with_passwords(), "--jobs", "1", "--no_report"]
    config.saved.mkdir(parents=True, exist_ok=True)
    logs = [config.saved / f"{config.name}_job{job}.log" for job in range(config.jobs)]
    ended = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    jobs = []
    try:
        with signals_as_before(sigterm=interrupt):
            for log in logs:
                with open(log, "wb") as file:
                    jobs.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
            while any(job.poll() is None for job in jobs):
                time.sleep(0.5)
                say_ended(study, ended)
    finally:
        for job in jobs:
            if os.name == "posix":  # on Windows this would kill; there Ctrl-C reaches them by itself
                job.terminate()
        for job in jobs:
            job.wait()
        say_ended(study, ended)
    for job, log in zip(jobs, logs, strict=True):
        if job.returncode:
            cli.fail(f"a process of the search failed: {runs.last_line(log)}", code=1)


def say_ended(study: optuna.Study, known: set[int]) -> None:
    """A line for each trial that has ended and is not in `known`, which it is added to."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number not in known:
            print(describe(trial, study), flush=True)
            known.add(trial.number)


# -------------------------------------------------------------------------------------------------------- the report


def report(config: Config, study: optuna.Study) -> None:
    """Compare the best with the default where the search is complete, then write table and pictures."""
    trials = study.get_trials(deepcopy=False)
    best, failed = best_of(trials), []
    if best is None:
        raise ValueError(f"no trial of {config.name} has been trained to its end: nothing to report")
    under_way = [trial for trial in trials if trial.state == TrialState.RUNNING]
    complete = len(counted(study)) >= config.trials and not under_way
    wanted = planned_comparison(config, trials, best)
    if complete and config.train:
        seed_by_seed = [run for together in zip(*wanted.values(), strict=True) for run in together]
        failed = runs.train_missing(dict(seed_by_seed), config) if len(wanted) > 1 else []
    elif config.train:
        rest = f", and {len(under_way)} under way in other processes" if under_way else ""
        done = len(counted(study)) - len(under_way)
        print(f"\n{done} of {config.trials} trials have ended{rest}: the same command goes on, and compares at the end")
    compared = read_comparison(config, wanted)
    repeated = {trial.user_attrs["again"] for trial in trials if "again" in trial.user_attrs}
    rows = [as_row(trial, repeated) for trial in trials]
    prefix = config.figures / config.name
    pictures = tune_figures.draw_all(study, rows, best.number, prefix, config)
    settings = dataclasses.replace(config, storage=None)  # which may say more of a machine than others should know
    more = {"best": best.number, "trials": rows, "comparison": compared}
    runs.write_study(prefix, as_markdown(config, rows, compared), settings, pictures, failed, **more)


def planned_comparison(config: Config, trials: list[FrozenTrial], best: FrozenTrial) -> dict[str, list]:
    """Names and flags of the runs of the default, the best and those that were asked for, now or earlier, by title.

    Raises:
        ValueError: there is no such trial.
    """
    pattern = rf"{config.name}_trial(\d+)_seed\d+"
    stored = (re.fullmatch(pattern, path.stem) for path in config.saved.glob(f"{config.name}_trial*.json"))
    numbers = {best.number, *config.compare, *(int(match[1]) for match in stored if match)}
    if unknown := [number for number in config.compare if not 0 <= number < len(trials) or not trials[number].params]:
        raise ValueError(f"--compare {unknown[0]}: there is no such trial")
    epochs = config.full_epochs or usual(f"--model {config.model} --dataset {config.dataset}", {}).epochs
    common = f"--model {config.model} --dataset {config.dataset} --epochs {epochs} --no_test"
    default, chosen = default_params(SPACES[config.model], config.common), {"default": common}
    for number in sorted(numbers & set(range(len(trials)))):
        if trials[number].params != default:
            chosen[f"trial{number}"] = f"{common} {flags_of(trials[number].params, config.common)}"
    seeds = range(1, config.seeds + 1)
    return {
        what: [(f"{config.name}_{what}_seed{seed}", f"{flags} --seed {seed}") for seed in seeds]
        for what, flags in chosen.items()
    }


def read_comparison(config: Config, wanted: dict[str, list]) -> list[dict]:
    """Of the default and each trial that is compared with it the validation accuracy by seed, as far as it is stored;
    of the trials how much that is above the default's, and how sure: `p_holm` is corrected for several trials."""
    found = []
    for what, named in wanted.items():
        row = {"what": what, "command": "", "minutes": 0.0, "val_accuracy": {}}
        for seed, (name, flags) in enumerate(named, start=1):
            if (config.saved / f"{name}.json").exists():
                runs.require_same_hyperparameters(name, flags, config)
                results = runs.read_report(name, config)["results"]
                row["command"] = f"python train.py {flags.rpartition(' --seed')[0]}"
                row["val_accuracy"][str(seed)] = results["val_accuracy"]
                row["minutes"] += results["training_seconds"] / 60
        if count := len(row["val_accuracy"]):
            row["minutes"] = round(row["minutes"] / count, 1)
            found.append(row)
    for row in found[1:] if found and found[0]["what"] == "default" else []:
        base = found[0]["val_accuracy"]
        seeds = [seed for seed in row["val_accuracy"] if seed in base]
        if seeds:
            row |= paired_t([row["val_accuracy"][seed] for seed in seeds], [base[seed] for seed in seeds])
    tested = [row for row in found if row.get("p") is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return found


def as_row(trial: FrozenTrial, repeated: set[int]) -> dict:
    """A trial as it is published: all that is needed to train it again, and what came of it.

    Args:
        repeated: numbers of the trials that were stopped or killed, and begun anew under another number.
    """
    seconds = trial.duration.total_seconds() if trial.duration else None
    return {
        "number": trial.number,
        "state": "begun anew" if trial.number in repeated else STATES[trial.state],
        "why": trial.user_attrs.get("why") or trial.user_attrs.get("what"),
        "val_accuracies": [trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)],
        "seconds": None if seconds is None else round(seconds, 1),
        "command": trial.user_attrs.get("command"),
        "params": trial.params,
    }


def as_markdown(config: Config, rows: list[dict], compared: list[dict]) -> str:
    """The most accurate trials and the default's, how the search went, and the comparison."""
    finished = [row for row in rows if row["state"] == "finished"]
    ranked = sorted(finished, key=lambda row: -row["val_accuracies"][-1])
    default = default_params(SPACES[config.model], config.common)
    shown = [row for rank, row in enumerate(ranked) if rank < SHOWN or row["params"] == default]
    base = next((row["val_accuracies"][-1] for row in finished if row["params"] == default), None)
    table = [
        {
            "trial": f"{row['number']}{', the default' if row['params'] == default else ''}",
            "validation accuracy": f"{row['val_accuracies'][-1]:.1%}",
            "points": "" if base is None else points(row["val_accuracies"][-1] - base),
            "flags": f"`{flags_of(row['params'], config.common)}`",
        }
        for row in shown
    ]
    minutes = sum(row["seconds"] or 0 for row in rows) / 60
    count = Counter(row["state"] for row in rows)
    states = ", ".join(f"{number} {state}" for state, number in count.items())
    epochs = f"{config.epochs} epoch{'s' * (config.epochs > 1)}"
    note = (
        f"Validation accuracy of `python train.py {config.common}` with these flags; points are to the default's. "
        f"Trials of {epochs} on {config.dataset}: {states}; {minutes:,.{0 if minutes >= 10 else 1}f} minutes in all."
    )
    return "\n\n".join([runs.markdown(table), note, *([comparison_in_words(compared)] if compared else [])])


def comparison_in_words(compared: list[dict]) -> str:
    """A table of the default and the trials, seed by seed, and what it says."""
    names = {row["what"]: row["what"].replace("trial", "trial ").replace("default", "the default") for row in compared}
    seeds = sorted({seed for row in compared for seed in row["val_accuracy"]}, key=int)
    table = []
    for row in compared:
        by_seed = {
            f"seed {seed}": f"{row['val_accuracy'][seed]:.1%}" if seed in row["val_accuracy"] else "" for seed in seeds
        }
        more = {"minutes": f"{row['minutes']:.1f}", "command": f"`{row['command']}`"}
        table.append({"": names[row["what"]], **by_seed, **more})
    sentences = [in_words(names[row["what"]], row) for row in compared if "difference" in row]
    return "\n\n".join([runs.markdown(table), "Validation accuracy. " + " ".join(sentences)])


def in_words(name: str, row: dict) -> str:
    difference = f"{name.capitalize()} minus the default: {points(row['difference'])} points"
    if row["interval"] is None:
        return f"{difference}, with one seed."
    words = {"above": "it is better", "below": "it is worse"}
    said = words.get(verdict(row["interval"], row["p_holm"]), "no difference is shown")
    interval = f"95 % interval {interval_text(row['interval'])}"
    return f"{difference} ({interval}, paired t; Holm's p {row['p_holm']:.2g}): {said}."


if __name__ == "__main__":
    main()
