"""Folders of pictures as data sets: what is read, how it is split, and what is refused."""

import json
import os
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, run_main, start
from PIL import Image
from test_predict import READABLE, UNREADABLE

import predict
from images.folder import ImageError
from network import CNN, VisionTransformer
from setup_cifar import load_data
from training.run import Run

CLASSES = {"cat": (200, 40, 40), "dog": (40, 200, 40), "eel": (40, 40, 200)}  # and their colours


def write_pictures(folder, counts=10, classes=CLASSES, start=0, size=(40, 30)):
    """PNGs of one colour for each class, of whose red the last digit is the picture's number."""
    for name, color in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(start, start + counts):
            Image.new("RGB", size, (color[0] + number, *color[1:])).save(folder / name / f"{number:03d}.png")


def numbers(split):
    """Of each class in a split, which pictures are in it."""
    assert torch.equal(split.images, split.images[:, :, :1, :1].expand_as(split.images))  # of one colour, unchanged
    found = {name: [] for name in CLASSES}
    for label, color in zip(split.labels.tolist(), split.images[:, :, 0, 0].tolist(), strict=True):
        name = list(CLASSES)[label]
        assert color[1:] == list(CLASSES[name][1:])
        found[name].append(color[0] - CLASSES[name][0])
    return {name: sorted(values) for name, values in found.items()}


@pytest.fixture
def pets(tmp_path):
    write_pictures(tmp_path / "pets" / "train")
    return tmp_path / "pets"


# ---------------------------------------------------------------------------------------------------------- splits


def test_folders_for_all_three_splits_are_taken_as_they_are(pets):
    write_pictures(pets / "val", 4, start=10)
    write_pictures(pets / "test", 3, start=14)
    data = load_data(str(pets), val_fraction=0.5, split_seed=7)
    assert (data.name, data.source, data.classes, data.flip) == ("pets", str(pets), list(CLASSES), True)
    assert numbers(data.train) == dict.fromkeys(CLASSES, list(range(10)))
    assert numbers(data.val) == dict.fromkeys(CLASSES, list(range(10, 14)))
    assert numbers(data.test) == dict.fromkeys(CLASSES, list(range(14, 17)))
    for split in (data.train, data.val, data.test):
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.labels.tolist() != sorted(split.labels.tolist())  # the first few are not of one class


@pytest.mark.parametrize("present", [[], ["val"], ["test"]])
def test_what_is_missing_is_held_out_of_every_class(pets, present):
    for name in present:
        write_pictures(pets / name, 4, start=10)
    data = load_data(str(pets), val_fraction=0.25)
    parts = {name: numbers(getattr(data, name)) for name in ("train", "val", "test")}
    sizes = {(): (6, 2, 2), ("val",): (8, 4, 2), ("test",): (8, 2, 4)}[tuple(present)]
    for pet in CLASSES:
        assert tuple(len(parts[name][pet]) for name in parts) == sizes
        drawn = sorted(number for name in parts if name not in present for number in parts[name][pet])
        assert drawn == list(range(10))  # each picture in one split
    assert len({tuple(part["cat"]) for part in parts.values()}) == 3
    assert any(parts["train"]["cat"] != parts["train"][pet] for pet in CLASSES)


def test_the_split_is_seeded_and_test_images_stay_the_same(pets):
    first, again = load_data(str(pets)), load_data(str(pets))
    other = load_data(str(pets), split_seed=1, val_fraction=0.5)
    assert torch.equal(first.train.images, again.train.images)
    assert torch.equal(first.val.labels, again.val.labels)
    assert numbers(first.test) == numbers(other.test)
    assert numbers(first.val) != numbers(other.val)
    assert numbers(load_data(str(pets), split_seed=1).val) != numbers(first.val)


def test_mean_and_std_are_computed_from_the_training_images(pets):
    data = load_data(str(pets))
    pixels = data.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 2, 3)), atol=1e-3)


# ----------------------------------------------------------------------------------------------- awkward content


