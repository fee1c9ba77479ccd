"""Writes checkpoints in the background, one at a time, and knows what is safe."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from logging import Logger
from typing import Any

from detkernel.errors import relative

from detkernel_checkpoint import _file
from detkernel_checkpoint._folder import Entry, Folder
from detkernel_checkpoint._snapshot import Snapshot

_NICE = 10
"""How far the writing thread steps back for training, as in nice(1). At 19, 517 MB took 13 s to write on busy cores."""


class Writer:
    """One background thread. A failure to write stops nothing: it is logged, and what is safe stays safe."""

    def __init__(
        self, folder: Folder, keep: int | None, log: Logger, safe: Entry | None, step_back: bool = True
    ) -> None:
        self._folder, self._keep, self._log = folder, keep, log
        first = _step_back if step_back else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detkernel-checkpoint", initializer=first)
        self._snapshot = Snapshot()
        self._pending: Future[None] | None = None
        self._entry: Entry | None = None
        self.safe = safe
        """The last checkpoint that is known to be whole."""
        self.failure: str | None = None
        """Why the last one could not be written, or None if it was."""

    def start(self, entry: Entry, tree: Any) -> None:
        """Copy the state now and write it behind the caller's back. Waits if the one before is not written yet."""
        self.settle(wait=True)
        payload = self._snapshot.take(tree)
        self._entry = entry
        self._pending = self._thread.submit(self._write, entry, payload)

    def settle(self, wait: bool = False, then: str | None = "training goes on") -> None:
        """See what became of the checkpoint that is being written, if it is done or the caller waits.

        A failure is logged, with what happens `then`; where that is None, the caller has a better word to say.
        """
        if self._pending is None or self._entry is None or not (wait or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self.safe, self.failure = self._entry, None
        except OSError as error:
            self.failure = f"{relative(self._entry.path)} could not be written: {error.strerror or error}"
            if then is not None or self._entry.best:  # nobody tries to write that one again
                self._log.error("%s; %s. %s", self.failure, then or "the run has ended", self.safety())

    def close(self) -> None:
        """Finish what is being written; what came of it is `failure` and `safe`."""
        self.settle(wait=True, then=None)
        self._thread.shutdown()

    def safety(self) -> str:
        if self.safe is None:
            return "No checkpoint is safe yet"
        return f"Safe is {relative(self.safe.path)}, of iteration {self.safe.iteration}"

    def _write(self, entry: Entry, payload: Any) -> None:
        self._snapshot.wait()
        _file.write(entry.path, payload)
        try:
            self._folder.prune(entry, self._keep)
        except OSError as error:
            self._log.warning("an old checkpoint could not be deleted: %s", error)


def _step_back() -> None:
    """Lower the priority of this thread alone, which only Linux can: it takes what training leaves of the cores."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(os.nice(0) + _NICE, 19))
