"""Ends a run before its time slot does."""

from __future__ import annotations

import re
import time

from detkernel import Run, hookimpl, option, plugin, state

from detkernel_guards.signals import STOPPED

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(seconds?|s|minutes?|min|m|hours?|h|days?|d)")


@plugin(resume_neutral=("*",))
class MaxTime:
    """Stop after a given time: finish the iteration, save, and exit with status 75, so that a later run goes on."""

    limit: str = option(help="such as '8 hours', '90 minutes' or '23h 50m'")
    exit_status: int = option(default=STOPPED, at_least=0, at_most=255, help="what the command then exits with")

    _began: float = state(default=0.0)
    _seconds: float = state(default=0.0)

    def __attrs_post_init__(self) -> None:
        self._seconds = seconds(self.limit)

    @hookimpl
    def setup(self) -> None:
        self._began = time.monotonic()

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        self._check(run)

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        self._check(run)

    def _check(self, run: Run) -> None:
        if time.monotonic() - self._began >= self._seconds:
            run.stop(f"the time limit of {self.limit} is reached", self.exit_status)


def seconds(text: str) -> float:
    """Read `8 hours` or `1d 2h`. Raises ValueError."""
    parts = _TEXT.findall(text.lower())
    if not parts or _TEXT.sub("", text.lower()).strip(" ,"):
        raise ValueError(f"limit: expected a time such as '8 hours' or '23h 50m', got '{text}'")
    return sum(float(number) * _UNITS[unit[0]] for number, unit in parts)
