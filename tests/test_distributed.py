"""Several processes train as one does: started by torchrun, on digits, with shares of batches that are uneven or empty.

Tolerances: what is only summed in another order differs by rounding (1e-5). Muon orthogonalises in bf16, so that its
weights differ by up to half a percent of the largest (0.005), and the losses by 1e-4. BatchNorm divides by deviations
that are small at the beginning: 5e-4 and 5e-5, at a rate low enough that rounding does not grow from step to step (at
0.05 one thread and two of a single process differ by as much). With these two an image whose likeliest classes tie may
change sides.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch
import torch.nn as nn
from helpers import MODEL, ROOT

from network import Model
from runner import choose_device
from support import distributed
from support.files import read_file
from training.parallel import share_batch_norm

TRAIN = ROOT / "train.py"
SMALL = "--dataset digits --hidden_size 16 --num_heads 2 --num_blocks 2 --patch_size 8 --precision fp32".split()
SMALL += ["--name", MODEL, "--keep_checkpoint"]
SGD = "--optimizer sgd --lr 0.05 --epochs 2"
RUNS = {  # 1150 images: of 191 the last batch has 4, of 1149 it has one, which leaves nothing for a second process
    "adamw": "--optimizer adamw --augment random_erasing+cutmix --grad_clip 0.5 --batch_size 191 --epochs 3",
    "muon": "--batch_size 191 --epochs 2",
    "batch_norm": "--optimizer sgd --lr 0.01 --epochs 2 --tokenizer conv --batch_size 1149",
    "accumulated": f"{SGD} --batch_size 64 --grad_accum 3 --ema 0.9",
    "few": f"{SGD} --batch_size 2 --label_fraction 0.03",  # in three processes the first has no images at all
    "early": f"{SGD} --batch_size 191 --epochs 9 --patience 1 --min_improvement 9",
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA GPUs")),
]

# Several runs of train.py in the same processes, which saves starting them; {rank} in a flag is the process's number.
# A run may also be told to send one process a signal, or to spoil its images, at a step.
WORKER = """
import contextlib, json, math, signal, sys
sys.path.insert(0, {folder!r})
import train
from runner import Runner
from support import distributed
from training.run import Run

fault = None
take_step = Runner.train_step

def train_step(self, images, labels):
    if fault and (self.step, distributed.rank()) == (fault[1], distributed.world_size() - 1):
        if fault[0] == "signal":
            signal.raise_signal(signal.SIGINT)
        else:
            images = images * math.nan
    return take_step(self, images, labels)

draw_pictures = Run.draw_pictures  # where there is a GIF alone, to save time
Run.draw_pictures = lambda self, runner: draw_pictures(self, runner) if self.config.gif_frames else []
Runner.train_step = train_step
with distributed.processes():
    distributed.processes = contextlib.nullcontext  # one group for all runs
    for args, fault in json.loads(sys.argv[1]):
        try:
            train.main([arg.replace("{{rank}}", str(distributed.rank())) for arg in args])
        except SystemExit as stop:
            if fault is None or fault[0] != "signal":
                raise
            print("ended with", stop.code)
