"""Large files of COCO's form, read in blocks: the ordinary ones, which are nearly all.

Whatever is not ordinary (a mistake, keypoints, a mask in place of a box) is left to `coco.py`, which reads the same
file entry by entry and knows what to say of each. So nothing here needs words.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import msgspec
import numpy as np
from detkernel.files import read_regular
from detkernel_detection import ImageId
from numpy.typing import NDArray

from detkernel_data.annotations import Masks, Texts, offsets_of

_BLOCK = 1_000
"""Annotations that are Python objects at a time: all of COCO's would take 2.4 GB, and these stay in the CPU's cache."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LARGEST = 2**53
_NUMBERS = {int, float}


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
        parts = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        annotations = msgspec.json.decode(parts.pop("annotations"), type=list[msgspec.Raw])
        return Split({name: msgspec.json.decode(value) for name, value in parts.items()}, annotations)
    except (KeyError, ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        return None


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
    masks: Masks | None
    unused: Counter[tuple[str, str]]
    """How many annotations have a value under a name that nothing reads."""


def columns(
    annotations: Sequence[msgspec.Raw],
    names: Mapping[int, str],
    positions: Mapping[ImageId, int],
    known: frozenset[str],
    *,
    masks: bool,
) -> Columns | None:
    """All annotations, or None where one of them is not ordinary. `names`: of categories, by their ids."""
    blocks, unused = [], Counter[tuple[str, str]]()
    try:
        for start in range(0, len(annotations), _BLOCK):
            entries = msgspec.json.decode(b"[" + b",".join(annotations[start : start + _BLOCK]) + b"]")
            keys = set().union(*entries)
            blocks.append(_block(entries, keys, names, positions, masks=masks))
            if not keys <= known:
                _count_unused(entries, known, unused)
    except (_UnusualError, KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError):
        return None
    if not blocks:
        return None
    made = _joined(blocks, unused)
    return made if len(np.unique(made.ids)) == len(made.ids) else None


class _UnusualError(Exception):
    """Something that the careful reader is to look at."""


def _block(
    entries: Sequence[dict[str, Any]],
    keys: set[str],
    names: Mapping[int, str],
    positions: Mapping[ImageId, int],
    *,
    masks: bool,
) -> Columns:
    """`keys`: all names that an entry has a value under."""
    ids = [entry["id"] for entry in entries]
    images = [entry["image_id"] for entry in entries]
    categories = [entry["category_id"] for entry in entries]
    boxes = [entry["bbox"] for entry in entries]
    areas = [math.nan if (area := entry.get("area")) is None else area for entry in entries]
    _require(set(map(type, ids)) <= {int} and set(map(type, categories)) <= {int})
    _require(set(map(type, images)) <= {int, str})
    _require(set(map(type, boxes)) <= {list} and set(map(len, boxes)) <= {4})
    sides = list(chain.from_iterable(boxes))
    _require(set(map(type, sides)) <= _NUMBERS and set(map(type, areas)) <= _NUMBERS)
    corners, area = np.array(sides, dtype=np.float64).reshape(-1, 4), np.array(areas, dtype=np.float64)
    numbers = np.array(ids, dtype=np.int64)
    _require(bool((np.abs(corners) <= _LARGEST).all() and (np.abs(numbers) <= _LARGEST).all()))
    _require(bool((np.isnan(area) | ((area >= 0) & (area <= _LARGEST))).all()))
    return Columns(
        image=np.array([positions[image] for image in images], dtype=np.int64),
        names=[names[category] for category in categories],
        boxes=corners,
        area=area,
        ids=numbers,
        crowd=_flags(entries, keys, "iscrowd"),
        ignore=_flags(entries, keys, "ignore"),
        difficult=_flags(entries, keys, "difficult"),
        masks=_masks(entries) if masks else None,
        unused=Counter(),
    )


def _require(ordinary: bool) -> None:
    if not ordinary:
        raise _UnusualError


def _flags(entries: Sequence[dict[str, Any]], keys: set[str], name: str) -> NDArray[np.bool_]:
    if name not in keys:
        return np.zeros(len(entries), dtype=bool)
    values = [entry.get(name) for entry in entries]
    _require(set(values) <= {None, 0, 1})
    return np.array(values, dtype=bool)


def _masks(entries: Sequence[dict[str, Any]]) -> Masks:
    found = [entry.get("segmentation") or [] for entry in entries]
    _require(set(map(type, found)) <= {dict, list})
    runs = {number: Masks.text_of(mask) for number, mask in enumerate(found) if type(mask) is dict}
    polygons = [mask if type(mask) is list else [] for mask in found]
    parts = list(chain.from_iterable(polygons))
    _require(set(map(type, parts)) <= {list})
    if not all(parts):  # empty polygons are none, as in the careful reader
        polygons = [[part for part in mask if part] for mask in polygons]
        parts = list(chain.from_iterable(polygons))
    values = array("d", list(chain.from_iterable(parts)))  # refuses texts and nulls, as the careful reader does
    return Masks.packed(
        np.frombuffer(values, dtype=np.float64) if values else np.zeros(0),
        offsets_of(list(map(len, parts))),
        offsets_of(list(map(len, polygons))),
        Texts.sparse(len(found), runs),
    )


def _count_unused(entries: Sequence[dict[str, Any]], known: frozenset[str], counts: Counter[tuple[str, str]]) -> None:
    for entry in entries:
        if not known.issuperset(entry):
            counts.update(("annotations", name) for name in set(entry) - known if entry[name] not in (None, "", [], {}))


def _joined(blocks: Sequence[Columns], unused: Counter[tuple[str, str]]) -> Columns:
    arrays = {
        name: np.concatenate([getattr(block, name) for block in blocks])
        for name in ("image", "boxes", "area", "ids", "crowd", "ignore", "difficult")
    }
    masks = None if blocks[0].masks is None else Masks.joined([block.masks for block in blocks if block.masks])
    return Columns(
        **arrays, names=list(chain.from_iterable(block.names for block in blocks)), masks=masks, unused=unused
    )


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
