"""COCO form: one JSON file of instances, one folder of images."""

from __future__ import annotations

import errno
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from detkernel import DataError, option, plugin
from detkernel.errors import did_you_mean, relative
from detkernel.files import open_regular
from detkernel_detection import ImageId
from detkernel_detection.images import SUFFIXES, Listing, scan

from detkernel_data.download.published import hint as download_hint
from detkernel_data.formats.dataset import FileDataset, check_names
from detkernel_data.formats.entry import Entry, is_number
from detkernel_data.formats.kept import Kept
from detkernel_data.formats.lvis import read_federated
from detkernel_data.formats.missing_files import Near
from detkernel_data.formats.table import Box, Table
from detkernel_data.report import Problems, counted, note

if TYPE_CHECKING:
    from detkernel_data.formats.coco_quick import Columns, Split

    pass

_LARGEST = 2**34
"""Bytes: several times the largest published annotations. They are read into memory."""


class Category(NamedTuple):
    name: str
    keypoints: tuple[str, ...]


class Form(NamedTuple):
    """How the file is to be read, by the options of the data set."""

    masks: bool
    bbox: Literal["xywh", "xyxy", "cxcywh"]
    fractions: bool
    evaluate_ignored: bool
    drop_missing: bool
    fields: tuple[str, ...] = ()
    """Further keys of annotations that are read."""


def read(path: Path, images: Path, form: Form) -> tuple[Table, dict[str, int], tuple[str, ...]]:
    """Everything that the file says, its category ids by name, and the names of the keypoints.

    Raises `DataError` with all problems found.
    """
    source = relative(path)
    found = None if form.fractions or form.fields else _split(path)
    ordinary = _read_quickly(source, found, images, form) if found is not None else None
    if ordinary is not None:
        return ordinary
    data = Entry(source, _parse(path, form.masks))
    categories = _categories(data, source)
    keypoint_names = _keypoint_names(categories, source)
    table = _empty_table(source, [categories[number].name for number in sorted(categories)], form)
    positions = _add_images(table, data, images, form.drop_missing)
    _Objects(table, categories, positions, len(keypoint_names), form).add_all(_annotations(data, len(positions)))
    _report_unused(table, data, _count_unused(data.fields["annotations"], "annotations", form.fields))
    table.federated = read_federated(data, source, {number: found.name for number, found in categories.items()})
    return table, {categories[number].name: number for number in sorted(categories)}, keypoint_names


def _split(path: Path) -> Split | None:
    if find_spec("msgspec") is None:
        return None  # it only saves time and memory
    from detkernel_data.formats.coco_quick import split

    try:
        return split(path, _LARGEST)
    except OSError:
        return None  # the careful reader says why


def _read_quickly(
    source: str, found: Split, images: Path, form: Form
) -> tuple[Table, dict[str, int], tuple[str, ...]] | None:
    """What `read` gives, in blocks of a thousand annotations; None where one of them wants a closer look."""
    from detkernel_data.formats import coco_quick

    data = Entry(source, found.fields)
    categories = _categories(data, source)
    if any(category.keypoints for category in categories.values()):
        return None
    table = _empty_table(source, [categories[number].name for number in sorted(categories)], form)
    seen = coco_quick.images(found.fields.get("images"), images)
    if seen is None:
        positions = _add_images(table, data, images, form.drop_missing)
    else:
        table.image_ids, table.files, table.heights, table.widths = seen
        positions = {number: place for place, number in enumerate(table.image_ids)}
    names = {number: category.name for number, category in categories.items()}
    used = frozenset(_USED["annotations"] | _MEAN_NOTHING)
    columns = coco_quick.columns(found.annotations, names, positions, used, masks=form.masks)
    if columns is None:
        return None
    objects = _Objects(table, categories, positions, 0, form)
    objects.take_columns(columns)
    _report_unused(table, data, columns.unused)
    table.federated = read_federated(data, source, names)
    return table, {categories[number].name: number for number in sorted(categories)}, ()


def _annotations(data: Entry, images: int) -> list[Any]:
    if data.fields.get("annotations") is None:
        raise DataError(
            f"{data.place}: `annotations` is missing: the file lists {counted(images, 'image')} and no objects, as the "
            "files of test images without annotations do; training and evaluation need objects"
        )
    return data.list("annotations")