"""


def start(command, variables=None, **options):
    """A process whose threads are one, as sums depend on their number too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(variables or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def torchrun(count, script, *args, **options):
    """The processes' parent, started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return start([*command, str(script), *args], **options)


def run(folder, count, runs):
    """Runs, each its arguments and what is to go wrong, in `count` processes: what these printed, and how it ended."""
    script = folder / f"worker_{count}.py"
    script.write_text(WORKER.format(folder=str(TRAIN.parent)), encoding="utf-8")
    if count == 1:
        process = start([sys.executable, str(script), json.dumps(runs)])
    else:
        process = torchrun(count, script, json.dumps(runs))
    try:
        printed, complaints = process.communicate(timeout=900)
    finally:
        process.kill()
    errors = re.findall(r"train.py: error: .*", complaints)
    return SimpleNamespace(printed=printed, complaints=complaints, errors=errors, code=process.returncode)


def results(folder):
    """Report and model of the run that wrote into `folder`."""
    return json.loads((folder / f"saved/{MODEL}.json").read_text(encoding="utf-8")), Model.load(
        folder / f"saved/{MODEL}.pt"
    )


def curves(report):
    return {name: report["metrics"][name] for name in ("train_loss", "val_loss")} | {
        "test_loss": [report["results"]["test_loss"]]
    }


def compare(folder, other, tolerance=1e-5, loss_tolerance=1e-5, ties=0):
    (report, model), (other_report, other_model) = results(folder), results(other)
    for name in ("train_step", "val_step", "train_accuracy", "val_accuracy"):
        within = ties / 287 + 1e-9 if name.endswith("accuracy") else 0  # there are 287 validation images
        assert report["metrics"][name] == pytest.approx(other_report["metrics"][name], abs=within), name
    for name, losses in curves(report).items():
        assert losses == pytest.approx(curves(other_report)[name], rel=loss_tolerance), name
    ours, theirs = model.state_dict(), other_model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert torch.allclose(weights, theirs[name], rtol=0, atol=tolerance), name


# ------------------------------------------------------------------------------------------------- many as one


@pytest.fixture(scope="module", params=DEVICES)
def trained(request, tmp_path_factory):
    """The same runs in one, two and three processes, those in one taken up again in two and the other way round."""
    folder = tmp_path_factory.mktemp("trained")
    common = [*SMALL, "--device", request.param]

    def args(name, output, *more):
        frames = "2" if output.endswith("/adamw") else "0"
        return [*common, *RUNS[name].split(), "--gif_frames", frames, "--output_dir", f"{folder}/{output}", *more]

    interrupted = ("signal", 10)  # of 21 steps: in the middle of the second epoch
    ended = {}
    for count in (1, 2, 3):
        runs = [(args(name, f"{count}_{{rank}}/{name}"), None) for name in RUNS]
        if count < 3:
            runs.append((args("adamw", f"{count}_{{rank}}/resumed"), interrupted))
        if count == 2:
            shutil.copytree(folder / "1_0/resumed", folder / "2_0/resumed_by_2")
            runs.append((args("adamw", "2_{rank}/resumed_by_2", "--resume"), None))
            runs.append((args("muon", "2_{rank}/broken"), ("images", 3)))
        if count == 3:
            runs.append((args("muon", "3_{rank}/unlike", "--seed", "{rank}"), None))
        ended[count] = run(folder, count, runs)
    ended["resumed"] = run(folder, 1, [(args("adamw", "2_0/resumed", "--resume"), None)])
    return SimpleNamespace(folder=folder, ended=ended)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_losses_accuracies_and_weights_are_those_of_one_process(trained, name, count):
    tolerances = {"muon": (0.005, 1e-4, 1), "batch_norm": (5e-4, 5e-5, 1)}.get(name, ())
    compare(trained.folder / f"{count}_0" / name, trained.folder / "1_0" / name, *tolerances)


def test_every_image_is_counted_once(trained, digits):
    """By hand from the saved model; 287 and 360 images, in shares of 143 and 144, or 95 and 96."""
    for count in (2, 3):
        report, model = results(trained.folder / f"{count}_0/adamw")
        mean, std = (torch.tensor(model.metadata[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        for split, accuracy in (("val", "val_accuracy"), ("test", "test_accuracy")):
            part = getattr(digits, split)
            with torch.no_grad():
                right = (model((part.images / 255 - mean) / std).argmax(dim=1) == part.labels).sum().item()
            assert report["results"][accuracy] == right / len(part)
        assert report["provenance"]["processes"] == count


def test_early_stopping_stops_all(trained):
    for count in (1, 2, 3):
        report, _ = results(trained.folder / f"{count}_0/early")
        assert (report["results"]["epochs"], report["results"]["tested_epoch"]) == (2, 1)


def test_the_first_process_alone_writes_and_prints(trained):
    folders = {path.name for path in trained.folder.iterdir() if path.is_dir()}
    assert folders == {"1_0", "2_0", "3_0"}
    for count in (1, 2, 3):
        printed = trained.ended[count].printed
        assert printed.count("test loss") == len(RUNS) + (count == 2)
        assert (f", in {count} processes" in printed) == (count > 1)
    folders = [trained.folder / f"{count}_0/adamw" for count in (1, 2, 3)]
    written = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in folders]
    assert "figures/VisionTransformer_digits_animation.gif" in written[0]
    assert written[0] == written[1] == written[2]


def test_a_signal_to_one_process_stops_all_after_the_same_step(trained):
    for count in (1, 2):
        assert trained.ended[count].printed.count("ended with 130") == 1
        assert "interrupted after step 11;" in trained.ended[count].printed
    assert "to go on: torchrun --nproc_per_node=2 train.py --output_dir" in trained.ended[2].printed
    assert f"--resume --name {MODEL}" in trained.ended[2].printed


def test_a_run_is_taken_up_again_by_another_number_of_processes(trained):
    assert trained.ended["resumed"].code == 0, trained.ended["resumed"].complaints
    for name in ("resumed", "resumed_by_2"):
        compare(trained.folder / "2_0" / name, trained.folder / "1_0/adamw")


def test_a_loss_that_is_not_finite_in_one_process_is_everyones(trained):
    ended = trained.ended[2]
    assert ended.code == 1
    assert len(ended.errors) == 1 and "at step 4 " in ended.errors[0]
    assert not (trained.folder / f"2_0/broken/saved/{MODEL}.pt").exists()


def test_processes_with_other_hyperparameters_are_refused(trained):
    ended = trained.ended[3]
    assert ended.code == 1
    assert len(ended.errors) == 1 and "same hyperparameters" in ended.errors[0]
    assert not (trained.folder / "3_0/unlike").exists()


# ------------------------------------------------------------------------------------------------ ends


def started(folder):
    """torchrun with two processes of train.py that have done an epoch of very many."""
    if os.name == "nt":
        pytest.skip("sends signals")
    endless = "--epochs 5000 --batch_size 191 --gif_frames 0 --device cpu".split()
    process = torchrun(2, TRAIN, *SMALL, *endless, "--output_dir", str(folder), cwd=folder)
    for line in process.stdout:
        if line.startswith("epoch    1/5000"):
            return process
    raise AssertionError(process.communicate()[1])


def test_a_killed_process_ends_the_others_with_one_line(tmp_path):
    process = started(tmp_path)
    workers = psutil.Process(process.pid).children()
    next(worker for worker in workers if worker.environ()["RANK"] == "0").kill()
    killed = time.monotonic()
    _, complaints = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    (error,) = re.findall(r"train.py: error: .*", complaints)
    assert "one of 2 processes was killed" in error and "--resume" in error


def test_where_torchrun_is_killed_its_processes_end_with_a_checkpoint_and_one_line(tmp_path):
    process = started(tmp_path)
    workers = psutil.Process(process.pid).children()
    process.kill()
    psutil.wait_procs(workers, timeout=30)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    printed, complaints = process.communicate(timeout=60)
    step = read_file(tmp_path / f"saved/{MODEL}.checkpoint")["runner"]["progress"]["step"]
    assert printed.count(f"interrupted after step {step};") == 1
    assert "error" not in complaints.lower() and "Traceback" not in complaints and "frame #" not in complaints


def test_processes_whose_torchrun_is_gone_before_they_meet_end_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "_torchrun", None)
    environment = {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**environment, "MASTER_ADDR": "localhost", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    for number, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        with mock.patch("threading.Thread"), pytest.raises(SystemExit, match="1"), distributed.processes():
            pass
        assert capsys.readouterr().err.count("torchrun does not answer") == lines


def test_the_first_process_waits_longer_for_what_is_done_in_turns(tmp_path):
    """Reading a folder may take longer than a process that hangs is waited for."""
    script = tmp_path / "slow.py"
    script.write_text(
        f"import datetime, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom support import distributed\n"
        "with distributed.processes():\n"
        "    import torch.distributed as dist\n"
        "    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=4))\n"
        "    with distributed.main_process_first():\n        time.sleep(6)\n"
        "    print(distributed.all_reduce(1))\n"
    )
    process = torchrun(2, script)
    try:
        printed, complaints = process.communicate(timeout=120)
    finally:
        process.kill()
    assert printed == "2\n", complaints


def test_processes_that_torchrun_has_not_started_need_no_number_on_their_machine(tmp_path):
    script = tmp_path / "by_hand.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom support import distributed\n"
        "with distributed.processes():\n    with distributed.main_process_first():\n"
        "        print(distributed.all_reduce(1))\n"
    )
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = [start([sys.executable, str(script)], {**variables, "RANK": str(rank)}) for rank in (0, 1)]
    try:
        printed = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert printed[0][0] == "2\n", printed


def test_a_process_that_hangs_ends_soon_after_torchrun(tmp_path):
    if os.name == "nt":
        pytest.skip("sends signals")
    hangs = tmp_path / "hangs.py"
    hangs.write_text(
        f"import signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom support import distributed\n"
        "distributed.GRACE = 2\nsignal.signal(signal.SIGTERM, lambda *_: print('asked to stop', flush=True))\n"
        "with distributed.processes():\n    print('hangs', flush=True)\n    while True:\n        time.sleep(9)\n"
    )
    process = torchrun(2, hangs)
    assert process.stdout.readline() == "hangs\n"
    workers = psutil.Process(process.pid).children()
    process.kill()
    printed, _ = process.communicate(timeout=30)  # which waits for all that could still print
    assert printed == "asked to stop\n"
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_stops_all_with_one_checkpoint_and_says_how_to_go_on(tmp_path):
    process = started(tmp_path)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    step = read_file(tmp_path / f"saved/{MODEL}.checkpoint")["runner"]["progress"]["step"]
    assert printed.count(f"interrupted after step {step};") == 1
    assert "--resume" in printed


# ---------------------------------------------------------------------------------------------- shares and devices


@pytest.mark.parametrize("augment", ["none", "crop_flip", "random_erasing+cutmix", "mixup"])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_shares_of_a_batch_together_are_the_batch(digits, augment, world_size):
    small = digits.loader("train", 7).images[:23], digits.train.labels[:23]  # the last batch has two images

    def loader(**share):
        loader = digits.loader("train", 7, shuffle=True, augment=augment, seed=3, **share)
        loader.images, loader.labels = small
        loader.set_epoch(2)
        return loader

    shares = zip(*(loader(rank=rank, world_size=world_size) for rank in range(world_size)), strict=True)
    for share, (images, labels) in zip(shares, loader(), strict=True):
        assert max(len(part) for part, _ in share) - min(len(part) for part, _ in share) <= 1
        assert torch.equal(torch.cat([part for part, _ in share]), images)
        assert torch.equal(torch.cat([part for _, part in share]), labels)


@pytest.mark.parametrize(
    "gpus, name, device", [(0, "auto", "cpu"), (4, "auto", "cuda:2"), (4, "cuda", "cuda:2"), (4, "cpu", "cpu")]
)
def test_each_process_has_a_gpu_of_its_own_where_there_are_any(monkeypatch, gpus, name, device):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with mock.patch.object(torch.cuda, "set_device"), mock.patch.object(distributed, "world_size", return_value=3):
        assert distributed.device_name(name) == device
        with pytest.raises(ValueError, match="cuda:1.*several processes"):
            distributed.device_name("cuda:1")
    assert distributed.device_name("cuda:1") == "cuda:1"


def test_the_command_to_go_on_is_that_of_this_machine(monkeypatch):
    assert [Path(part).resolve() for part in distributed.launcher()] == [Path(sys.executable).resolve()]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with mock.patch.object(distributed, "world_size", return_value=8):
        assert distributed.launcher() == ["torchrun", "--nproc_per_node=4"]
        environment = {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "host0", "MASTER_PORT": "29500"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        flags = ["--nnodes=2", "--node_rank=1", "--master_addr=host0", "--master_port=29500"]
        assert distributed.launcher() == ["torchrun", "--nproc_per_node=4", *flags]


def test_apart_no_process_waits_for_another():
    with mock.patch.object(torch.distributed, "is_initialized", return_value=True):
        with mock.patch.object(torch.distributed, "get_world_size", return_value=3):
            assert distributed.world_size() == 3
            with distributed.apart():
                assert distributed.world_size() == 1 and distributed.all_reduce(5) == 5
            assert distributed.world_size() == 3


@pytest.mark.skipif(torch.cuda.device_count() > 8, reason="needs a machine with fewer GPUs")
def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "8")
    with mock.patch.object(distributed, "world_size", return_value=9), pytest.raises(ValueError, match="cuda:8"):
        choose_device(distributed.device_name("cuda"))


def test_a_batch_norm_that_cannot_be_shared_is_left_alone():
    plain, kinds = nn.BatchNorm2d(3), [{"affine": False}, {"momentum": None}, {"track_running_stats": False}]
    model = nn.Sequential(plain, *(nn.BatchNorm2d(3, **kind) for kind in kinds))
    share_batch_norm(model, torch.device("cpu"))
    assert [type(layer) is nn.BatchNorm2d for layer in model] == [False, True, True, True]
    assert model(torch.randn(4, 3, 2, 2)).isfinite().all()
