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

import train
from support import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("training", "images", "support", "studies")
# what makes a command small; a later flag takes the place of an earlier one
SMALL = "--dataset digits --img_size 32 --epochs 1 --batch_size 10 --label_fraction 0.1 --gif_frames 0".split()
# what needs a network, an interrupted run, or minutes: such commands are parsed and not run
NOT_RUN = ("timm:", "--resume", "--minutes", "--compile", "--pretrained", "cifar100", "--tensorboard", "--flip")
# Runs scripts one after another in one process, because importing torch takes long.
DRIVER = """
import importlib, json, sys
sys.path.insert(0, ".")
import setup_cifar
from training.run import Run

Run.draw_pictures = lambda self, runner: []
train, test, *rest = setup_cifar.read_digits()
setup_cifar.read_digits = lambda: (train.subset(range(600)), test.subset(range(60)), *rest)
for script, args in json.loads(sys.argv[1]):
    print("RUN", script, *args, flush=True)
    importlib.import_module(script).main(args)
"""


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def lines_of_shell(page):
    return [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]


def as_command(line):
    """(module, arguments) of a line that runs one of the project's scripts, else None."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["torchrun"]:
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[:2] == ["python", "-m"] and words[2].startswith("studies."):
        return words[2], words[3:]
    if words[:1] == ["python"] and words[1].endswith(".py"):
        return words[1].removesuffix(".py"), words[2:]
    return None


def commands(page):
    return [command for command in map(as_command, lines_of_shell(page)) if command]


def commands_in_sentences(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [command for command in map(as_command, re.findall(r"`(python [^`]+)`", text)) if command]


ALL = [(page, *command) for page in PAGES for command in commands(page)]


def test_there_are_commands_of_every_script():
    named = {script for _, script, _ in ALL}
    scripts = {"train", "evaluate", "explain", "predict", "export", "setup_cifar"}
    studies = {"compare", "ablation", "crossval", "transfer", "faithfulness", "benchmark", "scaling", "tune"}
    assert scripts | {f"studies.{name}" for name in studies} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_is_printed_exists(page):
    printed = commands_in_sentences(page)
    printed += commands(page) if page.name != "extending.md" else []  # run below, with what the page adds
    for script, args in printed:
        module = importlib.import_module(script)
        layers = [train.dependent_defaults] if script in ("train", "studies.crossval") else []
        cli.parse(module.Config, [arg for arg in args if arg != "--help"], *layers, remember=False)


def test_every_flag_has_a_text():
    for script in sorted({script for _, script, _ in ALL}):
        groups = cli.flag_groups(importlib.import_module(script).Config)
        assert not [name for name, (_, text) in groups.items() if not text], script


@pytest.mark.parametrize(
    ("script", "typed"),
    [
        ("evaluate", "python evaluate.py saved/VisionTransformer.pt saved/CNN.pt --ensemble"),
        ("train", "torchrun --nproc_per_node=2 train.py"),
        ("studies.ablation", "python -m studies.ablation --jobs 2"),
    ],
)
def test_help_begins_with_commands_as_they_are_typed(script, typed, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    assert stop.value.code == 0 and f"\n    {typed}" in usage and "[flags]" not in usage and "#" not in usage


def test_other_commands_are_those_of_this_project():
    for line in [line for page in PAGES for line in lines_of_shell(page)]:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), line
        elif words[:2] == ["pip", "install"] and words[2] == "-r":
            assert (ROOT / words[3]).exists(), line
        else:
            known = ("python -m venv .venv", "source .venv/bin/activate", "")
            assert as_command(line) or " ".join(words) in known, line


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
    """The project's modules, the reports of its studies, small models on digits under the names of the committed ones,
    and a photograph."""
    for path in [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.*"))]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    shutil.copytree(ROOT / "saved" / "studies", tmp_path / "saved" / "studies")
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "another.png", "photos/one.png"):
        Image.new("RGB", (60, 40), "red").save(tmp_path / name)
    return tmp_path


def drive(folder, runs, script=DRIVER):
    command = [sys.executable, "-c", script, json.dumps(runs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, "\n".join([*re.findall("RUN .*", done.stdout)[-1:], done.stderr[-3000:]])


MODELS = [("train", [*SMALL, "--name", "VisionTransformer"]), ("train", [*SMALL, "--model", "cnn", "--name", "CNN"])]


def in_miniature(script, args):
    """The command made small, or None."""
    if any(word in part for part in args for word in NOT_RUN):
        return None
    if script == "train":
        precision = ["--precision", "fp32"] if "--preset" in args else []  # bf16 is slow on many processors
        classes = ["--classes", "1,2"] if "--classes" in args else []
        return script, [*args, *SMALL, *precision, *classes]
    if script == "setup_cifar":
        return script, [*args, "--dataset", "digits", "--img_size", "32"]
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


def apply(path, diff):
    """Put the lines with + in the place of those with -, which, with the lines around them, are in the file once."""
    lines, text = diff.splitlines(), path.read_text(encoding="utf-8")
    before, after = ("\n".join(line[1:] for line in lines if line[:1] in f" {sign}") for sign in "-+")
    assert text.count(f"\n{before}\n") == 1, before
    path.write_text(text.replace(f"\n{before}\n", f"\n{after}\n"), encoding="utf-8")


def test_extending_is_true_word_for_word(copy):
    """Each block of code goes where its first line says; then every command of the page runs."""
    page = ROOT / "docs" / "extending.md"
    for language, put in (("python", put_in), ("diff", apply)):
        for block in blocks(page, language):
            place, code = block.removeprefix("# ").split("\n", 1)
            put(copy / place, code)
    runs = []
    for script, args in commands(page):
        extra = ["--images", "20", "--no_latency"] if script == "export" else []
        if script == "train":
            extra = [*(SMALL[2:] if "stripes" in args else SMALL), "--num_blocks", "1"]
        runs.append((script, [*args, *extra]))
    assert len(runs) > 10
    drive(copy, runs, DRIVER + OBJECTS)


OBJECTS = """
import torch
from network import FeedForward
from runner import Runner
from setup_cifar import load_data
from train import Config, StopWhenGood, focal_loss

assert Config().gamma == 2.0
logits, labels = torch.randn(8, 10), torch.randint(0, 10, (8,))
torch.testing.assert_close(focal_loss(logits, labels, 0.0), torch.nn.functional.cross_entropy(logits, labels))
data, model = load_data("digits"), FeedForward(3072, 16, 10)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
runner = Runner(model, optimizer, focal_loss, "cpu", callbacks=[StopWhenGood(0.5)])
runner.train(data.loader("train", 100), data.loader("val", 500), epochs=50)
assert runner.epoch < 50 and runner.metrics["val_accuracy"][-1] > 0.5
"""


def test_the_python_lines_of_readme_and_data_run(copy):
    (block,) = blocks(ROOT / "README.md", "python")
    small = 'load_data("digits").part_of_labels(0.1)'
    block = block.replace('load_data("cifar10")', small).replace("epochs=20", "epochs=1")
    assert small in block and "epochs=1" in block
    (other,) = blocks(ROOT / "docs" / "data.md", "python")
    checks = "assert loss > 0 and len(attention_weights) == 4"
    drive(copy, MODELS[:1], f"{DRIVER}\n{block}\n{checks}\n{other}")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_what_it_installs_before_pip_does(tmp_path):
    command = ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", "train"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, pip, after = printed.partition(" -m pip install ")
    assert pip and all(word in before for word in ("PyTorch", "GB", "CUDA", "minutes", "once"))
    assert "--quiet" not in after and "http" not in printed
