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
    """Every line on standard error, with a progress bar below where that is a terminal."""

    writes_files: ClassVar[bool] = False

    _bar: Bar | None = state(default=None)

    def start(self, run: Run, progress: Progress) -> None:
        if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown") and not run.checking:
            from detkernel_logging.progress_bar import Bar

            self._bar = Bar(run, progress)

    def write(self, run: Run, entry: Entry) -> None:
        if self._bar is None:
            print(entry.text, file=sys.stderr, flush=True)
        else:
            self._bar.write(entry)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
