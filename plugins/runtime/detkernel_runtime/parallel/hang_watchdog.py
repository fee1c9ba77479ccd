"""Says which process hangs, and where."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch.distributed as dist
from detkernel import Run

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_SHARE = 0.5
"""It speaks after this share of the time after which the others give up waiting."""


class Watch(threading.Thread):
    """Looks on from a thread: when the run has not moved for a while, each process says where it is, and the first
    one logs a line for each. A rank that is an iteration behind the others, or the only one not inside a collective,
    is the one to look at."""

    def __init__(self, run: Run, store: Store, patience: float) -> None:
        super().__init__(name="detkernel-watch", daemon=True)
        self._run, self._store, self._patience = run, store, patience * _SHARE
        self._main = threading.get_ident()
        self._left = threading.Event()
        self.beats = 0
        """Counted up by the main thread at every step."""

    def stop(self) -> None:
        self._left.set()
        if threading.get_ident() != self.ident:
            self.join()

    def run(self) -> None:
        seen, since, reported = 0, time.monotonic(), False
        while not self._left.wait(min(1.0, self._patience / 4)):
            if self.beats != seen:
                if reported:
                    self._say("moving")
                seen, since, reported = self.beats, time.monotonic(), False
            elif not reported and time.monotonic() - since > self._patience:
                reported = True
                self._say(self._place())
                if self._run.rank == 0:
                    self._report()

    def _report(self) -> None:
        ranks, until = range(self._run.world_size), time.monotonic() + min(30.0, self._patience * 0.8)
        while not all(self._said(rank) for rank in ranks) and time.monotonic() < until:
            if self._left.wait(0.2):
                return
        places = "\n".join(f"  rank {rank}: {self._said(rank) or 'moving, or gone'}" for rank in ranks)
        self._run.log.warning("nothing has moved for %.0f s; the processes are at:\n%s", self._patience, places)

    def _say(self, place: str) -> None:
        with suppress(dist.DistError):  # the store went with its process: the run is ending
            self._store.set(f"hang/{self._run.rank}", place)

    def _said(self, rank: int) -> str:
        with suppress(dist.DistError):
            if self._store.check([f"hang/{rank}"]):
                return self._store.get(f"hang/{rank}").decode()
        return ""

    def _place(self) -> str:
        """Where the main thread is: the innermost frames outside of torch."""
        frame = sys._current_frames().get(self._main)
        outer = frame
        while outer is not None and "/torch/" in outer.f_code.co_filename:
            outer = outer.f_back
        if frame is None or outer is None:
            return f"iteration {self._run.iter}"
        code, inner = outer.f_code, frame.f_code.co_name
        within = f", inside {inner}" if outer is not frame else ""
        return f"iteration {self._run.iter}, {code.co_filename}:{outer.f_lineno} in {code.co_name}{within}"
