"""Files that cannot hurt: crafted ones with a right checksum are refused in one line, before they take memory."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MODEL, ROOT, SMALL, outcome, run_main, train_small
from PIL import Image

from evaluate import per_class
from images.loader import join_names, pack_ids, split_names, unpack_ids
from network import CNN, VisionTransformer
from runner import Runner
from setup_cifar import load_data
from studies import runs
from studies.compare import read_answers
from support import report, schema
from support.files import CheckpointError, figures_folder, first_line, read_file, short, write_file
from support.report import read_json, write_json
from support.significance import paired_bootstrap
from training.checkpoints import restore_runner, runner_state
from training.optim import build_optimizer, build_schedule, checked_state
from training.trained import load_model

# ------------------------------------------------------------------------------------------ checkpoints (SIGSEGV)


def trained_runner(data, optimizer: str) -> Runner:
    torch.manual_seed(0)
    model = VisionTransformer(hidden_size=8, num_heads=2, num_blocks=1, patch_size=16)
    chosen = build_optimizer(model, optimizer, 1e-3)
    runner = Runner(model, chosen, torch.nn.CrossEntropyLoss(), "cpu", build_schedule(chosen, 9), verbose=False)
    runner.train(data.loader("train", 500), data.loader("val", 500), 1)
    return runner


def memory_of(state: dict) -> dict:
    """What the last part of an optimiser remembers: AdamW's."""
    return state["optimizer"]["parts"][-1]["state"] if "parts" in state["optimizer"] else state["optimizer"]["state"]


SPOILED = {
    "empty": lambda memory, key: memory[0].update({key: torch.zeros(0)}),
    "another shape": lambda memory, key: memory[0].update({key: torch.zeros(2, 3)}),
    "short": lambda memory, key: memory[0].update({key: memory[0][key].flatten()[:1]}),
    "another kind": lambda memory, key: memory[0].update({key: memory[0][key].double()}),
    "expanded": lambda memory, key: memory[0].update({key: torch.zeros(1).expand(10**9)}),
    "a number": lambda memory, key: memory[0].update({key: 1.0}),
    "missing": lambda memory, key: memory[0].pop(key),
    "one too many": lambda memory, key: memory[0].update(surplus=memory[0][key]),
    "of other parameters": lambda memory, key: memory.update({10**6: memory[0]}),
    "no dict": lambda memory, key: memory.update({0: [1]}),
}


@pytest.mark.parametrize("spoil", SPOILED)
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam", "sgd"])
def test_an_optimisers_state_is_compared_tensor_by_tensor(digits, optimizer, spoil):
    """Fused AdamW wrote beyond the end of tensors that were too small."""
    runner = trained_runner(digits, optimizer)
    state, weights = runner_state(runner), [p.clone() for p in runner.model.parameters()]
    restore_runner(runner, state)  # as it is, it fits
    state = runner_state(trained_runner(digits, optimizer))
    SPOILED[spoil](memory_of(state), "momentum_buffer" if optimizer == "sgd" else "exp_avg")
    with pytest.raises(ValueError):
        restore_runner(runner, state)
    assert all(torch.equal(a, b) for a, b in zip(weights, runner.model.parameters(), strict=True))
    runner.train(digits.loader("train", 500), digits.loader("val", 500), 1)  # and nothing of it is in use


