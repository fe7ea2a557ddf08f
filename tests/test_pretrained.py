"""Weights from elsewhere: another model's file, a file of timm's, a server; and what is then frozen or slowed."""

import copy
import hashlib
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import run_main, same_weights, tiny_dataset
from PIL import Image
from test_robustness import interrupt, run_on_tiny

from images.augment import import_torchvision
from network import CNN, FeedForward, Model, VisionTransformer
from support.files import CheckpointError
from train import FINE_TUNING_RATE, RATES
from training import models, trained
from training.models import TimmModel, freeze_backbone, load_timm_weights, resize_positions, start_from
from training.optim import OPTIMIZERS, build_optimizer

import_torchvision()
timm = pytest.importorskip("timm")
param_groups_layer_decay = pytest.importorskip("timm.optim").param_groups_layer_decay

FLAGS = ("--epochs", "1", "--batch_size", "8")
SMALL = {"hidden_size": 16, "num_heads": 2, "num_blocks": 2, "patch_size": 8}


def randomised(model):
    """With every parameter and buffer away from its initial value."""
    generator = torch.Generator().manual_seed(7)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator))
    return model


def save(model, path):
    randomised(model).save(path, dataset="other", classes=["a"], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    return model


# --------------------------------------------------------------------------------------------- from a model of ours


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("before, after", [(4, 8), (8, 4), (5, 7), (4, 4)])
def test_positions_are_resized_as_timm_does_it(cls_token, before, after):
    position = torch.randn(1, before**2 + cls_token, 6)
    resized = resize_positions(position, after**2 + cls_token, cls_token)
    expected = timm.layers.resample_abs_pos_embed(position, [after, after], num_prefix_tokens=int(cls_token))
    torch.testing.assert_close(resized, expected)
    if cls_token:
        assert torch.equal(resized[:, 0], position[:, 0])


@pytest.mark.parametrize(
    "make, head",
    [
        (lambda size, classes: VisionTransformer(size, output_size=classes, pooling="cls", **SMALL), "head"),
        (lambda size, classes: VisionTransformer(size, output_size=classes, tokenizer="conv", **SMALL), "head"),
        (lambda size, classes: CNN(size, classes), "output"),
        (lambda size, classes: FeedForward(3072, 8, classes), "output"),
    ],
)
@pytest.mark.parametrize("size", [32, 64])
def test_a_model_starts_from_all_weights_but_the_heads(tmp_path, make, head, size):
    source = save(make(32, 10), tmp_path / "source.pt")
    model = make(size, 4)
    fresh = copy.deepcopy(model).state_dict()
    metadata = start_from(model, tmp_path / "source.pt")
    assert metadata["mean"] == [0.1, 0.2, 0.3]
    old, new = source.state_dict(), model.state_dict()
    for name in new:
        if name.startswith(head):
            assert torch.equal(new[name], fresh[name])
        elif name == "embedding.position" and size == 64:
            assert new[name].shape[1] == 64 + (model.pooling == "cls")
        else:
            assert torch.equal(new[name], old[name]), name


def test_files_that_cannot_be_started_from_are_refused(tmp_path):
    save(VisionTransformer(**SMALL), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="holds a VisionTransformer, which cannot start a CNN"):
        start_from(CNN(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="hidden_size is 16 there and 32 here, num_blocks is 2 there and 3 here"):
        start_from(VisionTransformer(**{**SMALL, "hidden_size": 32, "num_blocks": 3}), tmp_path / "vit.pt")
    with pytest.raises(CheckpointError, match="cannot read .*none.pt"):
        start_from(CNN(), tmp_path / "none.pt")


# ------------------------------------------------------------------------------------------------ freezing, layers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_does_not_change_and_the_head_does(name):
    model = randomised(VisionTransformer(tokenizer="conv", drop_path=0.5, **SMALL))
    freeze_backbone(model)
    before = copy.deepcopy(model)
    optimizer = build_optimizer(model, name, weight_decay=0.1)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.head.parameters()
    }
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    for _ in range(2):
        model.train()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert changed == {"head.weight", "head.bias"}  # so neither BatchNorm's running mean
    features = nn.Sequential(model.embedding, *model.blocks)
    in_training = features(images)
    assert model.training and model.head.training
    model.eval()
    assert torch.equal(features(images), in_training)  # and no branch was skipped
    assert before.requires_grad_(True).train().blocks[0].training


def test_of_a_timm_model_with_two_heads_both_are_trained():
    model = TimmModel("deit_tiny_distilled_patch16_224", 32, 3)
    freeze_backbone(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"backbone.{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")}


