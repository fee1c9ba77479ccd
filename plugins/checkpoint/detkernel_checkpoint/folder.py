"""The checkpoints of a run in their folder: `iter_1200.pt` and `best_iter_800.pt`, and two names that stay the same:
`last.pt` and `best.pt` are links to the newest of each."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import attrs
from detkernel import CheckpointError
from detkernel.errors import relative
from detkernel.files import open_to_write, refuse_links

from detkernel_checkpoint import checkpoint_file

_RECORD = 512
_NAME = re.compile(r"(best_)?iter_(\d+)\.pt")


@attrs.frozen
class Entry:
    """A checkpoint by its name; nothing of it has been read."""

    path: Path
    iteration: int
    best: bool


@attrs.frozen
class Lock:
    """A folder's lock file: it says which process holds it, and whose checkpoints the folder has.

    The lock is the process's alone (POSIX): loader workers do not have it, and with the process it is gone.
    """

    handle: int

    def read(self) -> tuple[str, str]:
        """The process, and the identity of the run."""
        process, _, identity = os.pread(self.handle, _RECORD, 0).decode(errors="replace").partition("\n")
        return process, identity.strip()

    def write(self, identity: str) -> None:
        """On a full disk, what was there stays."""
        with suppress(OSError):
            os.pwrite(
                self.handle, f"process {os.getpid()} on {platform.node()}\n{identity}\n".encode().ljust(_RECORD), 0
            )

    def release(self) -> None:
        os.close(self.handle)


@attrs.frozen
class Folder:
    """Where the checkpoints of a run lie. It may not exist yet."""

    path: Path

    def prepare(self) -> None:
        """Make the folder, clear away what a killed run left half written, and see that it can be written to."""
        probe = self.path / f"probe{checkpoint_file.TEMPORARY}"
        refuse_links(probe, self.path.parent)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(f"*.pt.*{checkpoint_file.TEMPORARY}"):
                left.unlink()
            probe.write_bytes(b"\0")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"{relative(self.path)}: checkpoints cannot be written there: {error.strerror}; "
                "free it, or set run.work_dir to a folder that can be written to"
            ) from None

    def hold(self) -> Lock | None:
        """Keep other runs out. None where the file system knows no locks. Raises CheckpointError if a run is here."""
        try:
            import fcntl
        except ImportError:
            return None
        try:
            handle = open_to_write(self.path / ".lock", self.path.parent, os.O_RDWR | os.O_CREAT)
        except OSError:
            return None  # `prepare` says so
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = Lock(handle).read()[0]
            os.close(handle)
            raise CheckpointError(
                f"{relative(self.path)}: another run is at work there ({holder}); wait for its end, or set "
                "run.work_dir to another folder"
            ) from None
        except OSError:
            os.close(handle)
            return None
        return Lock(handle)

    def name(self, iteration: int, best: bool = False) -> Path:
        return self.path / f"{'best_' * best}iter_{iteration}.pt"

    def entries(self) -> list[Entry]:
        """All checkpoints by their names, the newest first."""
        return sorted(self._entries(), key=lambda entry: (entry.iteration, entry.best), reverse=True)

    def _entries(self) -> Iterator[Entry]:
        try:
            names = os.listdir(self.path)  # noqa: PTH208 - names alone are wanted
        except (FileNotFoundError, NotADirectoryError):  # reported where it is made
            return
        except OSError as error:
            raise CheckpointError(f"{relative(self.path)}: cannot be listed: {error.strerror}") from None
        for path in (self.path / name for name in names):
            match = _NAME.fullmatch(path.name)
            if match:
                yield Entry(path, int(match[2]), bool(match[1]))

    def prune(self, written: Entry, keep: int | None) -> None:
        """Once a checkpoint is safe: delete the older best ones, or all but the newest `keep` others."""
        same = [
            entry for entry in self.entries() if entry.best == written.best and entry.iteration <= written.iteration
        ]
        for entry in same[1 if written.best else keep :] if written.best or keep else []:
            entry.path.unlink(missing_ok=True)

    def name_newest(self) -> None:
        """Let `last.pt` and `best.pt` be the newest checkpoint and the best one; away with a name that has none.

        A name changes at once, from one whole checkpoint to another. What has such a name and is no other checkpoint of
        this folder, a file that somebody put there say, is kept as `best_1.pt`. Raises OSError.
        """
        entries = self.entries()
        for name, best in (("last.pt", False), ("best.pt", True)):
            newest, path = next((entry.path for entry in entries if entry.best == best), None), self.path / name
            if newest is not None and path.exists() and path.samefile(newest):
                continue
            if path.exists() and not _is_name(path, entries):
                path.rename(
                    next(free for number in count(1) if not (free := self.path / f"{path.stem}_{number}.pt").exists())
                )
            if newest is None:
                path.unlink(missing_ok=True)
            else:
                _link(newest, path)

    def set_aside(self, after: int) -> tuple[int, Path] | None:
        """Move checkpoints beyond an iteration away, so that they are not taken for this run's; nothing is deleted."""
        stale = [entry for entry in self.entries() if entry.iteration > after]
        if not stale:
            return None
        number = 1
        while (aside := self.path / f"aside_{number}").exists():
            number += 1
        aside.mkdir()
        for entry in stale:
            entry.path.rename(aside / entry.path.name)
        return len(stale), aside


def _is_name(path: Path, entries: Iterable[Entry]) -> bool:
    """Whether a file is but a name: a link, another name of a file, or a copy of one that is here."""
    mine = path.lstat()
    if path.is_symlink() or mine.st_nlink > 1:
        return True
    others = (entry.path.stat() for entry in entries)
    return any((mine.st_size, mine.st_mtime_ns) == (other.st_size, other.st_mtime_ns) for other in others)


def _link(file: Path, path: Path) -> None:
    """Make a path a name of a file beside it: a symbolic link, a hard one, or a copy, by what the file system knows.
    Raises OSError; what the path was is then untouched."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{checkpoint_file.TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        try:
            temporary.symlink_to(file.name)
        except (OSError, NotImplementedError):
            try:
                temporary.hardlink_to(file)
            except (OSError, NotImplementedError):
                shutil.copy2(file, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
