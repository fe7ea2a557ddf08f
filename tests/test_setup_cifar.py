import concurrent.futures
import dataclasses
import gzip
import hashlib
import http.server
import io
import pickle
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import torch

import setup_cifar
from images.download import DownloadError, download, find_or_download
from images.loader import DataError, ImageLoader, Split, fits
from setup_cifar import CIFAR, load_data

CIFAR10_FOLDER = CIFAR["cifar10"].folder

# ------------------------------------------------------------------------------------------------------ helpers


def numbered_split(n=100, size=8, seed=0):
    """Images of noise, whose labels are their numbers."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n))


def pixel_loader(split, batch_size, **options):
    """A loader whose output is pixels in [0, 1]."""
    return ImageLoader(split, batch_size, mean=[0.0] * 3, std=[1.0] * 3, **options)


def epoch_of(loader, epoch=None, first_batch=0):
    """All images and labels of one epoch."""
    if epoch is not None:
        loader.set_epoch(epoch, first_batch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def md5(content):
    return hashlib.md5(content).hexdigest()


def pack(members, links=()):
    """A tar.gz of `(name, content)`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


class FakeCifar:
    """A CIFAR-10 of 100 training and 10 test images. Image i is all i; its label is i % 10."""

    name = "cifar10"

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.folder = CIFAR[self.name].folder
        self.files = self.make_files()
        self.use_archive(pack((f"{self.folder}/{name}", data) for name, data in self.files.items()))

    def make_files(self):
        files = {}
        for number in range(6):
            name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
            values = np.arange(20) + 20 * number if number < 5 else np.arange(200, 210)
            data = np.repeat(values.astype(np.uint8)[:, None], 3072, axis=1)
            files[name] = pickle.dumps({"data": data, "labels": [int(value) % 10 for value in values]}, protocol=2)
        files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
        return files

    def use_archive(self, archive):
        self.archive = archive
        sums = {name: md5(data) for name, data in self.files.items()}
        fake = dataclasses.replace(CIFAR[self.name], md5=md5(archive), files=sums)
        self.monkeypatch.setitem(CIFAR, self.name, fake)

    def write_files(self, data_dir, leave_out=()):
        folder = data_dir / self.folder
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            if name not in leave_out:
                (folder / name).write_bytes(data)
        return folder

    def write_archive(self, data_dir):
        data_dir.mkdir(exist_ok=True)
        (data_dir / CIFAR[self.name].archive).write_bytes(self.archive)


class FakeCifar100(FakeCifar):
    """A CIFAR-100 of 200 training and 50 test images. Image i is all i; its fine label is i % 100, its coarse one 0."""

    name = "cifar100"

    def make_files(self):
        files = {}
        for name, count in (("train", 200), ("test", 50)):
            data = np.repeat(np.arange(count, dtype=np.uint8)[:, None], 3072, axis=1)
            labels = {"fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count}
            files[name] = pickle.dumps({"data": data, **labels}, protocol=2)
        names = {"fine_label_names": [f"fine {i}" for i in range(100)], "coarse_label_names": ["coarse"] * 20}
        files["meta"] = pickle.dumps(names, protocol=2)
        return files


@pytest.fixture
def cifar(monkeypatch):
    return FakeCifar(monkeypatch)


@pytest.fixture
def cifar100(monkeypatch):
    return FakeCifar100(monkeypatch)


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def unpacked(cifar):
    return sorted(f"{CIFAR10_FOLDER}/{name}" for name in cifar.files)


# --------------------------------------------------------------------------------------------------------- split


def test_split_is_80_20_disjoint_and_complete(cifar, tmp_path):
    cifar.write_files(tmp_path)
    data = load_data("cifar10", tmp_path)
    train, val = (split.images[:, 0, 0, 0].tolist() for split in (data.train, data.val))
    assert (len(train), len(val)) == (80, 20)
    assert sorted(train + val) == list(range(100))
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(200, 210))
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.labels, split.images[:, 0, 0, 0].long() % 10)


