"""From the run's Python logger to the sinks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from copy import copy

from detkernel import Run, UserError
from detkernel.catalog import Catalog
from detkernel.errors import CatalogError, printable, relative

from detkernel_logging.sink import Entry, Sink

FORM = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"
_BARE = logging.Formatter("%(message)s")


class Forward(logging.Handler):
    """Hands what is logged to every sink, on the first process. The others, and the loader's forked workers, only say
    on standard error what went wrong.

    Whether this is the first process is asked at every record: at the first ones, nobody knows yet.
    """

    def __init__(self, run: Run, sinks: Sequence[Sink], key: str) -> None:
        """`key`: where a config has the sinks, `log.sinks` say."""
        super().__init__()
        self.setFormatter(logging.Formatter(FORM))
        self._run, self._sinks = run, [sink for sink in sinks if not (run.checking and sink.writes_files)]
        self._key = key
        self._failed: list[Sink] = []
        self._began = self._removed = False
        self._process = os.getpid()
        self._level = run.log.level
        run.log.addHandler(self)
        if not run.log.isEnabledFor(logging.INFO):
            run.log.setLevel(logging.INFO)

    def begin(self) -> None:
        """The run begins: from now on, no sink can end it, and its work dir is there to stay."""
        self._began = True

    def detach(self) -> None:
        """Leave the logger as it was."""
        self._run.log.removeHandler(self)
        self._run.log.setLevel(self._level)
        self.close()

    def emit(self, record: logging.LogRecord) -> None:
        if self._run.is_main and os.getpid() == self._process:
            self._look_for_work_dir()
            whole, brief = self._entry(record), self._entry(record, getattr(record, "brief", None))
            self.each(lambda sink: sink.write(self._run, whole if sink.writes_files else brief))
        elif record.levelno >= logging.WARNING:
            print(self._entry(record).text, file=sys.stderr, flush=True)

    def _entry(self, record: logging.LogRecord, message: str | None = None) -> Entry:
        """A record as the sinks take it, with another message where one is given."""
        if message is not None:
            record = copy(record)
            record.msg, record.args = message, ()
        # a traceback, say, passes no filter of the logger
        text, message = (printable(form(record), keep="\n\t") for form in (self.format, _BARE.format))
        return Entry(text, record.levelno, getattr(record, "metrics", None), message, record.created)

    def _look_for_work_dir(self) -> None:
        """Say once that the work dir was removed: the next line makes it again, but what it had is lost."""
        if self._began and not self._removed and not self._run.work_dir.exists():
            self._removed = True
            if any(sink.writes_files for sink in self._sinks):
                self._run.log.warning(
                    "run.work_dir: %s was removed; the log goes on in a new one, without what was in it",
                    relative(self._run.work_dir),
                )

    def each(self, call: Callable[[Sink], None]) -> None:
        """Call every sink. One that cannot write is reported once; it is tried again nevertheless.

        A mistake of the user's, a link in the place of a file say, ends a run that has not begun.
        """
        for sink in self._sinks:
            try:
                call(sink)
            except (OSError, UserError) as error:
                if sink in self._failed:
                    continue
                self._failed.append(sink)
                if isinstance(error, UserError) and not self._began:
                    raise
                self._run.log.warning("%s cannot write: %s; the run goes on without", self._place(sink), _why(error))

    def _place(self, sink: Sink) -> str:
        """Where a config has a sink, and what it calls it: `log.sinks.1 (json_lines)`."""
        origin = getattr(sink, "__detkernel_origin__", None)
        try:
            name = Catalog().name_of(type(sink))
        except CatalogError:
            name = type(sink).__name__
        return f"{origin.path if origin else self._key} ({name})"


def _why(error: OSError | UserError) -> str:
    if isinstance(error, UserError) or not error.strerror:
        return str(error)
    return f"{relative(error.filename)}: {error.strerror}" if error.filename else error.strerror