class Counting(torch.optim.SGD):
    """Remembers in its group how many steps it has made, as Prodigy and others do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: Counting(p, lr=0.1, momentum=0.9),
    ],
    ids=["NAdam", "amsgrad", "Adafactor", "group"],
)
def test_an_optimiser_of_ones_own_goes_on_from_its_file(tmp_path, make):
    def trained(steps, state=None):
        layer = torch.nn.Linear(4, 3)
        with torch.no_grad():
            layer.weight.copy_(start if state is None else state["weight"]), layer.bias.zero_()
        optimizer = make(layer.parameters())
        if state is not None:
            layer.bias.data.copy_(state["bias"])
            optimizer.load_state_dict(checked_state(optimizer, state["optimizer"]))
        for number in range(*steps):
            optimizer.zero_grad()
            layer(inputs[number]).square().sum().backward()
            optimizer.step()
        return {**layer.state_dict(), "optimizer": optimizer.state_dict()}

    start, inputs = torch.randn(3, 4), torch.randn(6, 2, 4)
    write_file(tmp_path / "state", trained((0, 3)))
    resumed, whole = trained((3, 6), read_file(tmp_path / "state")), trained((0, 6))
    assert torch.equal(resumed["weight"], whole["weight"]) and torch.equal(resumed["bias"], whole["bias"])
    assert resumed["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]


@pytest.mark.parametrize("value", [np.float64(0.5), torch.Size([2]), {"deep": [np.int64(1)]}])
def test_what_could_not_be_read_back_is_not_written(tmp_path, value):
    with pytest.raises(TypeError, match="cannot be saved: it is a (float64|Size|int64)"):
        write_file(tmp_path / "file", {"callback": value})
    assert list(tmp_path.iterdir()) == []


def test_two_callbacks_of_a_class_are_both_remembered():
    class Remembers:
        def __init__(self, value):
            self.value = value

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    def runner(*values):
        model = CNN()
        callbacks = [Remembers(value) for value in values]
        return Runner(model, torch.optim.SGD(model.parameters(), 0.1), None, "cpu", callbacks=callbacks)

    other = runner(0, 0)
    restore_runner(other, runner_state(runner(1, 2)))
    assert [callback.value for callback in other.callbacks] == [1, 2]


@pytest.mark.parametrize("results", [{}, {"test_accuracy": None}, [], "done", {"test_accuracy": 0.5}])
def test_a_checkpoint_with_half_a_result_does_not_train_from_scratch(tmp_path, results):
    train_small(tmp_path)
    path = tmp_path / "saved" / f"{MODEL}.checkpoint"
    contents = read_file(path)
    write_file(path, {**contents, "results": results})
    before = (tmp_path / "saved" / f"{MODEL}.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_small(tmp_path, "--resume")
    assert stop.value.code == 2
    assert (tmp_path / "saved" / f"{MODEL}.pt").read_bytes() == before


def test_a_finished_run_whose_report_is_lost_writes_it_again(tmp_path):
    """A lost report of a fold blocked cross-validation for ever."""
    train_small(tmp_path)
    report = tmp_path / "saved" / f"{MODEL}.json"
    before = read_json(report)
    report.unlink()
    train_small(tmp_path, "--resume")
    after = read_json(report)
    assert after["metrics"] == before["metrics"]
    assert after["results"] == before["results"] and after["val_seconds"] == before["val_seconds"]


@pytest.mark.parametrize("damage", ["report", "model", "another model"])
def test_a_finished_run_whose_files_are_damaged_writes_them_again(tmp_path, damage):
    train_small(tmp_path)
    report, path = tmp_path / "saved" / f"{MODEL}.json", tmp_path / "saved" / f"{MODEL}.pt"
    before = read_json(report)["results"], read_file(path)["weights"]
    if damage == "report":
        report.write_text("{", encoding="utf-8")
    elif damage == "model":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        CNN().save(path)
    train_small(tmp_path, "--resume")
    assert read_json(report)["results"] == before[0]
    assert all(torch.equal(weights, before[1][name]) for name, weights in read_file(path)["weights"].items())


@pytest.mark.parametrize("damaged", ["report", "model"])
def test_without_a_checkpoint_the_file_that_is_damaged_is_named(tmp_path, damaged, capfd):
    train_small(tmp_path)
    report, path = tmp_path / "saved" / f"{MODEL}.json", tmp_path / "saved" / f"{MODEL}.pt"
    (tmp_path / "saved" / f"{MODEL}.checkpoint").unlink()
    contents = read_json(report)
    if damaged == "report":
        write_json(report, {**contents, "results": {**contents["results"], "val_loss": "little"}})
    else:
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit) as stop:
        train_small(tmp_path, "--resume")
    words = "val_loss" if damaged == "report" else f"{MODEL}.pt is missing, damaged"
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and words in errors[-1] and "run without --resume" in errors[-1]


@pytest.mark.parametrize(
    "where, value",
    [
        (("config", "grad_accum"), "x"),
        (("config", "grad_accum"), 0),
        (("runner", "progress", "batch"), 10**12),
        (("runner", "metrics", "val_accuracy"), torch.tensor([7.0], dtype=torch.float64)),
    ],
)
def test_a_checkpoint_with_values_that_make_no_sense_is_one_line(tmp_path, where, value):
    train_small(tmp_path)
    path = tmp_path / "saved" / f"{MODEL}.checkpoint"
    contents = read_file(path)
    place = contents
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    write_file(path, {**contents, "results": None})
    flags = [*SMALL, *"--epochs 2 --gif_frames 0 --resume --resume_changed --output_dir".split(), tmp_path]
    code, line = outcome("train.py", *flags)
    assert code == 2 and line.count("\n") == 0 and f"{MODEL}.checkpoint" in line, line


# -------------------------------------------------------------------------------------------------- memory


PROBE = """
import re, resource, sys
from pathlib import Path
import torch
import {module}
def peak():  # of this program alone, where ru_maxrss begins with that of the process which started it
    if Path("/proc/self/status").exists():
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
try:
    {call}
