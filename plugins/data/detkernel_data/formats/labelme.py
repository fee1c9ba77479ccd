"""LabelMe form: a JSON file beside each image, with the shapes that were drawn on it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

from detkernel import DataError, option, plugin
from detkernel.errors import relative
from detkernel.files import read_regular
from detkernel_detection.images import SUFFIXES, Listing

from detkernel_data.formats.dataset import FileDataset, check_names
from detkernel_data.formats.entry import Entry, is_number, json_problems
from detkernel_data.formats.missing_files import Near, walk
from detkernel_data.formats.table import Box, Table
from detkernel_data.report import EXAMPLES, Problems, counted, note, tally

_LARGEST = 2**29
"""Bytes of a file: it may hold its image as text."""
_CIRCLE = 32
"""Corners of the polygon that a circle becomes."""
_WITHOUT_AREA = ("line", "linestrip", "point", "points")


class Drawn(NamedTuple):
    """One object: what was drawn under one label, and under one group number where there is such."""

    name: str
    box: Box
    mask: Any
    """Polygons, run lengths, or nothing for a rectangle."""
    number: int
    """Of its first shape in the file, from 1."""
    fields: Sequence[Any]


class LabelmeFile(NamedTuple):
    image: str
    """As the file names it."""
    height: int
    """0 where the file does not state it."""
    width: int
    objects: list[Drawn]
    without_area: list[str]
    """Kinds of the shapes that enclose nothing: points and lines."""


def read_json(path: Path, limit: int = _LARGEST) -> Any:
    """The content of a JSON file. Raises `DataError` with line and column."""
    try:
        with json_problems(path):
            return json.loads(read_regular(path, limit).decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{relative(path)}: the annotations cannot be read ({error.strerror})") from None


def is_labelme(content: Any) -> bool:
    """Whether a JSON file's content is of this form; other tools leave JSON files in a folder too."""
    return isinstance(content, dict) and "shapes" in content and ("imagePath" in content or "imageHeight" in content)


def read_file(path: Path, fields: Sequence[str] = ()) -> LabelmeFile | None:
    """Read a file, or give None for one of another form. Raises `DataError` with the shape that is wrong."""
    content = read_json(path)
    if not is_labelme(content):
        return None
    entry = Entry(relative(path), content)
    image = str(entry.fields.get("imagePath") or "").replace("\\", "/")  # Windows' LabelMe writes its own separator
    sides = [entry.fields.get(name) for name in ("imageHeight", "imageWidth")]
    height, width = (
        (0, 0) if sides == [None, None] else (entry.integer(name, at_least=1) for name in ("imageHeight", "imageWidth"))
    )
    groups: dict[object, list[Drawn]] = {}
    without_area = []
    for number, value in enumerate(entry.list("shapes"), start=1):
        shape = Entry(f"{entry.place}: shape {number}", value)
        kind = shape.text("shape_type") if shape.fields.get("shape_type") is not None else "polygon"
        if kind in _WITHOUT_AREA:
            without_area.append(kind)
            continue
        drawn = _drawn(shape, kind, number, (height, width), fields)
        group = shape.fields.get("group_id")
        groups.setdefault((drawn.name, group) if group is not None else number, []).append(drawn)
    return LabelmeFile(image, height, width, [_joined(group) for group in groups.values()], without_area)


def _drawn(shape: Entry, kind: str, number: int, size: tuple[int, int], fields: Sequence[str]) -> Drawn:
    name = shape.text("label")
    points = [_point(shape, place, value) for place, value in enumerate(shape.list("points"))]
    values = [_value(shape, wanted) for wanted in fields]
    least = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}.get(kind)
    if least is None:
        raise shape.wrong("shape_type", "polygon, rectangle, circle, mask, line, linestrip or point", kind)
    if len(points) < least:
        raise shape.wrong("points", f"at least {least}, as a {kind} has", shape.fields["points"])
    if kind == "circle":
        (x, y), edge = points[0], points[1]
        radius = math.dist((x, y), edge)
        turns = [2 * math.pi * step / _CIRCLE for step in range(_CIRCLE)]
        outline = [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]
        box = (x - radius, y - radius, x + radius, y + radius)
        return Drawn(name, box, [array("d", [value for point in outline for value in point])], number, values)
    xs, ys = zip(*points, strict=True)
    box = (min(xs), min(ys), max(xs), max(ys))
    mask: Any = []
    if kind == "polygon":
        mask = [array("d", [value for point in points for value in point])]
    elif kind == "mask":
        box, mask = _painted(shape, points[0], size)
    return Drawn(name, box, mask, number, values)