def rates(optimizer, model):
    """The learning rate of each parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def timms_scales(model, decay):
    """What timm multiplies each parameter's rate with, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_layers_rate_is_that_of_the_layer_above_times_the_decay(name):
    model = VisionTransformer(pooling="cls", **{**SMALL, "num_blocks": 3})
    lr = rates(build_optimizer(model, name, 0.01, layer_decay=0.5), model)
    reference = timms_scales(timm.models.VisionTransformer(embed_dim=16, depth=3, num_heads=2), 0.5)
    theirs = {re.match(r"blocks\.\d|norm|head|", key)[0] or "embedding": scale for key, scale in reference.items()}
    assert theirs == {
        "embedding": 1 / 16,
        "blocks.0": 1 / 8,
        "blocks.1": 1 / 4,
        "blocks.2": 0.5,
        "norm": 0.5,
        "head": 1,
    }
    ours = {re.match(r"blocks\.\d|norm|head|embedding", key)[0]: rate / 0.01 for key, rate in lr.items()}
    assert ours == pytest.approx(theirs)
    assert len(lr) == len(list(model.parameters()))
    assert len(set(rates(build_optimizer(model, name, 0.01), model).values())) == 1


def test_layers_of_other_models_are_their_children_and_timm_knows_its_own():
    model = CNN()
    lr = rates(build_optimizer(model, "adamw", 0.01, layer_decay=0.5), model)
    expected = {"conv1": 0.0025, "conv2": 0.005, "output": 0.01}
    assert lr == pytest.approx({f"{layer}.{p}": lr for layer, lr in expected.items() for p in ("weight", "bias")})
    model = TimmModel("test_vit")
    lr = rates(build_optimizer(model, "sgd", 0.01, layer_decay=0.5), model)
    theirs = timms_scales(model.backbone, 0.5)
    assert lr == pytest.approx({f"backbone.{key}": 0.01 * scale for key, scale in theirs.items()})


