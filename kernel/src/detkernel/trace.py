"""`detkernel run --trace`: every event of the first iterations, with its plugins and their times.

While a trace is on, each implementation is called through a clock; when the iterations are over the originals are put
back, so that the rest of the run costs nothing. The tree goes to standard error, the calls as JSON lines to the work
dir.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import attrs

from detkernel.files import write_atomic
from detkernel.run import Run


@attrs.define
class Call:
    """One event, or one plugin's answer to it."""

    name: str
    depth: int
    start: float
    """Seconds since the trace began."""
    plugin: str = ""
    seconds: float = 0.0
    iteration: int = 0


class Tracer:
    """Records the calls of a bus from now until `run` has completed a number of iterations."""

    def __init__(self, run: Run, iterations: int = 3, out: IO[str] | None = None) -> None:
        self.run, self.last = run, run.iter + iterations
        self.calls: list[Call] = []
        self._out = out or sys.stderr
        self._depth = 0
        self._began = time.perf_counter()
        self._stop: Callable[[], None] | None = run.bus.intercept(self._event, self._implementation)

    @contextmanager
    def _event(self, event: str, _arguments: object) -> Iterator[None]:
        if event == "before_train_iter" and self.run.iter >= self.last:
            self.finish()
        with self._timed(event):
            yield
        if event == "after_run":
            self.finish()

    def _implementation(self, plugin: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            with self._timed(function.__name__, plugin):
                return function(*arguments)

        return call

    @contextmanager
    def _timed(self, name: str, plugin: str = "") -> Iterator[None]:
        call = Call(name, self._depth, time.perf_counter() - self._began, plugin, iteration=self.run.iter)
        self.calls.append(call)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            call.seconds = time.perf_counter() - self._began - call.start

    def finish(self) -> None:
        """Put the implementations back, print the tree and write `trace.jsonl`."""
        if self._stop is None:
            return
        self._stop()
        self._stop = None
        if self.run.is_main:
            self._out.write(self.tree())
            lines = "".join(json.dumps(attrs.asdict(call)) + "\n" for call in self.calls)
            write_atomic(self.run.work_dir / "trace.jsonl", lines)

    def tree(self) -> str:
        """The calls as text: events with their plugins below them, and what was spent between two events."""
        lines = ["trace: milliseconds of each event and of each plugin in it\n"]
        end = 0.0
        for call in self.calls:
            if call.depth == 0 and call.start - end > 0.0005:
                lines.append(_row(0, "(between: loader, kernel)", call.start - end))
            lines.append(_row(call.depth, call.plugin or call.name, call.seconds))
            if call.depth == 0:
                end = call.start + call.seconds
        return "".join(lines)


def _row(depth: int, label: str, seconds: float) -> str:
    return f"{'  ' * depth + label:<48} {seconds * 1000:10.2f}\n"
