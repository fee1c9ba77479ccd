"""The loader's processes: what each of them is reading, who waits for whom, and how they end."""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import util
from pathlib import Path
from typing import Any
from weakref import WeakSet

WARN_AFTER = 20.0
"""Seconds that a batch is waited for before a word about it; then after twice as many, and so on."""
STOP_AFTER = 10.0
"""Seconds that a batch is waited for once the run is told to stop."""
PATIENCE = 5.0
"""Seconds that workers have to end by themselves."""
_PR_SET_PDEATHSIG = 1

_OPEN: WeakSet[Any] = WeakSet()
_SIGKILL = 9


class Setup:
    """What each worker does first (torch's `worker_init_fn`)."""

    def __init__(self, slots: Any) -> None:
        self._slots = slots
        self._is_child_of_main = threading.current_thread() is threading.main_thread()
        self._main = os.getpid()

    def __call__(self, worker: int) -> None:
        from torch.utils.data import get_worker_info

        # Ctrl-C and batch systems signal all processes; a worker that leaves would end the run before it is saved
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if sys.platform == "linux" and self._is_child_of_main:  # it goes by the thread that made the process
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
            if multiprocessing.get_start_method() != "forkserver" and os.getppid() != self._main:
                os._exit(1)  # it died before the line above, which nobody will tell
        info = get_worker_info()
        assert info is not None
        info.dataset.reading = (self._slots, worker)  # type: ignore[attr-defined]


class Watch:
    """A thread that looks at the workers while a batch is waited for.

    The main thread can be deep in a read from a worker that does not answer, where neither a timeout nor a signal's
    handler ends it; killing that worker does.
    """

    def __init__(self, iterator: Any, reading: Callable[[int], str], stopping: Callable[[], bool]) -> None:
        self._iterator, self._reading, self._stopping = iterator, reading, stopping
        self._since: float | None = None
        self._told = 0.0
        self._ended = threading.Event()
        self.gave_up = ""
        """Who was waited for when the wait was ended."""
        threading.Thread(target=self._look, name="detkernel-loader-watch", daemon=True).start()

    def wait_begins(self) -> None:
        self._told, self._since = 0.0, time.monotonic()

    def wait_ends(self) -> None:
        self._since = None

    def end(self) -> None:
        self._ended.set()

    def _look(self) -> None:
        asked: float | None = None
        while not self._ended.wait(min(1.0, WARN_AFTER / 4, STOP_AFTER / 4)):
            now, since = time.monotonic(), self._since
            if since is None:
                asked = None
                continue
            if now - since >= max(WARN_AFTER, 2 * self._told):
                self._told = now - since
                logging.getLogger("detkernel").warning(
                    "data: waiting for a batch for %.0f seconds: %s", now - since, self._suspect()
                )
            if self._stopping():
                asked = asked or now
                if now - asked >= STOP_AFTER:
                    self.gave_up = self._suspect()
                    kill(self._iterator)
                    return

    def _suspect(self) -> str:
        """The worker whose batch is next, unless others have been stopped."""
        workers = self._iterator._workers
        stopped = [number for number, worker in enumerate(workers) if is_stopped(worker.pid)]
        if stopped:
            names = ", ".join(self._named(number) for number in stopped)
            pids = " ".join(str(workers[number].pid) for number in stopped)
            return f"{names} stopped by a signal; `kill -CONT {pids}` lets it go on"
        waited = self._iterator._task_info.get(self._iterator._rcvd_idx)
        if waited is None:
            return "no worker has it"
        return f"{self._named(waited[0])} is slow or hangs"

    def _named(self, number: int) -> str:
        return f"worker {number} (process {self._iterator._workers[number].pid}{self._reading(number)})"


def opened(iterator: Any) -> None:
    """Remember that it has workers to let go."""
    if not _OPEN:
        # before multiprocessing's own, which asks daemons to end with the SIGTERM that they ignore and waits for ever
        atexit.unregister(_kill_all)
        atexit.register(_kill_all)
    _OPEN.add(iterator)


def dismiss(iterator: Any) -> None:
    """Let the workers go; one that hangs (on a lost disk, say) is killed."""
    _OPEN.discard(iterator)
    for worker in iterator._workers:
        if worker.is_alive() and is_stopped(worker.pid):
            worker.kill()
    timer = threading.Timer(PATIENCE, kill, [iterator])
    timer.daemon = True
    timer.start()
    try:
        iterator._shutdown_workers()
    finally:
        timer.cancel()
        kill(iterator)


def kill(iterator: Any) -> None:
    """End the workers at once."""
    for worker in iterator._workers:
        with suppress(ValueError, OSError):
            if worker.is_alive():
                worker.kill()


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped (SIGSTOP, a debugger); false where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def _kill_all() -> None:
    for iterator in list(_OPEN):
        kill(iterator)


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


def worker_count(wanted: int | None) -> int:
    """The wanted number; None: the cores that this process may use, shared with those that were started beside it."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(beside) if beside.isdigit() else 1))
