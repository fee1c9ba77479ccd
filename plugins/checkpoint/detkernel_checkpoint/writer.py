"""Writes checkpoints in the background, one at a time, and knows what is safe."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from logging import Logger
from typing import Any

from detkernel.errors import relative

from detkernel_checkpoint import checkpoint_file, finite
from detkernel_checkpoint.folder import Entry, Folder
from detkernel_checkpoint.snapshot import Snapshot

_NICE = 10
"""How far the writing thread steps back for training, as in nice(1). At 19, 517 MB took 13 s to write on busy cores."""


class Writer:
    """A thread for each checkpoint, behind training. A failure to write stops nothing: it is logged, and what is safe
    stays safe.

    A state that is not finite is never written: it would take the place of one that is.
    """

    def __init__(
        self,
        folder: Folder,
        keep: int | None,
        log: Logger,
        safe: Entry | None,
        infinite: Collection[str] = (),
        step_back: bool = True,
    ) -> None:
        self._folder, self._keep, self._log, self._infinite = folder, keep, log, infinite
        self._first = _step_back if step_back else None
        self._snapshot = Snapshot()
        self._pending: Future[None] | None = None
        self._entry: Entry | None = None
        self._held: tuple[Entry, Any] | None = None
        self._safe = safe
        """The last checkpoint that is known to be whole."""
        self.failure: str | None = None
        """Why the last one could not be written, or None if it was."""

    def start(self, entry: Entry, tree: Any) -> None:
        """Copy the state now and write it behind the caller's back. Waits if the one before is not written yet."""
        self.hold(entry, tree)
        self.write_held()

    def hold(self, entry: Entry, tree: Any) -> None:
        """Copy the state now, to be written only if `write_held` is called before the next `hold` or `start`."""
        self.collect(wait=True)
        self._held = None
        self._held = entry, self._snapshot.take(tree)

    def write_held(self) -> None:
        """Write what is held, if anything is."""
        if self._held is not None:
            self._entry, payload = self._held
            self._held = None
            # A thread for each: while one that has called torch lives, so do its OpenMP threads, and with more of those
            # than cores OpenMP lets all of them sleep between operations: training on two cores took twice as long.
            thread = ThreadPoolExecutor(1, thread_name_prefix="detkernel-checkpoint", initializer=self._first)
            self._pending = thread.submit(self._write, self._entry, payload)
            thread.shutdown(wait=False)

    def collect(self, wait: bool = False, then: str | None = "training goes on") -> None:
        """See what became of the checkpoint that is being written, if it is done or the caller waits.

        A failure is logged, with what happens `then`; where that is None, the caller has a better word to say. Raises
        NonFiniteError if the state was not finite, and so was not written.
        """
        if self._pending is None or self._entry is None or not (wait or self._pending.done()):
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._safe, self.failure = self._entry, None
        except finite.NonFiniteError as error:
            where = f"the state at iteration {self._entry.iteration} cannot be trained on"
            self.failure = f"{where}: {error}; {relative(self._entry.path)} was not written"
            raise finite.NonFiniteError(self.failure) from None
        except OSError as error:
            self.failure = f"{relative(self._entry.path)} could not be written: {error.strerror or error}"
            if then is not None or self._entry.best:  # nobody tries to write that one again
                self._log.error("%s; %s. %s", self.failure, then or "the run has ended", self.safety())

    def close(self) -> None:
        """Finish what is being written; what came of it is `failure` and `safe`."""
        self.collect(wait=True, then=None)

    def safety(self) -> str:
        safe = self.safe
        if safe is None:
            return "No checkpoint is safe yet"
        return f"Safe is {relative(safe.path)}, of iteration {safe.iteration}"

    @property
    def safe(self) -> Entry | None:
        """The newest checkpoint that a run can go on from; somebody may have removed the last one that was written."""
        if self._safe is not None and self._safe.path.exists():
            return self._safe
        return next(iter(self._folder.entries()), None)

    def _write(self, entry: Entry, payload: Any) -> None:
        self._snapshot.wait()
        finite.check(payload, self._infinite)
        checkpoint_file.write(entry.path, payload)
        self.name_newest()
        try:
            self._folder.prune(entry, self._keep)
        except OSError as error:
            self._log.warning("an old checkpoint could not be deleted: %s", error)

    def name_newest(self) -> None:
        """Let the names that stay be those of the newest checkpoints. What fails is logged, and nothing is lost."""
        try:
            self._folder.name_newest()
        except OSError as error:
            self._log.warning("last.pt and best.pt could not be set: %s", error)


def _step_back() -> None:
    """Lower the priority of this thread alone, which only Linux can: it takes what training leaves of the cores."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(os.nice(0) + _NICE, 19))
