"""Folders of pictures as data sets: what is read, how it is split, and what is refused."""

import json
import os
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import ROOT, run_main, start
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_predict import READABLE, UNREADABLE

import predict
from images import loader
from images.folder import ImageError
from images.loader import DataError
from network import CNN, VisionTransformer
from setup_cifar import load_data
from training.run import Run
from training.trained import test_loader as its_test_images

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


def test_what_is_not_used_is_named(pets, capsys):
    write_pictures(pets / "valid", 1)
    Image.new("RGB", (4, 4)).save(pets / "train" / "loose.png")
    load_data(str(pets))
    said = capsys.readouterr().err
    assert "not used: valid (known are train, val and test)" in said
    assert "train: not used: 1 files in no folder of a class" in said


def test_a_model_can_be_tested_whatever_split_it_was_trained_with(tmp_path):
    for number in range(20):  # until the usual split would leave no picture of a class to train on
        pets = tmp_path / f"pets{number}"
        write_pictures(pets / "train", 2, start=2 * number)
        write_pictures(pets / "test", 2, start=100 + 2 * number)
        try:
            load_data(str(pets))
        except ImageError as error:
            assert str(error).endswith(f"or make the folder {pets / 'val'}")
            break
    data = load_data(str(pets), val_fraction=0)
    model = CNN(32, 3)
    model.metadata = data.metadata
    assert its_test_images(model, None, 10, "cpu").num_images == 6


