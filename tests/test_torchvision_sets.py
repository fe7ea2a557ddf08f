"""MNIST, FashionMNIST and SVHN: small files in their formats, from a server on this machine, against torchvision's own
reading of them."""

import functools
import gzip
import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import scipy.io
import torch
from helpers import refused, run_main

import export
from images.augment import import_torchvision
from images.download import DownloadError, download
from images.loader import DataError
from setup_cifar import load_data

CLASSES = {"mnist": "MNIST", "fashionmnist": "FashionMNIST", "svhn": "SVHN"}
TRAIN, TEST = 50, 20


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def idx(array):
    """Yann LeCun's format: two zeros, 8 for bytes, the number of axes, their lengths, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def mat(path, images, labels):
    scipy.io.savemat(path, {"X": images, "y": labels[:, None]}, do_compression=True)
    return path.read_bytes()


def make_files(name, folder):
    """File name -> contents, in torchvision's order."""
    random, files = np.random.default_rng(0), {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        labels = np.arange(count) % 10
        if name == "svhn":
            images = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
            file = f"{part.replace('t10k', 'test')}_32x32.mat"
            files[file] = mat(folder / file, images, np.where(labels == 0, 10, labels).astype(np.uint8))
        else:
            images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(images), mtime=0)
            files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(labels), mtime=0)
    return files


class Server(http.server.ThreadingHTTPServer):
    """Gives `files` by name; the first `cut` answers break off in the middle."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.cut = files, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if len(self.server.asked) <= self.server.cut else content)


@pytest.fixture(params=CLASSES)
def served(request, tmp_path, monkeypatch):
    """A server with small files; torchvision's addresses and md5 sums are theirs, and its code is as it is."""
    name = request.param
    (tmp_path / "made").mkdir()
    server = Server(make_files(name, tmp_path / "made"))
    server.name = name
    sums = {file: hashlib.md5(content).hexdigest() for file, content in server.files.items()}
    import_torchvision()
    from torchvision import datasets

    server.kind = getattr(datasets, CLASSES[name])
    if name == "svhn":
        parts = zip(("train", "test"), sums, strict=True)
        table = {part: [server.url + file, file, sums[file]] for part, file in parts}
        monkeypatch.setattr(server.kind, "split_list", table)
    else:
        monkeypatch.setattr(server.kind, "mirrors", [server.url + "gone/", server.url])
        monkeypatch.setattr(server.kind, "resources", list(sums.items()))
    monkeypatch.delenv(f"{CLASSES[name].upper()}_URL")
    monkeypatch.setattr("images.download.download", functools.partial(download, attempts=2, wait=0))
    yield server
    server.shutdown()
    server.server_close()


def folder_of(server, data_dir):
    return data_dir if server.name == "svhn" else data_dir / CLASSES[server.name] / "raw"


def test_images_labels_and_classes_are_those_that_torchvision_reads(served, tmp_path):
    data = load_data(served.name, tmp_path / "data")
    assert (len(data.train), len(data.val), len(data.test)) == (40, 10, TEST)
    assert data.name == served.name and data.flip == (served.name == "fashionmnist")
    flags = ({"split": "train"}, {"split": "test"}) if served.name == "svhn" else ({"train": True}, {"train": False})
    train, test = (served.kind(tmp_path / "data", **flag) for flag in flags)
    assert data.classes == getattr(train, "classes", list("0123456789"))
    for split, whole in ((data.train, train), (data.val, train), (data.test, test)):
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (3, 32, 32)
        first = 0 if whole is train else TRAIN
        for image, label, number in zip(split.images, split.labels.tolist(), split.ids.tolist(), strict=True):
            theirs, their_label = whole[number - first]  # a picture and a number
            expected = np.asarray(theirs.convert("RGB")).transpose(2, 0, 1)
            if served.name != "svhn":
                expected = np.pad(expected, ((0, 0), (2, 2), (2, 2)))
            assert label == their_label and (image.numpy() == expected).all()
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)


