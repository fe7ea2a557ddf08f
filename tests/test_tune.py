"""tune.py: a search that goes on after a kill, that processes share, that prunes by what it is fed, and its report."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import optuna
import pytest
from helpers import refused, run_main, start
from optuna.trial import TrialState

import train
from network import VisionTransformer
from studies import tune, tune_search
from studies.tune_space import SPACES, default_params, flags_of
from support.model import num_parameters
from support.report import read_json
from support.significance import paired_t

FLAGS = "--model cnn --dataset digits --epochs 2 --seeds 0".split()
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


def storage(folder):
    return f"sqlite:///{folder}/saved/studies/tune_cnn_digits.db"


def trials_in(where, states=None):
    study = optuna.load_study(study_name="tune_cnn_digits", storage=tune_search.open_storage(where))
    return study.get_trials(states=states)


def wait_for(happened, process, seconds=900):
    """Until something has happened, in the order of a quarter of a second after it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            if happened():
                return
        except (KeyError, ValueError, optuna.exceptions.StorageInternalError):  # it is not there yet
            pass
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"it did not happen: {process.communicate()}")


def finish(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


# -------------------------------------------------------------------------------------------------------- the space


@pytest.mark.parametrize("model", SPACES)
@pytest.mark.parametrize("dataset", ["cifar10", "digits"])
def test_the_default_is_in_the_space_and_means_the_default(model, dataset):
    common = f"--model {model} --dataset {dataset}"
    params = default_params(SPACES[model], common)
    for name, choices in SPACES[model].items():
        assert choices._contains(choices.to_internal_repr(params[name])), name
    flags = dict(re.findall(r"--(\w+) (\S+)", flags_of(params, common)))
    batch_size = {"cifar10": 128, "digits": 16}[dataset]
    defaults = {"batch_size": batch_size}
    for name, value in flags.items():
        assert value == str(defaults.get(name, getattr(train.Config, name))), name


def test_rates_are_multiples_of_the_optimisers_own():
    params = {
        "optimizer": "sgd",
        "lr_times": 0.5,
        "weight_decay_times": 2.0,
        "batch_size_times": 2.0,
        "warmup": 0.12345,
    }
    flags = flags_of(params, "--model cnn --dataset cifar10")
    assert set(re.findall(r"--\w+ \S+", flags)) == {
        *("--optimizer sgd", "--lr 0.05", "--weight_decay 0.001", "--batch_size 256", "--warmup 0.123")
    }


def test_no_vit_of_the_space_has_many_more_parameters_than_the_default():
    space = SPACES["vit"]
    for heads in space["num_heads"].choices:
        model = VisionTransformer(
            32, 64, 10, heads, 4, patch_size=4, mlp_ratio=max(space["mlp_ratio"].choices), pooling="mean"
        )
        assert num_parameters(model) <= 220_000


def test_paired_differences_and_their_interval():
    """By hand: differences of 2, 1 and 3 points, whose standard error is 1 / sqrt(3), and t(0.975, 2) = 4.3027."""
    found = paired_t([0.72, 0.71, 0.73], [0.70, 0.70, 0.70])
    assert found["difference"] == pytest.approx(0.02)
    assert found["interval"] == pytest.approx([0.02 - 0.043027 / 3**0.5, 0.02 + 0.043027 / 3**0.5], rel=1e-4)
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)
    assert paired_t([0.7], [0.6])["interval"] is None
    assert paired_t([0.7, 0.8], [0.6, 0.7])["interval"] == pytest.approx([0.1, 0.1])


def test_of_several_trials_a_difference_is_called_one_by_the_corrected_p():
    row = {"difference": -0.019, "interval": [-0.033, -0.006], "p": 0.026, "p_holm": 0.052}
    assert tune.in_words("trial 3", row).endswith("Holm's p 0.052): no difference is shown.")
    assert tune.in_words("trial 3", {**row, "p_holm": 0.026}).endswith("it is worse.")


# -------------------------------------------------------------------------------------------- what a trial is fed


class FakeTrial:
    """Remembers what it is given, and is to be pruned below a value."""

    def __init__(self, prune_below):
        self.reported, self.attributes, self.prune_below = [], {}, prune_below

    def report(self, value, step):
        self.reported.append((step, value))

    def should_prune(self):
        return self.reported[-1][1] < self.prune_below

    def set_user_attr(self, name, value):
        self.attributes[name] = value


