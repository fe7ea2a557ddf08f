"""Where a run writes, and the lock on its name."""

import errno
import itertools
import os
from pathlib import Path

from filelock import FileLock, Timeout

from support.files import write_bytes


class Paths:
    """Where a run writes: every name begins with the run's, but for two pictures of the plain Vision Transformer.

    Args:
        root: the folder that holds all of it.
        name: of the run; it may have a folder in front.
    """

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, name
        saved, figures = root / "saved" / name, root / "figures" / name
        self.model = saved.with_name(f"{saved.name}.pt")  # the weights that the test figures belong to
        self.best = saved.with_name(f"{saved.name}.best.pt")  # with --patience: the best until now
        self.last = saved.with_name(f"{saved.name}.last.pt")  # and those that training ended with
        self.report = saved.with_name(f"{saved.name}.json")
        self.table = saved.with_name(f"{saved.name}.csv")  # every step and every epoch
        self.checkpoint = saved.with_name(f"{saved.name}.checkpoint")
        self.lock = saved.with_name(f"{saved.name}.lock")
        self.curves = figures.with_name(f"{figures.name}_curves.png")
        self.frames = figures.with_name(f"{figures.name}_frames")
        self.attention = figures.with_name(f"{figures.name}_attention_maps.png")
        self.gif = figures.with_name(f"{figures.name}_animation.gif")
        if name == "VisionTransformer":
            self.attention, self.gif = root / "figures" / "attention_maps.png", root / "animation_vit.gif"
        self.tensorboard = root / "runs" / name

    def claim(self) -> FileLock:
        """Make the folders, make sure now that they can be written, and lock the name.

        The lock is also released when this process ends, however it ends.

        Raises:
            OSError: a folder that cannot be written.
            ValueError: another run of this name is under way.
        """
        longest = {}  # name in each folder
        for path in vars(self).values():
            if isinstance(path, Path) and path not in (self.root, self.tensorboard):
                known = longest.get(path.parent, path)
                longest[path.parent] = max(known, path, key=lambda path: len(os.fsencode(path.name)))
        for path in longest.values():
            probe = path.with_name(f"{path.name}.try")  # as long as .tmp, which another run may be writing
            try:
                write_bytes(probe, b"")
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                raise ValueError(f"{path.name} is too long for a file here: choose a shorter --name") from None
            probe.unlink()
        lock = FileLock(self.lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run named {self.name} is under way here: choose another --name") from None
        return lock

    def set_aside(self, unfinished: bool = False) -> str:
        """Rename what a run of this name has written, so that nothing is lost; returns its new name. Of an unfinished
        run, the files of another that has finished are left where they are."""
        others = (Paths(self.root, f"{self.name}_old{number}") for number in itertools.count(1))
        other = next(paths for paths in others if not any(path.exists() for path in paths.files().values()))
        for what, path in self.files().items():
            if path.exists() and not (unfinished and what in ("model", "report", "attention", "gif")):
                path.replace(other.files()[what])
        return other.name

    def files(self) -> dict[str, Path]:
        """What is left of a run, and its folder of frames."""
        return {
            name: path for name, path in vars(self).items() if isinstance(path, Path) and name not in ("root", "lock")
        }


def release(lock: FileLock) -> None:
    """Give a name free and leave no file behind."""
    if os.name == "posix":  # elsewhere a file that is open stays; while it is locked, nobody else can have it
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