def test_any_format_and_size_is_read_and_the_rest_is_listed_and_left_out(tmp_path, capfd):
    folder = tmp_path / "pets" / "train"
    write_pictures(folder, classes={"dog": CLASSES["dog"]})
    (folder / "any" / "deeper").mkdir(parents=True)
    for name, (contents, *_) in READABLE.items():
        (folder / "any" / name).write_bytes(contents)
    (folder / "any" / "deeper" / "UPPER.JPG").write_bytes(READABLE["photo.jpg"][0])
    (folder / "any" / "no ending, ünïcödé $5").write_bytes(READABLE["rgb.png"][0])
    for name, (contents, _) in UNREADABLE.items():
        (folder / "any" / name).write_bytes(contents)
    for hidden in (folder / ".cache", folder / "any" / ".thumbnails"):
        hidden.mkdir()
        (hidden / "small.png").write_bytes(READABLE["rgb.png"][0])
    (folder / "any" / "._photo.jpg").write_bytes(b"left by a Mac")
    (folder / "beside the classes.txt").write_text("does not matter", encoding="utf-8")

    data = load_data(str(tmp_path / "pets"), img_size=24)
    assert data.classes == ["any", "dog"]
    assert data.image_size == data.metadata["image_size"] == 24
    assert len(data.train) + len(data.val) + len(data.test) == 10 + len(READABLE) + 2
    listed = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "skipped" in line]
    assert len(listed) == len(UNREADABLE) + 1
    for name, (_, reason) in UNREADABLE.items():
        assert any(name in line and reason in line for line in listed)
    assert f"skipped {len(UNREADABLE)} of " in listed[-1]


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links and permissions")
def test_links_and_what_must_not_be_read(pets, capfd):
    (pets / "train" / "cat" / "nowhere.png").symlink_to(pets / "missing.png")
    (pets / "train" / "cat" / "linked.png").symlink_to(pets / "train" / "cat" / "000.png")
    os.mkfifo(pets / "train" / "cat" / "pipe.png")  # to open it would be to wait for ever
    data = load_data(str(pets))
    assert len(data.train) + len(data.val) + len(data.test) == 31
    assert "nowhere.png" in capfd.readouterr().err


@pytest.mark.parametrize("size", [1, 8, 50])
def test_img_size_is_the_side_of_the_squares(pets, size):
    data = load_data(str(pets), img_size=size)
    assert data.train.images.shape[2:] == (size, size)
    assert data.image_size == size


def empty_class(folder):
    (folder / "train" / "fox").mkdir()


def unreadable_class(folder):
    empty_class(folder)
    (folder / "train" / "fox" / "fox.png").write_bytes(b"no picture")


def lonely_picture(folder):
    write_pictures(folder / "train", 1, {"fox": (0, 0, 0)})


def single_class(folder):
    for name in ("dog", "eel"):
        (folder / "train" / name).rename(folder / name)


def no_train(folder):
    (folder / "train").rename(folder / "training")


def no_class(folder):
    (folder / "train").rename(folder / "pictures")
    (folder / "train").mkdir()


def other_class_in_val(folder):
    write_pictures(folder / "val", 2, {**CLASSES, "fox": (0, 0, 0)})


def class_missing_in_test(folder):
    write_pictures(folder / "test", 2, {"cat": (0, 0, 0), "dog": (0, 0, 0)})


def empty_class_in_test(folder):
    class_missing_in_test(folder)
    (folder / "test" / "eel").mkdir()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (empty_class, "train/fox is empty"),
        (unreadable_class, "train/fox is empty"),
        (lonely_picture, "'fox' has 1 training picture"),
        (single_class, "only the class 'cat'"),
        (no_train, "no folder train"),
        (no_class, "no folder: a model needs two"),
        (other_class_in_val, "val .*same classes: 'fox'"),
        (class_missing_in_test, "test .*same classes: 'eel'"),
        (empty_class_in_test, "test/eel is empty"),
    ],
)
def test_folders_that_are_no_data_set_are_refused(pets, spoil, words):
    spoil(pets)
    with pytest.raises(ImageError, match=words.replace("/", r"[/\\]")) as error:
        load_data(str(pets))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, -32])
