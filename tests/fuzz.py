"""Damaged and crafted files: each is given to the code that a user would call, and is used or refused in one line.

    python -m tests.fuzz --minutes 10                            # all families; another --seed makes other cases
    python -m tests.fuzz --cases 500 --families model checkpoint
    python -m tests.fuzz --only model:17                         # one case again, with its output

A case follows from its family, seed and number, and runs in processes of its own: one makes the file, the next uses it.
Where files carry a checksum, crafted contents are written with a right one. Faults are: an exception that would be a
traceback, a crash of native code, a hang, more than 1 GiB of memory, an error that is not one line, a damaged file
taken for a whole one (silent), and code in a file that ran.
"""

import argparse
import collections
import contextlib
import faulthandler
import gc
import io
import itertools
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

import network
import predict
import setup_cifar
import train
import utils
from images.folder import read_image, to_array
from images.loader import Dataset, Split
from studies import ablation, compare, comparison, comparison_figures, crossval, runs
from support import cli, files, report
from support.figures import save_figure
from tests.conftest import Trap
from tests.helpers import run_main
from training import trained
from training.checkpoints import Checkpoints
from training.run import Run

SECONDS, MEMORY, ADDRESSES = 20, 2**30, 6 * 2**30  # of a case; the last is where the system refuses more
UNIT = 1 if sys.platform == "darwin" else 1024  # of memory as the system counts it
FAULTS = ("traceback", "crash", "hang", "memory", "not one line", "silent", "code ran", "not made")
OUTCOMES = ("accepted", "refused", *FAULTS)
VIT = "--dataset digits --hidden_size 8 --num_heads 2 --num_blocks 1 --patch_size 16 --batch_size 16 --device cpu"
MODELS = {"vit": VIT, "cnn": f"{VIT} --model cnn", "mlp": f"{VIT} --model mlp"}
OPTIONS = {
    "muon": "",
    "muon_both": "--ema 0.9 --patience 2",
    "adamw_ema": "--optimizer adamw --ema 0.9",
    "sgd_patience": "--optimizer sgd --patience 2",
    "finished": "",
}
# no GPU, which a fork cannot go on with; and nothing listens at this address
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "CIFAR10_URL": "http://127.0.0.1:9/none.tar.gz", "no_proxy": "127.0.0.1"}
FOLDS = f"{VIT} --model mlp --epochs 1 --folds 2 --name folds"


# --------------------------------------------------------------------------------------------------- whole files


def train_at(folder: Path, flags: str, *more: object) -> None:
    run_main("train.py", *flags.split(), "--gif_frames", 0, "--keep_checkpoint", "--output_dir", folder, *more)


def stop_after_an_epoch(checkpoints: Checkpoints, runner: object) -> None:
    checkpoints.write(runner)
    raise SystemExit(9)


