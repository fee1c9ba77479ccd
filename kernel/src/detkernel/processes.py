"""The processes of a run: what plugins ask them (`run.processes`), and how this one was started (`run.launch`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import attrs

T = TypeVar("T")


class Processes:
    """Lets the processes of a run tell each other what they found out. This one is of a single process: it asks nobody.

    The plugin that makes several processes of a run sets one of its own in `setup`. Every process must call these
    methods at the same place, or the others wait for it.
    """

    def gathered(self, value: T) -> list[T]:
        """On the first process, everybody's value by rank; elsewhere nothing."""
        return [value]

    def from_main(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all of them. A `UserError` that it raises is everybody's."""
        return make()


@attrs.frozen
class Launch:
    """How a process of a run was started; the defaults are those of one that nobody would start again."""

    restarts: int = 0
    """How often the processes of this run have been started again."""
    identity: str = ""
    """A name for this run that is the same however often its processes are started again."""
