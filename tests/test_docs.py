"""What README and docs print can be done: commands are parsed, and run in miniature; links lead somewhere."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from PIL import Image

from support import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("training", "images", "support", "studies")
# what makes a command small; a later flag takes the place of an earlier one
SMALL = "--dataset digits --img_size 32 --epochs 1 --batch_size 200 --gif_frames 0 --precision fp32".split()
NOT_RUN = (  # what needs a network, a run that was interrupted, or minutes; such commands are parsed
    "timm:",
    "--resume",
    "--compile",
    "--flip",
    "--pretrained",
    "cifar100",
)
# Runs scripts one after another in one process, as importing torch takes most of the time.
DRIVER = """
import importlib, json, sys, traceback
sys.path.insert(0, ".")
for script, args in json.loads(sys.argv[1]):
    print("RUN", script, *args, flush=True)
    importlib.import_module(script).main(args)
"""


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page):
    """Every command of a page as (module, arguments)."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["torchrun"]:
                words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
            if words[:1] == ["python"] and words[1:2] != ["-m"]:
                yield words[1].removesuffix(".py"), words[2:]
            elif words[:2] == ["python", "-m"] and words[2].startswith("studies"):
                yield words[2], words[3:]


ALL = [(page, *command) for page in PAGES for command in commands(page)]


def test_there_are_commands_of_every_script():
    named = {script for _, script, _ in ALL}
    scripts = {"train", "evaluate", "explain", "predict", "export", "setup_cifar"}
    studies = {"compare", "ablation", "crossval", "transfer", "faithfulness", "benchmark", "scaling"}
    assert scripts | {f"studies.{name}" for name in studies} <= named


@pytest.mark.parametrize("page, script, args", ALL, ids=lambda x: x if isinstance(x, str) else "")
def test_every_flag_that_is_printed_exists(page, script, args):
    if page.name == "extending.md":
        pytest.skip("is run as a whole, with what it adds")
    module = importlib.import_module(script)
    dependent = importlib.import_module("train").dependent_defaults if script in ("train", "studies.crossval") else None
    cli.parse(module.Config, args, dependent)


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 8000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]*)(#[\w-]+)?\)", text):
        path, anchor = target
        if path.startswith("http"):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {path}"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {path}{anchor}"
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|json|png|ipynb))`", text):
        known = [ROOT / name, page.parent / name, ROOT / "saved" / name, ROOT / "figures" / name]
        assert any(path.exists() for path in known) or name.startswith("my_"), f"{page.name} names {name}"


# ------------------------------------------------------------------------------------------------ run in miniature


@pytest.fixture
def copy(tmp_path):
    """The project's modules, with small models on digits under the names of the committed ones, and a photograph."""
    for path in [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for name in ("photo.jpg", "another.png"):
        Image.new("RGB", (60, 40), "red").save(tmp_path / name)
    return tmp_path


def drive(folder, runs, script=DRIVER):
    command = [sys.executable, "-c", script, json.dumps(runs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, "\n".join([*re.findall("RUN .*", done.stdout)[-1:], done.stderr[-3000:]])


MODELS = [("train", [*SMALL, "--name", "VisionTransformer"]), ("train", [*SMALL, "--model", "cnn", "--name", "CNN"])]


def in_miniature(script, args):
    """The command made small, or None."""
    if any(word in part for part in args for word in NOT_RUN):
        return None
    if script == "train":
        classes = ["--classes", "1,2", "--batch_size", "50"] if "--classes" in args else []
        few = ["--label_fraction", "0.5"] if "--label_fraction" in args else []
        return script, [*args, *SMALL, *classes, *few]
    if script == "setup_cifar":
        return script, [*args, "--dataset", "digits"]
    if script == "export":
        return script, [*args, "--images", "20", "--no_latency"]
    return (script, args) if script in ("evaluate", "explain", "predict") else None


def test_commands_run_in_miniature(copy):
    runs = [in_miniature(script, args) for page, script, args in ALL if page.name != "extending.md"]
    unique = {json.dumps(run): run for run in runs if run}
    assert len(unique) > 15
    drive(copy, [*MODELS, *unique.values()])


def put_in(path, code):
    """The code into a file: behind the table that it has an entry for, else before the part that runs as a script."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines, line = text.splitlines(), len(text.partition('\nif __name__ == "__main__":')[0].splitlines())
    for node in ast.parse(text).body:
        names = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(f"\n{name.id}[" in f"\n{code}" for name in names if isinstance(name, ast.Name)):
            line = node.end_lineno
    path.write_text("\n".join([*lines[:line], code, *lines[line:], ""]), encoding="utf-8")


def test_extending_is_true_word_for_word(copy):
    """Each block of code goes where its first line says; then every command of the page runs."""
    page = ROOT / "docs" / "extending.md"
    for block in blocks(page, "python"):
        place, code = block.removeprefix("# ").split("\n", 1)
        put_in(copy / (place if place.endswith(".py") else "anywhere.py"), code)
    runs = []
    for script, args in commands(page):
        small = [*SMALL, "--num_blocks", "1"] if script == "train" else []
        small = small[2:] if "stripes" in args else small
        own = ["--name", "MyNet"] if "my_model.py:MyNet" in args else []
        extra = ["--images", "20", "--no_latency"] if script == "export" else own if script == "train" else []
        runs.append((script, [*args, *small, *extra]))
    assert len(runs) > 10
    drive(copy, runs)
    drive(copy, [], OBJECTS)


OBJECTS = """
import sys
sys.path.insert(0, ".")
import torch
from anywhere import StopWhenGood
from network import FeedForward
from runner import Runner
from setup_cifar import load_data
from train import MoreConfig, focal_loss

assert MoreConfig().gamma == 2.0
data, model = load_data("digits"), FeedForward(3072, 16, 10)
loader = data.loader("train", 100)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
runner = Runner(model, optimizer, focal_loss, "cpu", callbacks=[StopWhenGood(0.5)])
runner.train(loader, data.loader("val", 500), epochs=50)
assert runner.epoch < 50 and runner.metrics["val_accuracy"][-1] > 0.5
"""


def test_the_python_lines_of_the_readme_run(copy):
    (block,) = blocks(ROOT / "README.md", "python")
    block = block.replace('load_data("cifar10")', 'load_data("digits")').replace("epochs=20", "epochs=1")
    assert 'load_data("digits")' in block and "epochs=1" in block
    drive(copy, MODELS[:1])
    drive(copy, [], f"import sys\nsys.path.insert(0, '.')\n{block}\nassert loss > 0 and len(attention_weights) == 4")