def make_whole_files(root: Path) -> None:
    """Whole files of each family in `root/<family>`, those of a study in `root/study/saved/studies`."""
    for family in ("model", "checkpoint", "picture", "cifar"):
        (root / family).mkdir()
    for name, flags in MODELS.items():
        train_at(root, flags, "--epochs", 1, "--name", name)
        (root / "saved" / f"{name}.pt").replace(root / "model" / f"{name}.pt")
    for name, flags in OPTIONS.items():
        with contextlib.ExitStack() as contexts:
            if name != "finished":
                contexts.enter_context(contextlib.suppress(SystemExit))
                contexts.enter_context(mock.patch.object(Checkpoints, "epoch_end", stop_after_an_epoch))
            train_at(root, f"{VIT} {flags}", "--epochs", 2, "--name", name)
        (root / "saved" / f"{name}.checkpoint").replace(root / "checkpoint" / f"{name}.checkpoint")
    studies = root / "study" / "saved" / "studies"
    names = [("cnn", f"study_digits_{recipe}_cnn_seed0", ()) for recipe in compare.RECIPES]
    names += [("mlp", f"study_digits_{recipe}_mlp_seed0", ()) for recipe in compare.RECIPES]
    names += [("vit", f"ablation_digits_1epochs_{row}", ()) for row in ("default_seed0", "default_seed1", "sgd_seed0")]
    names += [("mlp", f"folds_fold{k}", ("--fold", f"{k}/2")) for k in range(2)]
    for model, name, more in names:
        train_at(root / "study", MODELS[model], "--epochs", 1, "--name", f"studies/{name}", *more)
    compare.load_runs(study_in(root / "study"))  # writes the .npz
    for path in studies.iterdir():
        if path.suffix not in (".json", ".npz"):
            path.unlink()
    make_pictures(root / "picture")
    (root / "cifar" / "data_batch_1").write_bytes(
        pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 4})
    )
    with tarfile.open(root / "cifar" / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(root / "cifar" / "data_batch_1", "cifar-10-batches-py/data_batch_1")


def make_pictures(folder: Path) -> None:
    """A picture in each of Pillow's usual formats and modes."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8), "RGBA")
    for ending in "png jpg tif gif webp bmp ppm tga ico jp2 pcx sgi dds avif".split():
        with contextlib.suppress(OSError, KeyError, ValueError):  # a Pillow that cannot write this format
            colours.convert("RGB").save(folder / f"rgb.{ending}")
    for mode in ("RGBA", "P", "L", "LA", "1", "I;16"):
        image = colours.convert("L").convert(mode) if mode[0] == "I" else colours.convert(mode)
        image.save(folder / f"{mode.replace(';', '')}.png", **({"transparency": 3} if mode == "P" else {}))
    for mode, compression in (("F", None), ("RGB", "tiff_lzw"), ("RGB", "jpeg"), ("CMYK", None), ("1", "group4")):
        colours.convert("RGB").convert(mode).save(folder / f"{mode}_{compression}.tif", compression=compression)
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.convert("RGB").save(folder / "turned.jpg", exif=exif)
    frames = [colours.convert("RGB").rotate(90 * k) for k in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])


# ------------------------------------------------------------------------------------------------------- damage


def damaged(r: random.Random, data: bytes, others: list[Path]) -> tuple[bytes, str]:
    """Bytes that are no longer those of the file, and what was done to them."""
    size = len(data)
    (a, b), n = sorted((r.randrange(size), r.randrange(size))), min(r.choice((1, 4, 64, 1000, 10_000)), size)
    digits = [i for i, byte in enumerate(data) if 48 <= byte < 58] or [a]

    def put(start: int, new: bytes) -> bytes:
        return data[:start] + new + data[start + len(new) :]

    def flipped() -> bytes:
        changed = bytearray(data)
        for _ in range(r.choice((1, 1, 3, 20))):
            changed[r.randrange(size)] ^= 1 << r.randrange(8)
        return bytes(changed)

    ways = {
        "bits": flipped,
        "zeros": lambda: put(a, bytes(n)),
        "noise": lambda: put(a, r.randbytes(n)),
        "digit": lambda: put(r.choice(digits), b"%d" % r.randrange(10)),
        "number": lambda: put(
            min(a, r.randrange(200)), r.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x32\xc8", b"\xc8\x32"))
        ),
        "cut": lambda: data[:a],
        "longer": lambda: data + r.randbytes(n),
        "doubled": lambda: data[: a + n] + data[a:],
        "swapped": lambda: data[:a] + data[b : b + n] + data[a + n : b] + data[a : a + n] + data[b + n :],
        "foreign": lambda: r.choice(others).read_bytes(),
        "empty": lambda: b"",
        "text": lambda: r.choice((b"hello\n", b"{}", b"[]", b"null", b"[" * 10**5, b"1" * 5000)),
    }
    kind = r.choice(["bits", "number", "digit", *ways])
    return ways[kind](), f"{kind} at {a} of {size}"


class Call:
    """Unpickling this calls a function."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def nested(depth: int, width: int = 1) -> list:
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


DEEP = "<nested>"  # stands for a list 5,000 deep
nan, inf = float("nan"), float("inf")
PLAIN = [None, True, -1, 0, 1, 2.5, 1e308, inf, nan, 10**30, 20_000, 10**7, "", "x" * 10**5, "a\nb $^", [], {}]
PLAIN += [[1] * 1000, ["x"], {"a": 1}, [None], [[1, 2], [3]], DEEP]
# fmt: off
TENSORS = {
    "empty": lambda: torch.zeros(0), "scalar": lambda: torch.tensor(1.0), "shape": lambda: torch.zeros(3, 5, 7),
    "booleans": lambda: torch.ones(2) > 0, "integers": lambda: torch.arange(8), "complex": lambda: torch.zeros(8) * 1j,
    "meta": lambda: torch.ones(8).to("meta"), "sparse": lambda: torch.eye(8).to_sparse(),
    "bfloat16": lambda: torch.ones(8).bfloat16(), "stride 0": lambda: torch.zeros(1).expand(8, 8),
}
UNSIGNED = {  # of which no checksum is made: some take as long to make as to check
    "huge stride 0": lambda trap: torch.zeros(1).expand(4 * 10**8), "nested": lambda trap: nested(5000),
    "shared lists": lambda trap: nested(10, width=10), "trap": Trap, "bytearray": lambda trap: Call(bytearray, 2**31),
    "range": lambda trap: Call(range, 10**12), "long": lambda trap: 1 << 8 * 10**6, "bytes": lambda trap: b"bytes",
    "module": lambda trap: network.TransformerBlock(8, 2), "set": lambda trap: {1, 2},
}
TWISTS = {
    "flat": torch.flatten, "one more axis": lambda x: x[None], "none left": lambda x: x.flatten()[:0],
    "one less": lambda x: x.flatten()[:-1], "twice": lambda x: x.flatten().repeat(2), "double": torch.Tensor.double,
    "long": torch.Tensor.long, "bool": torch.Tensor.bool, "complex": lambda x: x.to(torch.complex64),
    "nan": lambda x: x.float() * nan, "large": lambda x: x.float() * 1e38,
}
# fmt: on
SPECIAL = {  # places, with values that may matter there
    "model": {
        "model": ["CNN", "FeedForward", "VisionTransformer", "Model", "OwnModel", "TimmModel"],
        "config.hidden_size": [20_000, 10**7, 10**12, -8, 0, 7, 2.5],
        "config.num_blocks": [10**7, -1, 0, 2, 1e9],
        "config.img_size": [0, -4, 33, 10**5, 16.0],
        "config.patch_size": [0, -4, 1, 33, 16.0],
        "config.output_size": [0, 1, 11, 10**9, -1],
        "metadata.mean": [[], [0.0], [0.0] * 4, [nan] * 3, [[0.0] * 3], "abc", ["a"] * 3],
        "metadata.std": [[], [0.0] * 3, [1.0] * 2, [1.0] * 4, [nan] * 3, 1.0, {"a": 1}],
        "metadata.classes": [[], ["a"], list(range(10)), ["$^"] * 10, "0123456789", ["x" * 10**4] * 10, [None] * 10],
        "metadata.source": ["", ".", "/nowhere", "cifar10", "auto", 5, "a\0b", "x" * 5000],
        "metadata.dataset": [5, None, "cifar10", [], "a\0b"],
    },
    "checkpoint": {
        "results": [{}, {"test_accuracy": None}, {"test_accuracy": "x"}, {"test_accuracy": [1]}, 5, [], "x"],
        "runner.progress.epoch": [-1, 2, 10**9, 1.5, None, "1"],
        "runner.progress.step": [-1, 10**9, 10**30, 1.5, None],
        "runner.progress.batch": [-1, 1, 10**9, 0.5, None],
        "runner.random_state": [torch.zeros(5056, dtype=torch.uint8), torch.zeros(3), None],
        "runner.cuda_random_state": [None, 5, [1], {}],
        "runner.scheduler.last_epoch": [-1, 10**9, 10**400, "1", None, nan],
    },
    "studies": {
        "results.val_accuracy": [None, "x", [], nan, inf, True, 10**400, -3],
        "metrics.val_accuracy": [[], [None], ["x"], {}, 5, [0.5] * 3, {"0": 1}, "x"],
        "val_seconds": [[None], ["x"], [nan], "x", {"0": 1}, [-1]],
        "config.epochs": ["1", None, 1.0, True, 2],
        "provenance.threads": [None, [], "x"],
    },
}


def plain(value: Any) -> Any:
    """A copy whose containers are dicts and lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def place(r: random.Random, root: dict) -> tuple[dict | list, Any, str]:
    """A container somewhere in nested ones, a key or index in it, and the way there."""
    node, path = root, ""
    while True:
        key = r.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path = f"{path}.{key}"
        if not (isinstance(node[key], dict | list) and node[key] and r.random() < 0.8):
            return node, key, path[1:]
        node = node[key]


def mutate(r: random.Random, root: dict, special: dict, draw: Callable) -> str:
    """Change one place in nested dicts and lists; returns what was done. `draw()` is a value and its name."""
    node, key, path = place(r, root)
    kind = r.choice(
        "special special special value value value twist twist remove add rename number cut swap self".split()
    )
    if kind == "special" and special:
        path = r.choice(list(special))
        node, key = root, path.rpartition(".")[2]
        for step in path.split(".")[:-1]:
            node = node.get(step, {}) if isinstance(node, dict) else {}
        if not isinstance(node, dict):
            node = root
        node[key] = r.choice(special[path])
        return f"{path} = {ascii(node[key])[:40] if isinstance(node[key], str | float | list | dict) else kind}"
    if kind == "twist" and isinstance(node[key], torch.Tensor):
        kind = r.choice(list(TWISTS))
        node[key] = TWISTS[kind](node[key])
    elif kind == "remove":
        del node[key]
    elif kind in ("rename", "number") and isinstance(node, dict):
        node[f"{key}_" if kind == "rename" else r.randrange(3)] = node.pop(key)
    elif kind == "cut" and isinstance(node[key], list):
        node[key] = node[key][: r.randrange(len(node[key]) + 1)] or node[key] * 3
    elif kind == "swap":
        other = r.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node[key], node[other] = node[other], node[key]
    elif kind == "self":
        node[key] = r.choice((root, node))
    elif kind == "add" and isinstance(node, dict):
        node["new"], kind = draw()
    else:
        node[key], kind = draw()
    return f"{path}: {kind}"


def craft_tensors(r: random.Random, source: Path, target: Path, trap: Path) -> tuple[bool, str]:
    """A file of tensors and plain values with other contents; whether its checksum is right, and what was done."""
    if r.random() < 0.01:
        return False, bomb(source, target, "data/0", b"")
    contents, signed = plain(files.read_file(source)), r.random() < 0.85

    def draw():
        if signed and r.random() < 0.6:
            value = r.choice(PLAIN)
            return (nested(5000) if value is DEEP else value), f"= {ascii(value)[:40]}"
        name = r.choice(list(TENSORS if signed else UNSIGNED))
        return (TENSORS[name]() if signed else UNSIGNED[name](trap)), f"= {name}"

    special = SPECIAL[source.parent.name] if signed else {}
    done = "; ".join(mutate(r, contents, special, draw) for _ in range(r.choice((1, 1, 2))))
    if signed:
        with contextlib.suppress(Exception):  # there is no checksum of some contents, such as a list within itself
            files.write_file(target, contents)
            return True, done
    sys.setrecursionlimit(10**5)
    torch.save({**contents, "sha256": "0" * 64}, target)
    return False, done


def craft_report(r: random.Random, source: Path, target: Path, trap: Path) -> tuple[bool, str]:
    contents = json.loads(source.read_text())
    has_sum = contents.pop("sha256", None) is not None

    def draw():
        value = r.choice(PLAIN)
        return value, f"= {ascii(value)[:40]}"

    done = "; ".join(mutate(r, contents, SPECIAL["studies"], draw) for _ in range(r.choice((1, 1, 2))))
    try:
        report.write_json(target, contents)
    except (RecursionError, ValueError):  # a dict within itself
        target.write_text("[1, 2]")
        return not has_sum, done
    text = target.read_text()
    assert ('"sha256"' in text) == has_sum, "write_json does not write the checksum that stored reports have"
    target.write_text(text.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000))
    return not (has_sum and DEEP in text), done


def craft_answers(r: random.Random, source: Path, target: Path, trap: Path) -> tuple[bool, str]:
    with np.load(source) as stored:
        arrays = dict(stored)
    key = r.choice(list(arrays))
    array, objects = arrays.pop(key), np.empty(3, dtype=object)
    if r.random() < 0.02:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (77 * 2**24,)})
        return True, bomb(source, target, f"{key}.npy", header.getvalue())
    objects[:] = [Trap(trap), None, "x"]
    others = [objects, [], 1, "x", nan, 10**400, array.ravel()[:0], array.ravel()[:-1], array[None], [array] * 2]
    others += [array.astype("U9"), np.zeros(3, complex), np.zeros(1, "M8[s]"), np.broadcast_to(np.uint8(1), 10**6)]
    others += [np.full(array.shape, value) for value in (nan, inf, -1, 200, 10**18, True, b"x")]
    changed = np.asarray(r.choice(others))
    np.savez(target, **arrays, **{r.choice((key, key, key, "new")): changed})
    return True, f"{key} = {changed.dtype} {changed.shape}"


def craft_picture(r: random.Random, source: Path, target: Path, trap: Path) -> tuple[bool, str]:
    if r.random() < 0.02:
        mode = r.choice(("1", "L", "P", "I;16"))
        large = Image.new(mode, (12_000, 12_000))
        large.save(target, "png", compress_level=1, **({"transparency": 0} if mode == "P" else {}))
        return True, f"a picture of 144 megapixels, {mode}"
    size, mode = (r.choice((1, 2, 3, 5000)), r.choice((1, 7))), r.choice(("1", "L", "LA", "P", "RGBA", "I;16"))
    Image.new(mode, size[:: r.choice((1, -1))]).save(target, "png")
    return True, f"{size} {mode}"


def craft_cifar(r: random.Random, source: Path, target: Path, trap: Path) -> tuple[bool, str]:
    data = pickle.dumps({"data": Trap(trap), "labels": [Trap(trap)]}, r.randrange(6))
    target.write_bytes(data)
    if source.suffix == ".gz":
        with tarfile.open(target, "w:gz") as tar:
            member = tarfile.TarInfo(
                r.choice(("cifar-10-batches-py/data_batch_1", "../../data_batch_1", "/tmp/fuzz_x"))
            )
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return False, "trap"


def bomb(source: Path, target: Path, name: str, header: bytes) -> str:
    """A zip whose member `name` unpacks to `header` and 1.2 GiB of zeros."""
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zip:
        for member in whole.namelist():
            with zip.open(member, "w", force_zip64=True) as file:
                if member.endswith(name):
                    file.write(header)
                    for _ in range(77):
                        file.write(bytes(2**24))
                else:
                    file.write(whole.read(member))
    return f"{name} unpacks to 1.2 GiB"


# ------------------------------------------------------------------------------------------------ what is called


def study_in(folder: Path) -> compare.Config:
    return compare.Config(dataset="digits", epochs=1, output_dir=str(folder))


def call_predict(path: Path, folder: Path, picture: Path | None = None) -> None:
    photo = picture or folder / "photo.png"
    if picture is None:
        Image.new("RGB", (20, 30), "red").save(photo)
    flags = [str(photo), "--checkpoint", str(path), "--output_dir", str(folder / "figures"), "--device", "cpu"]
    predict.main(flags)


def call_drawing(path: Path, folder: Path) -> None:
    with mock.patch.object(utils, "save_figure", save_figure):
        call_predict(path, folder)


def call_test_images(path: Path, folder: Path) -> None:
    model = trained.load_model(path)
    trained.predict(model, trained.test_loader(model, None, 500, "cpu"))


def call_train(path: Path, folder: Path, *more: object) -> None:
    name = path.stem.partition(".")[0]
    train_at(folder, MODELS.get(name) or f"{VIT} {OPTIONS[name]}", "--name", name, *more)


def call_folder(path: Path, folder: Path) -> None:
    for number, (part, name) in enumerate(itertools.product(("train", "val", "test"), ("cat", "dog"))):
        (folder / "pets" / part / name).mkdir(parents=True)
        Image.new("RGB", (9, 9), (number, 9 * number, 99 - number)).save(folder / "pets" / part / name / "a.png")
    shutil.copy(path, folder / "pets" / "train" / "cat")
    setup_cifar.load_data(str(folder / "pets"), img_size=8)


def call_study(path: Path, folder: Path) -> None:
    name = path.stem.partition("_")[0]
    if name == "folds":
        run_main("studies.crossval", *FOLDS.split(), "--output_dir", folder)
    else:
        module = {"study": "studies.compare", "ablation": "studies.ablation"}[name]
        run_main(module, "--no_train", "--dataset", "digits", "--epochs", 1, "--output_dir", folder)


class Family(NamedTuple):
    where: str  # a damaged file lies, in the folder of its case
    files: str  # the whole ones below the folder of all, as a pattern
    craft: Callable  # makes a file with other contents
    calls: list[Callable]  # what a file is given to, with the folder of its case


def call_start(path: Path, folder: Path) -> None:
    call_train(path, folder, "--epochs", 1, "--init_from", path)


def call_resume(path: Path, folder: Path) -> None:
    call_train(path, folder, "--epochs", 2, "--resume")


def call_read_report(path: Path, folder: Path) -> None:
    runs.read_report(path.stem, study_in(folder))


def call_load_runs(path: Path, folder: Path) -> None:
    compare.load_runs(study_in(folder))


def call_read_image(path: Path, folder: Path) -> None:
    to_array(read_image(path), 32)


def call_predict_picture(path: Path, folder: Path) -> None:
    call_predict(folder / "vit.pt", folder, path)


def call_cifar(path: Path, folder: Path) -> None:
    setup_cifar.load_data("cifar10", folder)


IN_STUDY = "saved/studies"
ON_MODEL = [*[call_predict] * 3, call_drawing, call_test_images, call_start]
ON_PICTURE = [*[call_read_image] * 3, call_predict_picture, call_folder]
FAMILIES = {
    "model": Family(".", "model/*", craft_tensors, ON_MODEL),
    "checkpoint": Family("saved", "checkpoint/*", craft_tensors, [call_resume]),
    "report": Family(IN_STUDY, f"study/{IN_STUDY}/*.json", craft_report, [call_read_report, call_study]),
    "answers": Family(IN_STUDY, f"study/{IN_STUDY}/*.npz", craft_answers, [call_load_runs]),
    "picture": Family(".", "picture/*", craft_picture, ON_PICTURE),
    "cifar": Family("cifar-10-batches-py", "cifar/*", craft_cifar, [call_cifar]),
}


# --------------------------------------------------------------------------------------------------------- cases


def in_child(action: Callable[[], None], folder: Path) -> tuple[int, int]:
    """Run `action` in a process of its own, which writes to files in `folder`; its wait status and most bytes."""
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            limit(folder)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        finally:
            sys.stdout.flush()
            os._exit(0)
    _, status, usage = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it started
    return status, usage.ru_maxrss * UNIT


def memory_now() -> int:
    """Most bytes that this process has had; a child begins with what it has."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def limit(folder: Path) -> None:
    """Have this process write to `folder`, end after a while, and get only so much memory."""
    import resource

    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    faulthandler.enable(all_threads=False)
    faulthandler.dump_traceback_later(SECONDS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS + 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = Path("/proc/self/statm")
    if memory.exists():
        size = int(memory.read_text().split()[0]) * resource.getpagesize() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def craft(r: random.Random, family: str, source: Path, target: Path) -> None:
    """Make the file of a case at `target`, and say in facts.json what was done."""
    signed, done = FAMILIES[family].craft(r, source, target, Path("sprung").absolute())
    Path("facts.json").write_text(json.dumps({"signed": signed, "done": done}))


def use(call: Callable, source: Path, target: Path, signed: bool) -> None:
    """Give the file to the program, and say in outcome.json what came of it."""
    copy = Path("copy" + target.suffix)
    if not signed:
        shutil.copy(target, copy)
    outcome, error, where = "accepted", "", ""
    try:
        with cli.one_line_errors():
            call(target, Path.cwd())
    except SystemExit as stop:
        outcome = "refused" if stop.code in (1, 2) else "accepted"
    except BaseException as problem:
        traceback.print_exc()
        outcome, error = "traceback", f"{type(problem).__name__}: {' '.join(str(problem).split())[:100]}"
        frames = [
            f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(problem.__traceback__)
        ]
        where = innermost(reversed(frames))
    if outcome == "accepted" and not signed:
        try:
            outcome = outcome if same(contents(copy), contents(source)) else "silent"
        except Exception:  # whoever took this file does not check what other readers check
            outcome = "silent"
    Path("outcome.json").write_text(json.dumps([outcome, error, where]))


def innermost(frames: Any) -> str:
    """The first of these lines that is of the project itself."""
    own = (frame.replace(f"{cli.ROOT}/", "") for frame in frames if str(cli.ROOT) in frame)
    return next((frame for frame in own if not frame.startswith((".venv", "tests/"))), "")


def contents(path: Path) -> Any:
    if path.suffix in (".pt", ".checkpoint"):
        return files.read_file(path)
    if path.suffix == ".json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    if path.suffix == ".npz":
        with np.load(path) as stored:
            return {key: stored[key].tolist() for key in ("correct", "labels", "classes", "flops")}
    return path.read_bytes()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and (a == b or a != a and b != b)


class Result:
    """What came of a case: `outcome` accepted, refused or one of FAULTS; `error` and `where` of a fault."""

    def __init__(self, family: str, seed: int, number: int, root: Path, show: bool = False):
        self.facts = {"done": ""}
        self.case, self.outcome, self.error, self.where = f"{family}:{number}", "", "", ""
        r = random.Random(f"{seed} {family} {number}")
        source = r.choice(sorted(root.glob(FAMILIES[family].files)))
        call = r.choice(FAMILIES[family].calls)
        with tempfile.TemporaryDirectory(prefix="fuzz") as name:
            folder = Path(name)
            target = folder / ("." if source.suffix == ".gz" else FAMILIES[family].where) / source.name
            if "studies" in FAMILIES[family].where:
                shutil.copytree(root / "study", folder, dirs_exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            if family == "cifar" and source.suffix != ".gz":
                for file in setup_cifar.CIFAR["cifar10"].files:
                    (target.parent / file).touch()
            shutil.copy(root / "model" / "vit.pt", folder / "vit.pt")
            if r.random() < 0.45:
                others = [path for other in FAMILIES if other != family for path in sorted((root / other).glob("*.*"))]
                data, done = damaged(r, source.read_bytes(), others)
                target.write_bytes(data)
                self.facts = {"signed": family == "picture", "done": done}
            else:
                in_child(lambda: craft(r, family, source, target), folder)
                if not (folder / "facts.json").exists():
                    self.outcome, self.error = "not made", (folder / "stderr").read_text().splitlines()[-1]
                    return
                self.facts = json.loads((folder / "facts.json").read_text())
            before = memory_now()
            status, most = in_child(lambda: use(call, source, target, self.facts["signed"]), folder)
            self.judge(folder, status, most - before)
            if show:
                print(*((folder / name).read_text(errors="replace") for name in ("stdout", "stderr")))

    def judge(self, folder: Path, status: int, memory: int) -> None:
        errors = without_bars((folder / "stderr").read_text(errors="replace"))
        errors = "".join(line for line in errors.splitlines(keepends=True) if not line.startswith("skipped"))
        if (folder / "outcome.json").exists():
            self.outcome, self.error, self.where = json.loads((folder / "outcome.json").read_text())
            if self.outcome == "refused" and len(errors.splitlines()) != 1:
                self.outcome, self.error = "not one line", errors.strip()[:100]
            elif self.outcome == "refused":
                self.error = errors.strip()
        else:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            kind = {signal.SIGALRM: "hang", signal.SIGKILL: "memory"}.get(number, "crash")
            self.outcome, self.error = kind, f"signal {number}" if number else f"exit {os.WEXITSTATUS(status)}"
            lines = re.findall(r'File "(.+)", line (\d+) in (\w+)', errors)
            self.where = innermost(f"{file}:{line} in {name}" for file, line, name in lines)
        if (folder / "sprung").exists():
            self.outcome = "code ran"
        elif memory > MEMORY and self.outcome not in ("hang", "crash"):
            self.error, self.where = f"{memory / 2**30:.1f} GiB, then {self.outcome}", self.facts["done"][:40]
            self.outcome = "memory"


def without_bars(text: str) -> str:
    """What stays on the screen of progress bars and lines."""
    text = re.sub(r"[^\r\n]*\| *\d+/\d+ \[[^]\r\n]*\]", "", text)
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n") if line.rpartition("\r")[2].strip())


def use_little_data() -> None:
    """Have digits be few, pictures not drawn and models not compiled, so that a case takes little time."""
    digits, load = setup_cifar.load_data("digits"), setup_cifar.load_data
    each = [torch.nonzero(digits.train.labels == label)[:6, 0] for label in range(10)]
    parts = [torch.cat([indices[part] for indices in each]) for part in (slice(4), slice(4, 5), slice(5, 6))]
    little = [Split(digits.train.images[part], digits.train.labels[part]) for part in parts]

    def load_little(dataset="auto", *args, **options):
        known = isinstance(dataset, str) and dataset == "digits" and options.get("img_size", 32) == 32
        return Dataset("digits", digits.classes, *little, flip=False) if known else load(dataset, *args, **options)

    for module in (train, crossval, trained):
        module.load_data = load_little
    for module in (ablation, crossval, comparison_figures, utils):
        module.save_figure = lambda figure, path: None
    Run.draw_pictures = lambda *_: []
    train.compile_training = lambda *_: None  # half a minute
    bootstrap = comparison.paired_bootstrap
    comparison.paired_bootstrap = lambda *args, **options: bootstrap(*args, **{**options, "resamples": 50})
    compare.choose_device = lambda *_: torch.device("cpu")


def count_outcomes(results: dict[str, list[Result]]) -> list[dict]:
    """A row for each family: its cases, and how many had each outcome."""
    rows = []
    for family, found in results.items():
        counts = collections.Counter(result.outcome for result in found)
        rows.append({"family": family, "cases": len(found), **{name: counts[name] for name in OUTCOMES}})
    return rows


def report_results(results: dict[str, list[Result]]) -> None:
    print("| family | cases | " + " | ".join(OUTCOMES) + " |\n|:--|" + "--:|" * (len(OUTCOMES) + 1))
    for row in count_outcomes(results):
        print(f"| {' | '.join(map(str, row.values()))} |")
    print()
    groups = collections.defaultdict(list)
    for result in itertools.chain(*results.values()):
        if result.outcome in FAULTS:
            kind = re.sub(r"[\d.]+", "#", result.error.partition(":")[0])
            groups[result.case.partition(":")[0], result.outcome, kind, result.where].append(result)
    for (_, outcome, _, where), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        first = found[0]
        print(f"{len(found)} x {outcome} at {where or '?'}: {first.error} [{first.case}: {first.facts['done'][:120]}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--cases", type=int, help="of each family; default: 100, or as many as the minutes allow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", metavar="FAMILY:NUMBER", help="one case, with its output")
    parser.add_argument("--store", metavar="FILE", type=Path, help="where the counts go, as JSON")
    args = parser.parse_args()
    if not hasattr(os, "fork"):
        print("each case needs a process of its own by os.fork, which this system does not have: nothing is done")
        return
    torch.set_num_threads(1)
    results = {family: [] for family in args.families}
    with (
        tempfile.TemporaryDirectory(prefix="fuzz") as name,
        mock.patch.dict(os.environ, {**ENVIRONMENT, "DATA_DIR": f"{name}/data"}),
    ):
        root = Path(name)
        use_little_data()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            make_whole_files(root)
            gc.collect()  # what stopped runs left
        if args.only:
            family, number = args.only.split(":")
            result = Result(family, args.seed, int(number), root, show=True)
            print(json.dumps(vars(result), indent=1))
            raise SystemExit(result.outcome in FAULTS)
        end = time.monotonic() + 60 * args.minutes
        unlimited = args.cases is None and args.minutes < float("inf")
        numbers = itertools.count() if unlimited else range(100 if args.cases is None else args.cases)
        for number, family in ((number, family) for number in numbers for family in args.families):
            if time.monotonic() > end:
                break
            result = Result(family, args.seed, number, root)
            results[family].append(result)
            if result.outcome in FAULTS:
                print(
                    f"{result.outcome}: --seed {args.seed} --only {result.case}  {result.error} {result.where}",
                    flush=True,
                )
    report_results(results)
    if args.store:
        came_of = report.provenance() | {"command": shlex.join(["python", "-m", "tests.fuzz", *sys.argv[1:]])}
        report.write_json(args.store, {"seed": args.seed, "rows": count_outcomes(results), "provenance": came_of})
    raise SystemExit(any(result.outcome in FAULTS for found in results.values() for result in found))


if __name__ == "__main__":
    main()