def test_split_is_the_same_in_every_call_whatever_the_global_seed():
    splits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        splits.append(load_data("digits"))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(splits[0].train.images, splits[1].train.images)
    assert torch.equal(splits[0].val.labels, splits[1].val.labels)


def test_split_seed_and_fraction_choose_the_split(digits):
    other = load_data("digits", split_seed=1)
    assert len(other.val) == len(digits.val)
    assert not torch.equal(other.val.images, digits.val.images)
    assert torch.equal(other.test.images, digits.test.images)
    assert len(load_data("digits", val_fraction=0.5).val) == round(0.5 * 1437)


@pytest.mark.parametrize("fraction", [1, -0.1, 1.5, float("nan"), 0.0001, 0.9999])
def test_a_fraction_that_leaves_a_split_empty_is_refused(fraction):
    with pytest.raises(DataError, match="val_fraction"):
        load_data("digits", val_fraction=fraction)


def test_unknown_dataset_is_refused():
    with pytest.raises(
        DataError, match="minst.*auto, cifar10, cifar100, mnist, .*svhn, digits, or a folder.*did you mean mnist"
    ):
        load_data("minst")


def test_mean_and_std_are_of_the_training_split_alone(digits):
    pixels = digits.train.images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(digits.mean, pixels.mean(axis=(0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(digits.std, pixels.std(axis=(0, 2, 3)), atol=1e-5)


# -------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_real_ones_enlarged(digits):
    from sklearn.datasets import load_digits

    original = load_digits()
    assert digits.classes == list("0123456789")
    assert (len(digits.train), len(digits.val), len(digits.test)) == (1150, 287, 360)
    assert digits.image_size == 32
    assert digits.test.images.dtype == torch.uint8
    assert digits.test.images.shape == (360, 3, 32, 32)
    assert digits.test.labels.tolist() == original.target[::5].tolist()
    assert digits.test.images.min() == 0
    assert digits.test.images.max() == 255
    assert torch.equal(digits.test.images[:, 0], digits.test.images[:, 2])
    small = digits.test.images[:, 0].float().unflatten(1, (8, 4)).unflatten(3, (8, 4)).mean(dim=(2, 4))
    assert np.corrcoef(small.numpy().ravel(), original.images[::5].ravel())[0, 1] > 0.97


def test_digits_are_not_mirrored(digits, cifar, tmp_path):
    cifar.write_files(tmp_path)
    assert not digits.flip
    assert load_data("cifar10", tmp_path).flip


# ------------------------------------------------------------------------------------------------------- batches


def test_normalisation_is_the_plain_one(digits):
    images, labels = next(iter(digits.loader("val", 50)))
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (digits.mean, digits.std))
    plain = (digits.val.images[:50].numpy() / 255 - mean) / std
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    np.testing.assert_allclose(images.numpy(), plain, atol=1e-5)
    assert torch.equal(labels, digits.val.labels[:50])


def test_channels_have_their_own_mean_and_std():
    split = Split(torch.full((1, 3, 2, 2), 51, dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    images, _ = next(iter(ImageLoader(split, 1, mean=[0.0, 0.1, 0.2], std=[1.0, 0.5, 0.1])))
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([0.2, 0.2, 0.0]))


def test_last_batch_is_smaller_and_nothing_is_left_out():
    loader = pixel_loader(numbered_split(100), 32, shuffle=True)
    assert len(loader) == 4
    assert loader.num_images == 100
    assert [len(labels) for _, labels in loader] == [32, 32, 32, 4]
    assert sorted(epoch_of(loader)[1].tolist()) == list(range(100))
    assert len(pixel_loader(numbered_split(96), 32)) == 3


def test_without_shuffle_the_order_is_kept():
    assert epoch_of(pixel_loader(numbered_split(), 32), epoch=3)[1].tolist() == list(range(100))


def test_shuffled_images_keep_their_labels():
    split = numbered_split()
    images, labels = epoch_of(pixel_loader(split, 32, shuffle=True))
    assert labels.tolist() != list(range(100))
    assert torch.equal((images * 255).round().byte(), split.images[labels])


def test_images_are_padded_by_an_eighth(digits):
    assert digits.loader("train", 10, augment="crop_flip").augmentation.padding == 4


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [4, 2])
def test_augmented_images_are_crops_of_the_padded_image(flip, padding):
    split = numbered_split(400, size=16)
    images, labels = epoch_of(pixel_loader(split, 150, shuffle=True, augment="crop_flip", flip=flip, padding=padding))
    images = (images * 255).round().byte().numpy()
    seen = []
    for image, label in zip(images, labels.tolist(), strict=True):
        padded = np.pad(split.images[label].numpy(), ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (16, 16), axis=(1, 2))
        for mirrored in (False, True):
            same = (windows == (image[..., ::-1] if mirrored else image)[:, None, None]).all(axis=(0, 3, 4))
            seen += [(mirrored, top, left) for top, left in np.argwhere(same).tolist()]
    assert len(seen) == 400  # each image is exactly one of the crops
    mirrored, tops, lefts = zip(*seen, strict=True)
    assert set(tops) == set(lefts) == set(range(2 * padding + 1))
    assert 150 < sum(mirrored) < 250 if flip else sum(mirrored) == 0
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.2
    assert not flip or abs(np.corrcoef(tops, mirrored)[0, 1]) < 0.2


def test_augmentation_depends_on_seed_epoch_and_image_only():
    options = {"shuffle": True, "augment": "crop_flip", "seed": 5}
    whole, order = epoch_of(pixel_loader(numbered_split(), 100, **options), epoch=2)
    torch.manual_seed(123)
    for batch_size in (1, 7, 64):
        images, labels = epoch_of(pixel_loader(numbered_split(), batch_size, **options), epoch=2)
        assert torch.equal(labels, order)
        assert torch.equal(images, whole)


@pytest.mark.parametrize("first_batch", [0, 1, 9, 14])
def test_an_epoch_can_be_taken_up_at_any_batch(first_batch):
    options = {"shuffle": True, "augment": "crop_flip"}
    whole, order = epoch_of(pixel_loader(numbered_split(), 7, **options), epoch=3)
    images, labels = epoch_of(pixel_loader(numbered_split(), 7, **options), 3, first_batch)
    assert torch.equal(labels, order[7 * first_batch :])
    assert torch.equal(images, whole[7 * first_batch :])


def test_a_device_with_a_number_is_that_where_the_images_lie(digits):
    """Tensors sent to "cuda" say that they are on "cuda:0": not another place, from which each batch must come."""
    plain, numbered = (digits.loader("train", 500, device) for device in ("cpu", "cpu:0"))
    for (images, labels), (same, too) in zip(plain, numbered, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, too)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_images_that_do_not_fit_on_the_gpu_come_batch_by_batch(digits, monkeypatch):
    held = digits.loader("train", 100, "cuda", shuffle=True, augment="crop_flip")
    monkeypatch.setattr("images.loader.fits", lambda images, device: False)
    fetched = digits.loader("train", 100, "cuda", shuffle=True, augment="crop_flip")
    assert (held.images.device.type, fetched.images.device.type) == ("cuda", "cpu")
    for (a, labels), (b, same) in zip(held, fetched, strict=True):
        assert b.device.type == "cuda" and torch.equal(a, b) and torch.equal(labels, same)


def test_images_may_take_half_of_a_gpus_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2000, 9000))
    gpu = torch.device("cuda")
    assert fits(torch.zeros(999, dtype=torch.uint8), gpu)
    assert not fits(torch.zeros(1001, dtype=torch.uint8), gpu)
    assert fits(torch.zeros(1001, dtype=torch.uint8), torch.device("cpu"))


