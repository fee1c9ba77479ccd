"""How fast the run goes."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs
from detkernel import Run


@attrs.define(eq=False)
class Progress:
    """Seconds an iteration takes, and how many of them it waits for its batch.

    An iteration is what lies between the wait for its batch and the call of `log` behind its step: validations and
    checkpoints are not part of it, nor is what happens once. Sinks may read all of this at any time, from any thread.
    """

    val_batches: int = 0
    """Batches complete of the validation that is running."""
    val_began: float = 0.0
    """When it began, by `time.perf_counter`."""
    began: float = attrs.field(factory=time.perf_counter)
    aside: Callable[[], float] = lambda: 0.0
    """What the run's iterations have spent on what happens once, such as compilation: `run.aside`."""
    _waiting_since: float = attrs.field(init=False, factory=time.perf_counter)
    _aside_before: float = 0.0
    _seconds: float = 0.0
    _iters: int = 0
    _line_seconds: float = 0.0
    _line_waited: float = 0.0
    _line_iters: int = 0

    def waits(self) -> None:
        """The loop is about to ask the loader for a batch."""
        self._waiting_since, self._aside_before = time.perf_counter(), self.aside()

    def arrived(self) -> None:
        """The batch is there."""
        self._line_waited += time.perf_counter() - self._waiting_since

    def stepped(self) -> None:
        """The iteration is complete."""
        self._line_seconds += time.perf_counter() - self._waiting_since - (self.aside() - self._aside_before)
        self._line_iters += 1

    def take(self) -> dict[str, float]:
        """The means since the last line, in seconds; a new line begins."""
        count = max(self._line_iters, 1)
        means = {"time": self._line_seconds / count, "data_time": self._line_waited / count}
        self._seconds, self._iters = self._seconds + self._line_seconds, self._iters + self._line_iters
        self._line_seconds = self._line_waited = 0.0
        self._line_iters = 0
        return means

    @property
    def mean(self) -> float | None:
        """Seconds an iteration took since this process began, or None before the first."""
        iters = self._iters + self._line_iters
        return (self._seconds + self._line_seconds) / iters if iters else None

    def left(self, run: Run) -> float | None:
        """Seconds of training that remain, or None before the first iteration."""
        return None if self.mean is None else self.mean * max(run.max_iters - run.iter, 0)

    def validates(self) -> None:
        """A validation begins."""
        self.val_batches, self.val_began = 0, time.perf_counter()
