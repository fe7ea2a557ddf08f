"""Several processes that train as one: what `torchrun` starts, and what its processes have to agree on.

    torchrun --nproc_per_node=2 train.py

The work is done by torch.distributed, NCCL between CUDA devices and gloo elsewhere; here is what a script needs
besides. In a process that is alone all of this does nothing.
"""

import contextlib
import datetime
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from support.files import short

TIMEOUT = datetime.timedelta(minutes=10)  # a process that ends is missed at once; this is for one that hangs
PATIENCE = datetime.timedelta(days=1)  # with one that does something before the others: a download may take long
GRACE = 15  # seconds that a process whose torchrun was killed has for its last checkpoint
_store = None  # shared by the processes, before and after anything goes wrong
_torchrun = None  # its process id, where it keeps the store
_turns = itertools.count()  # of `main_process_first`
_apart = False  # whether this process acts as if it were alone, see `apart`


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Be one of the processes that torchrun's environment describes, and end together with them.

    The first alone prints. If one ends before its time all end: with what was wrong, once, and exit code 1. They also
    end when torchrun is killed, which then can end them no more.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    global _store
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _end_with_torchrun()
        _store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(store=_store, rank=number, world_size=count, timeout=TIMEOUT)
        if number > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends
        yield
        barrier()  # the first may still be drawing
        dist.destroy_process_group()
    except RuntimeError as error:
        first = first_to_fail()
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        if first:
            script = Path(sys.argv[0]).name
            reason = re.sub(r"\[/\S+\] ", "", str(error).partition(". ")[0])  # without the line of gloo's own code
            print(
                f"{script}: error: one of {os.environ['WORLD_SIZE']} processes was killed, crashed or hangs, and the "
                f"others end with it; --resume goes on from the last checkpoint ({reason})",
                file=sys.stderr,
            )
        raise SystemExit(1) from None
    except BaseException:
        first_to_fail()
        raise


def _end_with_torchrun() -> None:
    """From now on watch torchrun, the parent of this process, which keeps the store. Once it is gone, stop as at a
    signal; what hangs then ends all the same. (On Windows a process does not see that its parent is gone.)

    Raises:
        DistNetworkError: it is gone already.
    """

    def watch() -> None:
        while os.getppid() == _torchrun:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    global _torchrun
    _torchrun = os.getppid()
    threading.Thread(target=watch, daemon=True).start()
    try:  # by its store, which rendezvous would try for ten minutes
        socket.create_connection((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]), timeout=GRACE).close()
    except OSError as error:
        raise dist.DistNetworkError(f"torchrun does not answer: {error}") from None


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() and not _apart else 1


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within, this process waits for no other, whatever it calls."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


def launcher() -> list[str]:
    """What this machine's command line begins with, to start as many processes again."""
    if world_size() == 1:
        return [str(short(sys.executable))]
    command = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', world_size())}"]
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:  # several machines
        names = {"nnodes": "GROUP_WORLD_SIZE", "node_rank": "GROUP_RANK"}
        names |= {"master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
        command += [f"--{flag}={os.environ[name]}" for flag, name in names.items()]
    return command


def first_to_fail() -> bool:
    """Whether no other process has called this before: it is the one that says what was wrong."""
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if _store is None or _torchrun not in (None, os.getppid()):
        return first_here
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return first_here


def all_reduce(number: int, operation: Literal["sum", "max"] = "sum") -> int:
    """The sum, or the largest, of every process's number. It travels between processors: no accelerator waits."""
    if world_size() == 1:
        return number
    result = torch.tensor(int(number))
    dist.all_reduce(result, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM)
    return result.item()


def barrier() -> None:
    """Return once every process has come here."""
    all_reduce(0)


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process of each machine does this alone, a download say; then the others do it, and find it done. None
    goes on before all are through, as it would wait for the others less patiently then."""
    if world_size() == 1:
        yield
        return
    turn, on_machine = next(_turns), int(os.environ.get("LOCAL_RANK", 0))
    over = [f"turn {turn} of process {number} is over" for number in range(world_size())]
    if on_machine > 0:
        _store.wait([over[rank() - on_machine]], PATIENCE)
    yield
    _store.set(over[rank()], "")
    _store.wait(over, PATIENCE)


def broadcast(make: Callable[..., Any], *args: Any) -> Any:
    """What `make` gives the first process, on all of them: a file, say, that only its machine has."""
    result = [make(*args) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def require_same(what: str, value: str) -> None:
    """Refuse to go on with processes that disagree.

    Raises:
        ValueError: `what` has not the same value in all processes.
    """
    if all_reduce(value != broadcast(str, value)):
        raise ValueError(f"the processes do not have the same {what}: start all of them alike, with the same data")


def device_name(name: str) -> str:
    """The device of this process where `name` was asked for: each has a GPU of its own, or the CPU.

    Raises:
        ValueError: a device that several processes cannot use.
    """
    if world_size() == 1:
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r} is not for several processes: choose auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    number = int(os.environ.get("LOCAL_RANK", 0))
    if number < torch.cuda.device_count():
        torch.cuda.set_device(number)
    return f"cuda:{number}"