def test_every_epoch_and_seed_is_different():
    options = {"shuffle": True, "augment": "crop_flip"}
    loader = pixel_loader(numbered_split(), 50, **options)
    epochs = [epoch_of(loader) for _ in range(3)] + [epoch_of(pixel_loader(numbered_split(), 50, seed=1, **options))]
    for i, (images, labels) in enumerate(epochs):
        for other_images, other_labels in epochs[:i]:
            assert not torch.equal(labels, other_labels)
            by_number, other_by_number = images[labels.argsort()], other_images[other_labels.argsort()]
            assert not torch.equal(by_number, other_by_number)
    again, _ = epoch_of(loader, epoch=1)  # epochs count themselves, and can be had again
    assert torch.equal(again, epochs[1][0])


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    epoch_of(pixel_loader(numbered_split(), 50, shuffle=True, augment="crop_flip"))
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------- finding CIFAR-10


def test_files_are_found_by_argument_environment_and_default(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_cifar, "home", lambda: tmp_path)  # the project's folder
    for name in ("data", "environment", "argument"):
        folder = cifar.write_files(tmp_path / name)
        (folder / "readme.html").write_text("other files do not matter", encoding="utf-8")
    assert load_data("cifar10").classes == list("abcdefghij")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "environment"))
    (tmp_path / "data" / CIFAR10_FOLDER / "test_batch").write_bytes(b"damaged")
    assert len(load_data("cifar10").test) == 10
    (tmp_path / "environment" / CIFAR10_FOLDER / "test_batch").write_bytes(b"damaged")
    assert load_data("auto", tmp_path / "argument").name == "cifar10"


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_a_size_of_images_that_have_their_own_is_refused(cifar, tmp_path, dataset):
    cifar.write_files(tmp_path)
    with pytest.raises(DataError, match="img_size 64 is for folders"):
        load_data(dataset, tmp_path, img_size=64)


