"""Exported files, read back by ONNX Runtime and torch.export, against the PyTorch model on plain images."""

import io
import json

import pytest
import torch

import export
from images.loader import pack_ids
from network import CNN, FeedForward, Model, ResNet20, VisionTransformer
from training.models import TimmModel

onnx = pytest.importorskip("onnx", reason="needs onnx, onnxscript and onnxruntime")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")

MEAN, STD = [0.2, 0.5, 0.7], [0.1, 0.3, 0.2]  # of no data set: the model's own are to count


def small_vit(**options) -> VisionTransformer:
    model = VisionTransformer(hidden_size=16, num_heads=2, num_blocks=2, patch_size=8, **options)
    torch.nn.init.normal_(model.head.weight)  # zeros at first, with which all answers would agree
    return model


def with_metadata(model: Model, classes: int = 10) -> Model:
    model.metadata = {"dataset": "digits", "classes": [f"class {i}" for i in range(classes)], "mean": MEAN, "std": STD}
    return model.eval()


def plain_images(n: int, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def expected_logits(model: Model, images: torch.Tensor) -> torch.Tensor:
    channels = [(images[:, i].double() / 255 - MEAN[i]) / STD[i] for i in range(3)]
    with torch.no_grad():
        return model(torch.stack(channels, dim=1).float())


def run_onnx(contents: bytes, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


@pytest.fixture
def run(capsys):
    def run(*arguments):
        try:
            code = export.main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    return run


def save(model: Model, path, digits, **changes):
    metadata = {"dataset": "digits", "classes": digits.classes, "mean": MEAN, "std": STD}
    model.save(path, **metadata | {"seen": digits.metadata["seen"]} | changes)
    return path


@pytest.mark.parametrize(
    "make, size",
    [
        (small_vit, 32),
        (lambda: small_vit(img_size=24, pooling="mean", tokenizer="conv"), 24),
        (lambda: CNN(img_size=20), 20),
        (lambda: ResNet20(img_size=21).eval(), 21),
        (lambda: FeedForward(3 * 16**2, 32), 16),
    ],
    ids=["ViT, CLS token", "ViT, conv tokenizer", "CNN", "ResNet-20", "MLP"],
)
def test_any_number_of_plain_images_gives_the_models_logits(make, size):
    torch.manual_seed(0)
    model = with_metadata(make())
    program = export.to_program(model)
    contents = export.to_onnx(program, model)
    read_back = torch.export.load(io.BytesIO(export.save_program(program, model))).module()
    for n in (1, 7):
        images = plain_images(n, size)
        expected = expected_logits(model, images)
        assert expected.std() > 0.01  # answers differ, so that agreeing means something
        torch.testing.assert_close(run_onnx(contents, images), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read_back(images), expected, atol=1e-4, rtol=1e-4)


def test_a_model_of_timm_enlarges_the_images_inside_the_graph():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = with_metadata(TimmModel("test_vit"))
    images = plain_images(3)
    contents = export.to_onnx(export.to_program(model), model)
    torch.testing.assert_close(run_onnx(contents, images), expected_logits(model, images), atol=1e-3, rtol=1e-3)


def test_script(tmp_path, digits, run):
    torch.manual_seed(0)
    model = small_vit().eval()
    path = save(model, tmp_path / "a.pt", digits)
    code, out, _ = run(path, "--figures_dir", tmp_path / "figures", "--repeats", 2, "--images", 100)
    lines = out.splitlines()
    (heading,) = [line for line in lines if line.split()[:2] == ["PyTorch", "ONNX"]]
    assert code == 0 and "100 of 100" in out and len(heading) <= 80 and "|" not in out
    table = lines[lines.index(heading) :][:7]
    assert [line[:20].strip() for line in table[1:4]] == ["file, kB", "difference of logits", "same top-1"]
    assert len(table[5].split("batch 1, ms")[1].split()) == 4  # as many as there are predictors

    report = json.loads((tmp_path / "figures" / "a_export.json").read_text(encoding="utf-8"))
    accuracy = (expected_logits(model, digits.test.images).argmax(dim=1) == digits.test.labels).double().mean().item()
    assert report["rows"]["PyTorch"]["accuracy"] == pytest.approx(accuracy) and report["test_images"] == 360
    assert report["validation_images"] == len(digits.val)
    for row in report["rows"].values():
        assert row["bytes"] > 1000 and row["milliseconds_batch_1"] > 0 and row["milliseconds_batch_128"] > 0
    for who in ("ONNX Runtime", "ExportedProgram"):
        assert report["rows"][who]["same_top_1"] == 100 and report["rows"][who]["largest_difference"] < 1e-4
    assert report["provenance"]["onnxruntime"] == onnxruntime.__version__

    contents = (tmp_path / "a.onnx").read_bytes()
    onnx.checker.check_model(onnx.load_from_string(contents), full_check=True)
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", 3, 32, 32], "tensor(uint8)")
    assert (logits.name, logits.shape, logits.type) == ("logits", ["batch", 10], "tensor(float)")
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["classes"]) == digits.classes and json.loads(notes["image_size"]) == 32
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"])["classes"] == digits.classes
    here = export.__file__.encode()
    for file in (tmp_path / "a.onnx", tmp_path / "a.pt2"):
        assert here not in file.read_bytes()  # the exporters note lines of code: nobody's business


@pytest.mark.parametrize(
    "dataset, words", [("cifar10", "demos/cifar10_samples.png"), ("cifar100", "noise"), ("pets", "noise")]
)
def test_without_its_data_a_model_is_compared_on_other_pictures_and_no_accuracy_is_said(
    tmp_path, digits, run, dataset, words
):
    torch.manual_seed(0)
    path = save(small_vit().eval(), tmp_path / "a.pt", digits, dataset=dataset, source=str(tmp_path / dataset))
    (tmp_path / "a.int8.onnx").write_text("of an earlier model")
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)  # and nothing in it
    flags = ("--no-latency", "--data_dir", tmp_path / "data", "--figures_dir", tmp_path / "figures")
    code, out, _ = run(path, *flags)
    assert code == 0 and f"{dataset} is not on this machine" in out and words in out and "200 of 200" in out
    report = json.loads((tmp_path / "figures" / "a_export.json").read_text(encoding="utf-8"))
    assert words in report["compared_on"] and "test_images" not in report
    assert report["validation_accuracy_lost_in_8_bits"] is None
    assert not any("accuracy" in row for row in report["rows"].values())
    names = {"a.pt", "a.onnx", "a.pt2", "data", "figures"}
    assert {file.name for file in tmp_path.iterdir()} == names  # 8 bits are kept only where their accuracy is known


