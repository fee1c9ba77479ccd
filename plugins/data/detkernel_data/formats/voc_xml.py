"""Reads one annotation file of Pascal VOC form. Entities and external references are forbidden."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser
from detkernel import DataError
from detkernel.errors import relative
from detkernel.files import read_regular

from detkernel_data.formats.entry import is_number, number_in
from detkernel_data.formats.table import Box

CORNERS = ("xmin", "ymin", "xmax", "ymax")
_PIXELS = re.compile("[0-9]{1,6}")
_LARGEST = 2**26
"""Bytes. A file of ten thousand objects has a twentieth of it."""
_DEEPEST = 50
_FLAGS = ("difficult", "ignore", "deleted")


class VocObject(NamedTuple):
    name: str
    box: Box
    """As written."""
    difficult: bool
    """Or flagged by <ignore>, which some tools write."""
    deleted: bool
    """By a tool, LabelMe say, that keeps what was removed."""
    line: int
    fields: Sequence[float] = ()
    """The further values that were asked for."""


class VocFile(NamedTuple):
    height: int
    """0 where the file does not state a size, or states 0x0."""
    width: int
    objects: list[VocObject]


class _Builder:
    """Collects the texts of the elements that matter while the parser goes through the file."""

    def __init__(self, fields: Collection[str]) -> None:
        self.parser: Any = None
        self._fields = fields
        self.values: list[dict[str, str]] = []
        """Of each object, the fields that are there."""
        self._attribute: dict[str, str] = {}
        self.size: dict[str, str] = {}
        self.objects: list[tuple[int, dict[str, str]]] = []
        self.repeated: tuple[int, str] | None = None
        self._path: list[str] = []
        self._text: list[str] = []

    def start(self, tag: str, _attributes: object) -> None:
        self._path.append(tag)
        self._text = []
        if len(self._path) > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} elements deep")
        if self._path[1:] == ["object"]:
            self.objects.append((self.parser.CurrentLineNumber, {}))
            self.values.append({})

    def data(self, text: str) -> None:
        self._text.append(text)

    def end(self, tag: str) -> None:
        match self._path[1:]:
            case ["size", "width" | "height"]:
                self._keep(self.size, tag)
            case ["object", "name" | "difficult" | "ignore" | "deleted"] | [
                "object",
                "bndbox",
                "xmin" | "ymin" | "xmax" | "ymax",
            ]:
                self._keep(self.objects[-1][1], tag)
        if self._fields:
            self._end_field(tag)
        self._path.pop()

    def _end_field(self, tag: str) -> None:
        """<truncated>0</truncated>, or as CVAT writes it, <attribute><name>truncated</name><value>0</value>."""
        match self._path[1:]:
            case ["object", name] if name in self._fields:
                self._keep(self.values[-1], name)
            case ["object", "attributes", "attribute", "name" | "value"]:
                self._attribute[tag] = "".join(self._text).strip()
            case ["object", "attributes", "attribute"]:
                name, self._text = self._attribute.get("name", ""), [self._attribute.get("value", "")]
                self._attribute = {}
                if name in self._fields:
                    self._keep(self.values[-1], name)

    def close(self) -> list[str]:
        return self._path

    def _keep(self, texts: dict[str, str], tag: str) -> None:
        if tag in texts and self.repeated is None:
            self.repeated = (self.parser.CurrentLineNumber, tag)
        texts[tag] = "".join(self._text).strip()


def read_xml(path: Path, fields: Collection[str] = ()) -> VocFile:
    """Read a file, with further values of its objects. Raises `DataError` with its line and object."""
    builder = _Builder(fields)
    parser = DefusedXMLParser(target=builder)
    builder.parser = parser.parser
    try:
        parser.feed(read_regular(path, _LARGEST))
        parser.close()
    except OSError as error:
        raise DataError(f"{relative(path)}: the annotations cannot be read ({error.strerror})") from None
    except ParseError as error:
        line, column = error.position
        raise DataError(f"{relative(path)}:{line}:{column + 1}: broken XML: {str(error).partition(':')[0]}") from None
    except DefusedXmlException:
        line = builder.parser.CurrentLineNumber
        raise DataError(f"{relative(path)}:{line}: XML entities are not allowed here; remove the declaration") from None
    except (ValueError, LookupError) as error:  # an encoding that does not exist or does not fit
        raise DataError(f"{relative(path)}: broken XML: {error}") from None
    if builder.repeated:
        line, tag = builder.repeated
        raise DataError(f"{relative(path)}:{line}: <{tag}> is given twice; expected one")
    height, width = _size(path, builder.size)
    objects = [_object(path, number, *found) for number, found in enumerate(builder.objects, start=1)]
    if fields:
        for number, (found, values) in enumerate(zip(objects, builder.values, strict=True)):
            place = f"{relative(path)}:{found.line}: object {number + 1} '{found.name}'"
            numbers = [number_in(place, f"<{name}>", values.get(name)) for name in fields]
            objects[number] = found._replace(fields=numbers)
    return VocFile(height, width, objects)


def _size(path: Path, texts: dict[str, str]) -> tuple[int, int]:
    """(height, width)."""
    if not texts:
        return 0, 0
    height, width = (texts.get(name, "") for name in ("height", "width"))
    if not (_PIXELS.fullmatch(height) and _PIXELS.fullmatch(width)) or (int(height) == 0) != (int(width) == 0):
        raise DataError(
            f"{relative(path)}: <size>: expected width and height in pixels, got '{width}' and '{height}'; "
            "without <size> the image's own is taken"
        )
    return int(height), int(width)


def _object(path: Path, number: int, line: int, texts: dict[str, str]) -> VocObject:
    place = f"{relative(path)}:{line}: object {number}"
    name = texts.get("name")
    if not name:
        raise DataError(f"{place}: <name> is missing; expected the class of the object")
    values = [_number(f"{place} '{name}'", corner, texts) for corner in CORNERS]
    difficult, ignore, deleted = (_flag(f"{place} '{name}'", flag, texts) for flag in _FLAGS)
    return VocObject(name, (values[0], values[1], values[2], values[3]), difficult or ignore, deleted, line)


def _flag(place: str, name: str, texts: dict[str, str]) -> bool:
    value = texts.get(name, "").lower()
    if value not in ("", "0", "1", "true", "false"):
        raise DataError(f"{place}: <{name}>: expected 0 or 1, got '{texts[name][:40]}'")
    return value in ("1", "true")


def _number(place: str, corner: str, texts: dict[str, str]) -> float:
    if corner not in texts:
        raise DataError(f"{place}: <bndbox> has no <{corner}>; expected xmin, ymin, xmax and ymax in pixels")
    try:
        value = float(texts[corner])
    except ValueError:
        value = math.nan
    if not is_number(value):
        raise DataError(f"{place}: <{corner}>: expected a number of pixels, got '{texts[corner]}'")
    return value
