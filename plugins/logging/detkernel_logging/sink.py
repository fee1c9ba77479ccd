"""What a sink is, and what it is given: derive from `Sink` to send the log somewhere else."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import attrs
from detkernel import Mode, Part, Run, wrong

if TYPE_CHECKING:
    from detkernel_logging.progress import Progress


@attrs.frozen
class Metrics:
    """The numbers of a line."""

    mode: Mode
    epoch: int
    """From 1."""
    iter: int
    """Training: the batch of the epoch, from 1, or the iteration of a run that is counted in iterations. Else: the
    batches validated."""
    step: int
    """Iterations complete, over all epochs."""
    values: Mapping[str, float]


@attrs.frozen
class Entry:
    """One line of the log: a message of the kernel or a plugin, or metrics that are due."""

    text: str
    """As it is to be read, with its time and level, without a newline at its end."""
    level: int
    """As in `logging`."""
    metrics: Metrics | None = None
    message: str = ""
    """The text alone, without its time and level."""
    time: float = 0.0
    """When it was said, in seconds as `time.time` counts them."""


class Sink(Part, ABC):
    """A place that the log goes to.

    Only the first process has its sinks started and written to; a prediction has none. An `OSError` that one raises is
    reported once, and the run goes on.
    """

    writes_files: ClassVar[bool] = True
    """Whether something would be left behind: `detkernel check` does without such a sink."""

    def check(self) -> None:
        """Raise `UserError` where something is missing, such as a package; called before anything is set up."""

    def start(self, run: Run, progress: Progress) -> None:
        """The run begins, at `run.iter`: a resume was applied. Entries may have come before."""

    @abstractmethod
    def write(self, run: Run, entry: Entry) -> None:
        """Write a line."""

    def stop(self) -> None:
        """The run has ended, well or not, perhaps before it began: leave nothing open."""


def needed(sink: Sink, package: str, install: str) -> None:
    """Raise `UserError`, with the sink's place in the config, where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        message = f"{package} is not installed: `pip install {install}`, or leave this sink out"
        raise wrong(sink, "", message)
