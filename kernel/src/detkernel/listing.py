"""What is installed, as a table. On its own, so that `detkernel plugins` imports neither cattrs nor YAML."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from detkernel.catalog import Catalog


def plugin_list() -> str:
    """What is installed, by kind: name, distribution, version, one line. Imports no plugin."""
    catalog = Catalog()
    rows = table("name", "kind", "what it does", "distribution", "version")
    for name, offers in catalog.entries.items():
        for entry in offers:
            kind, line = entry.describe()
            conflict = " (CONFLICT: offered twice)" if len(offers) > 1 else ""
            rows.add_row(name, kind.lower() or "plugin", line + conflict, entry.distribution, entry.version)
    if not catalog.entries:
        return "no plugins are installed; `pip install detkernel` brings the standard ones\n"
    return render(rows)


def table(*columns: str) -> Table:
    """A table without lines; the first column never breaks."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, no_wrap=number == 0, overflow="fold")
    return made


def render(rows: Table) -> str:
    """The table at the terminal's width (wide where the output is no terminal), with colour only on a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(file=io.StringIO(), width=200)
    with console.capture() as capture:
        console.print(rows)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
