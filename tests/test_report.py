"""README, docs and notebooks say what is stored: the pages are as their templates give them; a number that was typed, a
claim that no longer holds, a summary of other runs and a stale report are found."""

import dataclasses
import json
import re
import shutil

import pytest
from helpers import ROOT, committed_results

import train
from studies import report, speed_facts, stale
from studies.prose import find_numbers
from support.report import processor_of, read_json, write_json
from support.significance import verdict

FILES = ("README.md", "docs/*.md", "docs/templates/*.md", "figures/*.json", "saved/*.json", "saved/studies/*.json")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The pages, their templates, the notebooks and everything that is stored and committed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("pages")
    for path in (path for pattern in (*FILES, "demos/*.ipynb") for path in ROOT.glob(pattern)):
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


@pytest.fixture
def copy(original):
    """The same; what the test changes is put back."""
    before = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    yield original
    for path in {path for path in original.rglob("*") if path.is_file()} - before.keys():
        path.unlink()
    for path, contents in before.items():
        if not path.exists() or path.read_bytes() != contents:
            path.write_bytes(contents)


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@committed_results
def test_pages_and_notebooks_say_what_is_stored(capsys):
    assert report.check(ROOT) == []
    printed = capsys.readouterr().out
    assert int(re.match(r"([\d,]+) numbers from stored results", printed)[1].replace(",", "")) > 500


def test_another_result_makes_pages_wrong(copy, capsys):
    path = copy / "saved" / "studies" / "study_default_vit_patch4_seed1.json"
    stored = read_json(path)
    stored["results"]["test_accuracy"] -= 0.05
    write_json(path, stored)
    path = copy / "figures" / "ablation.json"
    summary = read_json(path)
    summary["rows"][0]["val_accuracies"][0] += 0.01
    write_json(path, summary)
    studies = copy / "saved" / "studies"
    shutil.copy(studies / "study_default_cnn_seed2.json", studies / "study_default_cnn_seed3.json")
    (copy / "figures" / "crossval.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        report.main(["--check", "--root", str(copy)])
    printed = capsys.readouterr().out
    assert stop.value.code == 1
    assert re.search(r"^README.md:\d+: should be '\| Vision Transformer", printed, re.MULTILINE)
    assert re.search(r"^docs/results.md:\d+: should be", printed, re.MULTILINE)
    assert "figures/ablation.json is not of the runs of default that are stored: run python -m stud" in printed
    assert "figures/model_comparison.json is not of study_default_cnn_seed3: run python -m stud" in printed
    assert re.search(r"^docs/templates/recipe.md .*crossval.json is damaged", printed, re.MULTILINE)
    assert "docs/explain.md:" not in printed


def test_what_is_typed_is_found(copy, capsys):
    change(copy / "docs" / "templates" / "study.md", "## What was found", "## What was found\n\nIt gains 12.5 points.")
    change(copy / "docs" / "templates" / "tried.md", "# What was tried", '# What was tried\n\n{{ "91.4 %" }}\n')
    change(copy / "docs" / "runs.md", "## Names", "## Names\n\nIt takes three minutes.\n")
    path = copy / "demos" / "vit_tutorial.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"][0]["source"] += ["\n\nThe model is right in 83.7 % of the cases."]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    faults = "\n".join(report.check(copy))
    capsys.readouterr()
    for found in (
        r"docs/study.md has a typed number: .*gains 12.5 points",
        r"docs/templates/tried.md has a typed value in an expression: '91.4 %'",
        r"docs/runs.md has a typed number: .*takes three minutes",
        r"demos/vit_tutorial.ipynb has a typed number: .*right in 83.7 %",
    ):
        assert re.search(found, faults), found


