"""Training steps to be timed, and the clock that does it: what the studies of speed share."""

import time
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from images.loader import Dataset, Split
from runner import Runner, choose_precision
from studies.runs import markdown
from training.optim import build_optimizer, build_schedule

AUTO = choose_precision("auto", torch.device("cpu"))  # what `--precision auto` is on this processor


def training_step(
    model: nn.Module, optimizer, images: torch.Tensor, labels: torch.Tensor, precision: str = "fp32"
) -> Callable[[], None]:
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def our_runner(model: nn.Module, optimizer: str = "muon", kind: type[Runner] = Runner, precision: str = AUTO) -> Runner:
    """As train.py makes it."""
    optimizer = build_optimizer(model, optimizer)
    schedule = build_schedule(optimizer, 10_000)
    return kind(model.train(), optimizer, nn.CrossEntropyLoss(), "cpu", schedule, verbose=False, precision=precision)


def our_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer="adamw", precision="fp32"):
    """What `Runner` does in a step, with metrics and the check for infinities."""
    runner = our_runner(model, optimizer, precision=precision)
    return lambda: runner.train_step(images, labels)


def take_turns(
    steps: dict[str, Callable[[], None]], repeats: int, warmup: int = 3, now: Callable[[], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of each step, measured in turns.

    Args:
        now: gives the time; default: of one thread that of the processor, which other work on the machine hardly
            changes, of several that of the clock.
    """
    now = now or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    seconds = {name: [] for name in steps}
    for repeat in tqdm(range(warmup + repeats), desc="taking turns"):
        for name, step in steps.items():
            started = now()
            step()
            if repeat >= warmup:
                seconds[name].append(now() - started)
    return seconds


def synthetic_data(images: int = 4096) -> Dataset:
    """Random pictures of CIFAR-10's shape: how long they take does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        pictures = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(pictures, torch.randint(0, 10, (n,), generator=generator))

    return Dataset("random", [str(i) for i in range(10)], split(images), split(512), split(512), flip=True)


def print_table(rows: list[dict], columns: str) -> None:
    """As Markdown; `columns` are keys of a row, each with its format: "batch_size error:+.0%"."""
    texts = {column.partition(":")[0].replace("_", " "): "{" + column + "}" for column in columns.split()}
    print("\n" + markdown([{heading: text.format(**row) for heading, text in texts.items()} for row in rows]))
