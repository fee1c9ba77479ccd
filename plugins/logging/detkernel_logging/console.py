"""The sink that a person watches."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, ClassVar

from detkernel import Run, plugin, state

from detkernel_logging.sink import Entry, Sink

if TYPE_CHECKING:
    from detkernel_logging.progress import Progress
    from detkernel_logging.progress_bar import Bar


@plugin
class Console(Sink):
    """Every line on standard error; on a terminal in a short form, with a progress bar below."""

    writes_files: ClassVar[bool] = False

    _bar: Bar | None = state(default=None)
    _progress: Progress | None = state(default=None)

    def start(self, run: Run, progress: Progress) -> None:
        self._progress = progress
        if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not run.checking:
            from detkernel_logging.progress_bar import Bar

            self._bar = Bar(run, progress)

    def write(self, run: Run, entry: Entry) -> None:
        if not sys.stderr.isatty() and self._bar is None:
            print(entry.text, file=sys.stderr, flush=True)
            return
        from detkernel_logging import rows
        from detkernel_logging.progress import Progress

        text = rows.shown(run, self._progress or Progress(), entry)
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(entry, text)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
