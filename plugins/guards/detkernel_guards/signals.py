"""Ends a run well when it is told to stop from outside."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from detkernel import Run, hookimpl, option, plugin, state, wrong
from detkernel.errors import did_you_mean

STOPPED = 75
"""The exit status of a run that can go on: EX_TEMPFAIL of sysexits.h, which batch systems can be told to requeue."""


@plugin(resume_neutral=("*",))
class Signals:
    """On SIGTERM, SIGINT (Ctrl-C) or a batch system's SIGUSR1, finish the iteration, save, and exit with status 75.

    A second SIGINT leaves at once. A validation that is running is finished first. Once the run is saved, further
    signals change nothing.
    """

    names: list[str] = option(
        factory=lambda: [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)],
        help="signals that end the run",
    )
    exit_status: int = option(default=STOPPED, at_least=0, at_most=255, help="what the command then exits with")

    _before: dict[int, Any] = state(factory=dict)
    _run: Any = state(default=None)
    _told: bool = state(default=False)

    @hookimpl
    def setup(self, run: Run) -> None:
        for name in self.names:
            if name not in signal.Signals.__members__:
                raise wrong(
                    self, "names", f"no signal is called '{name}'{did_you_mean(name, signal.Signals.__members__)}"
                )
            if name in ("SIGKILL", "SIGSTOP"):
                raise wrong(self, "names", f"no program is told of {name}; it takes effect at once")
        if threading.current_thread() is not threading.main_thread() or run.checking or not run.trains:
            return  # in a test there is nothing to save: a signal ends it at once, as it does any program
        self._run, self._told = run, False
        for name in self.names:
            number = signal.Signals[name]
            self._before[number] = signal.signal(number, self._receive)

    @hookimpl(trylast=True)
    def after_run(self) -> None:
        """Behind all others: a signal that comes while the last checkpoint is saved must not end the process.

        Nor one that comes while it leaves: Python resets its handlers when it shuts down, but not what is ignored.
        """
        leaves = self._told and self._run.ends_process
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if leaves else handler)
        self._before.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again = "; once more leaves at once" if number == signal.SIGINT else ""
        if self._run.is_main:  # a launcher tells them all
            self._run.log.warning("%s: stopping after this iteration%s", name, again)
        self._told = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        self._run.stop(f"{name} was received", self.exit_status)  # which may raise, to give up what takes long
