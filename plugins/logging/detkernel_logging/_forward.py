"""From the run's Python logger to the sinks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from detkernel import Run

from detkernel_logging.sink import Entry, Sink

FORM = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"


class Forward(logging.Handler):
    """Hands what is logged to every sink, on the first process. The others, and the loader's forked workers, only say
    on standard error what went wrong.

    Whether this is the first process is asked at every record: at the first ones, nobody knows yet.
    """

    def __init__(self, run: Run, sinks: Sequence[Sink]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(FORM))
        self._run, self._sinks = run, [sink for sink in sinks if not (run.checking and sink.writes_files)]
        self._failed: list[Sink] = []
        self._process = os.getpid()
        self._level = run.log.level
        run.log.addHandler(self)
        if not run.log.isEnabledFor(logging.INFO):
            run.log.setLevel(logging.INFO)

    def detach(self) -> None:
        """Leave the logger as it was."""
        self._run.log.removeHandler(self)
        self._run.log.setLevel(self._level)
        self.close()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self._run.is_main and os.getpid() == self._process:
            entry = Entry(text, record.levelno, getattr(record, "figures", None))
            self.each(lambda sink: sink.write(self._run, entry))
        elif record.levelno >= logging.WARNING:
            print(text, file=sys.stderr, flush=True)

    def each(self, call: Callable[[Sink], None]) -> None:
        """Call every sink. One that cannot write is reported once; it is tried again nevertheless."""
        for sink in self._sinks:
            try:
                call(sink)
            except OSError as error:
                if sink not in self._failed:
                    self._failed.append(sink)
                    self._run.log.warning("%s cannot write: %s; the run goes on without", type(sink).__name__, error)