def test_mean_and_deviation_of_many_pictures_are_taken_in_parts(pets, monkeypatch):
    data = load_data(str(pets))
    monkeypatch.setattr(loader, "MANY", 100)
    assert load_data(str(pets)).mean == pytest.approx(data.mean)
    assert load_data(str(pets)).std == pytest.approx(data.std)
    images = torch.randint(0, 256, (3, 3, 1200, 1200), dtype=torch.uint8)  # of which one is a part
    images[1] //= 4
    mean, std = loader.mean_and_std(images)
    pixels = images.double() / 255
    torch.testing.assert_close(mean.double(), pixels.mean(dim=(0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(std.double(), pixels.std(dim=(0, 2, 3)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("present", [[], ["val"], ["test"]])
def test_what_is_missing_is_held_out(tmp_path, present):
    pets = tmp_path / "pets"
    write_pictures(pets / "train", 50)
    for name in present:
        write_pictures(pets / name, 4, start=50)
    data = load_data(str(pets), val_fraction=0.25)
    parts = {name: numbers(getattr(data, name)) for name in ("train", "val", "test")}
    for pet in CLASSES:
        drawn = sorted(number for name in parts if name not in present for number in parts[name][pet])
        assert drawn == list(range(50))  # each picture in one split
        assert all(len(parts[name][pet]) == 4 for name in present)
    shares = {"test": 0.2, "val": 0.25 if present else 0.8 * 0.25}
    for name in {"test", "val"} - set(present):  # right on average: within three standard deviations
        share, spread = len(getattr(data, name)) / 150, (shares[name] * (1 - shares[name]) / 150) ** 0.5
        assert abs(share - shares[name]) < 3 * spread
    assert any(parts["train"]["cat"] != parts["train"][pet] for pet in CLASSES)


def test_what_is_held_out_depends_on_each_picture_alone(tmp_path):
    """Pictures added, removed, renamed and copied move no other picture from one part to another."""
    pets = tmp_path / "pets"
    write_pictures(pets / "train", 40)
    before = load_data(str(pets))
    part_of = {i: name for name in ("train", "val", "test") for i in getattr(before, name).ids.tolist()}
    assert len(part_of) == 120 and set(part_of.values()) == {"train", "val", "test"}

    cats = pets / "train" / "cat"
    Image.new("RGB", (9, 9), (1, 2, 3)).save(cats / "000 before all others.png")
    (cats / "007.png").unlink()
    (cats / "008.png").rename(cats / "z.png")
    (pets / "train" / "dog" / "copy.png").write_bytes((cats / "009.png").read_bytes())
    after = load_data(str(pets))
    ids = {name: getattr(after, name).ids.tolist() for name in ("train", "val", "test")}
    assert sum(map(len, ids.values())) == 121
    new = 0
    for name, found in ids.items():
        new += sum(i not in part_of for i in found)
        assert all(part_of.get(i, name) == name for i in found)
    assert new == 1
    copied = [name for name, found in ids.items() for i in found if found.count(i) == 2]
    assert len(copied) == 2 and copied[0] == copied[1]  # both copies in one part


def test_pictures_of_train_are_left_out_of_test_and_counted(pets, capfd):
    write_pictures(pets / "test", 4, start=10)
    for number in range(3):
        copy = pets / "test" / "cat" / f"copied {number}.png"
        copy.write_bytes((pets / "train" / "dog" / f"00{number}.png").read_bytes())
    data = load_data(str(pets), val_fraction=0.4)
    assert len(data.test) == 12 and not torch.isin(data.test.ids, torch.cat([data.train.ids, data.val.ids])).any()
    lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "left out" in line]
    assert len(lines) == 1 and "3 of the 15 pictures" in lines[0]


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


def too_few(folder):
    for path in [*folder.rglob("*.png")]:
        if not path.stem.startswith("000"):
            path.unlink()


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
        (too_few, "too few pictures, and none (is held out for test|of .* is left to train on)"),
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


@pytest.mark.parametrize("name", ["digits", "CIFAR10", "pets"])
def test_a_model_finds_the_folder_it_was_trained_on_from_anywhere(tmp_path, monkeypatch, capsys, name):
    """Also where a data set has the folder's name: 7 % instead of 60 % was reported for that."""
    write_pictures(tmp_path / name / "train", 30)
    monkeypatch.chdir(tmp_path)
    run_main("train.py", "--dataset", f"./{name}", *SMALL, "--gif_frames", 0, "--device", "cpu", "--model", "mlp")
    [model] = (tmp_path / "saved").glob("*.pt")
    report = json.loads(model.with_suffix(".json").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_main("evaluate.py", model, "--device", "cpu", "--output_dir", "figures")
    stored = json.loads(next((tmp_path / "elsewhere" / "figures").glob("*_evaluation.json")).read_text())
    assert stored["accuracy"] == pytest.approx(report["results"]["test_accuracy"])
    assert [row["class"] for row in stored["classes"]] == list(CLASSES)
    (tmp_path / name).rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        run_main("evaluate.py", model, "--device", "cpu", "--output_dir", "figures")
    assert "--data_dir says where" in capsys.readouterr().err
    run_main("evaluate.py", model, "--device", "cpu", "--data_dir", tmp_path / "moved", "--output_dir", "figures")


def write_noise(folder, count=100, start=0):
    """Pictures of noise in two classes: nothing can be learned but by heart, and accuracy on others is 50 %."""
    random = np.random.default_rng(start)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")


LEARN_BY_HEART = "--model mlp --img_size 8 --hidden_size 256 --batch_size 16 --optimizer adamw --lr 3e-3 --augment none"
LEARN_BY_HEART += " --label_smoothing 0 --device cpu --gif_frames 0 --name FeedForward_noise --keep_checkpoint"


def test_a_changed_folder_gives_no_false_accuracy(tmp_path, monkeypatch, capsys):
    """One picture more made 82.5 % of noise whose classes nobody can tell."""
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "noise" / "train")
    run_main("train.py", "--dataset", "noise", *LEARN_BY_HEART.split(), "--epochs", 40)
    report = json.loads((tmp_path / "saved/FeedForward_noise.json").read_text())
    assert report["metrics"]["train_accuracy"][-1] > 0.95 and 0.2 < report["results"]["test_accuracy"] < 0.8
    assert "changed" not in capsys.readouterr().out

    write_noise(tmp_path / "noise" / "train", 20, start=100)
    run_main("evaluate.py", "saved/FeedForward_noise.pt", "--device", "cpu", "--output_dir", "figures")
    now = json.loads((tmp_path / "figures/FeedForward_noise_evaluation.json").read_text())
    data = load_data("noise", img_size=8)
    assert now["images"] == len(data.test) and 0.2 < now["accuracy"] < 0.8
    assert f"changed since training: tested on {len(data.test)} of {len(data.test)}" in capsys.readouterr().out

    # a person moves pictures that were trained on into a folder of their own for testing
    (tmp_path / "noise" / "test").mkdir()
    trained_on = {name: sorted((tmp_path / "noise" / "train" / name).glob("00*.png")) for name in ("a", "b")}
    for name, files in trained_on.items():
        (tmp_path / "noise" / "test" / name).mkdir()
        for file in files:
            file.rename(tmp_path / "noise" / "test" / name / file.name)
    run_main("evaluate.py", "saved/FeedForward_noise.pt", "--device", "cpu", "--output_dir", "figures")
    now = json.loads((tmp_path / "figures/FeedForward_noise_evaluation.json").read_text())
    never_seen = now["images"]
    assert 0 < never_seen < 20 and now["accuracy"] < 1
    assert f"tested on {never_seen} of 20, none of which was trained on" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_main(
            "train.py", "--dataset", "noise", *LEARN_BY_HEART.split(), "--epochs", 50, "--resume", "--resume_changed"
        )
    assert "are not those that this run began with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flags = [*LEARN_BY_HEART.split(), "--epochs", 1, "--init_from", "saved/FeedForward_noise.pt", "--name", "more"]
        run_main("train.py", "--dataset", "noise", *flags)
    assert f"was trained on {20 - never_seen} of the 20 test images" in capsys.readouterr().err


def test_a_model_of_pictures_that_does_not_say_which_is_not_tested(trained, capsys):
    folder, out = trained
    model = VisionTransformer.load(out / "saved" / "VisionTransformer_my pets.pt")
    del model.metadata["seen"]  # as earlier versions saved it
    model.save(out / "old.pt", **model.metadata)
    with pytest.raises(SystemExit):
        run_main("evaluate.py", out / "old.pt", "--output_dir", out / "evaluated")
    assert "does not say which pictures" in capsys.readouterr().err


def test_pictures_of_one_colour_are_refused_and_a_channel_of_one_value_is_said(tmp_path, capsys):
    write_pictures(tmp_path / "grey" / "train", 30, {name: (7, 7, 7) for name in CLASSES})
    for path in (tmp_path / "grey").rglob("*.png"):  # not the same file, and yet the same colour
        Image.new("RGB", (20, 20), (7, 7, 7)).save(path, pnginfo=text_of(path))
    with pytest.raises(DataError, match="one and the same colour"):
        load_data(str(tmp_path / "grey"))
    write_pictures(tmp_path / "red" / "train", 30, {"cat": (0, 0, 9), "dog": (100, 0, 9)})
    data = load_data(str(tmp_path / "red"))
    images, _ = next(iter(data.loader("train", 100)))
    assert images.isfinite().all() and images[:, 1:].abs().max() < 1e-6
    printed = capsys.readouterr().err
    assert "green is 0 everywhere" in printed and "blue is 9 everywhere" in printed


def text_of(path):
    info = PngInfo()
    info.add_text("path", str(path))
    return info


# ------------------------------------------------------------------------------------------------ from end to end


SMALL = "--hidden_size 16 --num_heads 2 --num_blocks 1 --patch_size 8 --batch_size 8 --epochs 1 --img_size 24".split()


NAMED = ["--name", "VisionTransformer_my pets"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run on pictures whose classes have awkward names; the folder of the pictures and of the model."""
    classes = {"$x_$": (200, 40, 40), "a b's": (40, 200, 40), "Größe, 50%": (40, 40, 200)}
    write_pictures(tmp_path / "my pets" / "train", classes=classes, size=(100, 60))
    out = tmp_path / "out"
    run_main(
        "train.py", "--dataset", f"{tmp_path / 'my pets'}/", *SMALL, *NAMED, "--gif_frames", 2, "--output_dir", out
    )
    return tmp_path / "my pets", out


def test_a_model_of_a_folder_of_pictures_can_be_used(trained, monkeypatch, capsys):
    folder, out = trained
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {
        "saved/VisionTransformer_my pets.pt",
        "saved/VisionTransformer_my pets.json",
        "saved/VisionTransformer_my pets.csv",
        "figures/VisionTransformer_my pets_curves.png",
        "figures/VisionTransformer_my pets_attention_maps.png",
        "figures/VisionTransformer_my pets_animation.gif",
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
    assert stored["images"] == len(load_data(str(folder)).test)
    assert stored["accuracy"] == pytest.approx(report["results"]["test_accuracy"])
    assert stored["loss"] == pytest.approx(report["results"]["test_loss"], rel=1e-4)
    run_main("explain.py", "--checkpoint", path, "--output_dir", out / "explained", "--device", "cpu")
    run_main("predict.py", folder / "train" / "$x_$" / "000.png", "--checkpoint", path, "--output_dir", out / "seen")
    assert "Größe, 50%" in capsys.readouterr().out
    assert (out / "seen" / "VisionTransformer_my pets_prediction_000.png").exists()


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
    printed, errors = run("train.py", "--dataset", folder, *flags, "--output_dir", out, "--name", model.stem)
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
            Image.fromarray(picture).save(tmp_path / split / name / "photo.jpg", exif=b"", comment=split.encode())
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
    flags += ["--name", "CNN_pets"]
    with mock.patch.object(Run, "draw_pictures", return_value=[]):
        run_main("train.py", "--dataset", pets, *flags)
    report = json.loads((tmp_path / "saved" / "CNN_pets.json").read_text(encoding="utf-8"))
    assert report["config"]["augment"] == "randaugment+cutmix"
    assert report["config"]["img_size"] == CNN.load(tmp_path / "saved" / "CNN_pets.pt").config["img_size"] == 24


def test_setup_script_says_what_it_found(pets, tmp_path, monkeypatch, capsys):
    run_main("setup_cifar.py", "--dataset", pets, "--img_size", 16, "--augmentations", "--figures_dir", tmp_path)
    printed = capsys.readouterr().out
    for text in ("pets: 16x16 RGB images of 3 classes", "train     23 images;  per class: 6 to 9"):
        assert text in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"samples_pets.png", "augmentations_pets.png"}


def test_copies_of_a_picture_are_in_one_fold(tmp_path):
    """Noise of which there are copies was right in 100 % of what each fold held out."""
    write_noise(tmp_path / "noise" / "train", 20)
    for path in [*(tmp_path / "noise").rglob("*.png")]:
        path.with_name(f"copy of {path.name}").write_bytes(path.read_bytes())
    data = load_data(str(tmp_path / "noise"), img_size=8)
    for number in range(4):
        fold = data.fold(number, 4)
        assert len(fold.train) + len(fold.val) == len(data.train) + len(data.val) and len(fold.val) > 4
        assert not torch.isin(fold.val.ids, fold.train.ids).any()


def test_resume_notices_other_classes_and_takes_the_same_pictures_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "noise" / "train", 30)
    flags = [*LEARN_BY_HEART.split(), "--name", "run"]
    run_main("train.py", "--dataset", "noise", *flags, "--epochs", 1)
    (tmp_path / "noise").rename(tmp_path / "moved")
    run_main("train.py", "--dataset", "./moved/", *flags, "--epochs", 2, "--resume", "--resume_changed")
    assert "resuming after epoch 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_main("train.py", "--dataset", "moved", *flags, "--epochs", 1, "--resume", "--resume_changed")
    assert "it cannot end after 1" in capsys.readouterr().err
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (tmp_path / "moved" / "train" / old).rename(tmp_path / "moved" / "train" / new)
    with pytest.raises(SystemExit):
        run_main("train.py", "--dataset", "moved", *flags, "--epochs", 3, "--resume", "--resume_changed")
    assert "or have other classes" in capsys.readouterr().err


def test_what_was_seen_is_remembered_through_other_data_and_the_start_must_stay_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_noise(tmp_path / "noise" / "train", 30)
    small = (
        "--model mlp --hidden_size 4 --epochs 1 --batch_size 16 --gif_frames 0 --device cpu --keep_checkpoint".split()
    )
    run_main("train.py", "--dataset", "noise", "--img_size", 32, *small, "--name", "first")
    run_main("train.py", "--dataset", "digits", *small, "--name", "second", "--init_from", "saved/first.pt")
    for name in ("a", "b"):
        (tmp_path / "noise" / "test" / name).mkdir(parents=True)
        for file in sorted((tmp_path / "noise" / "train" / name).glob("00*.png")):
            file.rename(tmp_path / "noise" / "test" / name / file.name)
    third = ("train.py", "--dataset", "noise", "--img_size", 32, *small, "--name", "third", "--init_from")
    with pytest.raises(SystemExit):
        run_main(*third, "saved/second.pt")
    assert "of the 20 test images" in capsys.readouterr().err
    run_main("train.py", "--dataset", "digits", *small, "--name", "first", "--seed", 1)  # another one of that name
    with pytest.raises(SystemExit):
        again = ("--name", "second", "--init_from", "saved/first.pt", "--epochs", 2, "--resume", "--resume_changed")
        run_main("train.py", "--dataset", "digits", *small, *again)
    assert "or that file has changed" in capsys.readouterr().err


def test_another_folder_in_place_of_the_one_trained_on_is_refused(trained, tmp_path, capsys):
    folder, out = trained
    write_pictures(
        tmp_path / "other" / "train",
        30,
        dict(zip(sorted(["$x_$", "a b's", "Größe, 50%"]), CLASSES.values(), strict=True)),
    )
    with pytest.raises(SystemExit):
        run_main("evaluate.py", out / "saved" / "VisionTransformer_my pets.pt", "--data_dir", tmp_path / "other")
    assert "none of the pictures that the model was trained on is in" in capsys.readouterr().err
