"""Runs side by side: what differs, means over seeds, unfinished and old runs, and the page as a parser reads it."""

import csv
import dataclasses
import html.parser
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, outcome
from test_robustness import SMALL, interrupt, run_on_tiny

import evaluate
import train
from support.report import read_json, write_json
from training import side_by_side_figures, stored_runs

STUDIES = ROOT / "saved" / "studies"
CURVES = {"val_accuracy": [0.3, 0.5, 0.45], "val_loss": [1.9, 1.2, 1.3], "val_step": [10, 20, 30]}


def store(path, accuracy=0.45, loss=1.3, metrics=CURVES, without=(), more=None, **config):
    """A report as train.py writes it, of three epochs."""
    results = {"parameters": 1234, "epochs": 3, "val_accuracy": accuracy, "val_loss": loss, "test_accuracy": 0.4}
    config = {**dataclasses.asdict(train.Config()), "dataset": "cifar10", "epochs": 3, **config}
    config = {name: value for name, value in config.items() if name not in without}
    results |= {"training_seconds": 90.0}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"results": results, "config": config, "metrics": metrics, **(more or {})})
    return path


@pytest.fixture
def compare(tmp_path, capsys, monkeypatch):
    """`python evaluate.py --runs ...`: rows of runs.csv by name, and what was printed."""

    def compare(*paths, width=500):
        monkeypatch.setenv("COLUMNS", str(width))
        evaluate.main(["--output_dir", str(tmp_path / "figures"), "--runs", *map(str, paths)])
        with open(tmp_path / "figures" / "runs.csv", encoding="utf-8", newline="") as file:
            return {row["name"]: row for row in csv.DictReader(file)}, capsys.readouterr()

    return compare


# --------------------------------------------------------------------------------------------------- what is compared


def test_runs_with_other_seeds_are_averaged(tmp_path, compare):
    accuracies, losses = [0.5, 0.52, 0.57], [1.1, 1.3, 1.2]
    for seed, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True)):
        store(tmp_path / f"saved/fast_seed{seed}.json", accuracy, loss, seed=seed, lr=0.01, gif_frames=seed)
    store(tmp_path / "saved/slow.json", 0.6, lr=0.001, device="cpu", name="slow")
    rows, printed = compare(tmp_path / "saved")
    assert list(rows) == ["slow", "fast"] and rows["fast"]["runs"] == "3"
    for name, values in (("val_accuracy", accuracies), ("val_loss", losses)):
        assert float(rows["fast"][name]) == pytest.approx(np.mean(values))
        assert float(rows["fast"][f"{name}_std"]) == pytest.approx(np.std(values, ddof=1))
    assert "53.0% ± 3.6" in printed.out and "1.200 ± 0.100" in printed.out
    assert rows["slow"]["val_accuracy_std"] == "" and float(rows["slow"]["minutes"]) == 1.5
    assert float(rows["slow"]["best_val_accuracy"]) == 0.5 and float(rows["slow"]["best_val_loss"]) == 1.2
    assert len(compare(tmp_path / "saved", "--each")[0]) == 4


def test_a_mean_of_runs_with_unlike_names_says_how_many_they_are(tmp_path, compare):
    for seed, name in enumerate(("first", "second", "third")):
        store(tmp_path / f"saved/{name}.json", seed=seed, name=name)
    rows, _ = compare(tmp_path / "saved")
    assert {name: row["runs"] for name, row in rows.items()} == {"first and 2 more": "3"}


def test_long_names_that_differ_in_the_middle_are_told_apart(tmp_path, compare):
    names = [f"{'long' * 12}_{middle}_{'name' * 12}" for middle in "ab"]
    for lr, name in enumerate(names):
        store(tmp_path / f"saved/{name}.json", lr=float(lr + 1), name=name)
    _, printed = compare(tmp_path / "saved")
    shown = [line.split()[0] for line in printed.out.splitlines() if line.startswith("long")]
    assert len(shown) == 2 and len(set(shown)) == 2


def test_folders_within_a_folder_are_not_searched(tmp_path, compare):
    store(tmp_path / "saved/a.json")
    store(tmp_path / "saved/studies/b.json", lr=0.5)
    assert list(compare(tmp_path / "saved")[0]) == ["a"]