def test_each_file_is_fetched_once(served, tmp_path):
    assert not export.is_here({"dataset": served.name}, str(tmp_path / "data"))
    first = load_data(served.name, tmp_path / "data")
    files = files_in(folder_of(served, tmp_path / "data"))
    unpacked = [] if served.name == "svhn" else [file.removesuffix(".gz") for file in served.files]
    assert files == sorted([*served.files, *unpacked])
    asked = len(served.asked)
    second = load_data(served.name, tmp_path / "data")
    assert len(served.asked) == asked and torch.equal(first.train.images, second.train.images)
    assert export.is_here({"dataset": served.name}, str(tmp_path / "data"))
    if served.name != "svhn":  # torchvision would take such files unchecked
        (folder_of(served, tmp_path / "data").parent / "processed").mkdir()
        with pytest.raises(DataError, match="processed is of an earlier torchvision"):
            load_data(served.name, tmp_path / "data")


@pytest.mark.parametrize("wrong", ["cut", "another"])
def test_a_wrong_or_cut_file_is_one_line(served, tmp_path, capfd, wrong):
    load_data(served.name, tmp_path / "data")
    path = folder_of(served, tmp_path / "data") / list(served.files)[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-9] if wrong == "cut" else content[::-1])
    with refused(capfd, tmp_path, str(path), "damaged", "delete it", script="setup_cifar.py"):
        run_main("setup_cifar.py", "--dataset", served.name, "--data_dir", tmp_path / "data")
    path.unlink()
    load_data(served.name, tmp_path / "data")
    assert path.read_bytes() == content


def test_what_is_unpacked_is_compared_with_its_archive(served, tmp_path):
    if served.name == "svhn":
        pytest.skip("has no archives")
    expected = load_data(served.name, tmp_path / "data").test.labels
    path = folder_of(served, tmp_path / "data") / "t10k-labels-idx1-ubyte"
    content = path.read_bytes()
    for wrong in (content[:5], content[:-1] + b"\0"):
        path.write_bytes(wrong)
        assert torch.equal(load_data(served.name, tmp_path / "data").test.labels, expected)
        assert path.read_bytes() == content


def test_after_a_broken_transfer_nothing_half_written_counts_and_a_second_try_works(served, tmp_path):
    served.cut = 100
    with pytest.raises(DownloadError, match="broke off") as error:
        load_data(served.name, tmp_path / "data")
    assert "\n" not in str(error.value)
    assert {file.rpartition(".")[2] for file in files_in(tmp_path / "data")} <= {"part"}
    served.cut = 0
    assert len(load_data(served.name, tmp_path / "data").test) == TEST


def test_what_a_server_gives_in_place_of_the_file_is_refused(served, tmp_path):
    served.files = {name: content[::-1] for name, content in served.files.items()}
    with pytest.raises(DownloadError, match="md5 differs"):
        load_data(served.name, tmp_path / "data")
    assert files_in(tmp_path / "data") == []


@pytest.mark.parametrize("name", CLASSES)
def test_without_the_server_the_ways_out_are_named(name, tmp_path):
    with pytest.raises(DownloadError) as error:
        load_data(name, tmp_path)
    for word in ("could not be downloaded from http://127.0.0.1:9/", "Put it into", "--data_dir", "--dataset digits"):
        assert word in str(error.value)
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError) and files_in(tmp_path) == []
    assert issubclass(DataError, ValueError)


def test_a_run_on_it_is_named_after_it_and_its_test_images_are_found_again(served, tmp_path, capfd):
    flags = "--hidden_size 16 --num_heads 2 --num_blocks 1 --patch_size 8 --batch_size 20 --epochs 1 --gif_frames 0"
    place = ["--data_dir", tmp_path / "data"]
    run_main("train.py", "--dataset", served.name, *flags.split(), *place, "--output_dir", tmp_path)
    (path,) = (tmp_path / "saved").glob("*.pt")
    assert path.stem.startswith(f"VisionTransformer_{served.name}_")
    report = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    figures = tmp_path / "evaluated"
    run_main("evaluate.py", path, *place, "--output_dir", figures)
    (found,) = figures.glob("*_evaluation.json")
    accuracy = json.loads(found.read_text(encoding="utf-8"))["accuracy"]
    assert accuracy == pytest.approx(report["results"]["test_accuracy"])
    if served.name == "fashionmnist":
        run_main("evaluate.py", path, "--flip", *place, "--output_dir", figures)
    else:
        with refused(capfd, tmp_path, "--flip is not for", served.name, script="evaluate.py"):
            run_main("evaluate.py", path, "--flip", *place, "--output_dir", figures)
