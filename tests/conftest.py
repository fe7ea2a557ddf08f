import os
from pathlib import Path

import pytest
import torch

import setup_cifar
import training.options
import training.run

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: on a busy machine two are slower

DATA_DIR = os.environ.get("DATA_DIR")


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """No test fetches data from the internet: nothing listens on this port. Where data lies, tests say."""
    monkeypatch.setenv("CIFAR10_URL", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setenv("CIFAR100_URL", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    for name in ("MNIST", "FASHIONMNIST", "SVHN"):
        monkeypatch.setenv(f"{name}_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("DATA_DIR", raising=False)


@pytest.fixture(autouse=True)
def project(monkeypatch):
    """A run in this process that is told no --output_dir writes to the working directory and not to this project."""
    for module in (training.run, training.options, setup_cifar):
        monkeypatch.setattr(module, "home", Path)


@pytest.fixture(scope="session")
def digits():
    return setup_cifar.load_data("digits")


@pytest.fixture(scope="session")
def cifar10():
    """The real CIFAR-10, from the environment's DATA_DIR or data/ beside the modules."""
    folder = Path(DATA_DIR or Path(setup_cifar.__file__).parent / "data")
    if not (folder / setup_cifar.CIFAR["cifar10"].folder).is_dir():
        pytest.skip("no cifar-10-batches-py in DATA_DIR or data/")
    return setup_cifar.load_data("cifar10", folder)


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)

    @property
    def sprung(self):
        return self.path.exists()


@pytest.fixture
def trap(tmp_path_factory):
    return Trap(tmp_path_factory.mktemp("trap") / "sprung")
