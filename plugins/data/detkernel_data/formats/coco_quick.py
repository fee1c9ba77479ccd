"""Large files of COCO's form, read in blocks: the ordinary ones, which are nearly all.

Whatever is not ordinary (a mistake, a mask in place of a box, lists in further fields) is left to `coco_entries.py`,
which reads the same file entry by entry and knows what to say of each. So nothing here needs words.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import attrs
import msgspec
import numpy as np
from detkernel.files import read_regular
from detkernel_detection import ImageId
from numpy.typing import NDArray

from detkernel_data.annotations import Masks, Texts, offsets_of
from detkernel_data.formats.coco_form import USED, Category, Field, Form, count_unused, take_flags
from detkernel_data.formats.table import Table

_BLOCK = 1_000
"""Annotations that are Python objects at a time: all of COCO's would take 2.4 GB, and these stay in the CPU's cache."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LARGEST = 2**53


class Split(NamedTuple):
    """A file's content, its annotations still as JSON."""

    fields: dict[str, Any]
    """Everything but the annotations."""
    annotations: list[msgspec.Raw]


def split(path: Path, limit: int) -> Split | None:
    """Read a file; None where it is not of the ordinary form. Raises OSError."""
    content = read_regular(path, limit)
    data = memoryview(content)[len(_BYTE_ORDER_MARK) if content.startswith(_BYTE_ORDER_MARK) else 0 :]
    try:
        try:
            found = msgspec.json.decode(data, type=_File)
            parts, annotations = (
                {name: getattr(found, name) for name in _FILE if getattr(found, name)},
                found.annotations,
            )
        except msgspec.ValidationError:  # it has parts of other names
            parts = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            annotations = msgspec.json.decode(parts.pop("annotations"), type=list[msgspec.Raw])
        return Split({name: msgspec.json.decode(value) for name, value in parts.items()}, annotations)
    except (KeyError, ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        return None


_FILE = ("info", "licenses", "images", "categories", "type")
_File: Any = msgspec.defstruct(
    "File",
    [("annotations", list[msgspec.Raw]), *((name, msgspec.Raw, msgspec.Raw()) for name in _FILE)],
    forbid_unknown_fields=True,
)
"""What COCO's own files have in them: split in one go, where a map of any names is gone through twice."""


@attrs.define(eq=False)
class Columns:
    """The annotations of a file, column by column."""

    image: NDArray[np.int64]
    """[M] positions of their images."""
    names: list[str]
    boxes: NDArray[np.float64]
    """[M, 4] as written."""
    area: NDArray[np.float64]
    """NaN where there is none."""
    ids: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    ignore: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    keypoints: NDArray[np.float64] | None
    """[M, 3K], zeros where an object has none; None where no class has any."""
    fields: dict[str, NDArray[Any]]
    masks: Masks | None
    unused: Counter[Field]
    """How many annotations have a value under a name that nothing reads."""

    def fill(self, filled: Table, form: Form) -> None:
        """Put them into a table."""
        table: Any = filled  # arrays in the place of lists
        boxes = self.boxes
        if form.bbox != "xyxy":
            corner = boxes[:, :2] - boxes[:, 2:] / 2 if form.bbox == "cxcywh" else boxes[:, :2]
            boxes = np.concatenate([corner, corner + boxes[:, 2:]], axis=1)
        table.image, table.names, table.boxes = self.image, self.names, boxes
        table.area, table.crowd, table.ids = self.area, self.crowd, self.ids
        table.keypoints, table.fields = self.keypoints, self.fields
        table.masks = self.masks if self.masks is not None and self.masks.any() else None
        take_flags(table, form, self.ignore.tolist(), self.difficult.tolist())


def columns(
    annotations: Sequence[msgspec.Raw],
    categories: Mapping[int, Category],
    positions: Mapping[ImageId, int],
    keypoints: int,
    form: Form,
) -> Columns | None:
    """All annotations, or None where one of them is not ordinary. `keypoints`: how many a class with some has."""
    if not annotations or USED["annotations"].intersection(form.fields):
        return None
    blocks = _Blocks(categories, positions, keypoints, form)
    try:
        for start in range(0, len(annotations), _BLOCK):
            blocks.add(annotations[start : start + _BLOCK])
        made = blocks.joined()
    except (_UnusualError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None
    ordered = np.sort(made.ids)
    return made if (ordered[1:] > ordered[:-1]).all() else None


class _UnusualError(Exception):
    """Something that the careful reader is to look at."""


def _require(ordinary: bool | np.bool_) -> None:
    if not ordinary:
        raise _UnusualError


_Mask: TypeAlias = list[list[float]] | dict[str, Any] | None


def _entry_type(form: Form, keypoints: int, *, strict: bool) -> Any:
    """The type of an annotation. msgspec takes no text, no truth value and no fraction for a whole number, and
    no whole number beyond a float's range. `strict`: nor a name that nothing reads."""
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = [
        ("id", int),
        ("image_id", int | str),
        ("category_id", int),
        ("bbox", tuple[float, float, float, float]),
        *((f"field_{number}", int | float) for number in range(len(form.fields))),
        ("segmentation", _Mask if form.masks else msgspec.Raw, None),
        ("area", float | None, None),
        *((name, Any, None) for name in ("iscrowd", "ignore", "difficult", "num_keypoints")),
        ("keypoints", list[float] if keypoints else msgspec.Raw, None),
    ]
    names = {f"field_{number}": name for number, name in enumerate(form.fields)}
    return msgspec.defstruct("Entry", fields, rename=names, gc=False, forbid_unknown_fields=strict)


class _Blocks:
    """Arrays of some annotations each; the numbers of polygons, which are most of a file, in one that grows."""

    def __init__(
        self, categories: Mapping[int, Category], positions: Mapping[ImageId, int], keypoints: int, form: Form
    ) -> None:
        self.names = {number: category.name for number, category in categories.items()}
        self.bare = frozenset(number for number, category in categories.items() if not category.keypoints)
        self.positions, self.keypoints, self.form = _Positions(positions), keypoints, form
        self.strict: Any = msgspec.json.Decoder(_entry_type(form, keypoints, strict=True))
        self.tolerant: Any = msgspec.json.Decoder(_entry_type(form, keypoints, strict=False))
        self.only_known = True
        self.rows: dict[str, list[NDArray[Any]]] = {}
        self.classes: list[str] = []
        self.numbers, self.parts, self.objects = array("d"), array("q"), array("q")
        self.runs: dict[int, str] = {}
        self.unused: Counter[Field] = Counter()

    def add(self, annotations: Sequence[msgspec.Raw]) -> None:
        """Raises one of several errors where an annotation is not ordinary."""
        entries = self._decoded(annotations)
        if self.form.masks:
            self._add_masks(entries)
        images, categories = [entry.image_id for entry in entries], [entry.category_id for entry in entries]
        self.classes += [self.names[number] for number in categories]
        area = _floats([math.nan if entry.area is None else entry.area for entry in entries], len(entries))
        _require((np.isnan(area) | ((area >= 0) & (area < _LARGEST))).all())
        block: dict[str, NDArray[Any]] = {
            "image": self.positions.of(images),
            "ids": np.array([entry.id for entry in entries], dtype=np.int64),
            "boxes": _floats(chain.from_iterable([entry.bbox for entry in entries]), 4 * len(entries)).reshape(-1, 4),
            "area": area,
            "crowd": _flags([entry.iscrowd for entry in entries]),
            "ignore": _flags([entry.ignore for entry in entries]),
            "difficult": _flags([entry.difficult for entry in entries]),
        }
        _require((np.abs(block["boxes"]) < _LARGEST).all() and (np.abs(block["ids"]) <= _LARGEST).all())
        if self.keypoints:
            block["keypoints"] = self._keypoints(entries)
        for number, name in enumerate(self.form.fields):
            values = np.array([getattr(entry, f"field_{number}") for entry in entries])
            _require(values.dtype.kind in "if" and (np.abs(values) < _LARGEST).all())
            block[f"field {name}"] = values
        for name, found in block.items():
            self.rows.setdefault(name, []).append(found)

    def _decoded(self, annotations: Sequence[msgspec.Raw]) -> Sequence[Any]:
        if self.only_known:
            try:
                return list(map(self.strict.decode, annotations))
            except msgspec.ValidationError:
                self.only_known = False
        self.unused += count_unused(map(msgspec.json.decode, annotations), "annotations", self.form.fields)
        return list(map(self.tolerant.decode, annotations))

    def _add_masks(self, entries: Sequence[Any]) -> None:
        masks: list[Any] = [entry.segmentation or [] for entry in entries]
        for number, mask in enumerate(masks):
            if type(mask) is dict:
                self.runs[len(self.objects) + number] = Masks.text_of(mask)
                masks[number] = []
        parts = list(chain.from_iterable(masks))
        if not all(parts):  # empty polygons are none, as in the careful reader
            masks = [[part for part in mask if part] for mask in masks]
            parts = list(chain.from_iterable(masks))
        lengths = list(map(len, parts))
        self.numbers.frombytes(_floats(chain.from_iterable(parts), sum(lengths)).view(np.uint8).data)
        self.parts.extend(lengths)
        self.objects.extend(map(len, masks))

    def _keypoints(self, entries: Sequence[Any]) -> NDArray[np.float64]:
        """[n, 3K]"""
        count = 3 * self.keypoints
        given = [number for number, entry in enumerate(entries) if entry.keypoints is not None]
        values = [entries[number].keypoints for number in given]
        _require(set(map(len, values)) <= {count})
        _require(self.bare.isdisjoint(entries[number].category_id for number in given))
        rows = np.zeros((len(entries), count))
        rows[given] = found = _floats(chain.from_iterable(values), count * len(given)).reshape(-1, count)
        _require((np.abs(found) < _LARGEST).all() and np.isin(found[:, 2::3], (0, 1, 2)).all())
        return rows

    def joined(self) -> Columns:
        """All that was added, which is not kept here then."""
        rows = {name: np.concatenate(self.rows.pop(name)) for name in list(self.rows)}
        masks = None
        if self.form.masks:
            masks = Masks.packed(
                np.frombuffer(self.numbers) if self.numbers else np.zeros(0),
                offsets_of(np.frombuffer(self.parts, dtype=np.int64) if self.parts else []),
                offsets_of(np.frombuffer(self.objects, dtype=np.int64)),
                Texts.sparse(len(self.objects), self.runs),
            )
        return Columns(
            **{name: found for name, found in rows.items() if not name.startswith("field ") and name != "keypoints"},
            names=self.classes,
            keypoints=rows.get("keypoints"),
            fields={name: rows[f"field {name}"] for name in self.form.fields},
            masks=masks,
            unused=self.unused,
        )


class _Positions:
    """Positions of images by their ids. A thousand at once are looked up in the time of a hundred."""

    def __init__(self, positions: Mapping[ImageId, int]) -> None:
        self._positions = positions
        numbers = [number for number in positions if isinstance(number, int)]
        self._numbers, self._places = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        if len(numbers) == len(positions):
            ids = np.array(numbers, dtype=np.int64)
            order = np.argsort(ids)
            self._numbers, self._places = ids[order], np.array(list(positions.values()), dtype=np.int64)[order]

    def of(self, images: Sequence[ImageId]) -> NDArray[np.int64]:
        """Raises KeyError for one that there is not."""
        if not len(self._numbers) or set(map(type, images)) != {int}:
            return np.array([self._positions[image] for image in images], dtype=np.int64)
        wanted = np.array(images, dtype=np.int64)
        places = np.searchsorted(self._numbers, wanted).clip(max=len(self._numbers) - 1)
        _require((self._numbers[places] == wanted).all())
        found: NDArray[np.int64] = self._places[places]
        return found


def _floats(values: Iterable[float], count: int) -> NDArray[np.float64]:
    return np.fromiter(values, np.float64, count)


def _flags(values: Sequence[Any]) -> NDArray[np.bool_]:
    _require(set(values) <= {None, 0, 1})
    return np.array(values, dtype=bool)


def images(entries: Any, folder: Path) -> tuple[list[ImageId], list[str], list[int], list[int]] | None:
    """(ids, files, heights, widths) of all images of a file, or None where one of them is not ordinary, or missing."""
    try:
        _require(type(entries) is list and set(map(type, entries)) <= {dict})
        ids, names = [entry["id"] for entry in entries], [entry["file_name"] for entry in entries]
        heights, widths = [entry["height"] for entry in entries], [entry["width"] for entry in entries]
        _require(set(map(type, ids)) <= {int} and set(map(type, names)) <= {str})
        _require(set(map(type, heights)) <= {int} and set(map(type, widths)) <= {int})
        _require(min(heights, default=1) > 0 and min(widths, default=1) > 0)
        _require(max(map(abs, [*ids, *heights, *widths]), default=0) <= _LARGEST)
        _require(len(set(ids)) == len(ids) and len(set(names)) == len(names))
        _require(not any(os.sep in name or not name for name in names))
        with os.scandir(folder) as there:
            _require(set(names) <= {entry.name for entry in there})
    except (_UnusualError, KeyError, TypeError, OSError):
        return None
    place = os.path.join(folder, "")  # noqa: PTH118
    return ids, [f"{place}{name}" for name in names], heights, widths