def test_an_img_size_that_makes_no_sense_is_refused(pets, size):
    with pytest.raises(ImageError, match="img_size"):
        load_data(str(pets), img_size=size)


def test_a_folder_named_like_a_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    write_pictures(tmp_path / "digits" / "train")
    monkeypatch.chdir(tmp_path)
    assert load_data("./digits").name == "digits_folder"
    assert load_data("digits").classes == list("0123456789")
    monkeypatch.chdir(tmp_path / "digits")
    assert load_data(".").name == "digits_folder"


# ------------------------------------------------------------------------------------------------ from end to end


SMALL = "--hidden_size 16 --num_heads 2 --num_blocks 1 --patch_size 8 --batch_size 8 --epochs 1 --img_size 24".split()


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run on pictures whose classes have awkward names; the folder of the pictures and of the model."""
    classes = {"$x_$": (200, 40, 40), "a b's": (40, 200, 40), "Größe, 50%": (40, 40, 200)}
    write_pictures(tmp_path / "my pets" / "train", classes=classes, size=(100, 60))
    out = tmp_path / "out"
    run_main("train.py", "--dataset", f"{tmp_path / 'my pets'}/", *SMALL, "--gif_frames", 2, "--output_dir", out)
    return tmp_path / "my pets", out


def test_a_run_on_a_folder_is_named_after_it_and_the_model_can_be_used(trained, monkeypatch, capsys):
    folder, out = trained
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert written == {
        "saved/VisionTransformer_my pets.pt",
        "saved/VisionTransformer_my pets.json",
        "saved/VisionTransformer_my pets.checkpoint",
        "figures/VisionTransformer_my pets_curves.png",
        "figures/attention_maps_my pets.png",
        "animation_vit_my pets.gif",
    }
    path = out / "saved" / "VisionTransformer_my pets.pt"
    model = VisionTransformer.load(path)
    assert model.config["img_size"] == 24
    assert model.config["output_size"] == 3
    assert model.metadata["classes"] == sorted(["$x_$", "a b's", "Größe, 50%"])

    capsys.readouterr()
    run_main("evaluate.py", path, "--output_dir", out / "figures", "--device", "cpu")
    report = json.loads((out / "saved" / "VisionTransformer_my pets.json").read_text(encoding="utf-8"))
    stored = json.loads((out / "figures" / "VisionTransformer_my pets_evaluation.json").read_text(encoding="utf-8"))
    assert stored["images"] == 6
    assert stored["accuracy"] == pytest.approx(report["results"]["test_accuracy"])
    assert stored["loss"] == pytest.approx(report["results"]["test_loss"], rel=1e-4)
    run_main("explain.py", "--checkpoint", path, "--output_dir", out / "explained", "--device", "cpu")
    run_main("predict.py", folder / "train" / "$x_$" / "000.png", "--checkpoint", path, "--output_dir", out / "seen")
    assert "Größe, 50%" in capsys.readouterr().out
    assert (out / "seen" / "000_prediction.png").exists()


def test_names_that_the_output_cannot_encode_are_printed_in_ascii(tmp_path):
    """On Windows, output that goes to a file is in the system's old encoding, which lacks most of the alphabets."""
    folder, out = tmp_path / "звери", tmp_path / "out"
    write_pictures(folder / "train", 30, {"кот": (200, 40, 40), "пёс": (40, 200, 200)})
    (folder / "train" / "кот" / "не картинка.png").write_bytes(b"no picture")
    flags = "--epochs 1 --num_blocks 1 --hidden_size 8 --num_heads 2 --batch_size 4 --gif_frames 0".split()
    model = out / "saved" / "VisionTransformer_звери.pt"

    def run(script, *args):
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = start(script, *args, env=environment, encoding="cp1252")
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return printed, errors

    ascii_name = "".join(f"\\u{ord(letter):04x}" for letter in "звери")
    printed, errors = run("train.py", "--dataset", folder, *flags, "--output_dir", out)
    assert f"VisionTransformer on {ascii_name}" in printed
    assert f"skipped: {tmp_path / ascii_name / 'train'}" in errors
    printed, _ = run("predict.py", folder / "train" / "пёс" / "000.png", "--checkpoint", model, "--output_dir", out)
    assert printed.startswith(f"{tmp_path / ascii_name / 'train'}") and printed.count("\\u043a\\u043e\\u0442") == 1
    printed, _ = run("evaluate.py", model, "--output_dir", out)
    assert ascii_name in printed