def test_eight_bits_are_a_quarter_of_the_size_and_nearly_the_same_answers(tmp_path):
    torch.manual_seed(0)
    model = with_metadata(FeedForward(3072, 256))
    contents = export.to_onnx(export.to_program(model), model)
    small = export.quantise(contents)
    assert len(small) < 0.3 * len(contents)
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(small).graph.initializer]
    largest = max(abs(int(x)) for w in weights if w.dtype == "int8" and w.ndim == 2 for x in (w.min(), w.max()))
    assert 60 <= largest <= 64  # 7 bits: more overflow on processors without VNNI
    images = plain_images(200)
    expected, logits = expected_logits(model, images), run_onnx(small, images)
    difference = (logits - expected).std() / expected.std()
    assert 1e-5 < difference < 0.05
    assert json.loads(onnxruntime.InferenceSession(small).get_modelmeta().custom_metadata_map["image_size"]) == 32


@torch.no_grad()
def fitted_mlp(digits) -> FeedForward:
    """Random hidden units, and an output layer by ridge regression: right on 97 digits of 100."""
    torch.manual_seed(0)
    model = FeedForward(hidden_size=200)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    hidden = model.hidden(((digits.train.images.float() / 255 - mean) / std).flatten(1)).relu().double()
    targets = torch.nn.functional.one_hot(digits.train.labels, 10).double() - 0.1
    model.output.weight.copy_(torch.linalg.solve(hidden.T @ hidden + torch.eye(200), hidden.T @ targets).T)
    model.output.bias.fill_(0.1)
    return model