def test_pages_are_written_anew_and_a_claim_that_fails_is_not(copy, capsys):
    """An ablation in which AdamW is the better one, and an insertion test that relevance wins."""
    path = copy / "figures" / "ablation.json"
    summary = read_json(path)
    row = next(row for row in summary["rows"] if row["row"] == "adamw")
    row |= {"mean": 0.99, "difference": 0.2}
    write_json(path, summary)
    recipe = (copy / "docs" / "recipe.md").read_bytes()
    path = copy / "figures" / "VisionTransformer_and_2_more_faithfulness.json"
    stored = read_json(path)
    stored["rankings"]["relevance"]["insertion"]["area"] = 0.9123
    write_json(path, stored)
    with pytest.raises(SystemExit) as stop:
        report.main(["--root", str(copy)])
    printed = capsys.readouterr().out
    assert stop.value.code == 1 and 'docs/templates/recipe.md says "' in printed
    assert (copy / "docs" / "recipe.md").read_bytes() == recipe
    explain = (copy / "docs" / "explain.md").read_text(encoding="utf-8")
    assert "| 91.2 |" in explain and "by\ninsertion relevance, " in explain


def test_another_seed_changes_no_template(copy, capsys):
    """A third run of a preset is a row's n, mean and name, wherever it is shown."""
    for seed in (0, 1, 2):
        stored = read_json(copy / "saved" / "studies" / "accurate_seed1.json")
        made = made_by(f"python train.py --preset accurate --seed {seed}")
        stored["config"] = made["config"]
        stored["provenance"] |= made["provenance"]
        stored["results"] |= {"test_accuracy": 0.9, "processor_seconds": 1200.0}
        write_json(copy / "saved" / "studies" / f"accurate_seed{seed}.json", stored)
    report.main(["--root", str(copy)])
    readme = (copy / "README.md").read_text(encoding="utf-8")
    results = (copy / "docs" / "results.md").read_text(encoding="utf-8")
    assert "**90.0 ± 0.0 %** (n = 3)" in readme and "`studies/accurate_seed2`" in results and "| 20 min |" in results
    assert "made with earlier" not in readme + results


def test_every_page_names_the_stale_reports_it_rests_on(copy, capsys):
    found = {name.split("/")[-1] for name, _, _ in stale.find_stale(copy)}
    for name in report.templates(copy):
        text = report.without_marks(report.render(copy, name)[0])
        sentences = " ".join(re.findall(r"[^.\n]* made with earlier [^.]*", text))
        source = (copy / "docs" / "templates" / name).read_text(encoding="utf-8")
        for topic in set(re.findall(r"\{[{%][^}]*?(\w+)\.", source)) & report.TOPICS.keys():
            if found & {run.split("/")[-1] for run in report.TOPICS[topic](copy)["runs"]}:
                assert sentences, (name, topic)
    old = copy / "docs" / "templates" / "results.md"
    path = copy / "saved" / "studies" / "study_default_vit_patch4_seed2.json"
    stored = read_json(path)
    stored["config"]["lr"] = 0.123
    write_json(path, stored)
    text = report.without_marks(report.render(copy, "results.md")[0])
    assert re.search(r"`study_default_vit_patch4_seed2`[^\n]* made with earlier", text)
    change(old, "{{ headline.earlier }}", "")
    _, faults = report.render(copy, "results.md")
    assert faults == ["rests on stale reports and does not say so: put {{ headline.earlier }} where they are used"]


def made_by(command, **changes):
    """A report of this command, as train.py would write it on another machine."""
    config = stale.parse(command)
    return {"config": {**dataclasses.asdict(config), **changes}, "provenance": {"command": command}}


def test_a_report_is_stale_where_todays_defaults_differ_and_not_where_the_machine_does():
    command = "python train.py --optimizer adamw --epochs 5 --threads 1 --output_dir . --name a"
    machine = {"threads": 64, "device": "cuda", "output_dir": "elsewhere", "precision": "fp32", "dataset": "cifar10"}
    assert stale.changes_since(made_by(command, **machine)) == {}
    assert stale.changes_since(made_by(command, lr=0.5)) == {"lr": (0.5, train.RATES["adamw"]["lr"])}
    assert stale.changes_since(made_by("python train.py --lr 0.5")) == {}
    assert stale.changes_since(made_by("python train.py --precision bf16", precision="fp32"))  # it was asked for
    assert stale.changes_since(made_by("python train.py --model cnn", tokenizer="conv")) == {}  # a CNN has none
    earlier = {"config": {"epochs": 20}, "provenance": {"command": "python train.py --no_such_flag"}}
    assert stale.changes_since(earlier) == {"command": ("accepted", "refused")}
    # of a study it is the study's code that says what would be trained
    assert not stale.changes_since(made_by("python train.py --pooling cls --epochs 5", name="ablation_cls_seed0"))
    assert stale.changes_since(made_by("python train.py --epochs 5", name="ablation_cls_seed0"))