def test_the_pruner_is_fed_with_each_epochs_validation_accuracy(tmp_path):
    trial = FakeTrial(prune_below=0)
    flags = "--model mlp --dataset digits --epochs 3 --hidden_size 8 --gif_frames 0 --no_test --name fed --output_dir"
    train.main([*flags.split(), str(tmp_path)], [tune_search.Watch(trial, float("inf"), None)])
    stored = read_json(tmp_path / "saved" / "fed.json")["metrics"]["val_accuracy"]
    assert trial.reported == list(enumerate(stored, start=1)) and len(stored) == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prune_below": 1.1}, optuna.TrialPruned),
        ({"stop": True}, tune_search.Stopped),
        ({"deadline": 0.0}, tune_search.Stopped),
        ({"parent": -1}, tune_search.Stopped),
    ],
)
def test_what_ends_a_trial(change, expected):
    trial = FakeTrial(change.get("prune_below", 0))
    watch = tune_search.Watch(trial, change.get("deadline", float("inf")), change.get("parent"))
    runner = SimpleNamespace(stop=change.get("stop", False), epoch=1, total_epochs=2, metrics={"val_accuracy": [0.5]})
    with pytest.raises(expected):
        watch.epoch_end(runner)
    assert trial.reported == [(1, 0.5)]
    if "prune_below" in change:  # after the last epoch there is nothing to save
        runner.epoch = 2
        watch.epoch_end(runner)


def test_a_hopeless_trial_is_pruned_and_one_that_diverges_too(tmp_path, monkeypatch, capsys):
    space = {"lr_times": optuna.distributions.FloatDistribution(1e-6, 1e12, log=True)}
    study = optuna.create_study(pruner=tune_search.PRUNERS["median"](3, 8), direction="maximize")
    for times in (1.0, 1.1, 1e-6, 1e12):
        study.enqueue_trial({"lr_times": times})
    common = "--model cnn --dataset digits --epochs 3 --batch_size 100 --optimizer sgd --no_test"
    tune_search.Search(study, space, common, 4, float("inf"), tmp_path).run()
    states = [(trial.state, len(trial.intermediate_values)) for trial in study.trials]
    assert states == [*[(TrialState.COMPLETE, 3)] * 2, (TrialState.PRUNED, 2), (TrialState.PRUNED, 0)]
    assert study.trials[3].user_attrs["why"] == "diverged" and not list(tmp_path.iterdir())
    assert "wrote" not in capsys.readouterr().out  # what is deleted again