def _point(shape: Entry, place: int, value: Any) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_number, value)):
        raise shape.wrong(f"points[{place}]", "two finite numbers, x and y in pixels", value)
    return float(value[0]), float(value[1])


def _value(shape: Entry, name: str) -> Any:
    """A further value of an object: a key of its shape, or one of its flags."""
    flags = shape.fields.get("flags")
    value = shape.fields.get(name, flags.get(name) if isinstance(flags, dict) else None)
    value = int(value) if isinstance(value, bool) else value
    if not is_number(value):
        raise shape.wrong(name, "a number or a flag, as `fields` of the data set asks for it in every object", value)
    return value


def _painted(shape: Entry, corner: tuple[float, float], size: tuple[int, int]) -> tuple[Box, Any]:
    """The box and the run lengths of a mask that is drawn in pixels: a PNG at its box's first corner."""
    import numpy as np
    from PIL import Image
    from pycocotools import mask as coco

    try:
        data = base64.b64decode(shape.text("mask"), validate=True)
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            pixels = np.asarray(image.convert("L")) > 0
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{shape.place}: `mask`: expected a PNG in base64 ({error})") from None
    height, width = size
    x, y = int(corner[0]), int(corner[1])
    if not height:
        raise DataError(f"{shape.place}: a mask needs `imageHeight` and `imageWidth` in its file")
    if not pixels.any() or x < 0 or y < 0 or y + pixels.shape[0] > height or x + pixels.shape[1] > width:
        raise DataError(
            f"{shape.place}: `mask`: {pixels.shape[1]}x{pixels.shape[0]} pixels at {x}, {y}, of which "
            f"{int(pixels.sum())} are set; expected some, within the image of {width}x{height}"
        )
    whole = np.zeros((height, width), dtype=np.uint8, order="F")
    whole[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    box = (x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)
    runs = coco.encode(whole)
    mask = {"size": [height, width], "counts": runs["counts"].decode()}
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3])), mask


def _joined(group: Sequence[Drawn]) -> Drawn:
    """Shapes of one group are the parts of one object."""
    first, *others = group
    if not others:
        return first
    corners = list(zip(*(one.box for one in group), strict=True))
    box = (min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3]))
    whole = all(isinstance(one.mask, list) and one.mask for one in group)
    return first._replace(box=box, mask=[part for one in group for part in one.mask] if whole else [])


def read(
    root: Path,
    unlabelled: str,
    orphans: str,
    *,
    drop_missing: bool,
    fields: Sequence[str] = (),
) -> Table:
    """Everything that the files below a folder say. Raises `DataError` with all problems found."""
    if not root.is_dir():
        raise DataError(f"{relative(root)}: there is no such folder of LabelMe's JSON files and images")
    problems, is_there, near = Problems(relative(root)), Listing(), Near(root, "", SUFFIXES)
    result = _Found(root, fields)
    table = result.table
    images: list[str] = []
    taken: dict[str, str] = {}
    without_image, others, shapes = [], [], Counter[str]()
    for folder, names in walk(root):
        images += [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]  # noqa: PTH118, PTH122
        for name in names:
            if not name.endswith(".json"):
                continue
            path = Path(folder) / name
            try:
                found = read_file(path, fields)
                if found is None:
                    others.append(str(path))
                    continue
                shapes.update(found.without_area)
                image = _image_of(path, found.image, is_there)
                if not image and orphans == "drop":
                    without_image.append(str(path))
                    continue
                if not image and not drop_missing:
                    raise DataError(_missing(path, found.image, problems, near))
                image = image or str(path.parent / (found.image or f"{path.stem}.jpg"))  # counted by `bad_images`
                if image in taken:
                    raise DataError(f"{relative(path)}: {relative(taken[image])} has the same image; keep one of them")
                taken[image] = str(path)
                result.add(image, str(path), found)
            except DataError as error:
                problems.add(str(error))
    problems.stop()
    if not taken and not others:
        raise DataError(f"{relative(root)}: there is no JSON file in this folder, or below it")
    _report(table, shapes, without_image, others)
    _add_unlabelled(result, [image for image in sorted(images) if image not in taken], unlabelled)
    table.masks = table.masks if any(table.masks or ()) else None
    return table


def _image_of(path: Path, named: str, is_there: Listing) -> str:
    """The image of a file: the one that it names, from its own folder; else the one that is called like it."""
    beside = [f"{path.stem}{suffix}" for suffix in sorted(SUFFIXES)]
    for name in [named, Path(named).name, *beside, *(one.upper() for one in beside)]:
        image = os.path.normpath(path.parent / name) if name else ""
        if image and is_there(image):
            return image
    return ""