# ------------------------------------------------------------------------------------------------------ timm's models


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_timms_norms_biases_cls_token_and_positions_are_not_decayed(optimizer):
    model = TimmModel("test_vit")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, optimizer, weight_decay=0.3).param_groups
    decayed = {names[id(p)] for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    weights = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert decayed == weights
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.norm.bias"} <= set(names.values()) - decayed


def test_a_timm_model_takes_images_of_any_size_and_is_saved_and_loaded(tmp_path):
    model = randomised(TimmModel("test_vit", img_size=32, output_size=4)).eval()
    images = torch.randn(2, 3, 32, 32)
    logits = model(images)
    enlarged = F.interpolate(images, (160, 160), mode="bicubic")
    torch.testing.assert_close(logits, model.backbone(enlarged))
    assert logits.shape == (2, 4) and model(torch.randn(2, 3, 200, 200)).shape == (2, 4)
    model.save(tmp_path / "model.pt")
    loaded = Model.load(tmp_path / "model.pt")
    assert type(loaded) is TimmModel and loaded.title == "test_vit"
    assert torch.equal(loaded(images), logits)


@pytest.mark.parametrize("name, words", [("vit_tiny_patch16_242", "vit_tiny_patch16_224"), ("zz", "none")])
def test_models_that_timm_does_not_have_are_refused_with_similar_names(name, words):
    with pytest.raises(ValueError, match=words):
        TimmModel(name)


def test_models_without_stochastic_depth_say_so():
    with pytest.raises(ValueError, match="drop_path_rate"):
        TimmModel("vgg11", drop_path=0.1)


def test_without_timm_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, errors = run_on_tiny(tmp_path, *FLAGS, "--model", "timm:test_vit")
    assert code == 2 and "pip install timm" in errors and len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- published weights


@pytest.fixture(scope="module")
def published():
    """What timm would publish for test_vit: weights with a head of 1000 classes."""
    torch.manual_seed(3)
    return randomised(timm.create_model("test_vit"))


@pytest.fixture(scope="module", params=["safetensors", "pth"])
def weight_file(request, published, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / f"weights.{request.param}"
    if request.param == "safetensors":
        from safetensors.torch import save_file

        save_file(published.state_dict(), path)
    else:
        torch.save(published.state_dict(), path)
    return path


def assert_published(model, published):
    """All weights of the backbone are the published ones, but the head's."""
    expected = published.state_dict()
    for name, value in model.backbone.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, expected[name]), name


def test_weights_come_from_a_file(weight_file, published):
    model = TimmModel("test_vit", output_size=4)
    load_timm_weights(model, str(weight_file))
    assert_published(model, published)
    assert model.get_classifier().weight.shape == (4, 64)


@pytest.mark.parametrize("damage", [None, b"", b"hello"])
def test_a_file_that_does_not_hold_them_is_refused(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(ValueError, match="weights of test_vit are not available from .*weights.safetensors") as error:
        load_timm_weights(TimmModel("test_vit"), str(path))
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(tmp_path, published):
    """Also where their names are those of the model: timm by itself would leave out what does not fit."""
    for contents in (timm.create_model("test_resnet").state_dict(), {"cls_token": published.cls_token.detach()}):
        path = tmp_path / "weights.pth"
        torch.save(contents, path)
        with pytest.raises(ValueError, match="weights of test_vit are not available from .*weights.pth") as error:
            load_timm_weights(TimmModel("test_vit"), str(path))
        assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Points huggingface_hub, which timm downloads from, at this machine; returns what is asked for there."""
    from huggingface_hub import constants

    asked, files = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self, with_body=False):
            asked.append(self.path)
            body = files.get(self.path.rsplit("/")[-1])
            self.send_response(404 if body is None else 200)
            if body is not None:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", 40 * "a")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if with_body and body is not None:
                self.wfile.write(body)

        def do_GET(self):
            self.do_HEAD(with_body=True)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield asked, files, server
    server.shutdown()
    server.server_close()


def test_weights_are_downloaded_through_timm_and_then_found_in_its_cache(hub, published):
    from safetensors.torch import save

    asked, files, server = hub
    files["model.safetensors"] = save(published.state_dict())
    for _ in range(2):
        model = TimmModel("test_vit", output_size=4)
        load_timm_weights(model)
        assert_published(model, published)
    assert any("timm/test_vit.r160_in1k" in path for path in asked)
    server.server_close()  # without a network, too
    load_timm_weights(model)
    assert_published(model, published)


def test_without_a_network_there_is_one_line_and_nothing_is_written(hub, tmp_path, monkeypatch):
    hub[2].server_close()  # nothing listens there any more
    started = time.monotonic()
    code, errors = run_on_tiny(tmp_path / "run", *FLAGS, "--model", "timm:test_vit", "--pretrained")
    assert time.monotonic() - started < 10  # the library would try for a minute
    assert code == 2 and len(errors.splitlines()) == 1 and "cannot be reached" in errors
    assert "are not available from the network" in errors and "--pretrained_file" in errors
    assert not (tmp_path / "run").exists()


def test_a_server_that_never_answers_is_not_waited_for(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(models, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ValueError, match="127.0.0.1:.* and timm's cache does not have them"):
            load_timm_weights(TimmModel("test_vit"))
        assert time.monotonic() - started < 5


# ------------------------------------------------------------------------------------------------------- as a whole


def test_a_timm_model_is_trained_evaluated_and_asked(tmp_path, monkeypatch, weight_file, published, capsys):
    flags = f"--model timm:test_vit --pretrained_file {weight_file} --freeze backbone --lr 0.1".split()
    flags += ["--name", "test_vit_digits"]
    assert run_on_tiny(tmp_path, *FLAGS, *flags) == (0, "")
    path = tmp_path / "saved" / "test_vit_digits.pt"
    model = Model.load(path)
    assert_published(model, published)
    assert model.get_classifier().weight.abs().sum() > 0
    assert model.metadata["mean"] == [0.5, 0.5, 0.5]  # what timm's weights expect
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"test_vit_digits_curves.png"}
    monkeypatch.setattr(trained, "load_data", lambda *_, **__: tiny_dataset())
    run_main("evaluate.py", path, "--output_dir", tmp_path / "evaluated")
    assert "test_vit on the 8 test images" in capsys.readouterr().out
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    run_main("predict.py", tmp_path / "red.png", "--checkpoint", path, "--output_dir", tmp_path / "figures")
    assert "no pictures of attention: test_vit does not give its attention weights" in capsys.readouterr().out
    assert (tmp_path / "figures" / f"{path.stem}_prediction_red.png").exists()


def test_rates_are_those_for_fine_tuning_where_timms_weights_are(tmp_path, monkeypatch, weight_file):
    rates = []
    monkeypatch.setattr(
        "train.build_optimizer", lambda model, *args: rates.append(args) or build_optimizer(model, *args)
    )
    for flags in ("", f"--pretrained_file {weight_file}"):
        run_on_tiny(tmp_path / "run", *FLAGS, "--model", "timm:test_vit", *flags.split())
    assert [args[:2] for args in rates] == [("adamw", RATES["adamw"]["lr"]), ("adamw", FINE_TUNING_RATE)]


def test_a_run_from_anothers_weights_with_a_frozen_backbone_can_be_resumed(tmp_path, monkeypatch):
    source = save(VisionTransformer(pooling="mean", tokenizer="conv", **SMALL), tmp_path / "source.pt")
    flags = "--hidden_size 16 --num_heads 2 --num_blocks 2 --patch_size 8 --tokenizer conv --batch_size 16 --epochs 3"
    flags = [*flags.split(), "--init_from", str(tmp_path / "source.pt"), "--freeze", "backbone"]
    flags += ["--name", "VisionTransformer_digits"]
    interrupt(tmp_path / "killed", "epoch_end", *flags)
    assert run_on_tiny(tmp_path / "killed", *flags, "--resume") == (0, "")
    assert run_on_tiny(tmp_path / "alone", *flags) == (0, "")
    killed, alone = (Model.load(tmp_path / name / "saved/VisionTransformer_digits.pt") for name in ("killed", "alone"))
    assert same_weights(killed, alone)
    assert same_weights(alone.blocks, source.blocks) and not same_weights(alone.head, source.head)
    assert alone.metadata["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--pretrained", "--init_from"),
        ("--model timm:test_vit --pretrained --init_from x.pt", "choose one"),
        ("--model timm:nonsense", "no model 'nonsense'"),
        ("--init_from x.pt", "cannot read x.pt"),
        ("--freeze backbone", "trained weights"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, monkeypatch, flags, words):
    code, errors = run_on_tiny(tmp_path / "run", *FLAGS, *flags.split())
    assert code == 2 and words in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()
