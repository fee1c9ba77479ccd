"""What fired, with what, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

from detkernel.bus import Bus


@attrs.frozen
class Fired:
    """One event that fired."""

    event: str
    arguments: Mapping[str, Any]


class Recorder:
    """Records every event of a run: `tiny_run({...}, recorder=recorder)`, then look at `recorder.fired`."""

    def __init__(self) -> None:
        self.fired: list[Fired] = []

    def attach(self, bus: Bus) -> None:
        """Record what this bus fires from now on."""
        bus.intercept(self._event, lambda _plugin, function: function)

    def names(self, containing: str = "") -> list[str]:
        """The events' names in the order in which they fired, those that contain a text."""
        return [fired.event for fired in self.fired if containing in fired.event]

    def of(self, event: str) -> list[Fired]:
        """Every time that an event fired."""
        return [fired for fired in self.fired if fired.event == event]

    @contextmanager
    def _event(self, event: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        self.fired.append(Fired(event, dict(arguments)))
        yield
