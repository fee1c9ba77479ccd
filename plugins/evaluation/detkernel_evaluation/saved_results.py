"""Reads detections in COCO's form of results, as `save` writes them and other tools do, and puts them to the data."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
from detkernel import DataError
from detkernel.errors import printable, relative
from detkernel.files import read_regular
from detkernel_detection import Annotations
from detkernel_detection.segmentations import mask_problem
from pycocotools import mask as rle

from detkernel_evaluation.found import Found

LARGEST = 2**34
"""Bytes: a thousand detections for each of a million images."""
EXAMPLES = 3
_PLACE = "\0"
"""Where a message has its examples."""


@attrs.define
class Saved:
    """The detections of a file, by position in the data set."""

    found: list[Found]
    """One for each image of the data; without detections where the file has none."""
    kinds: set[str]
    """Which of bbox, segm and keypoints every detection has."""
    images: int
    """How many images the file has detections of."""

    def __len__(self) -> int:
        return sum(len(found.scores) for found in self.found)


class Problems:
    """What is wrong with a file: each kind of mistake is one line, with its count and the first examples."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: dict[str, list[str]] = {}
        """Examples by what is wrong and expected."""

    def add(self, what: str, example: str) -> None:
        self.found.setdefault(what, []).append(example)

    def stop(self) -> None:
        """Raise DataError where something is wrong."""
        if not self.found:
            return
        lines = []
        for what, examples in self.found.items():
            more = f" and {len(examples) - EXAMPLES:,} more" if len(examples) > EXAMPLES else ""
            shown = ", ".join(examples[:EXAMPLES]) + more
            lines.append(f"{self.source}: {what.replace(_PLACE, shown)}")
        raise DataError("\n".join(lines))


def read(path: Path) -> list[Any]:
    """The entries of a file of results. Raises `DataError`."""
    place = relative(path)
    try:
        content = json.loads(read_regular(path, LARGEST))
    except OSError as error:
        raise DataError(f"{place}: the detections cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{place}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: broken JSON: {error}") from None
    if isinstance(content, list):
        return content
    keys = ", ".join(map(printable, list(content)[:6])) if isinstance(content, dict) else _short(content)
    what = "an annotation file" if isinstance(content, dict) and "images" in content else "not a file of results"
    raise DataError(
        f"{place}: this is {what} ({keys}); expected a list of detections, "
        '[{"image_id": 42, "category_id": 18, "bbox": [x, y, width, height], "score": 0.9}, ...]'
    )


def matched(
    entries: Sequence[Any],
    source: str,
    images: Sequence[Annotations],
    classes: Sequence[str],
    categories: Sequence[int] | None,
) -> Saved:
    """The entries of a file, put to a data set's images. Raises `DataError` with all kinds of problems.

    `categories`: the category id of each class; None: category ids are labels, from 0.
    """
    problems = Problems(source)
    images_of = _Images(images)
    ids = list(range(len(classes))) if categories is None else categories
    labels = {number: label for label, number in enumerate(ids)}
    known = _known_categories(classes, ids)
    columns: list[list[tuple[Any, ...]]] = [[] for _ in images]
    kinds = _kinds(entries)
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.add(
                f"expected a list of detections, each an object; found {_PLACE}", f"[{number}]: {_short(entry)}"
            )
            continue
        at = images_of.position(entry.get("image_id"))
        if at is None:
            problems.add(
                f"detections of images that the data does not have: {_PLACE}; expected {images_of.examples()}",
                f"[{number}] image_id {_short(entry.get('image_id'))}",
            )
        label = labels.get(category) if type(category := entry.get("category_id")) is int else None
        if label is None:
            problems.add(
                f"detections of categories that the data does not have: {_PLACE}; expected {known}"
                + _labels_advice(entries, ids),
                f"[{number}] category_id {_short(category)}",
            )
        score = entry.get("score")
        if not _is_finite(score):
            problems.add(f"a score that is not a finite number: {_PLACE}", f"[{number}] {_short(score)}")
        notes = None if at is None else images[at]
        values = [_value(kind, entry, number, notes, problems) for kind in kinds]
        if at is not None and label is not None:
            columns[at].append((score, label, *values))
    problems.stop()
    _check_keypoints(source, columns, kinds)
    found = [_found(column, kinds, notes) for column, notes in zip(columns, images, strict=True)]
    return Saved(found, set(kinds), sum(bool(column) for column in columns))


class _Images:
    """Finds an image by its id, by an id that is text there and a number here, or by its file's name."""

    def __init__(self, images: Sequence[Annotations]) -> None:
        self.images = images
        self.ids: dict[Any, int] = {notes.image_id: at for at, notes in enumerate(images)}
        self.names: dict[str, int | None] = {}
        """None: several images have this name."""
        for at, notes in enumerate(images):
            path = Path(notes.path)
            for name in {str(notes.image_id), path.name, path.stem}:
                self.names[name] = at if self.names.get(name, at) == at else None
        for at, notes in enumerate(images):  # an id goes before the name of another image's file
            self.names[str(notes.image_id)] = at

    def position(self, image_id: Any) -> int | None:
        if type(image_id) not in (int, str):
            return None
        at = self.ids.get(image_id)
        return self.names.get(str(image_id)) if at is None else at

    def examples(self) -> str:
        names = ", ".join(_short(notes.image_id) for notes in self.images[:EXAMPLES])
        return f"one of its {len(self.images)} images: {names}{', ...' if len(self.images) > EXAMPLES else ''}"


