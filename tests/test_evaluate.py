"""Measures against values worked out by hand and against scikit-learn; pictures and figures as files."""

import itertools
import json
import os
from pathlib import Path

import pytest
import sklearn.metrics
import torch
from conftest import DATA_DIR
from helpers import run_main
from PIL import Image

import evaluate
from network import CNN, FeedForward
from support.report import plain_table
from training.evaluation_figures import draw_confusion, draw_mistakes


@pytest.fixture
def predictions():
    """200 images of 5 classes, of which class 4 is never predicted."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (200,), generator=random)
    logits = torch.randn(200, 5, generator=random)
    logits[torch.arange(200), labels] += 1
    logits[:, 4] = -10
    return logits.softmax(dim=1), labels


def two_classes(confidence: list[float]) -> torch.Tensor:
    """Class 0 predicted with that probability."""
    top = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([top, 1 - top], dim=1)


def test_calibration_by_hand():
    # 5 bins. (0.4, 0.6]: 0.55 wrong and 0.6 right; (0.8, 1]: 0.9 right, 0.9 right, 1.0 wrong
    probabilities, labels = two_classes([0.55, 0.6, 0.9, 0.9, 1.0]), torch.tensor([1, 0, 0, 0, 1])
    table = evaluate.calibration(probabilities, labels, bins=5)
    assert [row["images"] for row in table] == [0, 0, 2, 0, 3]
    assert [(row["low"], row["high"]) for row in table] == [(i / 5, (i + 1) / 5) for i in range(5)]
    assert table[2]["confidence"] == pytest.approx(0.575) and table[2]["accuracy"] == 0.5
    assert table[4]["confidence"] == pytest.approx(2.8 / 3) and table[4]["accuracy"] == pytest.approx(2 / 3)
    assert table[0]["confidence"] is None and table[0]["accuracy"] is None
    # (2 * 0.075 + 3 * (2.8 - 2) / 3) / 5
    assert evaluate.expected_calibration_error(table) == pytest.approx(0.95 / 5)


def test_calibration_error_of_the_sure_and_right_and_of_the_sure_and_wrong():
    probabilities = two_classes([1.0] * 4)
    for label, error in ((0, 0), (1, 1)):
        table = evaluate.calibration(probabilities, torch.full((4,), label))
        assert evaluate.expected_calibration_error(table) == error


def test_every_image_is_in_one_of_fifteen_bins(predictions):
    table = evaluate.calibration(*predictions)
    assert len(table) == 15 and sum(row["images"] for row in table) == 200
    for row in table:
        if row["images"]:
            assert row["low"] < row["confidence"] <= row["high"]


def by_hand(probabilities, labels):
    """Counts of images: a row for each right class, a column for each predicted one."""
    matrix = torch.zeros(probabilities.shape[1], probabilities.shape[1], dtype=torch.long)
    for label, prediction in zip(labels, probabilities.argmax(dim=1), strict=True):
        matrix[label, prediction] += 1
    return matrix


def test_the_report_has_the_confusion_matrix_with_right_classes_as_rows(predictions, tmp_path):
    probabilities, labels = predictions
    answers = evaluate.Answers("model", probabilities.log(), labels)
    metadata = {"classes": list("abcde"), "dataset": "letters"}
    images = torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8)
    report = evaluate.evaluate(answers, images, "model.pt", "Model", metadata, tmp_path / "model", torch.device("cpu"))
    assert report["confusion_matrix"] == by_hand(probabilities, labels).tolist()


def test_precision_and_recall_from_the_confusion_matrix(predictions):
    rows = evaluate.per_class(*predictions, classes=list("abcde"))
    matrix = by_hand(*predictions).double()
    for i, row in enumerate(rows[:4]):
        precision, recall = matrix[i, i] / matrix[:, i].sum(), matrix[i, i] / matrix[i].sum()
        assert row["class"] == "abcde"[i] and row["images"] == matrix[i].sum()
        assert row["precision"] == pytest.approx(precision.item()) and row["recall"] == pytest.approx(recall.item())
        assert row["f1"] == pytest.approx((2 * precision * recall / (precision + recall)).item())
    assert rows[4]["precision"] == rows[4]["recall"] == 0  # never predicted
    table = evaluate.table_of_classes(rows).splitlines()
    assert table[0].split() == ["class", "precision", "recall", "F1", "images"] and len(set(map(len, table))) == 1
    assert table[5].split() == ["e", "0.0%", "0.0%", "0.0%", str(rows[4]["images"])]


def test_mistakes_are_the_most_confident_first(tmp_path):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    probabilities = two_classes([0.6, 0.99, 0.9, 0.7])
    figure = draw_mistakes(
        images, probabilities, torch.tensor([1, 0, 1, 1]), ["cat", "dog"], tmp_path / "mistakes.png", ""
    )
    said = [text.get_text() for text in figure.texts if text.get_text().startswith("cat")]
    assert said == ["cat 90 %", "cat 70 %", "cat 60 %"]
    assert (figure.axes[0].images[0].get_array() == images[2].permute(1, 2, 0).numpy()).all()


def test_a_model_without_mistakes_can_be_drawn(tmp_path):
    probabilities, labels = two_classes([1.0, 1.0]), torch.zeros(2, dtype=torch.long)
    draw_mistakes(torch.zeros(2, 3, 8, 8), probabilities, labels, ["cat", "dog"], tmp_path / "none.png", "")
    matrix = by_hand(probabilities, labels).tolist()
    draw_confusion(matrix, ["cat", "dog"], tmp_path / "confusion.png", "")
    assert (tmp_path / "none.png").exists() and (tmp_path / "confusion.png").exists()


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(capsys):
    def run(*arguments):
        try:
            code = evaluate.main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code or 0, *capsys.readouterr()

    return run


def save(model, path, digits, **changes):
    model.save(
        path, **{"dataset": "digits", "classes": digits.classes, "mean": digits.mean, "std": digits.std} | changes
    )
    return path


def test_script(tmp_path, digits, run):
    torch.manual_seed(0)
    models = [CNN().eval(), FeedForward(hidden_size=16).eval()]
    changed = {"mean": [0.1, 0.2, 0.3]}  # a model's own normalisation counts, not that of the data as split today
    paths = [save(models[0], tmp_path / "a.pt", digits), save(models[1], tmp_path / "b.pt", digits, **changed)]
    code, out, _ = run(*paths, "--output_dir", tmp_path / "figures", "--batch_size", 100)
    assert code == 0 and out.count("expected calibration error") == 2
    for name in "ab":
        for what in ("confusion", "calibration", "mistakes"):
            with Image.open(tmp_path / "figures" / f"{name}_{what}.png") as picture:
                assert picture.width > 400
    for model, name, mean in zip(models, "ab", (digits.mean, changed["mean"]), strict=True):
        report = json.loads((tmp_path / "figures" / f"{name}_evaluation.json").read_text(encoding="utf-8"))
        mean, std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(digits.std).view(1, 3, 1, 1)
        with torch.no_grad():
            logits = model((digits.test.images.float() / 255 - mean) / std)
        accuracy = sklearn.metrics.accuracy_score(digits.test.labels, logits.argmax(dim=1))
        loss = sklearn.metrics.log_loss(digits.test.labels, logits.double().softmax(dim=1))
        assert report["accuracy"] == pytest.approx(accuracy) and report["loss"] == pytest.approx(loss, rel=1e-4)
        assert report["images"] == 360 and report["dataset"] == "digits" and "torch" in report["provenance"]
        assert sum(map(sum, report["confusion_matrix"])) == 360


def test_what_is_printed_fits_80_columns(tmp_path, digits, run, monkeypatch):
    """But for what a person named themselves: a class, a file."""
    monkeypatch.chdir(tmp_path)
    paths = save_models(tmp_path, digits)
    (tmp_path / "VisionTransformer_with_a_long_name.pt").write_bytes(Path(paths[0]).read_bytes())
    names = ["VisionTransformer_with_a_long_name.pt", "FeedForward.pt"]
    code, out, _ = run(*names, "--ensemble", "--output_dir", tmp_path / "figures")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "|" not in out
    for what in ("confusion", "calibration", "mistakes"):
        assert f"\n  figures/FeedForward_{what}.png\n" in out.replace(os.sep, "/")
    again = run(*names, "--ensemble", "--output_dir", tmp_path / "figures")[1]
    assert "left as they are" in again and max(map(len, again.splitlines())) <= 80


def test_a_model_of_a_few_classes_says_which(tmp_path, digits, run, monkeypatch):
    titles = []
    for what in ("confusion", "calibration", "mistakes"):
        draw = getattr(evaluate, f"draw_{what}")
        monkeypatch.setattr(evaluate, f"draw_{what}", lambda *args, draw=draw: titles.append(draw(*args).texts[0]))
    CNN(output_size=2).save(tmp_path / "two.pt", **digits.select(["1", "7"]).metadata)
    code, out, _ = run(tmp_path / "two.pt", "--output_dir", tmp_path)
    assert code == 0 and "test images of digits, 1, 7\n" in out
    assert all(title.get_text().startswith("CNN on digits, 1, 7: ") for title in titles) and len(titles) == 3
    assert json.loads((tmp_path / "two_evaluation.json").read_text(encoding="utf-8"))["dataset"] == "digits"


@pytest.mark.parametrize("classes", [2, 3, 10, 20])
def test_a_confusion_matrix_is_large_enough_to_be_read(tmp_path, classes):
    figure = draw_confusion(
        torch.eye(classes).int().tolist(), [f"class {i}" for i in range(classes)], tmp_path / "confusion.png", ""
    )
    assert figure.axes[0].get_position().width * 100 * figure.get_size_inches()[0] >= 250


@pytest.mark.parametrize("classes", [100, 300, 1000])
def test_a_confusion_matrix_of_many_classes_is_of_bounded_size(tmp_path, classes):
    names = [f"class {i} of a very long name that goes on and on" for i in range(classes)]
    figure = draw_confusion(torch.eye(classes).int().tolist(), names, tmp_path / "confusion.png", "")
    assert max(figure.get_size_inches()) * 100 < 3000
    assert bool(figure.axes[0].get_xticklabels()) == (classes <= 200)


def test_long_names_of_mistakes_do_not_run_into_each_other(tmp_path):
    classes = ["golden retriever dog of the first kind", "black-and-tan coonhound of the second kind"]
    probabilities = torch.tensor([[0.99, 0.01]]).repeat(8, 1)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    figure = draw_mistakes(images, probabilities, torch.ones(8).long(), classes, tmp_path / "mistakes.png", "")
    boxes = [text.get_window_extent() for text in figure.texts[1:] if text.get_text()]
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_errors_are_one_line(tmp_path, digits, run):
    assert run()[0] == 2
    path = save(CNN(), tmp_path / "a.pt", digits)
    for arguments, words in (
        ([], "name at least one file"),
        ([tmp_path / "none.pt"], "No such file"),
        ([path, path], "overwrite each other"),
        (["--runs", tmp_path, "--model", "my_model.py:MyNet"], "does nothing with --model"),
        ([path, "--runs", tmp_path], "does nothing with models"),
    ):
        code, out, err = run(*arguments)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err


# ---------------------------------------------------------------------------------------------------------- ensembles


def test_an_ensemble_is_the_mean_of_the_probabilities(predictions):
    probabilities, labels = predictions
    other = probabilities.flip(0)
    members = [evaluate.Answers("a", probabilities.log(), labels), evaluate.Answers("b", other.log() + 3, labels)]
    together = evaluate.average(members, "ensemble")
    mean = (probabilities + other) / 2
    assert torch.allclose(together.logits.softmax(dim=1), mean, atol=1e-6)
    measured = evaluate.measures(together)
    assert measured["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, mean.argmax(dim=1)))
    assert measured["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, mean.double(), labels=range(5)), rel=1e-4)
    rows = evaluate.compare(members, together)
    for row, member in zip(rows, members, strict=True):
        difference = measured["accuracy"] - member.correct.float().mean().item()
        assert row["difference"] == pytest.approx(difference) and row["bca"][0] <= difference <= row["bca"][1]


def test_an_ensemble_of_one_model_twice_gains_nothing(predictions):
    member = evaluate.Answers("a", predictions[0].log(), predictions[1])
    (row, _) = evaluate.compare([member, member], evaluate.average([member, member], "ensemble"))
    assert row["difference"] == 0 and row["bca"] == [0, 0]


def test_flipped_answers_are_those_of_both_images():
    torch.manual_seed(0)
    model = CNN().eval()
    torch.nn.init.normal_(model.output.weight)
    images = torch.randn(6, 3, 32, 32)
    batches = [(images, torch.arange(6))]
    logits, _ = evaluate.predict(model, batches, flip=True)
    mean = (model(images).softmax(dim=1) + model(images.flip(-1)).softmax(dim=1)) / 2
    assert torch.allclose(logits.exp(), mean, atol=1e-6)
    mirrored, _ = evaluate.predict(model, [(images.flip(-1), torch.arange(6))], flip=True)
    assert torch.allclose(logits, mirrored, atol=1e-5)
    assert not torch.allclose(evaluate.predict(model, batches)[0].softmax(dim=1), mean, atol=1e-3)


def test_shifted_answers_are_those_of_the_image_and_of_both_moved_by_a_pixel():
    torch.manual_seed(0)
    model = CNN().eval()
    torch.nn.init.normal_(model.output.weight)
    images = torch.randn(6, 3, 32, 32)
    up_left = torch.cat([images[:, :, 1:], images[:, :, -2:-1]], dim=2)
    up_left = torch.cat([up_left[..., 1:], up_left[..., -2:-1]], dim=3)
    down_right = torch.cat([images[:, :, 1:2], images[:, :, :-1]], dim=2)
    down_right = torch.cat([down_right[..., 1:2], down_right[..., :-1]], dim=3)
    seen = [images, up_left, down_right]
    labels = torch.arange(6)
    logits, _ = evaluate.predict(model, [(images, labels)], shift=True)
    assert torch.allclose(logits.exp(), sum(model(view).softmax(dim=1) for view in seen) / 3, atol=1e-6)
    logits, _ = evaluate.predict(model, [(images, labels)], flip=True, shift=True)
    seen += [view.flip(-1) for view in seen]
    assert torch.allclose(logits.exp(), sum(model(view).softmax(dim=1) for view in seen) / 6, atol=1e-6)


def save_models(tmp_path, digits, **metadata):
    for seed, model_class in ((0, CNN), (1, FeedForward)):
        torch.manual_seed(seed)
        model = model_class()
        torch.nn.init.normal_(model.output.weight)
        model.save(tmp_path / f"{model_class.__name__}.pt", **{**digits.metadata, **metadata})
    return [str(tmp_path / "CNN.pt"), str(tmp_path / "FeedForward.pt")]


def test_ensemble_from_the_command_line(tmp_path, digits, capsys):
    paths = save_models(tmp_path, digits)
    run_main("evaluate.py", *paths, "--ensemble", "--output_dir", tmp_path)
    report = json.loads((tmp_path / "ensemble_digits.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["members"]] == ["CNN", "FeedForward"]
    evaluation = json.loads((tmp_path / "ensemble_digits_evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["accuracy"] == report["ensemble"]["accuracy"]
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["ensemble", f"{evaluation['accuracy']:.2%}"] in [line[:2] for line in lines] and "|" not in out
    for name in ("ensemble_digits.png", "ensemble_digits_calibration.png"):
        assert Image.open(tmp_path / name).width > 500


def test_ensembles_that_cannot_be(tmp_path, digits, capsys):
    paths = save_models(tmp_path, digits)
    other = tmp_path / "other" / "Other.pt"
    other.parent.mkdir()
    CNN(output_size=2).save(other, **digits.select(["1", "2"]).metadata)
    marks = {**digits.metadata["fingerprints"], "test": "360 images other"}
    CNN().save(tmp_path / "split.pt", **{**digits.metadata, "fingerprints": marks})
    for flags, words in (
        ((paths[0], "--ensemble"), "at least two"),
        ((*paths, other, "--ensemble"), "no ensemble: the classes of"),
        ((*paths, tmp_path / "split.pt", "--ensemble"), "no ensemble: the test images of"),
        ((paths[0], "--flip"), "mirrored digit"),
        ((paths[0], tmp_path / "ensemble_digits.pt", "--ensemble"), "begins with ensemble"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_main("evaluate.py", *flags, "--output_dir", tmp_path / "figures")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "figures").exists()


def test_flip_on_the_real_images(tmp_path, cifar10, capsys):
    data_dir = os.environ.get("DATA_DIR") or str(DATA_DIR or "data")
    run_main(
        "evaluate.py", "saved/CNN.pt", "--flip", "--output_dir", tmp_path, "--data_dir", data_dir, "--device", "cpu"
    )
    report = json.loads((tmp_path / "CNN_flip_evaluation.json").read_text(encoding="utf-8"))
    assert report["accuracy"] > 0.74 and "without mirror images: 76.0" in capsys.readouterr().out


def test_columns_are_even_where_letters_take_two(tmp_path):
    table = plain_table({"class": ["猫猫猫", "cat"], "images": ["1", "20"]}, left=["class"])
    assert table.split("\n") == ["class   images", "猫猫猫       1", "cat         20"]