def test_a_stale_report_comes_with_what_makes_it_anew(copy, capsys):
    path = copy / "saved" / "studies" / "study_default_cnn_seed2.json"
    stored = read_json(path)
    stored["config"]["warmup"] = 0.5
    write_json(path, stored)
    report.main(["--stale", "--root", str(copy)])
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("saved/studies/study_default_cnn_seed2.json: warmup 0.5, now 0.1")
    name = "studies/study_default_cnn_seed2"
    flags = f"--model cnn --dataset cifar10 --epochs 20 --seed 2 --gif_frames 0 --name {name}"
    assert lines[place + 1] == f"  python train.py {flags}"
    command = "python train.py --preset quick --seed 2 --gif_frames 0 --name a --resume --threads 1 --output_dir ."
    again = stale.command_of("saved/studies/a.json", made_by(command))
    assert again == "python train.py --preset quick --seed 2 --gif_frames 0 --name studies/a"


def test_names_and_code_are_no_numbers_and_keyed_ones_are_counted():
    text = "ResNet-20 on CIFAR-10 in bf16, 4x4, `--lr 0.1`, [x](y/3) (2024)\n\n```\n17\n```\n"
    assert find_numbers(text).unknown == []
    far = " and so on and on, as words go, until there is another number, and then one more of them, "
    found = find_numbers(far.join(["Right in \ue0003.5\ue001 % of 77 images", "-0.4 points", "2e-3", "half times"]))
    assert [re.search(r"77|-0\.4|2e-3|half", words)[0] for words in found.unknown] == ["77", "-0.4", "2e-3", "half"]
    assert found.keyed == {"in sentences: accuracies and other shares": 1}


def test_the_notebook_gives_the_verdicts_of_the_study():
    cells = json.loads((ROOT / "demos" / "model_comparison.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = ["".join(cell["source"]) for cell in cells if "def verdict(" in "".join(cell["source"])]
    names = {}
    exec(re.search(r"def verdict.*?(?=\n\n\n)", cell, re.DOTALL)[0], names)
    words = {"better": "above", "worse": "below", "cannot be told apart": "cannot be told apart from"}
    for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1)):
        for p in (0.001, 0.049, 0.05, 0.7):
            assert words[names["verdict"]((low + high) / 2, low, high, p)] == verdict([low, high], p)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["AVX2", "AVX-512", "AVX-512 BF16"], "EPYC with AVX-512 BF16"),
        (["AVX2", "AVX-512", "AVX-512 BF16", "AMX"], "EPYC with AVX-512 BF16 and AMX"),
        (["AVX2"], "EPYC with AVX2"),
        ([], "EPYC"),
    ],
)
def test_a_processor_is_called_by_what_matters_to_speed(sets, words):
    assert processor_of({"cpu": "EPYC", "instruction_sets": sets}) == words


def test_precisions_are_compared_seed_by_seed(tmp_path, monkeypatch):
    def runs(precision, **accuracies):
        machine = {"accelerator": None, "threads": 1, "cpu": precision, "instruction_sets": []}
        return {
            name: {
                "config": {"seed": int(name[1:]), "precision": precision if name != "s3" else "fp32"},
                "results": {"val_accuracy": accuracy, "training_seconds": 100 * accuracy},
                "provenance": machine,
            }
            for name, accuracy in accuracies.items()
        }

    stored = {"studies/fp32_seed*": runs("fp32", s0=0.5, s2=0.9, s3=0.1)}
    stored["studies/study_default_vit_patch4_seed*"] = runs("bf16", s0=0.4, s1=0.7, s2=0.7, s3=0.8)
    monkeypatch.setattr(speed_facts, "find_runs", lambda _root, pattern: stored[pattern])
    found = speed_facts.precision(tmp_path)
    assert (found["fp32"], found["bf16"]) == ([0.5, 0.9], [0.4, 0.7])  # the study's seed 3 was not in bf16
    assert found["fp32_seconds"] == [50, 90]
    assert found["by_seed"]["difference"] == pytest.approx(0.15) and found["fp32_where"] == ["fp32 (1 thread)"]