def test_the_same_seed_twice_counts_once_in_a_mean(tmp_path, compare):
    for name, seed in (("a_0", 0), ("a_1", 1), ("again", 0), ("z", 1)):
        store(tmp_path / f"saved/{name}.json", seed=seed, name=name)
    rows, printed = compare(tmp_path / "saved")
    assert {name: row["runs"] for name, row in rows.items()} == {"a": "2"}
    assert "with the same seed is there already: again, z." in printed.out
    for name in ("a_1", "z"):
        (tmp_path / f"saved/{name}.json").unlink()
    rows, printed = compare(tmp_path / "saved")
    assert list(rows) == ["a_0"] and "already: again." in printed.out and "±" not in printed.out
    rows, printed = compare(tmp_path / "saved", "--each")
    assert list(rows) == ["a_0", "again"] and "already" not in printed.out


def test_each_data_set_has_a_table_of_its_own(tmp_path, compare):
    for name, accuracy, config in (
        ("a", 0.5, {}),
        ("b", 0.6, {"lr": 0.1}),
        ("c", 0.97, {"dataset": "digits"}),
        ("d", 0.9, {"classes": "cat,dog"}),
    ):
        store(tmp_path / f"saved/{name}.json", accuracy, **config)
    rows, printed = compare(tmp_path / "saved")
    assert list(rows) == ["b", "a", "d", "c"] and (rows["c"]["dataset"], rows["d"]["classes"]) == ("digits", "cat,dog")
    parts = re.split(r"^(cifar10|cifar10, cat,dog|digits):\n", printed.out, flags=re.MULTILINE)
    assert parts[1::2] == ["cifar10", "cifar10, cat,dog", "digits"]
    for part, names in zip(parts[2::2], ("ba", "d", "c"), strict=True):
        lines = part.split("\n\n")[0].splitlines()
        assert lines[0].startswith("name ") and [line.split()[0] for line in lines[1:]] == list(names)
    assert (
        "compared" in printed.out
        and "aria-sort"
        not in (tmp_path / "figures" / "runs.html")
        .read_text(encoding="utf-8")
        .partition("<tbody>")[0]
        .partition("<thead>")[2]
    )


def test_hyperparameters_that_differ_have_a_column_and_no_others(tmp_path, compare):
    store(tmp_path / "saved/a.json", optimizer="adamw", tensorboard=True, preset="quick", seed=5)
    store(tmp_path / "saved/b.json", optimizer="sgd", warmup=0.0)
    rows, printed = compare(tmp_path / "saved")
    assert list(rows["a"])[:7] == ["name", "runs", "model", "optimizer", "warmup", "parameters", "epochs"]
    assert (rows["a"]["optimizer"], rows["b"]["optimizer"], rows["b"]["warmup"]) == ("adamw", "sgd", "0.0")
    assert "compared" not in printed.out


def test_what_an_earlier_version_lacks_or_spells_otherwise_is_no_difference(tmp_path, compare):
    lacking = ("ema", "grad_accum", "fold", "seed", "threads")
    store(tmp_path / "saved/old_0.json", without=lacking, augment=True, dataset="auto", folds=0)
    store(tmp_path / "saved/old_1.json", seed=1)
    rows, _ = compare(tmp_path / "saved")
    assert rows["old"]["runs"] == "2" and list(rows["old"])[3] == "parameters"
    store(tmp_path / "saved/averaged.json", ema=0.999)
    rows, _ = compare(tmp_path / "saved")
    assert rows["old"]["ema"] == "0.0" and rows["averaged"]["ema"] == "0.999"


@pytest.mark.parametrize("sort, names", [("val_accuracy", "bca"), ("val-loss", "abc"), ("lr", "cab"), ("name", "abc")])
def test_sorted_the_best_first_and_the_unknown_last(tmp_path, compare, sort, names):
    for name, accuracy, loss, lr in (("a", 0.3, 0.9, 0.02), ("b", 0.5, 1.0, 0.1), ("c", 0.4, 1.1, 0.003)):
        store(tmp_path / f"saved/{name}.json", accuracy, loss, lr=lr)
    nothing = {name: [] for name in CURVES}
    store(tmp_path / "saved/z.json", None, None, nothing, val_fraction=0.0, lr=1.0)
    rows, printed = compare(tmp_path / "saved", "--sort", sort)
    assert "".join(rows) == names + "z"
    assert (rows["z"]["val_accuracy"], rows["z"]["best_val_loss"], rows["z"]["test_accuracy"]) == ("", "", "0.4")
    assert re.search(r"others \(val fraction\)", printed.out)


