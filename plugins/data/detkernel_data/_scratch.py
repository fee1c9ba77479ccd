"""The folder of the sockets through which workers hand over tensors.

multiprocessing makes one a worker, which stays where a worker is killed. Here all share one of the main process, and
what a killed main process left is removed at the next start.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from typing import Any

_PREFIX = "detkernel-loader-"
_YOUNG = 60.0
"""Seconds in which a folder may not have its lock yet."""


def share_folder() -> None:
    """Call it before workers are made."""
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is not None or os.name != "posix":
        return
    _sweep()
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    lock = _lock(folder)
    util.Finalize(None, _remove, args=(folder, lock), exitpriority=-100)
    config["tempdir"] = folder


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG:
                continue
            lock = _lock(str(folder))
            if lock is not None:
                _remove(str(folder), lock)


def _lock(folder: str) -> int | None:
    """A lock that goes with the process and those that it forked; None where another has it."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(folder: str, lock: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        with suppress(OSError):
            os.close(lock)