# ------------------------------------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A search that was killed in the middle of its second trial or a later one, and started again; what was finished
    by then, and what the second start printed."""
    folder = tmp_path_factory.mktemp("killed")
    process = start("studies.tune", *whole_search(folder))
    wait_for(lambda: running_after(storage(folder), finished=1), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before, out = trials_in(storage(folder)), io.StringIO()
    with contextlib.redirect_stdout(out):
        run_main("studies.tune", *whole_search(folder))
    return folder, before, out.getvalue()


def whole_search(folder):
    return [*FLAGS[:-2], "--trials", "4", "--seeds", "1", "--full_epochs", "1", "--output_dir", folder]


def running_after(where, finished):
    """Whether a trial is in training, after so many that have ended."""
    trials = trials_in(where)
    ended = [trial for trial in trials if trial.state in ENDED]
    return len(ended) >= finished and any(t.state == TrialState.RUNNING and "command" in t.user_attrs for t in trials)


def test_after_a_kill_the_search_goes_on_and_nothing_finished_is_lost(killed):
    folder, before, out = killed
    after = trials_in(storage(folder))
    for trial in before:
        if trial.state in ENDED:
            assert after[trial.number] == trial  # its value, its dates, all
    (cut_short,) = [trial for trial in before if trial.state == TrialState.RUNNING]
    assert after[cut_short.number].state == TrialState.FAIL
    again = [trial for trial in after if trial.params == cut_short.params and trial.state in ENDED]
    assert len(again) == 1 and f"trial {cut_short.number} was killed" in out
    assert sum(trial.state in ENDED for trial in after) == 4
    assert not (folder / "saved" / "studies" / "tune_cnn_digits_trials").exists()


def test_the_search_begins_with_the_default(killed):
    folder, _, _ = killed
    first = trials_in(storage(folder))[0]
    assert first.params == default_params(SPACES["cnn"], "--model cnn --dataset digits")


def test_a_trial_is_repeated_by_its_command(killed, tmp_path):
    folder, _, _ = killed
    report = read_json(folder / "figures" / "tune_cnn_digits.json")
    row = next(row for row in report["trials"] if row["state"] == "finished" and row["number"] > 0)
    words = shlex.split(row["command"])
    assert words[:2] == ["python", "train.py"] and "--no_test" in words
    run_main("train.py", *words[2:], "--gif_frames", "0", "--name", "again", "--output_dir", tmp_path)
    again = read_json(tmp_path / "saved" / "again.json")
    assert again["metrics"]["val_accuracy"] == pytest.approx(row["val_accuracies"], abs=1e-6)
    assert not [name for name in again["results"] if name.startswith("test") and name != "tested"]


def test_table_pictures_and_json(killed, capsys):
    folder, _, _ = killed
    report = read_json(folder / "figures" / "tune_cnn_digits.json")
    assert report["provenance"]["command"].startswith("python -m studies.tune --model cnn")
    assert "storage" not in report["config"] or report["config"]["storage"] is None
    finished = [row for row in report["trials"] if row["state"] == "finished"]
    assert [row["state"] for row in report["trials"]].count("begun anew") == 1  # the one that was killed
    best = max(finished, key=lambda row: row["val_accuracies"][-1])
    assert report["trials"][report["best"]]["val_accuracies"][-1] == best["val_accuracies"][-1]
    text = (folder / "figures" / "tune_cnn_digits.md").read_text(encoding="utf-8")
    assert f"{best['val_accuracies'][-1]:.1%}" in text and "0, the default" in text
    assert (folder / "figures" / "tune_cnn_digits_history.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in (folder / "figures").glob("tune_cnn_digits*")}
    run_main("studies.tune", *whole_search(folder), "--no_train")
    assert {path: path.read_bytes() for path in before} == before
    assert "the same results as before" in capsys.readouterr().out


def test_further_trials_are_compared_seed_by_seed(killed, capfd):
    folder, _, _ = killed
    default = default_params(SPACES["cnn"], "--model cnn --dataset digits")
    report = read_json(folder / "figures" / "tune_cnn_digits.json")
    others = [row for row in report["trials"] if row["state"] in ("finished", "pruned") and row["params"] != default]
    what = f"trial{next(row['number'] for row in others if row['number'] != report['best'])}"
    run_main("studies.tune", *whole_search(folder), "--compare", what.removeprefix("trial"))
    out = capfd.readouterr().out
    rows = {row["what"]: row for row in read_json(folder / "figures" / "tune_cnn_digits.json")["comparison"]}
    stored = [read_json(folder / f"saved/studies/tune_cnn_digits_{name}_seed1.json") for name in (what, "default")]
    first, second = (run["results"]["val_accuracy"] for run in stored)
    assert rows[what]["difference"] == pytest.approx(first - second, abs=1e-5)
    assert f"{what.replace('trial', 'Trial ')} minus the default: {100 * (first - second):+.1f} points" in out
    assert all((run["config"]["epochs"], run["config"]["seed"]) == (1, 1) for run in stored)
    with refused(capfd, folder / "figures", "--compare 99", script="studies.tune"):
        run_main("studies.tune", *whole_search(folder), "--compare", 99)


@pytest.mark.parametrize("where", ["sqlite", "journal"])
def test_two_processes_share_a_search_and_train_nothing_twice(tmp_path, where):
    """Begun at once, when both find the waiting default."""
    where = {"sqlite": f"sqlite:///{tmp_path}/tune.db", "journal": f"{tmp_path}/journal.log"}[where]
    flags = [*FLAGS, "--epochs", "1", "--trials", "5", "--no_report", "--storage", where, "--output_dir", tmp_path]
    both = [start("studies.tune", *flags) for _ in range(2)]
    outs = [finish(process) for process in both]
    trials = trials_in(where)
    ended = [trial for trial in trials if trial.state in ENDED]
    assert len(ended) == 5 and not any(trial.state == TrialState.RUNNING for trial in trials)
    assert len({json.dumps(trial.params, sort_keys=True) for trial in ended}) == 5
    assert len({trial.user_attrs["worker"][1] for trial in ended}) == 2
    titles = [re.findall(r"^trial (\d+) \(", out, flags=re.MULTILINE) for out in outs]
    assert all(titles) and not set(titles[0]) & set(titles[1])  # each trained by one


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to one process")
def test_ctrl_c_of_jobs_is_one_line_and_what_they_trained_is_trained_next_time(tmp_path):
    flags = [*FLAGS, "--epochs", "500", "--trials", "2", "--jobs", "2", "--no_report", "--output_dir", tmp_path]
    process = start("studies.tune", *flags)
    wait_for(lambda: sum(bool(trial.intermediate_values) for trial in trials_in(storage(tmp_path))) == 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 130 and "goes on from here" in err and "Traceback" not in err
    assert len(re.findall(r"^trial [01]: epoch \d+: .*interrupted", out, flags=re.MULTILINE)) == 2
    first, second, *again = trials_in(storage(tmp_path))
    assert [trial.state for trial in (first, second)] == [TrialState.FAIL] * 2
    assert [trial.state for trial in again] == [TrialState.WAITING] * 2
    waiting = [trial.system_attrs["fixed_params"] for trial in again]
    assert all(trial.params in waiting for trial in (first, second))
    assert not (tmp_path / "saved" / "studies" / "tune_cnn_digits_trials").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no_train"], ["no search is stored"]),
        (["--no_train", "--storage", "sqlite:///none.db"], ["no search is stored in none.db"]),
        (["--no_train", "--storage", "none.log"], ["no search is stored in none.log"]),
        (["--storage", "no/such/folder/tune.log"], ["cannot be opened: there is no folder no/such/folder"]),
        (["--trials", "0"], ["trials", "at least 1"]),
        (["--minutes", "0"], ["minutes", "positive"]),
        (["--storage", "sqlite:////dev/null/tune.db"], ["--storage", "cannot be opened"]),
        (["--storage", "mysql://user:secret@host/tune"], ["mysql://user:***@host", "the module MySQLdb"]),
        (["--storage", "nosuch://user:secret@host/tune"], ["--storage", "nosuch://user:***@host"]),
    ],
)
def test_refused_in_one_line(tmp_path, capfd, flags, words):
    with refused(capfd, tmp_path, *words, script="studies.tune"):
        run_main("studies.tune", *FLAGS, "--output_dir", tmp_path, *flags)


def test_a_search_of_other_settings_is_not_mixed_in(killed, capfd):
    folder, _, _ = killed
    with refused(capfd, folder / "figures", "has epochs 2", script="studies.tune"):
        run_main("studies.tune", *whole_search(folder), "--epochs", 3)


def test_what_is_tried_does_not_depend_on_interruptions(tmp_path):
    space = SPACES["cnn"]

    def search(name, interrupted):
        study = tune_search.open_study(f"sqlite:///{tmp_path}/{name}.db", "tune_cnn", {}, {})
        study.sampler = tune_search.SamplerByNumber(seed=0, startup=3)
        while len(tune_search.counted(study)) < 8:
            trial = study.ask(space)
            if trial.number in interrupted:
                study.tell(trial, state=TrialState.FAIL)
                tune_search.put_back(study, trial, 1)
            else:
                study.tell(trial, trial.params["lr_times"] + trial.params["momentum"])
        return [trial.params for trial in tune_search.counted(study)]

    assert search("whole", ()) == search("interrupted", (1, 4, 5, 9))


def test_a_waiting_trial_is_given_to_one_of_several_processes(tmp_path):
    """SQLite gave it to two that asked at once; here eight do, again and again."""
    where = f"sqlite:///{tmp_path}/tune.db"
    study = optuna.create_study(study_name="tune_cnn_digits", storage=tune_search.open_storage(where))
    for number in range(24):
        study.enqueue_trial({"x": number})
    with ThreadPoolExecutor(8) as pool:
        asked = [number for numbers in pool.map(ask_three, [where] * 8) for number in numbers]
    assert sorted(asked) == list(range(24))


def ask_three(where):
    study, lock = optuna.load_study(study_name="tune_cnn_digits", storage=where), tune_search.lock_of(where)
    numbers = []
    for _ in range(3):
        with lock:
            numbers.append(study.ask().number)
    return numbers


def test_what_kills_its_process_three_times_is_left_out_and_other_machines_have_ten_minutes(tmp_path):
    study = tune_search.open_study(f"sqlite:///{tmp_path}/t.db", "t", {}, {"x": 0.5})
    space, (machine, *_) = {"x": optuna.distributions.FloatDistribution(0, 1)}, tune_search.this_process()
    for _ in range(3):
        trial = study.ask(space)
        trial.set_user_attr("worker", [machine, 999_999_999, 0.0])  # no such process
        assert trial.params == {"x": 0.5}
        tune_search.give_up_dead(study, tmp_path)
    assert not study.get_trials(states=(TrialState.WAITING,))
    trial = study.ask(space)
    trial.set_user_attr("worker", ["another machine", 1, 0.0])
    for ago, dead in ((590, False), (610, True)):
        trial.set_user_attr("seen", time.time() - ago)
        assert tune_search.is_dead(study.trials[trial.number]) == dead