def _known_categories(classes: Sequence[str], ids: Sequence[int]) -> str:
    known = sorted(zip(ids, map(printable, classes), strict=True))
    return ", ".join(f"{number} ({name})" for number, name in known[:6]) + (", ..." if len(known) > 6 else "")


def _labels_advice(entries: Sequence[Any], ids: Sequence[int]) -> str:
    """What to do where the numbers look like labels."""
    numbers = {entry.get("category_id") for entry in entries if isinstance(entry, dict)}
    if all(type(number) is int and 0 <= number < len(ids) for number in numbers):
        return "; `--categories labels` takes them as positions in the classes, from 0"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else f"'{printable(value)}'"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


Kind = Literal["bbox", "segmentation", "keypoints"]


def _kinds(entries: Sequence[Any]) -> list[Kind]:
    """What the file has: what its first detection has."""
    first: dict[str, Any] = next((entry for entry in entries if isinstance(entry, dict)), {"bbox": []})
    names: tuple[Kind, ...] = ("bbox", "segmentation", "keypoints")
    found: list[Kind] = [name for name in names if first.get(name) not in (None, [])]
    return found or ["bbox"]


def _value(kind: Kind, entry: Mapping[str, Any], number: int, notes: Annotations | None, problems: Problems) -> Any:
    value = entry.get(kind)
    if kind == "segmentation":
        value = [array("d", part) for part in value or ()] if _are_polygons(value) else value
        wrong = notes and (mask_problem(value, notes.height, notes.width) or (None if value else "it has no polygon"))
        if wrong:
            problems.add(f"`segmentation` is not a mask of its image: {_PLACE}", f"[{number}] {wrong}")
    elif not (_is_box if kind == "bbox" else _are_keypoints)(value):
        problems.add(f"`{kind}` is not {_FORMS[kind]}: {_PLACE}", f"[{number}] {_short(value)}")
    return value


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_finite, value)) and min(value[2:]) >= 0


def _are_polygons(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, list) and all(type(number) in (int, float) for number in part) for part in value
    )


def _are_keypoints(value: Any) -> bool:
    return isinstance(value, list) and len(value) % 3 == 0 and bool(value) and all(map(_is_finite, value))


_FORMS = {
    "bbox": "[x, y, width, height], four finite numbers, with sizes of at least 0",
    "keypoints": "a list of x, y, visibility for each keypoint, finite numbers",
}


def _check_keypoints(source: str, columns: Sequence[Sequence[tuple[Any, ...]]], kinds: Sequence[Kind]) -> None:
    if "keypoints" not in kinds:
        return
    place = 2 + kinds.index("keypoints")
    many = sorted({len(row[place]) // 3 for column in columns for row in column})
    if len(many) > 1:
        numbers = ", ".join(map(str, many))
        raise DataError(f"{source}: `keypoints`: expected as many in every detection, found {numbers}")


def _found(column: list[tuple[Any, ...]], kinds: Sequence[Kind], notes: Annotations) -> Found:
    """The detections of an image, by falling score; boxes that the file lacks are those of masks or keypoints."""
    column.sort(key=lambda row: -row[0])
    parts = dict(zip(("score", "label", *kinds), zip(*column, strict=True), strict=True)) if column else {}
    if not parts:
        return Found()
    masks = [_run_lengths(mask, notes) for mask in parts.get("segmentation", ())]
    points = np.array(parts["keypoints"], np.float64).reshape(len(column), -1, 3) if "keypoints" in parts else None
    if "bbox" in parts:
        boxes = np.array(parts["bbox"], np.float64)
        boxes[:, 2:] += boxes[:, :2]
    elif masks:
        boxes = np.array([rle.toBbox(mask) for mask in masks], np.float64)
        boxes[:, 2:] += boxes[:, :2]
    else:
        assert points is not None
        boxes = np.concatenate([points[:, :, :2].min(1), points[:, :, :2].max(1)], axis=1)
    return Found(boxes, np.array(parts["score"], np.float64), np.array(parts["label"], np.int64), masks, points)


def _run_lengths(mask: Any, notes: Annotations) -> dict[str, Any]:
    """A mask in the packed form of run lengths."""
    if isinstance(mask, dict) and isinstance(mask["counts"], str):
        return {"size": mask["size"], "counts": mask["counts"].encode()}
    polygons = isinstance(mask, list)
    given: Any = [list(part) for part in mask] if polygons else mask
    packed: Any = rle.frPyObjects(given, notes.height, notes.width)
    merged: dict[str, Any] = rle.merge(packed) if polygons else packed
    return merged