def test_other_images_are_said_to_be_no_comparison(tmp_path, compare):
    for name, images in (("a", "60 images aa"), ("b", "60 images bb")):
        store(tmp_path / f"one/{name}.json", dataset="pictures", lr=len(name), more={"images": images})
    assert "(pictures in the folder)" in compare(tmp_path / "one")[1].out
    # part of the labels is part of the training images alone
    store(tmp_path / "two/a.json", label_fraction=0.1, more={"images": "41000 images aa"})
    store(tmp_path / "two/b.json", more={"images": "50000 images bb"})
    assert "compared" not in compare(tmp_path / "two")[1].out
    store(tmp_path / "two/c.json", split_seed=1, fold="0/5", classes="cat,dog", dataset="cifar100")
    assert "(dataset, classes, split seed, fold)" in compare(tmp_path / "two")[1].out


# ------------------------------------------------------------------------------------------------------------- files


def test_a_run_that_has_not_finished(tmp_path, compare):
    flags = (*SMALL, "--epochs", "3", "--tokenizer", "conv")
    interrupt(tmp_path, "epoch_end", *flags)
    checkpoint = tmp_path / "saved" / "VisionTransformer_digits.checkpoint"
    rows, printed = compare(checkpoint)
    row = rows["VisionTransformer_digits"]
    assert (row["epochs"], row["epochs_asked_for"], row["finished"]) == ("1", "3", "False")
    assert "1 of 3 *" in printed.out and "* not finished" in printed.out and row["test_accuracy"] == ""
    assert 0 <= float(row["val_accuracy"]) <= 1 and float(row["minutes"]) > 0
    unfinished = checkpoint.read_bytes()
    assert run_on_tiny(tmp_path, *flags, "--resume") == (0, "")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(unfinished)  # beside the report
    for paths in (["saved"], ["saved/VisionTransformer_digits.checkpoint", "saved/*.json"]):
        rows, printed = compare(*(tmp_path / path for path in paths))
        ended = rows["VisionTransformer_digits"]
        assert (ended["epochs"], ended["finished"]) == ("3", "True") and "*" not in printed.out
        assert ended["parameters"] == row["parameters"]  # of which BatchNorm's statistics are none
    checkpoint.with_suffix(".json").unlink()
    checkpoint.write_bytes(whole)
    assert compare(checkpoint)[0]["VisionTransformer_digits"]["test_accuracy"] == ended["test_accuracy"]


def test_every_report_of_the_studies_is_read_and_counted(compare):
    reports = list(STUDIES.glob("*.json"))
    rows, printed = compare(STUDIES, ROOT / "saved" / "VisionTransformer.json", ROOT / "saved" / "CNN.json", width=9999)
    (again,) = re.findall(r"is there already: (.*)\.", printed.out)
    names, _, more = again.partition(" and ")
    left_out = len(names.split(", ")) + int(more.partition(" ")[0] or 0)
    assert sum(int(row["runs"]) for row in rows.values()) + left_out == len(reports) + 2 and not printed.err
    assert len(compare(STUDIES, "--each")[0]) == len(reports)
    accuracies = [read_json(STUDIES / f"ablation_conv_seed{i}.json")["results"]["val_accuracy"] for i in range(3)]
    assert float(rows["ablation_conv"]["val_accuracy"]) == pytest.approx(np.mean(accuracies))


