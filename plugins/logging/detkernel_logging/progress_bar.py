"""The progress bar: one line at the bottom of the terminal that the log scrolls above."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import IO, Any, cast

from detkernel import Run
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from detkernel_logging.log_lines import duration, val_batches
from detkernel_logging.progress import Progress
from detkernel_logging.rows import BEST, facts, speed
from detkernel_logging.sink import Entry

_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red", logging.CRITICAL: "bold red"}


class Bar:
    """Draws what it reads of the run four times a second, in its own thread: an iteration costs it nothing.

    What anybody prints meanwhile appears above the bar.
    """

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._values: Mapping[str, float] = {}
        self._console = Console(file=sys.stderr, force_terminal=True)
        self._live = Live(
            console=self._console,
            get_renderable=self._drawn,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._redirected = ExitStack()
        self._redirected.enter_context(redirect_stderr(_Above(self._console, sys.stderr)))
        if sys.stdout.isatty():
            self._redirected.enter_context(redirect_stdout(_Above(self._console, sys.stdout)))
        self._live.start()

    def write(self, entry: Entry, shown: str) -> None:
        """Print what is shown of an entry above the bar."""
        if entry.metrics is not None and entry.metrics.mode == "train":
            self._values = entry.metrics.values
        text = Text(shown, style=_STYLES.get(entry.level, ""))
        if entry.metrics is not None:
            text.highlight_words([BEST], "green")
        self._console.print(text, soft_wrap=True)

    def stop(self) -> None:
        """Wipe the bar away."""
        self._live.stop()
        self._redirected.close()

    def _drawn(self) -> Table:
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, min_width=8)
        grid.add_column(no_wrap=True)
        title, done, total, said = self._train() if self._run.mode == "train" else self._validation()
        grid.add_row(title, ProgressBar(total=total, completed=done), f"{done}/{total}  {'  '.join(said)}")
        return grid

    def _train(self) -> tuple[str, int, int, list[str]]:
        run, mean, left = self._run, self._progress.mean, self._progress.left(self._run)
        said = facts({**self._values, "time": mean or 0.0}, left)
        if run.options.until.unit == "iters":
            return "Iter", run.iter, run.max_iters, said
        if run.iter >= run.max_iters:  # the epoch is counted as complete, the end may still be saved
            return f"Epoch {run.max_epochs}/{run.max_epochs}", run.epoch_length, run.epoch_length, said
        return f"Epoch {run.epoch + 1}/{run.max_epochs}", run.batch, run.epoch_length, said

    def _validation(self) -> tuple[str, int, int, list[str]]:
        run, done = self._run, self._progress.val_batches
        total = val_batches(run)
        title = f"{run.mode} {run.val_set}".strip().capitalize()
        seconds = time.perf_counter() - self._progress.val_began
        said = [speed(done / seconds), f"eta {duration(seconds / done * (total - done))}"] if done else []
        return title, done, total, said


class _Above(FileProxy):
    """A standard stream whose lines go above the bar; the loader's forked workers write as if there was none: they
    have a copy of the bar, but not of the thread that may hold its lock."""

    def __init__(self, console: Console, file: Any) -> None:
        super().__init__(console, cast(IO[str], file))
        self._owner = os.getpid()

    def write(self, text: str) -> int:
        if os.getpid() == self._owner:
            super().write(text)
            return len(text)
        return self.rich_proxied_file.write(text)

    def flush(self) -> None:
        if os.getpid() == self._owner:
            super().flush()
        else:
            self.rich_proxied_file.flush()