def _parse(path: Path, masks: bool) -> Any:
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
        with open_regular(path) as binary, TextIOWrapper(binary, encoding="utf-8-sig") as file:
            if os.fstat(binary.fileno()).st_size > _LARGEST:
                raise OSError(errno.EFBIG, f"it has more than {_LARGEST:,} bytes")
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
    there = sorted(entry.name for entry in above.iterdir())
    near = Near(path.parent).hint(path.name) if path.parent.is_dir() else did_you_mean(path.name, there[:2000])
    if "?" in near or near.startswith(";"):
        return f"{relative(path)}: there is no such file{near}"
    there_is = f"{relative(above)} has {', '.join(there[:12]) or 'nothing in it'}"
    return f"{relative(path)}: there is no such file; {there_is}{download_hint(path)}"


def _categories(data: Entry, source: str) -> dict[int, Category]:
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


def _keypoint_names(categories: Mapping[int, Category], source: str) -> tuple[str, ...]:
    kinds = {category.keypoints for category in categories.values() if category.keypoints}
    if len(kinds) > 1:
        names = ", ".join(f"'{category.name}'" for category in categories.values() if category.keypoints)
        raise DataError(f"{source}: {names} have different keypoints; expected one set of them in a data set")
    return kinds.pop() if kinds else ()


def _empty_table(source: str, declared: list[str], form: Form) -> Table:
    table: Table

    def where(index: int) -> str:
        assert table.ids is not None
        name = os.path.basename(table.files[table.image[index]])  # noqa: PTH119 - called for many objects
        return f"{source}: annotation {table.ids[index]} '{table.names[index]}' of {name}"

    table = Table(
        source=source,
        declared=lambda: declared,
        where=where,
        where_image=lambda index: f"{source}: image {table.image_ids[index]}",
        fractions=form.fractions,
        fractions_advice="Set `bbox_unit: fractions`",
        corners_advice="" if form.bbox != "xywh" else "Set `bbox_format: xyxy` if they are",
        masks_advice="; where only boxes are trained, `masks: false` reads none",
        area=[],
        crowd=[],
        ids=[],
    )
    return table


def _add_images(table: Table, data: Entry, folder: Path, drop_missing: bool) -> dict[ImageId, int]:
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


class _Objects:
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
        self._report()

    def take_columns(self, found: Columns) -> None:
        """All annotations of a file at once, none of which has a mistake."""
        table: Any = self.table  # arrays in the place of lists
        boxes = found.boxes
        if self.form.bbox != "xyxy":
            corner = boxes[:, :2] - boxes[:, 2:] / 2 if self.form.bbox == "cxcywh" else boxes[:, :2]
            boxes = np.concatenate([corner, corner + boxes[:, 2:]], axis=1)
        table.image, table.names, table.boxes = found.image, found.names, boxes
        table.area, table.crowd, table.ids = found.area, found.crowd, found.ids
        self.ids = {0} if (found.ids == 0).any() else set()  # of which `_report` asks for nothing else
        self.ignored, self.difficult = found.ignore.tolist(), found.difficult.tolist()
        table.masks = found.masks if found.masks is not None and found.masks.any() else None
        self._report()

    def _report(self) -> None:
        """Flags that change what an object counts for are used, and said to be."""
        table = self.table
        if self.without_box:
            table.notes.append(
                note(f"{counted(len(self.without_box), 'box')} not in the file, taken from the mask", self.without_box)
            )
        if any(self.difficult):
            table.difficult = self.difficult
        if 0 in self.ids:
            what = (
                "an annotation has the id 0, by which pycocotools marks what was not found: there it counts as missed, "
                "whatever is detected, here as any other"
            )
            remedy = "number annotations from 1 to have pycocotools' metrics agree"
            first = np.flatnonzero(np.asarray(table.ids) == 0)[0]
            table.notes.append(note(what, [table.where(int(first))], remedy))
        places = [table.where(int(number)) for number in np.flatnonzero(self.ignored)]
        if not places:
            return
        if self.form.evaluate_ignored:
            table.untrained = self.ignored
            how = "not trained on; evaluation counts them, as pycocotools does"
            remedy = "`evaluate_ignored: false` counts them neither as missed nor what is found there as wrong"
        else:
            hard = self.difficult
            table.difficult = [one or other for one, other in zip(self.ignored, hard, strict=True)]
            how, remedy = "neither trained on nor counted in evaluation", "`evaluate_ignored: true` counts them"
        table.notes.append(note(f"{counted(len(places), 'object')} with `ignore` set: {how}", places, remedy))

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


