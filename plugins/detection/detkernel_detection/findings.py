"""What is odd about data, in parts: for a reader's notes, the log, a table, and a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import attrs
from detkernel.errors import printable


@attrs.frozen
class Finding:
    """Something about the data that somebody should know, in parts."""

    what: str
    """In words, without the count."""
    count: int = 0
    """How often; 0: it is not counted."""
    places: Sequence[str] = ()
    """All of them."""
    advice: str = ""
    """What to do about it."""
    option: str = ""
    """The option that settles it; empty where none does."""
    split: str = ""
    """The split of a config that it is about, or several."""

    @classmethod
    def of_text(cls, text: str, places: Sequence[str] = (), advice: str = "") -> Finding:
        """From the words of a reader, which begin with a count: `2 boxes without area dropped`."""
        number = _COUNT.match(text)
        option = _OPTION.search(advice)
        what = text[number.end() :] if number else text
        count = int(number[1].replace(",", "")) if number else len(places)
        return cls(what, count, places, advice, option[1] if option else "")

    @classmethod
    def of_note(cls, note: str) -> Finding:
        """From a note of a data set, which may be plain text, or text with `places`."""
        if isinstance(note, Note):
            return note.finding
        return cls.of_text(printable(str(note)), [printable(str(place)) for place in getattr(note, "places", ())])

    def __str__(self) -> str:
        """`boxes without area dropped (2)`, without places and advice."""
        counted = self.count and not self.what[:1].isdigit()
        return f"{self.what} ({self.count:,})" if counted else self.what


_COUNT = re.compile(r"([0-9][0-9,]*) (?!of )")
_OPTION = re.compile(r"`(?:data\.)?(\w+)\b")


class Note(str):
    """A warning: a count, three examples, and the option that changes it. `places` are all of them, and `finding` is
    the same in parts."""

    __slots__ = ("finding", "places")
    finding: Finding
    places: Sequence[str]

    def __new__(cls, text: str, places: Sequence[str] = (), finding: Finding | None = None) -> Note:
        note = super().__new__(cls, printable(text))  # names of files and classes may hold anything
        note.places = [printable(place) for place in places]
        note.finding = finding or Finding.of_text(str(note), note.places)
        return note

    def inside(self, prefix: str) -> Note:
        """The same, said of a part."""
        found = attrs.evolve(self.finding, what=f"{self.finding.what} ({printable(prefix)})")
        return Note(f"{prefix}: {self}", self.places, found)


@runtime_checkable
class ExaminesData(Protocol):
    """A plugin that knows what is odd about the data of a run, as the one that loads it does."""

    def examine_data(self) -> Sequence[Finding]:
        """What the readers found in the data sets that are loaded, and what can be said without opening an image."""
