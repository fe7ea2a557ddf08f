"""Augmentation by name, against torchvision's transforms called by hand and against what their papers define."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_setup_cifar import epoch_of, numbered_split, pixel_loader

import setup_cifar
from images.augment import NAMES, Augmentation, import_torchvision, parse_augment
from images.loader import ImageLoader, Split
from studies import benchmark

import_torchvision()
from torchvision.transforms import v2  # noqa: E402

OF_IMAGES = ["randaugment", "trivialaugment", "autoaugment", "random_erasing", "trivialaugment+random_erasing"]
OF_BATCHES = ["mixup", "cutmix", "mixup+cutmix", "randaugment+random_erasing+cutmix"]
FILL = (10, 120, 250)
FILL_MEAN = [value / 255 for value in FILL]


def loader(name, n=60, batch_size=20, **options):
    """Images of noise, whose labels are their numbers, as pixels in [0, 1]."""
    return pixel_loader(numbered_split(n, 16), batch_size, augment=name, num_classes=n, **{"shuffle": True, **options})


def ramps(n=64):
    """Images that grow lighter from left to right, and a little from top to bottom."""
    ramp = torch.arange(16) * 12 + torch.arange(16)[:, None]
    return Split(ramp.byte().expand(n, 3, 16, 16).clone(), torch.zeros(n, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["", "rotate", "none+mixup", "mixup+", "mixup,cutmix", "RandAugment"])
def test_names_that_make_no_sense_are_refused(name):
    with pytest.raises(ValueError, match="augment"):
        parse_augment(name)
    with pytest.raises(ValueError, match="augment"):
        loader(name)


def test_each_name_does_something_of_its_own():
    seen = [epoch_of(loader(name, shuffle=False))[0] for name in [*NAMES, "mixup+randaugment"]]
    assert torch.equal((255 * seen[0]).round().byte(), numbered_split(60, 16).images)
    for i, images in enumerate(seen):
        assert images.dtype == torch.float32
        assert not any(torch.equal(images, other) for other in seen[:i])


def test_a_missing_torchvision_is_one_line_and_matters_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for name in NAMES[2:]:
        with pytest.raises(ValueError, match="needs torchvision.*pip install"):
            Augmentation(name)
    for name in NAMES[:2]:
        epoch_of(loader(name))


# ------------------------------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("name", OF_IMAGES)
def test_what_happens_to_an_image_depends_on_seed_epoch_and_image_only(name):
    whole, order = epoch_of(loader(name, batch_size=60, seed=5), epoch=2)
    torch.manual_seed(123)
    for batch_size in (1, 7, 32):
        images, labels = epoch_of(loader(name, batch_size=batch_size, seed=5), epoch=2)
        assert torch.equal(labels, order)
        assert torch.equal(images, whole)
    kept = epoch_of(loader(name, seed=5, shuffle=False), epoch=2)[0]
    assert not torch.equal(kept[order], epoch_of(loader(name, seed=5, shuffle=False), epoch=3)[0][order])
    assert not torch.equal(kept[order], epoch_of(loader(name, seed=6, shuffle=False), epoch=2)[0][order])


@pytest.mark.parametrize("name", OF_IMAGES + OF_BATCHES)
def test_an_epoch_can_be_taken_up_at_any_batch(name):
    whole, targets = epoch_of(loader(name, batch_size=7), epoch=3)
    torch.manual_seed(123)
    for first_batch in (1, 5, 8):
        images, rest = epoch_of(loader(name, batch_size=7), 3, first_batch)
        assert torch.equal(images, whole[7 * first_batch :])
        assert torch.equal(rest, targets[7 * first_batch :])


@pytest.mark.parametrize("name", OF_IMAGES + OF_BATCHES)
def test_augmentation_leaves_the_global_random_state_and_the_images_alone(name):
    batches = loader(name)
    images = batches.images.clone()
    before = torch.get_rng_state()
    for _ in batches:
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(batches.images, images)


def test_batches_of_one_epoch_and_epochs_are_mixed_differently():
    targets = [targets for epoch in (0, 1) for _, targets in mixed_batches("mixup", epoch)]
    assert len({share for each in targets for share in each.amax(1).unique().tolist()}) == 6


# ------------------------------------------------------------------------------------- against torchvision by hand


@pytest.mark.parametrize(
    "name, transform",
    [
        ("randaugment", v2.RandAugment(fill=FILL)),
        ("trivialaugment", v2.TrivialAugmentWide(fill=FILL)),
        ("autoaugment", v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=FILL)),
        ("random_erasing", v2.RandomErasing(value=FILL)),
        ("random_erasing+randaugment", v2.Compose([v2.RandAugment(fill=FILL), v2.RandomErasing(value=FILL)])),
    ],
)
def test_torchvision_does_the_work_on_top_of_crop_and_flip(name, transform):
    split, options = numbered_split(40, 16), {"num_classes": 40, "padding": 2, "mean": FILL_MEAN}
    random = torch.Generator().manual_seed(1)
    draws = Augmentation(name, **options).draw(40, 1, random)
    members = torch.arange(40)
    cropped, _ = Augmentation("crop_flip", **options).apply(split.images, split.labels, draws, members, 0)
    images, labels = Augmentation(name, **options).apply(split.images, split.labels, draws, members, 0)
    assert torch.equal(labels, split.labels)
    with torch.random.fork_rng(devices=[]):
        for image, before, seed in zip(images, cropped, draws.image_seeds.tolist(), strict=True):
            torch.manual_seed(seed)
            assert torch.equal(image, transform(before.byte()))


@pytest.mark.parametrize("name, transform", [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_torchvision_does_the_mixing(name, transform):
    split, members = numbered_split(30, 16), torch.arange(10, 20)
    augmentation = Augmentation(name, num_classes=30, padding=2)
    draws = augmentation.draw(30, 3, torch.Generator().manual_seed(1))
    before = Augmentation("crop_flip", padding=2).apply(split.images[members], split.labels[members], draws, members, 1)
    images, targets = augmentation.apply(split.images[members], split.labels[members], draws, members, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.batch_seeds[1].item())
        expected = v2.RandomChoice([transform(num_classes=30)])(*before)
    assert torch.equal(images, expected[0])
    assert torch.equal(targets, expected[1])


# -------------------------------------------------------------------------------------------- against the definitions


def mixed_batches(name, epoch=0):
    """`(images, targets)` of each batch."""
    batches = loader(name)
    batches.set_epoch(epoch)
    return list(batches)


def neighbours(images):
    return torch.cat([images[-1:], images[:-1]])


def test_mixup_blends_images_and_labels_in_the_same_proportion():
    for (plain, labels), (images, targets) in zip(mixed_batches("crop_flip"), mixed_batches("mixup"), strict=True):
        share = targets[0, labels[0]]
        one_hot = F.one_hot(labels, 60).float()
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * neighbours(one_hot))
        torch.testing.assert_close(images, share * plain + (1 - share) * neighbours(plain), atol=1e-6, rtol=0)


def test_cutmix_labels_say_how_many_pixels_are_whose():
    shares = []
    for (plain, labels), (images, targets) in zip(mixed_batches("crop_flip"), mixed_batches("cutmix"), strict=True):
        foreign = (images != plain).any(dim=1)
        assert torch.equal(images, torch.where(foreign[:, None], neighbours(plain), plain))
        rows, columns = foreign[0].any(dim=1), foreign[0].any(dim=0)
        assert torch.equal(foreign, (rows[:, None] & columns).expand_as(foreign))  # one rectangle for the whole batch
        share = 1 - foreign[0].float().mean()
        one_hot = F.one_hot(labels, 60).float()
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * neighbours(one_hot))
        shares.append(share.item())
    assert len(set(shares)) == 3


def test_of_mixup_and_cutmix_together_each_batch_gets_one():
    kinds = []
    batches = [
        zip(mixed_batches("crop_flip", epoch), mixed_batches("mixup+cutmix", epoch), strict=True) for epoch in range(6)
    ]
    for (plain, _), (images, targets) in (pair for epoch in batches for pair in epoch):
        assert torch.allclose(targets.sum(dim=1), torch.ones(20))
        assert targets.count_nonzero(dim=1).max() <= 2
        whose = (images == plain) | (images == neighbours(plain))
        kinds.append("cutmix" if whose.all() else "mixup")
    assert 4 <= kinds.count("mixup") <= 14


def test_random_erasing_wipes_rectangles_in_the_mean_colour_from_half_of_the_images():
    plain, labels = epoch_of(loader("crop_flip", 400))
    batches = ImageLoader(numbered_split(400, 16), 20, FILL_MEAN, [1.0] * 3, shuffle=True, augment="random_erasing")
    images, again = epoch_of(batches)
    assert torch.equal(labels, again)
    images = images + torch.tensor(FILL_MEAN).view(1, 3, 1, 1)
    erased = ((images - plain).abs() > 1e-5).any(dim=1)
    assert 160 < erased.flatten(1).any(dim=1).sum() < 240
    for image, where in zip(images, erased, strict=True):
        if where.any():
            rows, columns = where.any(dim=1), where.any(dim=0)
            assert torch.equal(where, rows[:, None] & columns)
            torch.testing.assert_close(image[:, where].T, torch.tensor(FILL_MEAN).expand(int(where.sum()), 3))
            assert 0.01 < where.float().mean() < 0.4


@pytest.mark.parametrize("name", ["crop_flip", "random_erasing", "mixup", "cutmix", "mixup+cutmix"])
def test_digits_are_not_mirrored_by_any_of_them(digits, name):
    def lighter_on_the_right(data):
        images, _ = epoch_of(data.loader("train", 16, augment=name, padding=0))
        return (images[..., 8:].mean(dim=(1, 2, 3)) > images[..., :8].mean(dim=(1, 2, 3))).float().mean()

    data = dataclasses.replace(digits, train=ramps())
    assert lighter_on_the_right(data) > 0.9  # a large patch wiped out may tip the balance
    assert lighter_on_the_right(dataclasses.replace(data, flip=True)) < 0.8


def test_what_is_turned_or_shifted_in_has_the_mean_colour(digits):
    """So that it is zero once the image is normalised."""
    bright = torch.full_like(digits.train.images, 200)
    bright[0] = 0  # images of a single colour are no data set
    data = dataclasses.replace(digits, train=Split(bright, digits.train.labels))
    data.mean, data.std = FILL_MEAN, [1.0] * 3
    images, _ = epoch_of(data.loader("train", 100, augment="trivialaugment"))
    corners = images[:, :, ::31, ::31].permute(0, 2, 3, 1).flatten(0, 2)
    zero = (corners.abs() < 1e-5).all(dim=1).float().mean()
    assert 0.1 < zero < 0.6


# ------------------------------------------------------------------------------------------------ the picture, the cost


def test_the_sheet_of_augmentations(digits, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("images.sheets.save_figure", lambda figure, path: drawn.append((path.name, figure)))
    setup_cifar.main(["--dataset", "digits", "--augmentations", "--figures_dir", str(tmp_path)])
    assert "augmentations_digits.png" in capsys.readouterr().out
    name, figure = drawn[-1]
    assert name == "augmentations_digits.png"
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert len(shown) == 10 * len(NAMES)
    seventh = [(digits.train.labels == label).nonzero()[6].item() for label in range(10)]
    images = digits.train.images[torch.tensor(seventh)].permute(0, 2, 3, 1).numpy() / 255
    rows = np.stack(shown).reshape(len(NAMES), *images.shape)
    np.testing.assert_allclose(rows[0], images, atol=1e-6)
    befores = [rows[0], *[rows[1]] * (len(NAMES) - 2)]  # all else is done to what is cropped
    for before, after in zip(befores, rows[1:], strict=True):
        assert (abs(after - before).mean(axis=(1, 2, 3)) > 0.02).all()  # something can be seen in every example
    texts = {text.get_text() for text in figure.texts}
    assert {*NAMES, *"0123456789"} < texts
    mixtures = [text for text in texts if "%" in text]
    assert len(mixtures) == 20
    for text in mixtures:
        assert sum(int(line.split(" % ")[0]) for line in text.splitlines()) == pytest.approx(100, abs=1)


def test_the_cost_of_each_is_measured_printed_and_stored(tmp_path, monkeypatch, capsys):
    assert benchmark.NAMES == NAMES
    monkeypatch.setattr(benchmark, "NAMES", ("none", "autoaugment"))  # two are quicker
    data = benchmark.synthetic_data(16)
    monkeypatch.setattr(benchmark, "synthetic_data", lambda images: data)
    flags = ["--augmentation", "--repeats", "1", "--output_dir", str(tmp_path)]
    benchmark.main(flags)
    stored = json.loads((tmp_path / "augmentation_cost.json").read_text(encoding="utf-8"))
    assert list(stored["images_per_second"]) == ["none", "autoaugment"]
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for name, rates in stored["images_per_second"].items():
        assert rates["loader"] > rates["epoch"] > 0
        assert f"| {name} | {rates['loader']:,.0f} | {rates['epoch']:,.0f} |" in printed
