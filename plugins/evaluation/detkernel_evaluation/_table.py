"""A table of figures by class, for the log."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, int, Sequence[float]]]) -> str:
    """Class, number of objects and figures, a row each; a figure that there is none of is a dash."""
    cells = [["class", "objects", *columns]]
    cells += [[name, str(count), *map(_figure, figures)] for name, count, figures in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n  ".join([title, *lines])


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
