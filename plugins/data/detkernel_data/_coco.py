"""Reads instances of COCO form."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detkernel import DataError
from detkernel.detection import ImageId
from detkernel.errors import relative

from detkernel_data._json import Entry, is_number
from detkernel_data._pictures import Listing, scan
from detkernel_data._report import Problems
from detkernel_data._table import Table


class Category(NamedTuple):
    name: str
    keypoints: tuple[str, ...]


def read(path: Path, images: Path, *, masks: bool) -> tuple[Table, dict[str, int], tuple[str, ...]]:
    """Everything that the file says, its category ids by name, and the names of the keypoints.

    Raises `DataError` with all problems found.
    """
    source = relative(path)
    data = Entry(source, _parse(path, masks))
    categories = _categories(data, source)
    keypoint_names = _keypoint_names(categories, source)
    table = _empty_table(source, [categories[number].name for number in sorted(categories)])
    positions = _add_images(table, data, images)
    _Objects(table, categories, positions, len(keypoint_names), masks).add_all(data.list("annotations"))
    return table, {category.name: number for number, category in categories.items()}, keypoint_names


def _parse(path: Path, masks: bool) -> Any:
    """The file's content. Lists of coordinates are packed as they come: as Python numbers they take gigabytes."""

    def pack(fields: dict[str, Any]) -> dict[str, Any]:
        polygons = fields.get("segmentation")
        if not masks:
            fields.pop("segmentation", None)
        elif type(polygons) is list:
            try:
                fields["segmentation"] = [array("d", part) for part in polygons]
            except (TypeError, OverflowError):  # told when the annotation is checked
                return fields
        return fields

    try:
        with path.open(encoding="utf-8-sig") as file:
            return json.load(file, object_hook=pack)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{relative(path)}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{relative(path)}: broken JSON: nested too deeply for annotations") from None
    except ValueError as error:  # no UTF-8, or a number of thousands of digits
        raise DataError(f"{relative(path)}: broken JSON: {error}") from None