def test_the_example_of_the_docs_is_what_is_printed(compare):
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(name .*?)```", page, flags=re.DOTALL)
    _, printed = compare(STUDIES / "ablation_adamw*", width=80)
    assert block == printed.out.rpartition("wrote\n")[0]


def test_damaged_and_foreign_files_are_left_out_with_a_line_unless_nothing_remains(tmp_path, compare):
    whole = store(tmp_path / "saved/a.json")
    (tmp_path / "saved/cut.json").write_bytes(whole.read_bytes()[:300])
    write_json(tmp_path / "saved/foreign.json", {"name": "x", "scripts": {}})
    store(tmp_path / "saved/odd.json", more={"images": ["of", "another", "kind"]})
    (tmp_path / "saved/cut.checkpoint.previous").touch()
    (tmp_path / "saved/a.pt").touch()
    (tmp_path / "saved/b.checkpoint").write_bytes(b"PK")
    rows, printed = compare(tmp_path / "saved")
    assert list(rows) == ["a"]
    lines = printed.err.splitlines()
    assert [re.search(r"saved.(\w+\.\w+)", line)[1] for line in lines] == [
        "b.checkpoint",
        "cut.json",
        "foreign.json",
        "odd.json",
    ]
    for name in ("cut.json", "foreign.json", "a.pt", "missing.json", "missing*"):
        code, error = outcome("evaluate.py", "--output_dir", tmp_path / "none", "--runs", tmp_path / "saved" / name)
        assert code == 2 and error.count("\n") == 0 and name in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("flags", [["--sort", "val_accurcy"], ["--ensemble"], ["--flip"]])
def test_what_cannot_be_asked_of_runs_is_refused(tmp_path, flags):
    path = store(tmp_path / "a.json")
    code, error = outcome("evaluate.py", "--output_dir", tmp_path / "none", "--runs", path, *flags)
    assert code == 2 and flags[-1] in error and not (tmp_path / "none").exists()
    code, error = outcome("evaluate.py", "saved/CNN.pt", "--output_dir", tmp_path / "none", "--runs", path)
    assert code == 2 and "--runs" in error
    code, error = outcome("evaluate.py", "saved/CNN.pt", "--output_dir", tmp_path / "none", "--each")
    assert code == 2 and "--runs" in error


def test_runs_of_the_same_name_in_two_folders_are_told_apart(tmp_path, compare):
    for folder in ("one", "two"):
        store(tmp_path / folder / "a.json", optimizer="sgd" if folder == "one" else "adam")
    rows, _ = compare(tmp_path / "one", tmp_path / "two")
    assert sorted(rows) == [(tmp_path / folder / "a").as_posix() for folder in ("one", "two")]


# ---------------------------------------------------------------------------------------------------- how it is shown


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_table_is_as_wide_as_the_terminal_at_most(compare, width):
    pattern = STUDIES / "ablation_*"
    _, printed = compare(pattern, "--sort", "val_loss", width=width)
    out, _, wrote = printed.out.rpartition("wrote\n")
    assert max(map(len, out.splitlines())) <= width and len(wrote.splitlines()) == 3
    headings = [line.split() for line in out.splitlines() if line.startswith("name ")]
    assert len(headings) == 2 and {"name", "val_loss"} <= set(headings[0])
    assert width < 80 or "val_accuracy" in headings[0]
    with_all = compare(pattern, width=1000)[1].out.split("\n")[0].split()
    left_out = " ".join(out.split()).partition("in the files: ")[2].partition(". ")[0].split(", ")
    assert set(left_out) - {""} == set(with_all) - set(sum(headings, []))


def test_what_is_the_same_in_all_rows_is_said_once(tmp_path, compare):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        store(tmp_path / f"saved/{name}.json", 0.3 + lr, lr=lr)
    _, printed = compare(tmp_path / "saved", width=80)
    table, same = printed.out.split("\n\n")[:2]
    assert table.splitlines()[0].split() == ["name", "lr", "val_accuracy", "test_accuracy"]
    assert " ".join(same.split()).startswith("The same in all rows: model vit, parameters 1,234, epochs 3, best_val")
    (tmp_path / "saved" / "b.json").unlink()
    assert "same in all" not in compare(tmp_path / "saved", width=80)[1].out


def test_a_run_before_its_first_checkpoint_is_one_line(tmp_path, compare):
    store(tmp_path / "saved/a.json")
    for name in ("a.lock", "new_lr0.002.lock", "new_lr0.002.csv"):
        (tmp_path / "saved" / name).touch()
    rows, printed = compare(tmp_path / "saved")
    assert list(rows) == ["a"] and printed.err.count("\n") == 1
    assert str(tmp_path / "saved" / "new_lr0.002") + " has begun" in printed.err
    (tmp_path / "saved/a.json").unlink()
    (tmp_path / "saved/a.lock").unlink()
    code, error = outcome("evaluate.py", "--output_dir", tmp_path / "none", "--runs", tmp_path / "saved")
    assert code == 2 and "new_lr0.002 has begun and has no checkpoint yet" in error and error.count("\n") == 0


class Page(html.parser.HTMLParser):
    """The cells of the table's rows, each as (tag, attributes, text), and what the page loads."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.buttons, self.loads, self.open = [], 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loads += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append([tag, attributes, ""])
        self.buttons += tag == "button" and self.open[-1] == "th"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1][2] += data


def test_the_page_has_every_cell_and_loads_nothing(tmp_path, compare):
    name = '<b>"bold" & it\'s'
    for seed, accuracy in enumerate((0.5, 0.6)):
        store(tmp_path / f"saved/{name}_{seed}.json", accuracy, seed=seed, init_from="<i>.pt")
    store(tmp_path / "saved/other.json", None, None, {what: [] for what in CURVES}, parameters=12)
    rows, _ = compare(tmp_path / "saved")
    text = (tmp_path / "figures" / "runs.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.loads) == 1 and page.loads[0].startswith("data:image/png;base64,iVBOR")
    assert "color-scheme: light dark" in text and "http" not in text.partition("<script>")[2]
    headings, *body = page.rows
    columns = [cell[2] for cell in headings]
    assert page.buttons == len(columns) and {"val_accuracy", "init_from"} <= set(columns) <= set(rows[name])
    assert [cell[2] for cell in headings if "aria-sort" in cell[1]] == ["val_accuracy"]
    assert headings[columns.index("val_accuracy")][1]["aria-sort"] == "descending"
    assert len(body) == 2 and all(len(row) == len(columns) for row in body)
    first = dict(zip(columns, body[0], strict=True))
    assert first["name"][0] == "th" and first["name"][1]["scope"] == "row"
    assert first["name"][2] == name and first["init_from"][2] == "<i>.pt"
    assert first["val_accuracy"][2] == "55.0% ± 7.1"
    assert float(first["val_accuracy"][1]["data-value"]) == pytest.approx(0.55)  # a number to sort by
    assert dict(zip(columns, body[1], strict=True))["val_accuracy"][1]["data-value"] == ""


def test_the_curves_are_means_with_a_band_and_leave_out_what_was_not_validated(tmp_path, compare, monkeypatch):
    drawn = []
    draw = side_by_side_figures.draw_curves
    monkeypatch.setattr("training.side_by_side.draw_curves", lambda *args: drawn.append(draw(*args)))
    higher = {**CURVES, "val_accuracy": [0.4, 0.7, 0.65, 0.8]}  # a run that went on for longer
    for seed, metrics in enumerate((CURVES, higher)):
        store(tmp_path / f"saved/a_{seed}.json", seed=seed, metrics=metrics)
    store(tmp_path / "saved/null.json", 0.9, lr=1.0, metrics={**CURVES, "val_loss": [None, 1.5, 1.4]})
    store(tmp_path / "saved/none.json", None, None, {name: [] for name in CURVES}, lr=2.0)
    compare(tmp_path / "saved")
    accuracy, loss = drawn[0].axes
    null, mean = (line.get_ydata() for line in accuracy.get_lines())
    assert mean == pytest.approx([35, 60, 55]) and null == pytest.approx([30, 50, 45])
    band = accuracy.collections[0].get_paths()[0].vertices
    assert set(band[:, 1].round(6)) == {30, 40, 50, 70, 45, 65}
    assert np.isnan(loss.get_lines()[0].get_ydata()).tolist() == [True, False, False]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["null: lr 1", "a: lr 0.006 (n = 2)"]


def test_more_rows_than_can_be_told_apart_are_not_all_drawn(tmp_path, compare, monkeypatch):
    styles = [tuple(side_by_side_figures.style(i).values()) for i in range(side_by_side_figures.MOST)]
    assert len(set(styles)) == len(styles) >= 12
    drawn = []
    draw = side_by_side_figures.draw_curves
    monkeypatch.setattr("training.side_by_side.draw_curves", lambda *args: drawn.append(draw(*args)))
    compare(STUDIES, "--each")
    assert len(drawn[0].axes[0].get_lines()) == len(styles)
    assert f"the first {len(styles)} of" in drawn[0].texts[1].get_text()


def test_patterns_and_names_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = "saved/studies/ablation_adamw_seed*.json"
    assert len(stored_runs.find_files((named,))) == 3
    assert len(stored_runs.find_files(("saved/CNN.json", "saved/CN*.json"))) == 1  # once, however often it is named
    (tmp_path / "saved" / "studies").mkdir(parents=True)
    shutil.copy(STUDIES / "ablation_adamw_seed0.json", tmp_path / "saved" / "studies")
    assert len(stored_runs.find_files((named,))) == 1  # what lies here comes first