except ValueError as error:
    print(str(error).count("\\n"), peak() - before, error)
"""


def memory_of_a_refusal(module: str, call: str) -> int:
    """Bytes that a process of its own takes at most, above what it had, until it refuses a file in one line."""
    code = PROBE.format(module=module, call=call)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    breaks, taken, _ = done.stdout.split(" ", 2)
    assert breaks == "0"
    return int(taken)


def with_weights(path: Path, **changed) -> None:
    contents = {"model": "CNN", "config": {}, "weights": dict(CNN().state_dict()), "metadata": {}}
    write_file(path, {**contents, **changed})


def compressed(path: Path) -> None:
    """As torch.save writes it, but a zip that is compressed: 2 GB of zeros in 2 MB."""
    with_weights(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in members.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(contents)
                for _ in range(2048 if name.endswith("/data/0") else 0):
                    file.write(bytes(1 << 20))


def expanded(path: Path) -> None:
    with_weights(path, weights={"output.bias": torch.zeros(1)})
    contents = torch.load(path, weights_only=True)
    contents["weights"]["output.bias"] = torch.zeros(1).expand(2 << 30)
    torch.save(contents, path)


def wide(path: Path) -> None:
    config = {"hidden_size": 20_000, "num_heads": 4}
    with_weights(path, model="VisionTransformer", config=config)


def deep(path: Path) -> None:
    with_weights(path, model="VisionTransformer", config={"num_blocks": 10**7})


def many_patches(path: Path) -> None:
    with_weights(path, model="VisionTransformer", config={"img_size": 8000, "patch_size": 1})


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource, which Windows has not")
@pytest.mark.parametrize("make", [compressed, expanded, wide, deep, many_patches])
def test_a_small_file_takes_little_memory_until_it_is_refused(tmp_path, make):
    make(tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 4 << 20
    taken = memory_of_a_refusal("network", f"network.Model.load({str(tmp_path / 'small.pt')!r})")
    assert taken < 1 << 30


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource, which Windows has not")
def test_small_answers_take_little_memory_until_they_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "answers.npz", correct=np.zeros(2 << 30, dtype=bool))
    call = f"studies.compare.read_answers(Path({str(tmp_path / 'answers.npz')!r}))"
    assert memory_of_a_refusal("studies.compare", call) < 1 << 30


def nested(levels: int) -> list:
    value = []
    for _ in range(levels):
        value = [value] * 10  # each level is one list, ten times
    return value


@pytest.mark.parametrize("name, metadata", [("billions", nested(12)), ("deep", json.loads("[" * 300 + "]" * 300))])
def test_lists_of_lists_are_refused(tmp_path, name, metadata):
    buffer = io.BytesIO()
    torch.save({"model": "CNN", "metadata": metadata, "sha256": ""}, buffer)
    (tmp_path / name).write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError):
        read_file(tmp_path / name)


# -------------------------------------------------------------------------------------------------- schemas


@pytest.fixture
def model(tmp_path):
    """The path of a model as train.py saves it, and its contents."""
    path = tmp_path / "model.pt"
    CNN().save(path, **load_data("digits").metadata)
    return path, read_file(path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model", ["CNN"]),
        ("model", None),
        ("config", {1: 2}),
        ("config", {"img_size": 1e308}),
        ("config", {"img_size": "32"}),
        ("config", []),
        ("weights", {0: torch.zeros(1)}),
        ("weights", {"output.bias": [1.0]}),
        ("metadata", None),
        ("metadata", {"classes": ["a", "b"]}),
        ("metadata.mean", [0.5]),
        ("metadata.mean", [0.5, "0.5", 0.5]),
        ("metadata.std", [0.5, 0.0, 0.5]),
        ("metadata.std", [0.5, float("nan"), 0.5]),
        ("metadata.classes", "0123456789"),
        ("metadata.classes", ["a", "b"]),  # the model knows ten
        ("metadata.classes", list(range(10))),
        ("metadata.dataset", 3),
        ("metadata.image_size", 0),
        ("metadata.seen", {"train": "mask ", "val": "mask "}),
        ("metadata.fingerprints", "none"),
    ],
)
def test_a_model_file_that_holds_something_else_is_one_line(model, tmp_path, key, value):
    path, contents = model
    part, _, name = key.partition(".")
    contents[part] = {**contents[part], name: value} if name else value
    write_file(path, contents)
    with pytest.raises(CheckpointError, match="model.pt") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    image = tmp_path / "photo.png"
    Image.new("RGB", (9, 9)).save(image)
    code, line = outcome("predict.py", image, "--checkpoint", path, "--output_dir", tmp_path)
    assert code == 2 and line.startswith("predict.py: error: ") and line.count("\n") == 0


def test_a_report_in_place_of_its_model_is_told_apart():
    with pytest.raises(CheckpointError, match=r"is a run's report; its model is in .*VisionTransformer\.pt"):
        load_model(ROOT / "saved" / "VisionTransformer.json")


def test_an_object_in_a_file_is_refused(model):
    path, contents = model
    torch.save({**contents, "sha256": "", "weights": CNN().conv1}, path)
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load_model(path)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A study's folder with the report of a run, and that run's report."""
    folder = tmp_path_factory.mktemp("stored")
    train_small(folder)
    report = read_json(folder / "saved" / f"{MODEL}.json")
    (folder / "saved" / "studies").mkdir()
    return runs.StudyOptions(output_dir=str(folder)), report


