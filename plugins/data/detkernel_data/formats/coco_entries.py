"""Files of COCO's form read entry by entry: slower than in blocks, with words for every mistake."""

from __future__ import annotations

import errno
import json
import math
import os
from array import array
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from detkernel import DataError
from detkernel.errors import did_you_mean, relative
from detkernel.files import open_regular
from detkernel_detection import ImageId
from detkernel_detection.images import SUFFIXES, Listing, scan

from detkernel_data.download.published import hint as download_hint
from detkernel_data.formats.coco_form import Category, Form, take_flags
from detkernel_data.formats.entry import Entry, is_number, json_problems
from detkernel_data.formats.missing_files import Near
from detkernel_data.formats.table import Box, Table
from detkernel_data.report import Problems, counted, note

LARGEST = 2**34
"""Bytes: several times the largest published annotations. They are read into memory."""


def read_annotations(data: Entry, images: int) -> list[Any]:
    if data.fields.get("annotations") is None:
        raise DataError(
            f"{data.place}: `annotations` is missing: the file lists {counted(images, 'image')} and no objects, as the "
            "files of test images without annotations do; training and evaluation need objects"
        )
    return data.list("annotations")


def parse(path: Path, masks: bool) -> Any:
    """The file's content. Lists of coordinates are packed as they come: as Python numbers they take gigabytes."""

    def pack(fields: dict[str, Any]) -> dict[str, Any]:
        polygons = fields.get("segmentation")
        if not masks and fields.get("bbox"):
            fields.pop("segmentation", None)
        elif type(polygons) is list:
            try:
                fields["segmentation"] = [array("d", part) for part in polygons if part != []]
            except (TypeError, OverflowError):  # reported when the annotation is checked
                return fields
        return fields

    try:
        with (
            json_problems(path),
            open_regular(path) as binary,
            TextIOWrapper(binary, encoding="utf-8-sig") as file,
        ):
            if os.fstat(binary.fileno()).st_size > LARGEST:
                raise OSError(errno.EFBIG, f"it has more than {LARGEST:,} bytes")
            return json.load(file, object_hook=pack)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None


def _unreadable(path: Path, error: OSError) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"{relative(path)}: the annotations cannot be read ({error.strerror})"
    above = next((parent for parent in path.parents if parent.is_dir()), Path())
    there = sorted(entry.name for entry in above.iterdir())
    near = Near(path.parent).hint(path.name) if path.parent.is_dir() else did_you_mean(path.name, there[:2000])
    if "?" in near or near.startswith(";"):
        return f"{relative(path)}: there is no such file{near}"
    there_is = f"{relative(above)} has {', '.join(there[:12]) or 'nothing in it'}"
    return f"{relative(path)}: there is no such file; {there_is}{download_hint(path)}"


def read_categories(data: Entry, source: str) -> dict[int, Category]:
    found: dict[int, Category] = {}
    names: set[str] = set()
    for index, value in enumerate(data.list("categories")):
        entry = Entry(f"{source}: categories[{index}]", value)
        number, name = entry.integer("id"), entry.text("name")
        if number in found:
            raise DataError(f"{source}: category id {number} is given to '{found[number].name}' and to '{name}'")
        if name in names:
            raise DataError(f"{source}: two categories are called '{name}'; classes are matched by name, so rename one")
        names.add(name)
        points = entry.list("keypoints") if "keypoints" in entry.fields else []
        found[number] = Category(name, tuple(map(str, points)))
    return found


def read_keypoint_names(categories: Mapping[int, Category], source: str) -> tuple[str, ...]:
    kinds = {category.keypoints for category in categories.values() if category.keypoints}
    if len(kinds) > 1:
        names = ", ".join(f"'{category.name}'" for category in categories.values() if category.keypoints)
        raise DataError(f"{source}: {names} have different keypoints; expected one set of them in a data set")
    return kinds.pop() if kinds else ()


def add_images(table: Table, data: Entry, folder: Path, drop_missing: bool) -> dict[ImageId, int]:
    """Append all images; image id -> position. Those that are missing are left to `bad_images: drop`."""
    problems = Problems(table.source)
    positions: dict[ImageId, int] = {}
    ids: set[str] = set()  # 7 and "7" are one: in results, ids are often text
    seen: dict[str, ImageId] = {}
    is_there, near = Listing(), Near(folder, "image_folder", SUFFIXES)
    with scan(folder, "images"):
        pass  # a missing folder is one problem, not one an image
    for index, value in enumerate(data.list("images")):
        try:
            entry = Entry(f"{table.source}: images[{index}]", value)
            number, name = entry.identity("id"), _file_name(entry)
            entry.place = f"{table.source}: image {number}"
            if str(number) in ids:
                raise DataError(f"{entry.place}: two images have this id; expected each once")
            if name in seen:
                raise DataError(f"{entry.place}: '{name}' is image {seen[name]} already; merge the two")
            path = os.path.join(folder, name)  # noqa: PTH118 - a path object for each image takes seconds
            if not drop_missing and not is_there(path):
                hint = "" if problems.full else near.hint(name) or "; `bad_images: drop` leaves out such images"
                raise DataError(f"{entry.place}: the image {relative(path)} is missing{hint}")
            ids.add(str(number))
            seen[name] = number
            positions[number] = table.add_image(number, path, *_size(entry))
        except DataError as error:
            problems.add(str(error))
    problems.stop()
    return positions


