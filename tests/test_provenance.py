"""Where a stored figure comes from: the code's commit, the processor, versions, and the seconds of the processor."""

import importlib.metadata
import shutil
import subprocess
import types

import pytest
import torch

from support import cli, report
from training import callbacks
from training.callbacks import Clock


def version_in(folder, monkeypatch):
    monkeypatch.setattr(report, "ROOT", folder)
    report.code_version.cache_clear()
    try:
        return report.code_version()
    finally:
        report.code_version.cache_clear()


def git(folder, *words):
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_and_whether_the_code_is_that_of_the_commit(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text("lr = 1\n")
    (tmp_path / "results.json").write_text("{}")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    (tmp_path / "results.json").write_text("[]")  # what runs write is no change of the code
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert version_in(tmp_path, monkeypatch) == {"commit": commit, "clean": True}
    (tmp_path / "train.py").write_text("lr = 2\n")
    assert version_in(tmp_path, monkeypatch) == {"commit": commit, "clean": False}
    inner = tmp_path / "unpacked"  # the project, unpacked in somebody else's repository
    inner.mkdir()
    assert version_in(inner, monkeypatch) == {"commit": None, "clean": None}


def test_without_git_or_a_repository_the_commit_is_not_known(tmp_path, monkeypatch):
    unknown = {"commit": None, "clean": None}
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert version_in(tmp_path, monkeypatch) == unknown
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version_in(tmp_path, monkeypatch) == unknown


def test_processor_and_versions_are_named():
    found = report.provenance()
    assert found["versions"]["numpy"] == importlib.metadata.version("numpy") and "torch" in found
    assert isinstance(found["cpu"], str) and found["cpu"]
    assert "not-installed" not in found["versions"]


def test_the_accelerator_is_the_one_that_was_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert report.provenance("cpu")["accelerator"] is None
    assert report.provenance("cuda:1")["accelerator"] == "card 1"
    assert report.provenance(torch.device("mps"))["accelerator"] == "MPS"


@pytest.mark.parametrize(("system", "shown"), [("posix", "'/a b/python' x.py"), ("nt", '"/a b/python" x.py')])
def test_a_command_to_go_on_with_is_in_the_words_of_the_shell(monkeypatch, system, shown):
    monkeypatch.setattr(cli.os, "name", system)
    assert cli.for_shell(["/a b/python", "x.py"]) == shown


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("numpy", "not-installed"))
    assert list(report.package_versions()) == ["numpy"]


def test_seconds_of_the_processor_go_on_in_a_resumed_run(monkeypatch):
    now = iter([0.0, 10.0, 100.0, 103.0])  # of the processor: a step of 10 seconds, and after --resume one of 3
    times = types.SimpleNamespace(perf_counter=lambda: 0.0, process_time=lambda: next(now))
    monkeypatch.setattr(callbacks, "time", times)
    first, second, earlier = Clock(), Clock(), Clock()
    for clock, before in ((first, None), (second, first)):
        if before:
            clock.load_state_dict(before.state_dict())
        clock.step_start(None)
        clock.step_end(None)
    assert (first.processor_seconds, second.processor_seconds) == (10, 13)
    earlier.load_state_dict({"seconds": 5.0, "val_seconds": []})  # of a version that did not count them
    earlier.step_end(None)
    assert earlier.processor_seconds is None and earlier.state_dict()["processor_seconds"] is None
