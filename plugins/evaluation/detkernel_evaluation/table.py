"""A table of metrics by class, for the log, and names of classes that can be shown."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from detkernel.errors import printable

WIDEST = 60
"""Columns of a terminal that a class name may take; the rest of a longer one is cut off, in the table only."""


def shown(classes: Sequence[str]) -> list[str]:
    """A name for each class that can stand in a metric's name: in one line, not blank, and no two the same.

    They depend on nothing but the names and their order, so that they are the same in every run.
    """
    names: list[str] = []
    for name in classes:
        plain = printable(name) if name.strip() else repr(name)
        same = sum(other == plain or other.startswith(f"{plain} (") for other in names)
        names.append(f"{plain} ({same + 1})" if plain in names else plain)
    return names


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, int, Sequence[float]]]) -> str:
    """Class, number of objects and metrics, a row each; a metric that is nan is a dash."""
    cells = [["class", "objects", *columns]]
    cells += [[_cut(name), str(count), *map(_value, metrics)] for name, count, metrics in rows]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([_padded(row[0], widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n  ".join([title, *lines])


def width(text: str) -> int:
    """The columns of a terminal that a text takes: wide characters (CJK, most emoji) two, combining ones none."""
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _padded(text: str, columns: int) -> str:
    return text + " " * (columns - width(text))


def _cut(name: str) -> str:
    if width(name) <= WIDEST:
        return name
    while width(name) > WIDEST - 3:
        name = name[: WIDEST - 3] if len(name) > WIDEST else name[:-1]
    return f"{name}..."


def _value(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