def test_archive_is_found_and_unpacked_once(cifar, tmp_path):
    cifar.write_archive(tmp_path)
    assert len(load_data("cifar10", tmp_path).train) == 80
    assert files_in(tmp_path) == sorted([*unpacked(cifar), "cifar-10-python.tar.gz"])
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    assert len(load_data("cifar10", tmp_path).train) == 80


def test_missing_files_come_from_the_archive(cifar, tmp_path):
    cifar.write_files(tmp_path, leave_out=["data_batch_3"])
    cifar.write_archive(tmp_path)
    assert len(load_data("cifar10", tmp_path).train) == 80


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_a_missing_file_is_named_and_does_not_turn_into_digits(cifar, tmp_path, dataset):
    cifar.write_files(tmp_path, leave_out=["data_batch_3"])
    with pytest.raises(DataError, match="lacks data_batch_3") as error:
        load_data(dataset, tmp_path)
    assert not isinstance(error.value, DownloadError)


@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: data[:-1] + b"!", lambda data: b""])
def test_a_damaged_file_is_named_with_what_to_do(cifar, tmp_path, dataset, damage):
    folder = cifar.write_files(tmp_path)
    (folder / "data_batch_4").write_bytes(damage(cifar.files["data_batch_4"]))
    with pytest.raises(DataError, match="data_batch_4 is damaged.*delete it"):
        load_data(dataset, tmp_path)