@pytest.mark.parametrize(
    "key, value",
    [
        ("results.val_loss", "little"),
        ("results.val_accuracy", None),
        ("results", "done"),
        ("results.test_accuracy", None),
        ("results.val_accuracy", 82.0),
        ("results.parameters", 1.5),
        ("config.epochs", "20"),
        ("config.seed", True),
        ("config.name", 3),
        ("config.name", "studies/another"),
        ("metrics.val_loss", []),
        ("metrics.val_loss", [None]),
        ("metrics.val_accuracy", {"0": 1.0}),
        ("val_seconds", [1.0, 2.0]),
        ("provenance", None),
        ("provenance.threads", 0),
    ],
)
def test_a_report_that_holds_something_else_is_one_line(stored, key, value):
    options, report = stored
    part, _, name = key.partition(".")
    changed = {**report, part: {**report[part], name: value} if name else value}
    write_json(options.saved / "run.json", changed)
    with pytest.raises(
        CheckpointError, match=f"run.json cannot be used: .*({name or part}|another run).*delete it"
    ) as error:
        runs.read_report("run", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 10**5, '{"results": NaN}', '{"a": ' * 10**4, "\x00", '{"sha256": 3}']
)
def test_json_that_is_none_or_not_ours_is_one_line(tmp_path, text):
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="report.json"):
        read_json(tmp_path / "report.json")
    (tmp_path / "report.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="report.json"):
        read_json(tmp_path / "report.json")


def test_a_digit_changed_in_a_report_is_noticed(stored):
    options, report = stored
    path = options.saved / f"{MODEL}.json"
    write_json(path, report)
    assert runs.read_report(MODEL, options) == report
    accuracy = repr(report["results"]["val_accuracy"])
    other = accuracy[:-1] + ("1" if accuracy[-1] != "1" else "2")
    path.write_text(path.read_text(encoding="utf-8").replace(accuracy, other), encoding="utf-8")
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        runs.read_report(MODEL, options)
    write_json(path, report)
    path.write_text(path.read_text(encoding="utf-8").replace('"sha256"', '"sha956"'), encoding="utf-8")
    with pytest.raises(CheckpointError, match="do not match its checksum"):  # not a file from before checksums
        runs.read_report(MODEL, options)
    write_json(path, report)
    contents = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(contents), encoding="utf-8")  # laid out in another way it is the same
    assert runs.read_report(MODEL, options) == report