_USED = {
    "images": {"id", "file_name", "coco_url", "width", "height"},
    "annotations": {
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "difficult", "segmentation"),
        *("keypoints", "num_keypoints"),
    },
    "categories": {"id", "name", "keypoints"},
    "": {"images", "annotations", "categories"},
}
_MEAN_NOTHING = {
    *("info", "licenses", "license", "type", "url", "flickr_url", "flickr_640_url", "coco_url", "date_captured"),
    *("supercategory", "skeleton", "color", "synset", "def", "synonyms", "frequency", "image_count", "instance_count"),
}
"""Where images come from, and what COCO and LVIS say of categories for people."""
_Field: TypeAlias = tuple[str, str]
"""(part of the file, name)."""
_LVIS = ("neg_category_ids", "not_exhaustive_category_ids")


def _count_unused(entries: Iterable[Mapping[str, Any]], part: str, fields_read: Sequence[str]) -> Counter[_Field]:
    """How many entries have a value under a name that nothing reads."""
    known = _USED[part] | _MEAN_NOTHING | set(fields_read)
    counts: Counter[_Field] = Counter()
    for fields in entries:
        if not known.issuperset(fields):
            counts.update((part, name) for name in set(fields) - known if fields[name] not in (None, "", [], {}))
    return counts


def _report_unused(table: Table, data: Entry, counts: Counter[_Field]) -> None:
    """Fields that are not read, since one of them may change what the others mean. `counts`: of the annotations."""
    for part in ("images", "categories", ""):
        counts.update(_count_unused(data.fields[part] if part else [data.fields], part, ()))
    lvis = max((counts.pop(("images", name), 0) for name in _LVIS), default=0)
    if lvis:
        table.notes.append(
            note(
                f"`neg_category_ids` and `not_exhaustive_category_ids` of {counted(lvis, 'image')}, as LVIS has them, "
                "are what `lvis_map` goes by; with other evaluators, a detection of a class that was not annotated in "
                "an image counts as wrong"
            )
        )
    if counts:
        named = [
            f"`{name}`" + (f" of {number} {part}" if part else "") for (part, name), number in sorted(counts.items())
        ]
        table.notes.append(note("fields that are not used", named))


@plugin
class Coco(FileDataset):
    """Images and instances in COCO form, with polygons or run lengths and keypoints where they are given.

    Category ids may have gaps: classes are the categories' names in the order of their ids. Crowds are kept and
    flagged.
    """

    annotation_file: Path = option(help="the JSON file, such as annotations/instances_train2017.json")
    image_folder: Path = option(help="the folder that the images' `file_name` starts from")
    class_names: list[str] | None = option(
        default=None, help="categories in label order; null: all, in the order of their ids"
    )
    masks: bool = option(default=True, help="keep segmentations; false saves memory where only boxes are trained")
    bbox_format: Literal["xywh", "xyxy", "cxcywh"] = option(
        default="xywh", help="corner and size, as in COCO's own files, two corners, or centre and size"
    )
    bbox_unit: Literal["pixels", "fractions"] = option(
        default="pixels", help="'fractions': boxes and polygons are parts of the image's width and height, 0 to 1"
    )
    evaluate_ignored: bool = option(
        default=True,
        help="count objects with `ignore: 1` in evaluation, as pycocotools does; false: they are neither missed nor is "
        "what is found there wrong. They are never trained on",
    )
    cache: bool = option(
        default=True,
        help="keep the annotations of a file of more than 4 MB, cleaned, below ~/.cache/detkernel: the next run, and "
        "each loader worker, map them into memory; they are read again as soon as a file or an option is another",
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        kept = Kept.of(self) if self.cache else None
        if kept is not None and kept.take(self):
            return
        form = Form(
            masks=self.masks,
            bbox=self.bbox_format,
            fractions=self.bbox_unit == "fractions",
            evaluate_ignored=self.evaluate_ignored,
            drop_missing=self.bad_images == "drop",
            fields=tuple(self.fields),
        )
        table, numbers, self.keypoint_names = read(self.annotation_file, self.image_folder, form)
        self.category_ids = {}
        for name, number in numbers.items():  # of classes that are merged, the first number
            self.category_ids.setdefault(self.rename_classes.get(name, name), number)
        self.federated = table.federated and table.federated.renamed(self.rename_classes)
        self._clean(table, self.class_names)
        if kept is not None and self.federated is None:
            kept.put(self)