def _file_name(entry: Entry) -> str:
    """LVIS states no `file_name`: its images are called by the last two parts of their address in COCO."""
    address = entry.fields.get("coco_url")
    if "file_name" not in entry.fields and isinstance(address, str):
        return "/".join(address.split("/")[-2:])
    return entry.text("file_name")


def _size(entry: Entry) -> tuple[int, int]:
    """(height, width); (0, 0) where neither is stated."""
    if entry.fields.get("height") is None and entry.fields.get("width") is None:
        return 0, 0
    return entry.integer("height", at_least=1), entry.integer("width", at_least=1)


class Objects:
    """Appends annotations to a table, each of them checked."""

    def __init__(
        self,
        table: Table,
        categories: Mapping[int, Category],
        positions: Mapping[ImageId, int],
        keypoints: int,
        form: Form,
    ) -> None:
        self.table = table
        self.categories = categories
        self.positions = positions
        self.ids: set[int] = set()
        self.keypoint_count = keypoints
        self.form = form
        self.masks: list[Any] | None = [] if form.masks else None
        self.keypoints: list[Sequence[float]] | None = [] if keypoints else None
        self.ignored: list[bool] = []
        self.difficult: list[bool] = []
        self.without_box: list[str] = []
        table.fields = {name: [] for name in form.fields}

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
        if self.without_box:
            what = f"{counted(len(self.without_box), 'box')} not in the file, taken from the mask"
            self.table.notes.append(note(what, self.without_box))
        take_flags(self.table, self.form, self.ignored, self.difficult)

    def _add(self, entry: Entry) -> None:
        number = entry.integer("id")
        if number in self.ids:
            raise DataError(f"{entry.place}: two annotations have this id; expected each once")
        position = self.positions.get(image := entry.identity("image_id"))
        if position is None:
            raise DataError(
                f"{entry.place}: `image_id`: there is no image {image!r} in the file{self._other_type(image)}"
            )
        category = self.categories.get(category_id := entry.integer("category_id"))
        if category is None:
            known = ", ".join(map(str, sorted(self.categories)[:12]))
            raise DataError(f"{entry.place}: `category_id`: there is no category {category_id} (there are {known})")
        mask = entry.fields.get("segmentation")
        box = self._box(entry, mask)
        area = entry.fields.get("area")
        if area is not None and (not is_number(area) or area < 0):
            raise entry.wrong("area", "a number of at least 0", area)
        crowd, ignore, difficult = (_flag(entry, name) for name in ("iscrowd", "ignore", "difficult"))
        keypoints = self._keypoints(entry, category)
        self.ids.add(number)
        self.ignored.append(ignore)
        self.difficult.append(difficult)
        values = [self._value(entry, name) for name in self.form.fields]
        for name, value in zip(self.form.fields, values, strict=True):
            self.table.fields[name].append(value)
        self._append(number, crowd, math.nan if area is None else float(area), mask, keypoints)
        self.table.add_object(position, category.name, box)

    def _value(self, entry: Entry, name: str) -> Any:
        """A number, or a list of as many as the objects before it have."""
        value = entry.fields.get(name)
        before = self.table.fields[name][0] if self.table.fields[name] else value
        if is_number(value) and not isinstance(before, list):
            return value
        numbers = list(value) if isinstance(value, (list, array)) and all(map(is_number, value)) else []
        if not numbers or (before is not value and not (isinstance(before, list) and len(before) == len(numbers))):
            like = f"{len(before)} numbers" if isinstance(before, list) and before is not value else "a number"
            raise entry.wrong(name, f"{like}, as `fields` of the data set asks for it in every object", value)
        return numbers

    def _box(self, entry: Entry, mask: Any) -> Box:
        """xyxy; where the file has none, that of the mask."""
        if mask and not entry.fields.get("bbox"):
            from detkernel_data.masks import mask_box

            box = mask_box(mask)
            if box is None:
                raise DataError(f"{entry.place}: `bbox` is missing, and its segmentation gives none")
            self.without_box.append(entry.place)
            return box
        x, y, width, height = map(float, entry.numbers("bbox", 4))
        if self.form.bbox == "xyxy":
            return x, y, width, height
        if self.form.bbox == "cxcywh":
            x, y = x - width / 2, y - height / 2
        return x, y, x + width, y + height

    def _other_type(self, image: ImageId) -> str:
        """What to say where the image is there under an id of the other type."""
        other: ImageId = str(image)
        if isinstance(image, str):
            try:
                other = int(image)
            except ValueError:
                return ""
        known = other in self.positions
        return f", but there is {other!r}: a number is not text; write both in one way" if known else ""

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


def _flag(entry: Entry, name: str) -> bool:
    value = entry.fields.get(name)
    if value is not None and value not in (0, 1):
        raise entry.wrong(name, "0 or 1", value)
    return bool(value)