def test_answers_of_the_committed_study_can_be_read():
    original = ROOT / "saved" / "studies" / "study_default_cnn_seed0.npz"
    answers = read_answers(original)
    assert answers["correct"].shape == (10_000,) and answers["labels"].max() == 9


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.update(correct=~a["correct"]),  # the checksum is that of the others
        lambda a: (a.pop("sha256"), a.update(correct=a["correct"].astype(float))),
        lambda a: (a.pop("sha256"), a.update(correct=a["correct"][:-1])),
        lambda a: (a.pop("sha256"), a.update(labels=a["labels"] + 200)),
        lambda a: (a.pop("sha256"), a.update(classes=np.arange(10))),
        lambda a: (a.pop("sha256"), a.pop("flops")),
        lambda a: (a.pop("sha256"), a.update(flops=np.array([1, 2]))),
        lambda a: a.update(classes=np.array([print, None], dtype=object)),
    ],
)
def test_answers_that_are_something_else_are_refused(tmp_path, spoil):
    from studies.compare import checksum

    answers = {
        "correct": np.arange(20) % 2 == 0,
        "labels": (np.arange(20) % 10).astype(np.uint8),
        "classes": np.array(list("abcdefghij")),
        "flops": np.array(5),
    }
    answers["sha256"] = np.array(checksum(answers))
    np.savez_compressed(tmp_path / "run.npz", **answers)
    assert read_answers(tmp_path / "run.npz").keys() == {"correct", "labels", "classes", "flops"}
    spoil(answers)
    np.savez_compressed(tmp_path / "run.npz", **answers)
    with pytest.raises(CheckpointError, match="run.npz is damaged"):
        read_answers(tmp_path / "run.npz")
    data = (tmp_path / "run.npz").read_bytes()
    for position in range(40, len(data), 97):  # zlib errors and all
        (tmp_path / "run.npz").write_bytes(data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
        with pytest.raises(CheckpointError):
            read_answers(tmp_path / "run.npz")


def test_the_check_names_the_first_place():
    table = schema.optional({"a": [{"b": schema.COUNT}]}, c=schema.TEXT)
    schema.check({"a": [{"b": 0}, {"b": 1, "more": None}]}, table)
    for value, words in (
        ({"a": [{"b": 0}, {"b": -1}]}, r"a\[1\].b must be a whole number, at least 0, not -1"),
        ({"a": [{}]}, r"a\[0\].b is missing"),
        ({"a": {}}, "a must be a list, not a dict of 0"),
        ({"a": [], "c": 5}, "c must be text, not 5"),
        ([], "it must be a table"),
    ):
        with pytest.raises(ValueError, match=words):
            schema.check(value, table)


# ----------------------------------------------------------------------------------------- figures that are none


def no_constants(text: str) -> None:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(text, parse_constant=refuse)


def test_every_json_is_strict_where_there_is_one_test_image_of_one_class(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        for part, count in (("train", 12), ("val", 3), ("test", 1)):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / name / f"{number}.png")
    copied = tmp_path / "pets" / "train" / "b" / "0.png"
    (tmp_path / "pets" / "test" / "b" / "0.png").write_bytes(copied.read_bytes())  # which leaves class a alone
    flags = "--dataset pets --img_size 8 --hidden_size 8 --num_heads 2 --num_blocks 1 --batch_size 8 --epochs 1"
    flags += " --name VisionTransformer_pets"
    run_main("train.py", *flags.split(), "--lr", 1e-12, "--gif_frames", 0, "--device", "cpu")  # all answers are equal
    model = tmp_path / "saved" / "VisionTransformer_pets.pt"
    run_main("evaluate.py", model, "--device", "cpu", "--output_dir", "figures")
    run_main("explain.py", "--checkpoint", model, "--device", "cpu", "--rows", 1, "--output_dir", "figures")
    importer = ("studies.faithfulness", "--checkpoint", model, "--device", "cpu", "--images", 1, "--steps", 2)
    run_main(*importer, "--output_dir", "figures")
    written = [*tmp_path.glob("saved/*.json"), *tmp_path.glob("figures/*.json")]
    assert len(written) == 3
    for path in written:
        no_constants(path.read_text(encoding="utf-8"))
        read_json(path)
    evaluation = read_json(tmp_path / "figures" / "VisionTransformer_pets_evaluation.json")
    assert evaluation["images"] == 1 and evaluation["accuracy"] in (0, 1)
    assert [row["recall"] is None for row in evaluation["classes"]] == [False, True]
    code, line = outcome("evaluate.py", model, "--flip", "--device", "cpu", "--output_dir", "figures")
    assert code == 2 and "two test images or more" in line


def test_the_same_results_leave_a_file_untouched(tmp_path, capsys):
    """A repetition on more threads or another day is no change; one figure that differs in what matters is."""
    path, figures = tmp_path / "a.json", {"accuracy": 0.82690001, "rows": [{"loss": 1 / 3, "ms": 5.0}], "n": 10}
    assert report.write_results(path, {**figures, "provenance": {"date": "2020-01-01"}}, ("ms",))
    first = path.read_bytes()
    assert read_json(path)["rows"][0]["loss"] == 0.333333
    again = {"accuracy": 0.82690004, "rows": [{"loss": 1 / 3 + 1e-8, "ms": 9.0}], "n": 10}
    assert not report.write_results(path, {**again, "provenance": {"date": "2030-01-01"}}, ("ms",))
    assert path.read_bytes() == first and "left as they are" in capsys.readouterr().out
    others = [{**figures, "accuracy": 0.8270}, {**figures, "n": 11}, {**figures, "rows": []}, {**figures, "more": 1}]
    for other in others:
        assert report.write_results(path, {**other, "provenance": {"date": "2030-01-01"}}, ("ms",)), other
    path.write_bytes(first[:50])
    assert report.write_results(path, figures) and read_json(path)["n"] == 10


def test_what_is_not_finite_is_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5, -float("inf")], "y": {"z": np.float64("nan")}, 3: (1, 2)})
    no_constants((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert read_json(tmp_path / "a.json") == {"x": [None, 1.5, None], "y": {"z": None}, "3": [1, 2]}


def test_a_class_without_images_has_no_recall():
    rows = per_class(torch.eye(3), torch.tensor([0, 1, 1]), ["a", "b", "c"])
    assert [(row["recall"], row["f1"] is None) for row in rows] == [(1, False), (0.5, False), (None, True)]


@pytest.mark.parametrize("images", [2, 3, 5])
def test_intervals_of_very_few_images_are_numbers(images):
    first, second = np.zeros(images), np.zeros(images)
    first[0] = 1
    found = paired_bootstrap(first, second, resamples=500)
    assert np.isfinite([*found["bca"], *found["percentile"]]).all() and found["bca"][0] <= 1 / images <= found["bca"][1]


# -------------------------------------------------------------------------------------------------- names and ids


@pytest.mark.parametrize(
    "names", [["cat", "dog"], ["Größe, 50%", "a"], ['"quoted"', "b,c"], ["猫", "犬"], ["a b's", "$x_$"]]
)
def test_classes_with_commas_can_be_chosen(names):
    assert split_names(join_names(names)) == names
    assert split_names(' cat , "small, dog" ') == ["cat", "small, dog"]


@pytest.mark.parametrize("ids", [[], [5], [3, 1, 2, 40_000], [(1 << 62) + 7, (1 << 62) + 1]])
def test_ids_are_stored_as_text(ids):
    ids = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(unpack_ids(pack_ids(ids)), ids.sort().values)
    assert len(pack_ids(torch.arange(50_000))) < 10_000  # of CIFAR-10
    with pytest.raises(ValueError):
        unpack_ids("something else")


@pytest.mark.skipif(sys.platform == "win32", reason="other limits")
@pytest.mark.parametrize("length, fits", [(225, True), (235, False), (250, False)])
def test_a_name_too_long_for_the_longest_file_is_refused_before_training(tmp_path, length, fits):
    name = "n" * length
    flags = ("--dataset", "digits", "--epochs", 1, "--model", "mlp", "--hidden_size", 4, "--gif_frames", 0)
    code, line = outcome("train.py", *flags, "--name", name, "--output_dir", tmp_path, "--batch_size", 500)
    if fits:
        assert code == 0 and (tmp_path / "saved" / f"{name}.pt").exists()
    else:
        assert code == 2 and "too long for a file here: choose a shorter --name" in line
        assert not list(tmp_path.rglob("*.pt"))


def test_init_from_a_model_trained_on_what_is_validation_here_is_refused(tmp_path):
    train_small(tmp_path / "first")
    start = ("--init_from", tmp_path / "first" / "saved" / f"{MODEL}.pt")
    train_small(tmp_path / "same", *start)
    flags = [*SMALL, "--split_seed", 1, "--output_dir", tmp_path / "other", *start]
    code, line = outcome("train.py", *flags)
    assert code == 2 and "validation images, which would make accuracies too high" in line, line
    seen = read_file(tmp_path / "same" / "saved" / f"{MODEL}.pt")["metadata"]["seen"]
    assert seen["digits"]["train"].startswith("mask ")


def test_paths_are_said_from_the_working_directory_where_that_is_shorter(tmp_path, monkeypatch):
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "a" / "x.png") == Path("a/x.png") and short("a/x.png") == Path("a/x.png")
    assert short("/") == Path("/")
    monkeypatch.chdir(tmp_path / "a")
    assert short(tmp_path / "x.png") == Path("../x.png")
    assert figures_folder("here") == Path("here")
    monkeypatch.chdir(ROOT)
    assert figures_folder(None) == Path("figures")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("one\ntwo", "one"),
        ("\n  one  \ntwo", "one"),
        ("Error(s) in loading:\n\tMissing key(s).\n\tmore", "Missing key(s)."),
        ("nothing below:", "nothing below:"),
        ("", "ValueError"),
        (500 * "x", 200 * "x"),
    ],
)
def test_the_first_line_of_an_error_says_what_is_wrong(text, line):
    assert first_line(ValueError(text)) == line
