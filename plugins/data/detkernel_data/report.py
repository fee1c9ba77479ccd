"""Mistakes and remarks about data, collected: each kind is reported once, with a count and its first places."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from detkernel import DataError
from detkernel.errors import printable
from detkernel.files import write_atomic
from detkernel_detection.findings import Finding, Note

SHOWN = 10
"""Problems that an error lists."""
EXAMPLES = 3
"""Places that a warning names; a file in the work dir has all."""


def with_advice(error: DataError) -> str:
    """What to say of an image that cannot be used; where it cannot be decoded, with the option that leaves it out."""
    from detkernel_detection.images import ImageError

    return f"{error}, or set `bad_images: drop`" if isinstance(error, ImageError) else str(error)


def note(what: str, places: Sequence[str] = (), remedy: str = "", shown: Sequence[str] | None = None) -> Note:
    """`what: place; place; place; and 4 more (remedy)`. `shown`: the first places in a form to be read."""
    examples = list(places if shown is None else shown)[:EXAMPLES]
    rest = len(places) - len(examples)
    listed = "; ".join([*examples, *([f"and {rest} more"] if rest > 0 else [])])
    text = f"{what}{': ' if listed else ''}{listed}{f' ({remedy})' if remedy else ''}"
    return Note(text, places, Finding.of_text(printable(what), [printable(place) for place in places], remedy))


def write_places(path: Path, notes: Iterable[str], within: Path) -> bool:
    """Write every place of those notes that could not name all; whether there was one. Raises OSError."""
    long = [(one, one.places) for one in notes if isinstance(one, Note) and len(one.places) > EXAMPLES]
    if long:
        text = "\n".join("\n  ".join([str(one), *places]) for one, places in long)
        write_atomic(path, (text + "\n").encode("utf-8", "backslashreplace"), within)
    return bool(long)


class Problems:
    """What makes a data set unusable. `stop` raises one `DataError` with the first of them and how many there are."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._first: list[str] = []
        self._count = 0

    def add(self, problem: str) -> None:
        self._count += 1
        if len(self._first) < SHOWN:
            self._first.append(printable(problem))

    @property
    def full(self) -> bool:
        """Whether another one would only be counted: no need to find words for it."""
        return self._count >= SHOWN

    def stop(self) -> None:
        if self._count == 1:
            raise DataError(self._first[0])
        if self._count:
            rest = [f"and {self._count - SHOWN} more"] if self._count > SHOWN else []
            raise DataError("\n  ".join([f"{self.source}: {self._count} problems", *self._first, *rest]))


def first(items: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    rest = len(items) - SHOWN
    return [*items[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]


def counted(number: int, thing: str) -> str:
    """`1 box`, `2,000 boxes`."""
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing}{'es' if thing.endswith(('x', 's', 'ch')) else 's'}"


def tally(counts: Iterable[tuple[str, int]]) -> str:
    """`RBC 4155x, WBC 372x`."""
    return ", ".join(first([f"{name} {count}x" for name, count in counts]))
