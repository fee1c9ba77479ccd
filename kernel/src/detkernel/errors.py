"""What can go wrong, and whose mistake it is.

DetkernelError
└── UserError            the user can fix it: one message, exit status 2, never a traceback
    ├── ConfigError      a config, found wrong before anything ran: all its problems at once
    ├── CatalogError     what is installed does not fit: a missing, doubled or broken plugin
    │   └── DefinitionError  a plugin class that its author did not define validly; a TypeError, too
    ├── DataError        a data set, or an entry of one
    ├── CheckpointError  a checkpoint that is torn, missing or does not fit
    └── ResourceError    memory that ran out, or a process that was killed: to start again may help

Everything else that escapes a plugin is a bug. It keeps its traceback and gains a note that names the plugin, its
distribution, the event and the iteration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import attrs


class DetkernelError(Exception):
    """Base of every error that detkernel raises on purpose."""


class UserError(DetkernelError):
    """A mistake in what the user gave us. The message says where, what, what was expected, and what to do."""


class CatalogError(UserError):
    """A plugin that is not installed, is installed twice, or cannot be imported."""


class DefinitionError(CatalogError, TypeError):
    """A class that cannot be made a plugin; names it and its member. The catalogue adds where it is, and whose."""


class DataError(UserError):
    """Data that cannot be used; names the file and the entry."""


class CheckpointError(UserError):
    """A checkpoint that is missing, torn, or does not fit this run."""


class ResourceError(UserError):
    """Something that the run needs was lost: memory, or a process of its own. A launcher may start the run again."""


_FOLLOWS = "this process failed because another did: "


def follow(error: BaseException, first: str) -> None:
    """Note on an error that another process failed first, and how; this one's is what followed from it."""
    error.add_note(f"{_FOLLOWS}{first}")


def followed(error: BaseException) -> str | None:
    """How another process failed first, where an error only followed from that; else None."""
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_FOLLOWS))
    return next((note.removeprefix(_FOLLOWS) for note in notes), None)


def printable(text: str, *, keep: str = "") -> str:
    """Text from a file, or of a user, as it may be shown: in one line, and a terminal obeys nothing in it.

    Escaped is what `str.isprintable` is false for: line breaks, control characters and with them every escape
    sequence, halves of surrogate pairs, characters that turn the direction of writing. Those in `keep` are not.
    """
    if text.isprintable():
        return text
    shown = (char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text)
    return "".join(shown)


class Escape(logging.Filter):
    """Makes the records of a logger `printable`, line by line: a table keeps its lines."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
        return True


ESCAPE = Escape()


_WIDTH = 70
"""Characters that a message shows of a line, around the place that is meant."""


@attrs.frozen
class Where:
    """A place in a config: file, line and column (both from 1). `line` 0: no place (built in Python)."""

    file: str
    line: int = 0
    column: int = 0
    text: str = ""
    """The line itself, for the caret."""
    foreign: bool = False
    """Whether it came inside another file, a checkpoint say, and so not from the hand of the user."""

    def __str__(self) -> str:
        file = printable(self.file)
        return f"{file}:{self.line}:{self.column}" if self.line else file

    def caret(self) -> str:
        """The line with a caret under the column, indented; empty where there is no line to show."""
        if not self.text:
            return ""
        start = max(0, self.column - 1 - _WIDTH * 2 // 3) if len(self.text) > _WIDTH else 0
        end = start + _WIDTH
        before, after = self.text[start : self.column - 1], self.text[self.column - 1 : end]
        before, after = ("..." * bool(start) + printable(before, keep="\t"), printable(after, keep="\t"))
        pad = "".join("\t" if char == "\t" else " " for char in before)
        return f"    {before}{after}{'...' * (len(self.text) > end)}\n    {pad}^"


@attrs.frozen
class Problem:
    """One thing that is wrong with a config. `path` is the option's dotted path, such as `model.backbone.depth`."""

    where: Where
    path: str = attrs.field(converter=printable)
    message: str

    def __str__(self) -> str:
        head = f"{self.where}: {self.path}: {self.message}" if self.path else f"{self.where}: {self.message}"
        caret = self.where.caret()
        return f"{head}\n{caret}" if caret else head


class ConfigError(UserError):
    """Every problem found in a config, each with its place, in the order of a file's lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        found = list(problems)
        files = list(dict.fromkeys(one.where.file for one in found))
        self.problems = sorted(found, key=lambda one: (files.index(one.where.file), one.where.line, one.where.column))
        super().__init__("\n".join(str(problem) for problem in self.problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'momentum'?`, or the choices when nothing is near and they are few, or nothing.

    What begins one choice alone, with three letters or more, means that one: `prob`, `probability`.
    """
    import difflib  # here, since only a mistake needs it

    known = sorted(known)
    folded = {choice.lower(): choice for choice in known}
    begun = [choice for choice in folded if len(name) >= 3 and choice.startswith(name.lower())]
    near = begun if len(begun) == 1 else difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    if near:
        return f", did you mean '{printable(folded[near[0]])}'?"
    if 0 < len(known) <= 12:
        return f" (expected one of: {', '.join(map(printable, known))})"
    return ""


def relative(path: str | Path) -> str:
    """The path as a message shows it: relative to the current folder where it lies below it, and `printable`."""
    return printable(as_typed(path))


def as_typed(path: str | Path) -> str:
    """The path as a user would type it: relative to the current folder where it lies below it."""
    try:
        return str(Path(os.path.realpath(path)).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
