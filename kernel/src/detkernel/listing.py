"""What is installed, as a table. On its own, so that `detkernel plugins` imports neither cattrs nor YAML."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from detkernel.catalog import Catalog

NARROWEST = 30
"""Columns that the text which wraps gets on the narrowest terminal."""


def plugin_list() -> str:
    """What is installed, by kind: name, distribution, version, one line. Imports no plugin."""
    catalog = Catalog()
    if not catalog.entries:
        return "no plugins are installed; `pip install detkernel` brings the standard ones\n"
    rows = []
    for name, offers in catalog.entries.items():
        for entry in offers:
            kind, line = entry.describe()
            misfit = catalog.misfits.get(entry.distribution)
            line += " (CONFLICT: offered twice)" if len(offers) > 1 else ""
            line += f" (DOES NOT FIT: {misfit})" if misfit else ""
            rows.append((name, kind.lower() or "plugin", line, entry.distribution, entry.version))
    return table(("name", "kind", "what it does", "distribution", "version"), rows, wrap=2)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, wrap: int) -> str:
    """Columns as wide as what they hold; on a terminal, the column `wrap` is broken to its width."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    if sys.stdout.isatty():
        others = sum(widths) - widths[wrap] + 2 * (len(widths) - 1)
        widths[wrap] = min(widths[wrap], max(shutil.get_terminal_size().columns - others, NARROWEST))
    broken = [
        [textwrap.wrap(cell, widths[wrap]) if column == wrap else [cell] for column, cell in enumerate(line)]
        for line in lines
    ]
    parts = (part for cells in broken for part in zip_longest(*cells, fillvalue=""))
    return "".join(f"{'  '.join(map(str.ljust, part, widths)).rstrip()}\n" for part in parts)
