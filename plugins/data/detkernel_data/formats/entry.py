"""Strict reading of fields from JSON that others wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detkernel import DataError
from detkernel.errors import relative

_LARGEST = 2**53
"""Beyond this, other readers of JSON lose digits."""

_NAMES = {dict: "a map", list: "a list", str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class Entry:
    """One map in a file; its fields are taken out with their types checked. Raises `DataError` naming the place."""

    def __init__(self, place: str, value: Any) -> None:
        self.place = place
        if not isinstance(value, dict):
            raise DataError(f"{place}: expected a map, got {kind(value)}")
        self.fields: Mapping[str, Any] = value

    def integer(self, name: str, *, at_least: int = -_LARGEST, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not at_least <= value <= _LARGEST:
            bound = f" of at least {at_least}" if at_least > -_LARGEST else ""
            bound = f" of at most {_LARGEST}" if type(value) is int and value > _LARGEST else bound
            raise self.wrong(name, f"a whole number{bound}", value)
        return value

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, "text", value)
        return value

    def identity(self, name: str) -> int | str:
        """A whole number, or text."""
        return self.text(name) if isinstance(self._get(name), str) else self.integer(name)

    def list(self, name: str) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

    def numbers(self, name: str, count: int) -> Sequence[float]:
        """So many numbers."""
        value = self._get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(name, f"{count} numbers", value)
        for position, item in enumerate(value):
            if not is_number(item):
                raise self.wrong(f"{name}[{position}]", "a finite number", item)
        return value

    def wrong(self, name: str, wanted: str, value: Any) -> DataError:
        return DataError(f"{self.place}: `{name}`: expected {wanted}, got {kind(value)}")

    def _get(self, name: str, default: Any = None) -> Any:
        value = self.fields.get(name, default)
        if value is None:
            raise DataError(f"{self.place}: `{name}` is missing")
        return value


@contextmanager
def json_problems(path: Path) -> Iterator[None]:
    """Raise what is wrong with a file's JSON as `DataError`, with line and column where they are known."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise DataError(f"{relative(path)}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{relative(path)}: broken JSON: nested too deeply for annotations") from None
    except ValueError as error:  # no UTF-8, or a number of thousands of digits
        raise DataError(f"{relative(path)}: broken JSON: {error}") from None


def is_number(value: Any) -> bool:
    """Whether it is a number with which one can reckon: no bool, not NaN, and far from overflow."""
    return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST


def number_in(place: str, name: str, text: str | None) -> float:
    """A field of an object that a file has as text: whole numbers stay such, true and false are 1 and 0."""
    words = {"true": 1, "false": 0}
    for read in (words.__getitem__, int, float):
        try:
            value = read((text or "").lower())
        except (KeyError, ValueError):
            continue
        if is_number(value):
            return value
    found = "nothing" if text is None else f"'{text[:40]}'"
    raise DataError(
        f"{place}: {name}: expected a number, as `fields` of the data set asks for it in every object; got {found}"
    )


def kind(value: Any) -> str:
    """What a value is; scalars with their value. Never the inside of a list: YAML aliases can make it endless."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return f"{_NAMES[type(value)]} of {len(value)}"
    return f"{_NAMES.get(type(value), type(value).__name__)} {value!r:.60}"