def test_a_damaged_archive_is_named_and_not_unpacked(cifar, tmp_path):
    cifar.write_archive(tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(cifar.archive[:-5])
    with pytest.raises(DataError, match="cifar-10-python.tar.gz is damaged or incomplete.*delete it"):
        load_data("auto", tmp_path)
    assert files_in(tmp_path) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_files_are_verified_before_they_are_unpickled(cifar, tmp_path, name, trap):
    folder = cifar.write_files(tmp_path)
    (folder / name).write_bytes(pickle.dumps(trap))
    with pytest.raises(DataError, match=name):
        load_data("cifar10", tmp_path)
    assert not trap.sprung


def test_names_in_an_archive_never_become_paths(cifar, tmp_path):
    data_dir = tmp_path / "outer" / "data"
    data_dir.mkdir(parents=True)
    members = [
        ("../evil", b"evil"),
        (str(tmp_path / "absolute"), b"evil"),
        (f"{CIFAR10_FOLDER}/../../evil", b"evil"),
        (f"{CIFAR10_FOLDER}/link/evil", b"evil"),
    ]
    genuine = [(f"{CIFAR10_FOLDER}/{name}", data) for name, data in cifar.files.items()]
    cifar.use_archive(pack(members + genuine, links=[(f"{CIFAR10_FOLDER}/link", str(tmp_path))]))
    cifar.write_archive(data_dir)
    assert len(load_data("cifar10", data_dir).train) == 80
    expected = [*unpacked(cifar), "cifar-10-python.tar.gz"]
    assert files_in(tmp_path) == sorted(f"outer/data/{name}" for name in expected)


# --------------------------------------------------------------------------------------------------- no CIFAR-10


def test_auto_falls_back_to_digits_with_a_warning_nobody_can_miss(tmp_path, capsys):
    data = load_data("auto", tmp_path)
    assert data.name == "digits"
    warning = capsys.readouterr().err
    assert "WARNING: this is NOT CIFAR-10" in warning
    assert "DIGITS" in warning
    assert files_in(tmp_path) == []


def test_cifar10_that_cannot_be_had_is_an_error_with_the_ways_out(tmp_path):
    with pytest.raises(DownloadError) as error:
        load_data("cifar10", tmp_path)
    for way_out in ("cifar-10-python.tar.gz", CIFAR10_FOLDER, "--data_dir", "DATA_DIR", "--dataset digits"):
        assert way_out in str(error.value)
    assert files_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------------ download


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; `script` says how each request is answered, the last entry all further ones."""

    daemon_threads = True

    def __init__(self, content, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.script = content, list(script)
        self.ranges = []  # the Range header of each request
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-python.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        answer = server.script[min(len(server.ranges), len(server.script) - 1)]
        server.ranges.append(asked)
        if isinstance(answer, int):
            return self.send_error(answer)
        if answer == "hang":
            return server.closing.wait(10)
        if isinstance(answer, bytes):  # all that is sent, whatever was asked
            return self.wfile.write(answer)
        content = server.content[::-1] if answer == "wrong" else server.content
        start = 0 if asked is None or answer == "ignore range" else int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        content = content[start:]
        if answer in ("drop", "stall"):
            content = content[: len(content) // 2]
        self.wfile.write(content)
        if answer == "stall":
            server.closing.wait(10)


@pytest.fixture
def serve():
    servers = []

    def start(content, *script):
        server = Server(content, script)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


CONTENT = np.random.default_rng(0).bytes(300_000)
HALF = f"bytes={len(CONTENT) // 2}-"


def fetch(server, path, **options):
    download(server.url, path, md5(CONTENT), **{"wait": 0.01, "timeout": 5, **options})


def assert_nothing_but(path):
    """`path` holds the content, and no other file is beside it."""
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_download_of_a_whole_file(serve, tmp_path, capsys):
    server = serve(CONTENT, "whole")
    fetch(server, tmp_path / "folder" / "archive")
    assert_nothing_but(tmp_path / "folder" / "archive")
    assert server.ranges == [None]
    assert "downloading archive" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"shape": (5, 1, 8, 8)}, {"shape": (5, 3, 8, 6)}, {"labels": torch.int32}])
def test_a_data_set_of_ones_own_has_to_have_the_right_shape(monkeypatch, wrong):
    images = torch.zeros(wrong.get("shape", (5, 3, 8, 8)), dtype=torch.uint8)
    split = Split(images, torch.arange(5).to(wrong.get("labels", torch.int64)))
    monkeypatch.setitem(setup_cifar.DATASETS, "mine", lambda data_dir: (split, split, list("abcde"), True))
    with pytest.raises(DataError, match="mine has images .*: needed are"):
        load_data("mine")


def test_two_that_want_a_file_at_once_fetch_it_once(serve, tmp_path):
    server = serve(CONTENT, "whole", "whole")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(find_or_download, tmp_path / "archive", [server.url], md5(CONTENT))
    assert_nothing_but(tmp_path / "archive")
    assert server.ranges == [None]


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize("why", ["no folder", "full"])
def test_what_this_machine_cannot_write_is_no_broken_network(serve, tmp_path, why):
    folder = tmp_path / "data"
    if why == "full":
        folder.mkdir()
        (folder / "archive.part").symlink_to("/dev/full")
    else:
        folder.write_text("a file")
    server = serve(CONTENT, "whole")
    with pytest.raises(DataError, match="cannot write .*archive.part: (No space left|File exists)"):
        fetch(server, folder / "archive", wait=60)
    assert len(server.ranges) == 1


def test_a_dropped_download_goes_on_where_it_stopped(serve, tmp_path):
    server = serve(CONTENT, "drop", "whole")
    fetch(server, tmp_path / "archive")
    assert_nothing_but(tmp_path / "archive")
    assert server.ranges == [None, HALF]


def test_a_partial_file_of_an_earlier_run_is_used(serve, tmp_path):
    with pytest.raises(DownloadError, match="broke off"):
        fetch(serve(CONTENT, "drop"), tmp_path / "archive", attempts=1)
    assert not (tmp_path / "archive").exists()
    server = serve(CONTENT, "whole")
    fetch(server, tmp_path / "archive")
    assert_nothing_but(tmp_path / "archive")
    assert server.ranges == [HALF]


def test_a_server_that_ignores_range_starts_anew(serve, tmp_path):
    server = serve(CONTENT, "drop", "ignore range")
    fetch(server, tmp_path / "archive")
    assert_nothing_but(tmp_path / "archive")
    assert server.ranges == [None, HALF]


@pytest.mark.parametrize("partial", [b"from another file", CONTENT, CONTENT + b"and more"])
def test_a_partial_file_that_is_no_beginning_is_thrown_away(serve, tmp_path, partial):
    (tmp_path / "archive.part").write_bytes(partial)
    fetch(serve(CONTENT, "whole"), tmp_path / "archive")
    assert_nothing_but(tmp_path / "archive")


def test_404_fails_at_once(serve, tmp_path):
    server = serve(CONTENT, 404)
    with pytest.raises(DownloadError, match="HTTP 404"):
        fetch(server, tmp_path / "archive", wait=60)
    assert len(server.ranges) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_busy_server_is_asked_again(serve, tmp_path, status):
    server = serve(CONTENT, status, status, "whole")
    fetch(server, tmp_path / "archive")
    assert_nothing_but(tmp_path / "archive")
    assert len(server.ranges) == 3


def test_there_is_an_end_to_trying(serve, tmp_path):
    server = serve(CONTENT, 503)
    with pytest.raises(DownloadError, match="HTTP 503"):
        fetch(server, tmp_path / "archive", attempts=3)
    assert len(server.ranges) == 3


def test_wrong_bytes_are_never_left_behind(serve, tmp_path):
    with pytest.raises(DownloadError, match="md5"):
        fetch(serve(CONTENT, "wrong"), tmp_path / "archive", attempts=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", ["hang", "stall"])
def test_a_hanging_server_is_not_waited_for(serve, tmp_path, answer):
    started = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        fetch(serve(CONTENT, answer), tmp_path / "archive", timeout=0.2, attempts=2)
    assert time.monotonic() - started < 5
    assert not (tmp_path / "archive").exists()


def test_a_stalled_download_goes_on_where_it_stopped(serve, tmp_path):
    server = serve(CONTENT, "stall", "whole")
    fetch(server, tmp_path / "archive", timeout=0.2)
    assert_nothing_but(tmp_path / "archive")
    assert server.ranges[0] is None
    assert int(server.ranges[1].strip("bytes=-")) > 0


def response(*headers, status="200 OK", body=CONTENT):
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1") + body


def chunked(body):
    return f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize("length", ["abc", "-5", "9" * 400, "9" * 5000, "1.5", "²", ""])
def test_a_length_that_is_none_is_not_believed(serve, tmp_path, length):
    server = serve(CONTENT, response(f"Content-Length: {length}"))
    fetch(server, tmp_path / "archive")
    assert_nothing_but(tmp_path / "archive")
    assert len(server.ranges) == 1


ANSWERS = {  # of a server gone wrong, which may be right the next time -> words of the reason
    "a length never reached": (response(f"Content-Length: {10**14}"), "broke off|416"),
    "no status": (b"\x1b[31mgarbage\r\n\r\n", "garbage"),
    "no number in the status": (response(status="abc OK"), "abc"),
    "a line too long": (response("X: " + "x" * 70_000), "header line"),
    "too many headers": (response(*(f"X-{i}: 1" for i in range(200))), "more than 100 headers"),
    "nothing": (b"", "closed connection"),
    "compressed": (response("Content-Encoding: gzip", body=gzip.compress(CONTENT)), "md5"),
    "a part that nobody asked for": (
        response("Content-Range: bytes 99-299999/300000", status="206 Partial Content", body=CONTENT[99:]), "md5"
    ),
    "chunks that are none": (response("Transfer-Encoding: chunked", body=b"xyz\r\n"), "IncompleteRead"),
    "more than promised": (
        response("Transfer-Encoding: chunked", "Content-Length: 1000", body=chunked(CONTENT)), "more than 1,000 bytes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_a_server_gone_wrong_is_asked_again(serve, tmp_path, name):
    answer, words = ANSWERS[name]
    server = serve(CONTENT, answer, "whole", "whole")
    fetch(server, tmp_path / "archive")
    assert_nothing_but(tmp_path / "archive")
    assert len(server.ranges) > 1
    server = serve(CONTENT, answer)
    with pytest.raises(DownloadError, match=words) as error:
        fetch(server, tmp_path / "other", attempts=2)
    assert str(error.value).isprintable() and len(str(error.value)) < 400 and len(server.ranges) == 2


def test_a_body_without_end_does_not_fill_the_disk(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("images.download.MOST", 100_000)
    with pytest.raises(DownloadError, match="more than 100,000 bytes"):
        fetch(serve(CONTENT, response()), tmp_path / "archive", attempts=2)
    assert list(tmp_path.iterdir()) == []


NO_ADDRESS = ["nowhere", "http://[::1", "http://127.0.0.1:port/x", "http://127.0.0.1:99999/", "http://\xff..a/", ""]


@pytest.mark.parametrize("address", ["file:///etc/x", *NO_ADDRESS[1:]])
def test_a_redirect_to_no_address_is_one_line(serve, tmp_path, address):
    server = serve(CONTENT, response(f"Location: {address}", status="302 Found", body=b""))
    with pytest.raises(DownloadError) as error:
        fetch(server, tmp_path / "archive")
    assert str(error.value).isprintable() and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", NO_ADDRESS)
def test_an_address_that_is_none_is_one_line(tmp_path, address):
    with pytest.raises(DownloadError, match="could not be downloaded"):
        download(address, tmp_path / "archive", md5(CONTENT), wait=60)


def test_cifar10_is_downloaded_verified_and_unpacked(cifar, serve, tmp_path, monkeypatch):
    server = serve(cifar.archive, "whole")
    monkeypatch.setenv("CIFAR10_URL", server.url)
    assert len(load_data("auto", tmp_path / "new" / "folder").train) == 80
    assert len(load_data("auto", tmp_path / "new" / "folder").train) == 80
    assert len(server.ranges) == 1


# ----------------------------------------------------------------------------------------------------- CIFAR-100


def test_cifar100_is_downloaded_verified_and_unpacked(cifar100, serve, tmp_path, monkeypatch):
    server = serve(cifar100.archive, "drop", "whole")
    monkeypatch.setenv("CIFAR100_URL", server.url)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for _ in range(2):
        data = load_data("cifar100", tmp_path)
    assert server.ranges == [None, f"bytes={len(cifar100.archive) // 2}-"]  # fetched once, in two parts
    assert data.name == "cifar100"
    assert data.flip
    assert data.classes == [f"fine {i}" for i in range(100)]
    assert (len(data.train), len(data.val), len(data.test)) == (160, 40, 50)
    for split in (data.train, data.val, data.test):
        assert torch.equal(split.labels, split.images[:, 0, 0, 0].long() % 100)


def test_cifar100_is_verified_before_it_is_unpickled(cifar100, tmp_path, trap):
    folder = cifar100.write_files(tmp_path)
    for name in cifar100.files:
        contents = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(trap))
        with pytest.raises(DataError, match=f"{name} is damaged"):
            load_data("cifar100", tmp_path)
        (folder / name).write_bytes(contents)
    assert not trap.sprung


def test_cifar100_that_cannot_be_had_is_an_error_with_the_ways_out(tmp_path):
    with pytest.raises(DownloadError, match="cifar-100-python.tar.gz could not .*cifar-100-python.*--data_dir"):
        load_data("cifar100", tmp_path)
    assert files_in(tmp_path) == []


def test_md5_sums_are_those_of_torchvision():
    from images.augment import import_torchvision

    import_torchvision()
    from torchvision import datasets

    for name, cls in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        ours = CIFAR[name]
        assert (ours.url, ours.archive, ours.md5, ours.folder) == (cls.url, cls.filename, cls.tgz_md5, cls.base_folder)
        published = {**dict(cls.train_list), **dict(cls.test_list), cls.meta["filename"]: cls.meta["md5"]}
        assert list(ours.files.items()) == list(published.items())


# ----------------------------------------------------------------------------------------------------- the script


def test_script_prints_what_it_found_and_saves_a_sheet(tmp_path, monkeypatch, capsys):
    setup_cifar.main(["--dataset", "digits", "--figures_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    for text in ("digits: 32x32", "10 classes", "1,150 images", "287 images", "360 images", "samples_digits.png"):
        assert text in printed
    assert files_in(tmp_path) == ["samples_digits.png"]


def test_script_fails_in_one_line_where_there_is_no_data(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        setup_cifar.main(["--data-dir", str(tmp_path)])
    assert stop.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "could not be downloaded" in complaint


# ------------------------------------------------------------------------------------------------ the real CIFAR-10


def test_cifar10_is_the_real_one(cifar10):
    assert (len(cifar10.train), len(cifar10.val), len(cifar10.test)) == (40_000, 10_000, 10_000)
    assert cifar10.classes == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert cifar10.test.images.shape == (10_000, 3, 32, 32)
    assert cifar10.test.labels[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10
    assert (cifar10.train.labels.bincount() + cifar10.val.labels.bincount()).tolist() == [5000] * 10
    assert cifar10.mean == pytest.approx([0.49, 0.48, 0.45], abs=0.005)
    assert cifar10.std == pytest.approx([0.247, 0.243, 0.262], abs=0.002)


def test_cifar10_images_are_the_right_way_up(cifar10):
    top, bottom = (
        cifar10.train.images[cifar10.train.labels == 8][:, :, rows].float().mean() for rows in (slice(8), slice(24, 32))
    )
    assert top > bottom + 10  # ships lie under a bright sky
