"""How long each plugin takes at each event, over a whole run.

    clock = Clock(run.bus)
    ...
    clock.stop()
    clock.seconds["optimizer", "after_train_iter"]

A call costs about a microsecond more. Where work is queued on a device, its time is found where somebody waits.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any

from detkernel.bus import Bus

Key = tuple[str, str]
"""A plugin's key in the config, and an event."""


class Clock:
    """Adds up times from its making until `stop`: a plugin's own, without those of the events that it fires itself, so
    that they may be added."""

    def __init__(self, bus: Bus) -> None:
        self.seconds: dict[Key, float] = defaultdict(float)
        self.calls: dict[Key, int] = defaultdict(int)
        self._inner = 0.0
        self._began = time.perf_counter()
        self._total: float | None = None
        self._undo = bus.wrap(self._timed)

    @property
    def total(self) -> float:
        """Seconds since the clock was made, up to its stop."""
        return time.perf_counter() - self._began if self._total is None else self._total

    def stop(self) -> None:
        """Put the functions back."""
        self._total = self.total
        self._undo()

    def _timed(self, plugin: str, event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        key = (plugin, event)

        @functools.wraps(function)
        def call(*arguments: Any, **optional: Any) -> Any:
            self.calls[key] += 1
            start, outer = time.perf_counter(), self._inner
            self._inner = 0.0
            try:
                return function(*arguments, **optional)
            finally:
                self._add(key, start, outer)

        @functools.wraps(function)
        def wrap(*arguments: Any, **optional: Any) -> Generator[Any, Any, Any]:
            self.calls[key] += 1
            generator = function(*arguments, **optional)
            step = functools.partial(next, generator)
            while True:  # once before what it wraps, and once behind it
                start, outer = time.perf_counter(), self._inner
                self._inner = 0.0
                try:
                    value = step()
                except StopIteration as end:
                    return end.value
                finally:
                    self._add(key, start, outer)
                try:
                    step = functools.partial(generator.send, (yield value))
                except BaseException as error:  # of another plugin; the wrapper may handle it
                    step = functools.partial(generator.throw, error)

        return wrap if inspect.isgeneratorfunction(function) else call

    def _add(self, key: Key, start: float, outer: float) -> None:
        """End a call that began at `start`; `outer`: what the call around it has spent in others before."""
        spent = time.perf_counter() - start
        self.seconds[key] += spent - self._inner
        self._inner = outer + spent