def _missing(path: Path, named: str, problems: Problems, near: Near) -> str:
    hint = "" if problems.full else near.hint(named or f"{path.stem}.jpg")
    advice = (
        "; `orphan_labels: drop` leaves such files out. An image that is kept inside of the file (`imageData`) is not "
        "read: `labelme_export_json` writes it"
    )
    return f"{relative(path)}: its image '{named}' is missing{hint or advice}"


def _report(table: Table, shapes: Counter[str], without_image: list[str], others: list[str]) -> None:
    if shapes:
        what = f"{counted(shapes.total(), 'shape')} without an area left out: {tally(sorted(shapes.items()))}"
        table.notes.append(note(what))
    if without_image:
        shown = [relative(file) for file in without_image[:EXAMPLES]]
        what = f"{counted(len(without_image), 'annotation file')} without an image left out"
        table.notes.append(note(what, without_image, "`orphan_labels: error` refuses them", shown))
    if others:
        shown = [relative(file) for file in others[:EXAMPLES]]
        what = f"{counted(len(others), 'JSON file')} not of LabelMe's form (`shapes`, `imagePath`) passed over"
        table.notes.append(note(what, others, shown=shown))


def _add_unlabelled(result: _Found, images: Sequence[str], policy: str) -> None:
    if not images:
        return
    shown = [relative(image) for image in images[:EXAMPLES]]
    what = f"{counted(len(images), 'image')} without a JSON file"
    if policy == "error":
        raise DataError(
            f"{result.table.source}: {what}: {'; '.join(shown)}; `unlabelled: keep` takes them without objects, "
            "`unlabelled: drop` leaves them out"
        )
    for image in images if policy == "keep" else ():
        result.add(image, image, None)
    kept = policy == "keep"
    done = "taken as images without objects" if kept else "left out"
    other = "`unlabelled: drop` leaves them out" if kept else "`unlabelled: keep` takes them as without objects"
    result.table.notes.append(note(f"{what} {done}", images, other, shown))


class _Found:
    """The table of what was read, and the place of each image and object."""

    def __init__(self, root: Path, fields: Sequence[str]) -> None:
        self.root = root
        self.sources: list[str] = []
        """Of each image, the file that messages name."""
        self.numbers: list[int] = []
        """Of each object, its shape in the file."""
        self.table = Table(
            source=relative(root),
            declared=lambda: sorted(set(self.table.names)),
            where=self._where,
            where_image=lambda index: relative(self.sources[index]),
            masks=[],
            fields={name: [] for name in fields},
        )

    def _where(self, index: int) -> str:
        table = self.table
        return f"{relative(self.sources[table.image[index]])}: shape {self.numbers[index]} '{table.names[index]}'"

    def add(self, image: str, source: str, found: LabelmeFile | None) -> None:
        table = self.table
        assert table.masks is not None
        identity = Path(os.path.relpath(image, self.root)).as_posix()
        position = table.add_image(identity, image, found.height if found else 0, found.width if found else 0)
        self.sources.append(source)
        for drawn in found.objects if found else ():
            table.add_object(position, drawn.name, drawn.box)
            table.masks.append(drawn.mask)
            self.numbers.append(drawn.number)
            for name, value in zip(table.fields, drawn.fields, strict=True):
                table.fields[name].append(value)


@plugin
class Labelme(FileDataset):
    """Images and shapes in LabelMe's form: a JSON file for each image, in a folder and those below it.

    Polygons, circles and masks become masks and the boxes around them, rectangles boxes; the shapes of one label and
    one `group_id` are the parts of one object. Points and lines are left out, and counted. Coordinates are those of
    the upright image, as LabelMe shows it. An image's id is its path below the folder.
    """

    root: Path = option(help="the folder of the JSON files and their images")
    class_names: list[str] | None = option(
        default=None, help="labels in label order; null: all that are there, sorted by name"
    )
    exif_orientation: Literal["ignore", "apply"] = option(
        default="apply", help="whether shapes were drawn on the image as stored, or on the upright one"
    )
    unlabelled: Literal["keep", "drop", "error"] = option(
        default="drop",
        help="images without a JSON file: taken as images without objects, left out and counted, or an error",
    )
    orphan_labels: Literal["drop", "error"] = option(
        default="error", help="JSON files without an image: left out and counted, or an error"
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        table = read(
            self.root,
            self.unlabelled,
            self.orphan_labels,
            drop_missing=self.bad_images == "drop",
            fields=tuple(self.fields),
        )
        self._clean(table, self.class_names)