def _unreadable(path: Path, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{relative(path)}: the annotations cannot be read ({error.strerror})"
    above = next((parent for parent in path.parents if parent.is_dir()), Path())
    there = sorted(entry.name for entry in above.iterdir())[:12]
    return f"{relative(path)}: there is no such file; {relative(above)} has {', '.join(there) or 'nothing in it'}"


def _categories(data: Entry, source: str) -> dict[int, Category]:
    found: dict[int, Category] = {}
    for index, value in enumerate(data.list("categories")):
        entry = Entry(f"{source}: categories[{index}]", value)
        number, name = entry.integer("id"), entry.text("name")
        if number in found:
            raise DataError(f"{source}: category id {number} is given to '{found[number].name}' and to '{name}'")
        if any(name == other.name for other in found.values()):
            raise DataError(f"{source}: two categories are called '{name}'; classes are matched by name, so rename one")
        points = entry.list("keypoints") if "keypoints" in entry.fields else []
        found[number] = Category(name, tuple(map(str, points)))
    return found


def _keypoint_names(categories: Mapping[int, Category], source: str) -> tuple[str, ...]:
    kinds = {category.keypoints for category in categories.values() if category.keypoints}
    if len(kinds) > 1:
        names = ", ".join(f"'{category.name}'" for category in categories.values() if category.keypoints)
        raise DataError(f"{source}: {names} have different keypoints; expected one set of them in a data set")
    return kinds.pop() if kinds else ()


def _empty_table(source: str, declared: list[str]) -> Table:
    table: Table

    def where(index: int) -> str:
        assert table.ids is not None
        name = os.path.basename(table.files[table.picture[index]])  # noqa: PTH119 - called for many objects
        return f"{source}: annotation {table.ids[index]} '{table.names[index]}' of {name}"

    table = Table(
        source=source,
        declared=lambda: declared,
        where=where,
        where_picture=lambda index: f"{source}: image {table.image_ids[index]}",
        area=[],
        crowd=[],
        ids=[],
    )
    return table


def _add_images(table: Table, data: Entry, folder: Path) -> dict[ImageId, int]:
    """Append all pictures; image id -> position."""
    problems = Problems(table.source)
    positions: dict[ImageId, int] = {}
    ids: set[str] = set()  # 7 and "7" are one: in results, ids are often text
    seen: dict[str, ImageId] = {}
    is_there = Listing()
    with scan(folder, "pictures"):
        pass  # a missing folder is one problem, not one a picture
    for index, value in enumerate(data.list("images")):
        try:
            entry = Entry(f"{table.source}: images[{index}]", value)
            number, name = entry.identity("id"), entry.text("file_name")
            entry.place = f"{table.source}: image {number}"
            if str(number) in ids:
                raise DataError(f"{entry.place}: two images have this id; expected each once")
            if name in seen:
                raise DataError(f"{entry.place}: '{name}' is image {seen[name]} already; merge the two")
            path = os.path.join(folder, name)  # noqa: PTH118 - a path object for each picture takes seconds
            if not is_there(path):
                raise DataError(f"{entry.place}: the picture {relative(path)} is missing")
            ids.add(str(number))
            seen[name] = number
            positions[number] = table.add_picture(number, path, *_size(entry))
        except DataError as error:
            problems.add(str(error))
    problems.stop()
    return positions


def _size(entry: Entry) -> tuple[int, int]:
    """(height, width); (0, 0) where neither is stated."""
    if entry.fields.get("height") is None and entry.fields.get("width") is None:
        return 0, 0
    return entry.integer("height", at_least=1), entry.integer("width", at_least=1)


class _Objects:
    """Appends annotations to a table, each of them checked."""

    def __init__(
        self,
        table: Table,
        categories: Mapping[int, Category],
        positions: Mapping[ImageId, int],
        keypoints: int,
        masks: bool,
    ) -> None:
        self.table = table
        self.categories = categories
        self.positions = positions
        self.ids: set[int] = set()
        self.keypoint_count = keypoints
        self.masks: list[Any] | None = [] if masks else None
        self.keypoints: list[Sequence[float]] | None = [] if keypoints else None

    def add_all(self, annotations: Sequence[Any]) -> None:
        problems = Problems(self.table.source)
        for index, value in enumerate(annotations):
            number = value.get("id") if isinstance(value, dict) else None
            place = f"annotation {number}" if type(number) is int else f"annotations[{index}]"
            try:
                self._add(Entry(f"{self.table.source}: {place}", value))
            except DataError as error:
                problems.add(str(error))
        problems.stop()
        self.table.keypoints = self.keypoints
        self.table.masks = self.masks if self.masks and any(self.masks) else None

    def _add(self, entry: Entry) -> None:
        number = entry.integer("id")
        if number in self.ids:
            raise DataError(f"{entry.place}: two annotations have this id; expected each once")
        picture = self.positions.get(image := entry.identity("image_id"))
        if picture is None:
            raise DataError(f"{entry.place}: `image_id`: there is no image {image!r} in the file")
        category = self.categories.get(category_id := entry.integer("category_id"))
        if category is None:
            known = ", ".join(map(str, sorted(self.categories)[:12]))
            raise DataError(f"{entry.place}: `category_id`: there is no category {category_id} (there are {known})")
        x, y, width, height = map(float, entry.numbers("bbox", 4))
        area = entry.fields.get("area")
        if area is not None and (not is_number(area) or area < 0):
            raise entry.wrong("area", "a number of at least 0", area)
        crowd = entry.fields.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise entry.wrong("iscrowd", "0 or 1", crowd)
        mask, keypoints = entry.fields.get("segmentation"), self._keypoints(entry, category)
        self.ids.add(number)
        self._append(number, bool(crowd), math.nan if area is None else float(area), mask, keypoints)
        self.table.add_object(picture, category.name, (x, y, x + width, y + height))

    def _append(self, number: int, crowd: bool, area: float, mask: Any, keypoints: Sequence[float]) -> None:
        table = self.table
        assert table.ids is not None
        assert table.crowd is not None
        assert table.area is not None
        table.ids.append(number)
        table.crowd.append(crowd)
        table.area.append(area)
        if self.masks is not None:
            self.masks.append(mask or [])
        if self.keypoints is not None:
            self.keypoints.append(keypoints)

    def _keypoints(self, entry: Entry, category: Category) -> Sequence[float]:
        """3K numbers: zeros where the object has none."""
        if self.keypoints is None or "keypoints" not in entry.fields:
            return array("d", bytes(8 * 3 * self.keypoint_count))
        if not category.keypoints:
            raise DataError(f"{entry.place}: `keypoints`: its category '{category.name}' names no keypoints")
        points = entry.numbers("keypoints", 3 * self.keypoint_count)
        if not set(points[2::3]) <= {0, 1, 2}:
            raise DataError(f"{entry.place}: `keypoints`: expected a visibility of 0, 1 or 2 in every third place")
        return array("d", points)
