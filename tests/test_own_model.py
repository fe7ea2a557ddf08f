"""A model in a file of one's own: `--model my_model.py:MyNet`."""

import json
import os

import pytest
import torch
from helpers import SMALL, outcome, run_main

from network import Model
from support.files import CheckpointError, read_file, write_file
from training.models import OwnModel, build_model, freeze_backbone, import_class, start_from
from training.trained import load_model

CODE = """
import torch.nn as nn
import beside

class MyNet(nn.Module):
    def __init__(self, output_size, img_size=8, num_blocks=7, other="default"):
        super().__init__()
        self.asked = output_size, img_size, num_blocks, other
        self.layer = nn.Linear(beside.PIXELS, output_size)

    def forward(self, images):
        return self.layer(images.flatten(1))

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        a, b = 1, 2, 3

class BrokenLater(MyNet):
    def forward(self, images):
        raise ValueError("a bug of my own")

class Lazy(MyNet):
    def __init__(self, output_size):
        super().__init__(output_size)
        self.layer = nn.LazyLinear(output_size)

class TooMany(MyNet):
    def forward(self, images):
        return super().forward(images).repeat(1, 2)

Number = 3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("PIXELS = 3072", encoding="utf-8")
    (tmp_path / "my model.py").write_text(CODE, encoding="utf-8")
    return str(tmp_path / "my model.py")


def test_the_constructor_is_given_by_name_what_it_asks_for(file):
    model = build_model(f"{file}:MyNet", {"num_blocks": 2, "lr": 1.0}, img_size=32, num_classes=4)
    assert model.module.asked == (4, 32, 2, "default")
    assert model.title == "MyNet" and model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert [p.shape for p in model.get_classifier().parameters()] == [(4, 3072), (4,)]


def test_the_file_is_executed_once_until_it_changes(tmp_path):
    file, count = tmp_path / "counted.py", tmp_path / "count"
    text = f"import torch.nn as nn\nopen({str(count)!r}, 'a').write('x')\nclass MyNet(nn.Linear): pass\n"
    file.write_text(text, encoding="utf-8")
    assert import_class(f"{file}:MyNet") is import_class(f"{file}:MyNet")
    assert count.read_text() == "x"
    file.write_text(text + "class Other(MyNet): pass\n", encoding="utf-8")
    os.utime(file, ns=(1, 1))
    assert import_class(f"{file}:Other").__name__ == "Other" and count.read_text() == "xx"


def test_it_is_trained_saved_loaded_and_used_by_every_script(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = f"{file}:MyNet"
    named = ("--freeze", "none", "--name", "MyNet_digits")
    run_main("train.py", *SMALL, "--epochs", 1, "--gif_frames", 0, "--model", model, *named)
    report = json.loads((tmp_path / "saved/MyNet_digits.json").read_text(encoding="utf-8"))
    run_main("evaluate.py", "saved/MyNet_digits.pt", "--model", model, "--output_dir", "figures")
    stored = json.loads((tmp_path / "figures/MyNet_digits_evaluation.json").read_text(encoding="utf-8"))
    assert stored["accuracy"] == pytest.approx(report["results"]["test_accuracy"])
    run_main("explain.py", "saved/MyNet_digits.pt", "--model", model, "--rows", 2, "--output_dir", "figures")
    assert "MyNet does not give its attention weights" in capsys.readouterr().out
    assert (tmp_path / "figures/MyNet_digits_explanations.png").exists()
    started = ("--init_from", "saved/MyNet_digits.pt", "--freeze", "backbone", "--name", "again")
    run_main("train.py", *SMALL, "--epochs", 1, "--gif_frames", 0, "--model", model, *started)
    assert load_model("saved/again.pt", model=model).image_size == 32


def test_weights_that_no_longer_fit_are_refused_in_a_line(file, tmp_path):
    make = import_class(f"{file}:MyNet")
    model = OwnModel("MyNet", {"output_size": 3, "img_size": 32}, make)
    model.save(tmp_path / "first.pt", dataset="x", mean=[0.5] * 3, std=[0.5] * 3, source="x", classes=list("abc"))
    later = OwnModel("MyNet", {"output_size": 3, "img_size": 32, "num_blocks": 2}, make)  # an argument that is new
    start_from(later, tmp_path / "first.pt")
    wider = OwnModel("MyNet", {"output_size": 3, "img_size": 32}, make)
    wider.module.extra = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="first.pt does not fit: weights: only in one of the two"):
        start_from(wider, tmp_path / "first.pt")


def test_a_model_without_a_linear_layer_has_no_head_to_train(tmp_path):
    (tmp_path / "conv.py").write_text(
        "import torch.nn as nn\nclass Conv(nn.Conv2d):\n    def __init__(self): super().__init__(3, 10, 32)\n",
        encoding="utf-8",
    )
    model = OwnModel("Conv", {}, import_class(f"{tmp_path / 'conv.py'}:Conv"))
    with pytest.raises(ValueError, match="Conv has no nn.Linear"):
        freeze_backbone(model)


@pytest.mark.parametrize("name", ["Broken", "BrokenLater"])
def test_an_error_in_ones_own_code_keeps_its_traceback(file, tmp_path, name):
    with pytest.raises(ValueError, match="too many values|bug of my own") as error:
        run_main("train.py", *SMALL, "--epochs", 1, "--model", f"{file}:{name}", "--output_dir", tmp_path)
    assert str(error.traceback[-1].path) == file


@pytest.mark.parametrize(
    "where, words",
    [
        ("{}:Nothing", "no nn.Module of the name 'Nothing'"),
        ("{}:Number", "no nn.Module"),
        ("none.py:MyNet", "no file"),
        ("{}:TooMany", "logits (2, 20), needed are (2, 10)"),
        ("{}:Lazy", "cannot be loaded: give it its sizes"),
    ],
)
def test_what_is_not_there_is_one_line(file, tmp_path, where, words):
    code, error = outcome("train.py", *SMALL, "--model", where.format(file), "--output_dir", tmp_path / "out")
    assert code == 2 and words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_never_says_where_its_class_lies_nor_has_it_imported(file, tmp_path):
    model = OwnModel("MyNet", {"output_size": 3}, import_class(f"{file}:MyNet"))
    model.save(tmp_path / "a.pt", dataset="digits", classes=["a"], mean=[0.0], std=[1.0], image_size=32)
    assert str(tmp_path) not in str(read_file(tmp_path / "a.pt"))
    with pytest.raises(CheckpointError, match="say where it lies, --model my_model.py:MyNet"):
        load_model(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a MyNet, not a BrokenLater"):
        load_model(tmp_path / "a.pt", model=f"{file}:BrokenLater")
    contents = read_file(tmp_path / "a.pt")
    for name in ("os", "posix.system", f"{file}:MyNet"):
        write_file(tmp_path / "b.pt", {**contents, "model": name})
        with pytest.raises(CheckpointError, match="does not know"):
            Model.load(tmp_path / "b.pt")
