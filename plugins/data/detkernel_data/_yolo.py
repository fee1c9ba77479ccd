"""Reads labels of YOLO form."""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from detkernel import DataError
from detkernel.errors import relative

from detkernel_data._pictures import Listing
from detkernel_data._report import Problems, counted, first
from detkernel_data._table import Box, Table
from detkernel_data._yolo_yaml import names_of, pictures_of, read_yaml

MARGIN = 0.01
"""How far out of 0..1 a coordinate may be before it is surely something else, such as pixels."""

_CLASS = re.compile("[0-9]{1,6}")


class Label(NamedTuple):
    """One line: fractions of the picture's width and height."""

    name: str
    box: Box
    polygon: Sequence[float]
    """x, y, ...; empty for a box."""
    line: int


def read(data: Path, split: str) -> tuple[Table, list[str]]:
    """Everything that the label files say, and notes. Raises `DataError` with all problems found."""
    path, content = read_yaml(data)
    names = names_of(content)
    pictures = pictures_of(path, content, split)
    problems = Problems(content.place)
    _check_alone(pictures, problems)
    lines: list[int] = []
    table = _empty_table(f"{content.place}: {split}", names, lines)
    unlabelled, is_there = [], Listing()
    for picture, identity in zip(pictures, _identities(pictures, path.parent), strict=True):
        labels = label_file(picture)
        if not is_there(labels):
            unlabelled.append(relative(picture))
        try:
            found = read_labels(labels, names) if is_there(labels) else []
            _append(table, lines, picture, identity, found)
        except DataError as error:
            problems.add(str(error))
    problems.stop()
    if unlabelled and len(unlabelled) == len(pictures):
        raise DataError(
            f"{table.source}: no picture has labels; expected {relative(label_file(pictures[0]))} and so on"
        )
    if not any(table.masks or ()):
        table.masks = None
    note = f"{counted(len(unlabelled), 'picture')} without a label file: {'; '.join(first(unlabelled))}"
    return table, [note] if unlabelled else []


def _append(table: Table, lines: list[int], picture: str, identity: str, labels: Sequence[Label]) -> None:
    assert table.masks is not None
    position = table.add_picture(identity, picture, 0, 0)
    for label in labels:
        table.add_object(position, label.name, label.box)
        table.masks.append([array("d", label.polygon)] if label.polygon else [])
        lines.append(label.line)


def _check_alone(pictures: Sequence[str], problems: Problems) -> None:
    """Each picture counts once, and has labels of its own."""
    owners: dict[str, str] = {}
    for picture in pictures:
        owner = owners.setdefault(labels := label_file(picture), picture)
        if owner is not picture:
            both = f"{relative(picture)} and {relative(owner)} have one label file, {relative(labels)}; rename one"
            problems.add(f"{relative(picture)}: listed twice in {problems.source}" if owner == picture else both)
    problems.stop()


def _identities(pictures: Sequence[str], root: Path) -> list[str]:
    """The names without suffix; where folders share some, the paths from the data.yaml's folder."""
    stems = [Path(picture).stem for picture in pictures]
    if len(set(stems)) == len(stems):
        return stems
    return [Path(os.path.relpath(picture, root)).as_posix() for picture in pictures]


def label_file(picture: str) -> str:
    """The labels of `.../images/.../a.jpg` are `.../labels/.../a.txt`; without such a folder, they lie beside it."""
    folder, slash, name = f"{os.sep}{picture}".rpartition(f"{os.sep}images{os.sep}")
    moved = f"{folder}{os.sep}labels{os.sep}{name}"[1:] if slash else picture
    return f"{os.path.splitext(moved)[0]}.txt"  # noqa: PTH122


def read_labels(path: str, names: Sequence[str]) -> list[Label]:
    """Read a label file. Raises `DataError` with its line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{relative(path)}: the labels cannot be read ({error})") from None
    return [_label(path, number, line, names) for number, line in enumerate(lines, start=1) if line.strip()]


def _label(path: str, line: int, text: str, names: Sequence[str]) -> Label:
    words = text.split()
    place = f"{relative(path)}:{line}"
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise DataError(
            f"{place}: expected 'class x y width height', or a class and the points of a polygon; "
            f"got {counted(len(words), 'value')}"
        )
    if not _CLASS.fullmatch(words[0]) or int(words[0]) >= len(names):
        raise DataError(
            f"{place}: expected a class of 0 to {len(names) - 1} (data.yaml's names), got '{words[0][:20]}'"
        )
    name, values = names[int(words[0])], [_fraction(place, word) for word in words[1:]]
    if len(values) == 4:
        x, y, width, height = values
        return Label(name, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), (), line)
    xs, ys = values[0::2], values[1::2]
    return Label(name, (min(xs), min(ys), max(xs), max(ys)), values, line)


def _fraction(place: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not -MARGIN <= value <= 1 + MARGIN:
        raise DataError(f"{place}: expected fractions of the picture's width and height, 0 to 1; got '{word[:20]}'")
    return value


def _empty_table(source: str, names: list[str], lines: list[int]) -> Table:
    table: Table

    def where(index: int) -> str:
        return f"{relative(label_file(table.files[table.picture[index]]))}:{lines[index]}"

    table = Table(
        source=source,
        declared=lambda: names,
        where=where,
        where_picture=lambda index: relative(table.files[index]),
        fractions=True,
        masks=[],
    )
    return table
