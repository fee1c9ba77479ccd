"""Mistakes in data, collected: what is wrong is told with its first places and a count, never one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from detkernel import DataError

SHOWN = 10


class Problems:
    """What makes a data set unusable. `stop` raises one `DataError` with the first of them and how many there are."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: list[str] = []

    def add(self, problem: str) -> None:
        self._found.append(problem)

    def stop(self) -> None:
        if len(self._found) == 1:
            raise DataError(self._found[0])
        if self._found:
            lines = "\n  ".join(first(self._found))
            raise DataError(f"{self.source}: {len(self._found)} problems\n  {lines}")


def first(items: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    rest = len(items) - SHOWN
    return [*items[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def counted(number: int, thing: str) -> str:
    """`1 box`, `2 boxes`."""
    if number == 1:
        return f"1 {thing}"
    return f"{number} {thing}{'es' if thing.endswith(('x', 's')) else 's'}"


def tally(counts: Iterable[tuple[str, int]]) -> str:
    """`RBC 4155x, WBC 372x`."""
    return ", ".join(first([f"{name} {count}x" for name, count in counts]))