def test_eight_bits_that_lose_accuracy_are_not_kept(tmp_path, digits, run, monkeypatch):
    path = save(fitted_mlp(digits), tmp_path / "a.pt", digits)
    flags = (path, "--figures_dir", tmp_path / "figures", "--no-latency")
    assert run(*flags)[0] == 0 and (tmp_path / "a.int8.onnx").exists()
    report = json.loads((tmp_path / "figures" / "a_export.json").read_text(encoding="utf-8"))
    accuracy = report["rows"]["PyTorch"]["accuracy"]
    assert accuracy > 0.8 and report["rows"]["ONNX Runtime, 8 bits"]["accuracy"] == pytest.approx(
        accuracy, abs=0.02
    )  # 7 images
    assert report["8_bits_kept"] and "milliseconds_batch_1" not in report["rows"]["PyTorch"]

    def always_the_first_class(contents: bytes) -> bytes:
        model = onnx.load_from_string(contents)
        bias = next(tensor for tensor in model.graph.initializer if "output.bias" in tensor.name)
        bias.raw_data = (torch.arange(10).float() * -1e4).numpy().tobytes()
        return model.SerializeToString()

    monkeypatch.setattr(export, "quantise", always_the_first_class)
    code, out, _ = run(*flags)
    right = expected_logits(fitted_mlp(digits), digits.val.images).argmax(dim=1) == digits.val.labels
    lost = right.double().mean().item() - (digits.val.labels == 0).double().mean().item()
    assert code == 0 and "not kept" in out and f"validation accuracy by {-100 * lost:+.2f} percentage points" in out
    assert not (tmp_path / "a.int8.onnx").exists()  # nor that of the export before
    assert (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(("lost", "kept"), [(0.0049, True), (0.0051, False)])
def test_eight_bits_are_kept_if_they_cost_half_a_point_at_most(tmp_path, digits, run, monkeypatch, lost, kept):
    path = save(fitted_mlp(digits), tmp_path / "a.pt", digits)
    monkeypatch.setattr(export, "lost_accuracy", lambda *_: lost)
    code, out, _ = run(path, "--figures_dir", tmp_path / "figures", "--no-latency")
    assert code == 0 and ("not kept" not in out) == kept == (tmp_path / "a.int8.onnx").exists()


@pytest.mark.parametrize("seen", ["no validation images", "an older file", "trained on those of the model before"])
def test_eight_bits_are_not_kept_on_the_word_of_test_images(tmp_path, digits, run, seen):
    val = torch.arange(287 if seen.startswith("trained") else 0)
    everything = {"digits": {"train": pack_ids(torch.arange(1797)), "val": pack_ids(val)}}
    changes = {"seen": {} if seen == "an older file" else everything}
    path = save(fitted_mlp(digits), tmp_path / "a.pt", digits, **changes)
    code, out, _ = run(path, "--figures_dir", tmp_path / "figures", "--no-latency")
    report = json.loads((tmp_path / "figures" / "a_export.json").read_text(encoding="utf-8"))
    assert code == 0 and "8 bits: not kept, as without validation images" in out
    assert report["validation_images"] == 0 and report["rows"]["ONNX Runtime, 8 bits"]["accuracy"] > 0.8
    assert not (tmp_path / "a.int8.onnx").exists() and (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("what", ["ONNX Runtime", "ExportedProgram"])
def test_a_wrong_graph_leaves_no_file(tmp_path, digits, run, monkeypatch, what):
    torch.manual_seed(0)
    path = save(FeedForward(hidden_size=32), tmp_path / "a.pt", digits)
    if what == "ONNX Runtime":  # both have it: the first to be checked is named
        monkeypatch.setattr(
            export.WithNormalisation, "forward", lambda self, images: self.model((images / 255 - 0.5) / self.std)
        )
    else:
        monkeypatch.setattr(
            export, "load_program", lambda contents: lambda images: torch.full((len(images), 10), torch.nan)
        )
    code, out, err = run(path, "--no-latency", "--figures_dir", tmp_path)
    assert code == 1 and "error: " + what + " does not answer as the model does" in err.replace("\r", "\n")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_errors_are_one_line(tmp_path, digits, run, monkeypatch):
    path = save(CNN(), tmp_path / "a.pt", digits)
    damaged = tmp_path / "damaged.pt"
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    damaged.write_bytes(contents)
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(contents[:5000])
    nameless = tmp_path / "nameless.pt"
    CNN().save(nameless)
    before = set(tmp_path.iterdir())
    for arguments, words in (
        ([], "required"),
        ([tmp_path / "none.pt"], "No such file"),
        ([damaged], "damaged"),
        ([truncated], "damaged"),
        ([nameless], "does not say what the model was trained on"),
        ([path, "--repeats", 0], "repeats must be at least 1"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    code, out, err = run(path)
    assert code == 2 and err.endswith("exporting needs onnxscript: pip install onnx onnxscript onnxruntime\n")
    assert set(tmp_path.iterdir()) == before
