"""What a terminal shows: text wrapped at words, in 80 columns or as many as it has, with few colours."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterable

import click

from detkernel.errors import printable

NARROWEST = 40


def columns() -> int:
    """Of the terminal, or 80 where the output goes elsewhere; the variable COLUMNS is stronger than both."""
    return max(shutil.get_terminal_size((80, 24)).columns, NARROWEST)


def wrapped(text: str, indent: str = "", first: str | None = None) -> str:
    """Text as lines that fit, each behind `indent`, the first one behind `first`; line breaks of its own are kept, and
    a line that is indented goes on farther in. A word that is too long, such as a path, stays whole."""
    lines = []
    for number, line in enumerate(text.split("\n")):
        own = line[: len(line) - len(line.lstrip())]
        head = first if first is not None and number == 0 else indent
        lines += textwrap.wrap(
            line,
            max(columns(), len(indent) + 20),
            initial_indent=head,
            subsequent_indent=indent + (f"{own}  " if own else ""),
            break_long_words=False,
            break_on_hyphens=False,
            expand_tabs=False,
            replace_whitespace=False,
        ) or [head.rstrip()]
    return "\n".join(lines)


def reflowed(text: str, indent: str = "") -> str:
    """Paragraphs of a docstring, wrapped anew; those with an indented line, code say, are left as they are."""
    made = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        set_by_hand = any(line.startswith((" ", "- ", "| ")) for line in lines)
        made.append(wrapped(paragraph if set_by_hand else " ".join(lines), indent))
    return "\n\n".join(made)


def rows(pairs: Iterable[tuple[str, str]], indent: str = "", widest: int = 26) -> str:
    """Names with what they are behind them; a name that is wider than `widest` has a line of its own, and so has one
    of a table that would not fit behind it."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs if len(name) <= widest), default=0)
    pad = f"{indent}{'':<{width}}  "

    def row(name: str, text: str) -> str:
        if len(name) > width:
            return f"{indent}{name}\n{wrapped(text, pad)}\n"
        if len(pad) + _table_width(text) > columns():
            return f"{indent}{name}\n{wrapped(text, f'{indent}  ')}\n"
        return wrapped(text, pad, f"{indent}{name:<{width}}  ") + "\n"

    return "".join(row(name, text) for name, text in pairs)


def _table_width(text: str) -> int:
    """Of the widest line with columns in it, two blanks between words; 0 where no line is like that."""
    return max((len(line) for line in text.split("\n") if "  " in line.strip()), default=0)


def styled(text: str, **style: object) -> str:
    """Text in colour, where colours are wanted (https://no-color.org); `click.echo` takes them off for a file."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, **style)  # type: ignore[arg-type]


def shown(text: object) -> str:
    """What may hold text from files, as a terminal may be given it; line breaks of a message's own are kept."""
    return printable(str(text), keep="\n\t")