def test_a_folder_whose_classes_have_changed_is_not_evaluated(trained, monkeypatch, capsys):
    folder, out = trained
    (folder / "train" / "a b's").rename(folder / "train" / "c")
    with pytest.raises(SystemExit) as stop:
        run_main("evaluate.py", out / "saved" / "VisionTransformer_my pets.pt", "--output_dir", out / "evaluated")
    assert stop.value.code == 2
    assert "no longer those that the model was trained on" in capsys.readouterr().err
    assert not (out / "evaluated").exists()


def test_predict_sees_a_picture_as_training_did(tmp_path):
    """A photograph comes to the model exactly as the data set's loader gives it."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 90, 140, 3), dtype=np.uint8)
    for split in ("train", "val", "test"):
        for name, picture in zip(("cat", "dog"), noise, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(picture).save(tmp_path / split / name / "photo.jpg", exif=b"")
    data = load_data(str(tmp_path), img_size=20)
    model = VisionTransformer(img_size=20, hidden_size=8, num_heads=1, num_blocks=1, output_size=2)
    model.metadata = data.metadata
    images, labels = next(iter(data.loader("test", 2)))
    for image, label in zip(images, labels.tolist(), strict=True):
        photo = predict.read_image(tmp_path / "test" / data.classes[label] / "photo.jpg")
        torch.testing.assert_close(predict.to_input(photo, model)[0], image)
        square = photo.crop((25, 0, 115, 90)).resize((20, 20), Image.Resampling.BICUBIC)
        seen = 255 * (image * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1))
        inside = (slice(None), slice(3, -3))  # at its sides the resizing looks beyond the square
        np.testing.assert_allclose(seen.permute(1, 2, 0).numpy()[inside], np.asarray(square)[inside], atol=2.01)


def test_a_bad_folder_is_refused_in_one_line_before_anything_is_written(pets, tmp_path, monkeypatch, capfd):
    single_class(pets)
    with pytest.raises(SystemExit) as stop:
        run_main("train.py", "--dataset", pets, *SMALL, "--output_dir", tmp_path / "out")
    assert stop.value.code == 2
    complaint = capfd.readouterr().err
    assert complaint.startswith("train.py: error: ") and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_img_size_and_augment_reach_a_run(pets, tmp_path, monkeypatch):
    flags = [*SMALL, "--gif_frames", "0", "--augment", "randaugment+cutmix", "--model", "cnn", "--output_dir", tmp_path]
    with mock.patch.object(Run, "draw_pictures", return_value=[]):
        run_main("train.py", "--dataset", pets, *flags)
    report = json.loads((tmp_path / "saved" / "CNN_pets.json").read_text(encoding="utf-8"))
    assert report["config"]["augment"] == "randaugment+cutmix"
    assert report["config"]["img_size"] == CNN.load(tmp_path / "saved" / "CNN_pets.pt").config["img_size"] == 24


def test_setup_script_says_what_it_found(pets, tmp_path, monkeypatch, capsys):
    run_main("setup_cifar.py", "--dataset", pets, "--img_size", 16, "--augmentations", "--figures_dir", tmp_path)
    printed = capsys.readouterr().out
    for text in ("pets: 16x16 RGB images of 3 classes", "18 images;  per class: 6 to 6"):
        assert text in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"samples_pets.png", "augmentations_pets.png"}
