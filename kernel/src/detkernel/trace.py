"""`detkernel run --trace`: every event of the first iterations, with its plugins and their times.

While a trace is on, each implementation is called through a clock, a wrapper for what it does before and after all
others; when the iterations are over the originals are put back, so that the rest of the run costs nothing. The tree
goes to standard error, the calls as JSON lines to the work dir.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
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
    detail: str = ""
    """Of a wrapper, "before" or "after" what it wraps; of `build_loader`, the mode."""
    seconds: float = 0.0
    iteration: int = 0
    """Counted from 1: the one that began last, whatever came since, such as a validation; 0 before the first."""


class Tracer:
    """Records the calls of a bus from now until a number of iterations is complete, wherever `run` stands by then."""

    def __init__(self, run: Run, iterations: int = 3, out: IO[str] | None = None) -> None:
        self.run = run
        self._left = iterations
        self.calls: list[Call] = []
        self._out = out or sys.stderr
        self._open: list[str] = []
        self._iteration = 0
        self._began = time.perf_counter()
        self._stop: Callable[[], None] | None = run.bus.intercept(self._event, self._implementation)

    @contextmanager
    def _event(self, event: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        if event == "before_train_iter":
            if self._left == 0:
                self.finish()
            self._left -= 1
            self._iteration = self.run.iter + 1
        with self._timed(event, detail=arguments.get("mode", "")):
            yield
        if event == "after_run":
            self.finish()

    def _implementation(self, plugin: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **optional: Any) -> Any:
            with self._timed(self._open[-1], plugin):
                return function(*arguments, **optional)

        @functools.wraps(function)
        def wrap(*arguments: Any, **optional: Any) -> Generator[Any, Any, Any]:
            generator = function(*arguments, **optional)
            step = functools.partial(next, generator)
            for part in ("before", "after"):
                with self._timed(self._open[-1], plugin, part):
                    try:
                        value = step()
                    except StopIteration as end:
                        return end.value
                try:
                    step = functools.partial(generator.send, (yield value))
                except BaseException as error:  # of another plugin; the wrapper may handle it
                    step = functools.partial(generator.throw, error)

        return wrap if inspect.isgeneratorfunction(function) else call

    @contextmanager
    def _timed(self, name: str, plugin: str = "", detail: str = "") -> Iterator[None]:
        start = time.perf_counter() - self._began
        call = Call(name, len(self._open), start, plugin, detail, iteration=self._iteration)
        self.calls.append(call)
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
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
            write_atomic(self.run.work_dir / "trace.jsonl", lines, self.run.work_dir)

    def tree(self) -> str:
        """The calls as text: events with their plugins below them, and what was spent between two events."""
        lines = ["trace: milliseconds of each event and of each plugin in it\n"]
        end, iteration = 0.0, 0
        for call in self.calls:
            if call.iteration != iteration:
                iteration = call.iteration
                lines.append(f"iteration {iteration}\n")
            if call.depth == 0 and call.start - end > 0.0005:
                lines.append(_row(0, "(between: loader, kernel)", call.start - end))
            detail = f" ({call.detail})" if call.detail else ""
            lines.append(_row(call.depth, (call.plugin or call.name) + detail, call.seconds))
            if call.depth == 0:
                end = call.start + call.seconds
        return "".join(lines)


def _row(depth: int, label: str, seconds: float) -> str:
    return f"{'  ' * depth + label:<48} {seconds * 1000:10.2f}\n"
