"""The notebooks run, without CIFAR-10 and without a network, and what is committed of them is fit to be read."""

import json
import re
import shutil

import nbformat
import numpy as np
import pytest
import torch
from helpers import ROOT
from nbclient import NotebookClient
from PIL import Image

from network import VisionTransformer
from training.trained import read_sheet, sample_images

FOLDERS = ("training", "images", "support", "studies")
NOTEBOOKS = ["vit_tutorial", "attention_maps", "model_comparison"]


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The repository's modules, committed results and notebooks in a folder where runs may write."""
    for path in [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for folder in ("saved", "figures", "demos"):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.suffix in (".pt", ".json", ".png", ".ipynb"):
                shutil.copy(path, tmp_path / folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def execute(copy, name, start="demos"):
    """The notebook with its outputs, run from the folder `start`; raises CellExecutionError on any error."""
    notebook = nbformat.read(copy / "demos" / f"{name}.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(copy / start)}}
    ).execute()
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(notebook):
    """All that a reader can read in the outputs."""
    for output in outputs(notebook):
        yield output.get("text", "")
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield content


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run(copy, name):
    before = {path for path in copy.rglob("*") if "__pycache__" not in path.parts}
    execute(copy, name)
    assert {path for path in copy.rglob("*") if "__pycache__" not in path.parts} == before, "a notebook leaves files"


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
NORMALISATION = {"mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
OTHER_VITS = {  # what train.py may put in the place of the committed model
    "two classes, patches that do not divide": ({"patch_size": 6, "pooling": "mean"}, "cifar10", ["truck", "cat"]),
    "conv tokenizer, CLS token, one block": ({"patch_size": 8, "tokenizer": "conv", "num_blocks": 1}, "digits", None),
    "the presets' tokenizer": ({"patch_size": 8, "tokenizer": "whitened", "num_blocks": 1}, "cifar10", CIFAR10),
    "one patch, one head": ({"patch_size": 32, "num_heads": 1, "num_blocks": 2}, "cifar10", CIFAR10),
}


@pytest.mark.parametrize("name", ["vit_tutorial", "attention_maps"])
@pytest.mark.parametrize("other", OTHER_VITS)
def test_notebooks_run_with_any_vit_and_say_what_is_true_of_it(copy, name, other):
    options, dataset, classes = OTHER_VITS[other]
    classes = classes or [str(digit) for digit in range(10)]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_heads": 2, "num_blocks": 3, "output_size": len(classes), **options}
    model = VisionTransformer(**sizes)
    torch.nn.init.normal_(model.head.weight)  # zeros at first, with which all answers would be the same
    model.save(copy / "saved" / "VisionTransformer.pt", dataset=dataset, classes=classes, **NORMALISATION)
    path = copy / "demos" / f"{name}.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("EPOCHS = 20", "EPOCHS = 1"), encoding="utf-8")
    notebook = execute(copy, name)
    said = "\n".join(texts(notebook))
    cls, patches = model.pooling == "cls", model.embedding.grid_size**2
    if name == "attention_maps":
        assert ("no CLS token" in said) != cls and f"each of the {patches + cls} tokens" in said
        assert "is of another model" in said  # the stored figures of section 6
    else:
        blocks, heads, side = sizes["num_blocks"], sizes["num_heads"], sizes["patch_size"]
        expected = f"{blocks} block(s) with {heads} head(s) each, tokens of 16 numbers, patches of {side}x{side} pixels"
        assert f"**{dataset}**: {expected}" in said and f"{20 * len(classes)} test pictures" in said
        assert ("small convolutions" in said) == (model.config["tokenizer"] != "patch")
        assert f"ln {len(classes)} = {np.log(len(classes)):.3f}" in said
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"\b(4|four) (blocks|heads)|\b64 (patch|token|number)", prose), "true of one model only"


def test_model_comparison_leaves_out_what_was_trained_on_other_data(copy):
    (copy / "figures" / "model_comparison.json").unlink()
    path = copy / "saved" / "VisionTransformer.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    report["config"]["dataset"] = "digits"
    path.write_text(json.dumps(report), encoding="utf-8")
    said = "\n".join(texts(execute(copy, "model_comparison")))
    assert "left out: CNN, which was trained on cifar10 and not on digits" in said
    accuracy = report["results"]["test_accuracy"]
    margin = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 360)
    assert f"{accuracy - margin:.1%} to {accuracy + margin:.1%}" in said


def test_the_pictures_of_a_model_are_of_its_classes(digits):
    model = VisionTransformer(output_size=2)
    model.metadata = {"dataset": "cifar10", "classes": ["truck", "cat"], **NORMALISATION}
    images, labels = sample_images(model, 3)
    sheet, of_sheet = read_sheet()
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(images, torch.cat([sheet[of_sheet == 9][:3], sheet[of_sheet == 3][:3]]))
    model.metadata |= {"dataset": "digits", "classes": digits.classes}
    images, labels = sample_images(model, 3)
    expected = [digits.test.images[digits.test.labels == label][:3] for label in range(10)]
    assert torch.equal(images, torch.cat(expected)) and labels.tolist() == [i for i in range(10) for _ in range(3)]


def test_notebooks_run_from_the_root_too(copy):
    execute(copy, "model_comparison", start=".")


def test_attention_maps_does_without_the_faithfulness_results(copy):
    for path in (copy / "figures").glob("*_faithfulness*"):
        path.unlink()
    assert any("python -m studies.faithfulness" in text for text in texts(execute(copy, "attention_maps")))


@pytest.mark.parametrize("paired", [True, False])
def test_model_comparison_reads_the_study_when_it_is_there(copy, paired):
    rng = np.random.default_rng(0)
    template = json.loads((ROOT / "saved" / "CNN.json").read_text(encoding="utf-8"))
    runs = []
    for name, accuracy in (("CNN", 0.7), ("ViT (patch=4)", 0.8), ("ViT (patch=8)", 0.6)):
        for _ in range(2):
            correct = rng.random(10_000) < accuracy
            results = {**template["results"], "test_accuracy": correct.mean()}
            answers = {"correct": "".join(map(str, correct.astype(int)))} if paired else {}
            runs += [
                {**template, "name": name, "recipe": r, "results": results} | answers for r in ("plain", "default")
            ]
    (copy / "figures" / "model_comparison.json").write_text(json.dumps({"runs": runs}), encoding="utf-8")
    text = "\n".join(texts(execute(copy, "model_comparison")))
    assert "6 runs" in text and ("paired bootstrap" in text) == paired
    difference, low, high = map(float, re.search(r"ViT \(patch=4\): (\S+) \((\S+) to (\S+)\)", text).groups())
    assert low < difference < high and abs(difference - 10) < 1.5
    assert "**ViT (patch=8)** is worse than **CNN**" in text and "**ViT (patch=4)** is better than **CNN**" in text


def test_model_comparison_says_no_more_than_the_p_values(copy):
    path = copy / "figures" / "model_comparison.json"
    study = json.loads(path.read_text(encoding="utf-8"))
    for row in study["differences"]:
        row["p_holm"] = 0.06
    path.write_text(json.dumps(study), encoding="utf-8")
    text = "\n".join(texts(execute(copy, "model_comparison")))
    others = {row["title"] for row in study["differences"] if row["recipe"] == "default"}
    assert all(f"**{name}** and **CNN** cannot be told apart" in text for name in others)
    assert not re.search(r"is (better|worse) than \*\*CNN", text)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_notebook_ends_with_exercises_whose_answers_are_hidden(name):
    cells = nbformat.read(ROOT / "demos" / f"{name}.ipynb", as_version=4).cells
    start = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    exercises = cells[start + 1 :]
    assert 2 <= len(exercises) <= 3 and {cell.cell_type for cell in exercises} == {"markdown"}
    hidden = re.compile(  # without the empty lines a web page shows the answer's Markdown as it is written
        r"\*\*Exercise \d\.\*\* .+?\n\n<details><summary>Answer</summary>\n\n.+\n\n</details>", re.DOTALL
    )
    for cell in exercises:
        assert hidden.fullmatch(cell.source) and cell.source.count("<details>") == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_fit_to_be_read(name):
    path = ROOT / "demos" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert any(kind.startswith("image/") for output in outputs(notebook) for kind in output.get("data", {}))
    assert path.stat().st_size < 1.5e6
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.kernelspec.name == "python3"
    for output in outputs(notebook):
        assert output.output_type != "error" and output.get("name") != "stderr"
    for text in [*texts(notebook), *(cell.source for cell in notebook.cells)]:
        assert "Traceback" not in text
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home|Users|usr|opt|mnt|private)\b|[A-Z]:\\Users", text)
        assert not re.search(r"0x[0-9a-f]{8,}", text), "an address in memory"


def test_the_sheet_holds_twenty_test_images_of_each_class(cifar10):
    sheet = np.array(Image.open(ROOT / "demos" / "cifar10_samples.png"))
    images = sheet.reshape(10, 32, 20, 32, 3).transpose(0, 2, 4, 1, 3)
    for label in range(10):
        expected = cifar10.test.images[cifar10.test.labels == label][:20].numpy()
        assert np.array_equal(images[label], expected)
    assert (ROOT / "demos" / "cifar10_samples.png").stat().st_size < 1e6
