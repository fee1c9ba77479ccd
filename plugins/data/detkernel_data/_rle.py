"""Checks of masks: the C code that draws polygons and decodes run lengths trusts what it is given."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np


def mask_problem(mask: Any, height: int, width: int) -> str | None:
    """What is wrong with a COCO segmentation of a picture of that size, or None.

    A polygon's numbers are expected packed in an `array`, as the readers do with every list of numbers.
    """
    if isinstance(mask, dict):
        return _runs_problem(mask, height, width)
    if not isinstance(mask, list):
        return f"expected polygons or run lengths, got {type(mask).__name__}"
    side = max(height, width)  # farther out than this, the C code fills memory with the outline
    for number, part in enumerate(mask, start=1):
        if not isinstance(part, array):
            return f"polygon {number}: expected a list of numbers x, y, ..."
        if len(part) % 2 or len(part) < 6:
            return f"polygon {number}: expected x, y of at least 3 points, got {len(part)} numbers"
        if not math.isfinite(sum(part)):
            return f"polygon {number}: a coordinate that is no finite number"
        if min(part) < -side or max(part) > 2 * side:
            farthest = max(part, key=abs)
            return f"polygon {number}: a coordinate of {farthest:.6g}, far outside a picture of {width}x{height}"
    return None


def mask_area(mask: Any) -> float:
    """The pixels that a sound segmentation covers: the shoelace formula, or every second run."""
    if isinstance(mask, dict):
        counts = mask["counts"]
        return float(sum((decode_counts(counts) or () if isinstance(counts, str) else counts)[1::2]))
    total = 0.0
    for part in mask:
        x, y = np.frombuffer(part)[0::2], np.frombuffer(part)[1::2]
        total += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    return total


def mask_box(mask: Any) -> tuple[float, float, float, float] | None:
    """The smallest xyxy box around a segmentation; None for one that has none, or that is not sound."""
    if isinstance(mask, dict):
        size = mask.get("size")
        if not isinstance(size, list) or len(size) != 2 or mask_problem(mask, *size):
            return None
        counts = mask["counts"]
        runs = np.array(decode_counts(counts) if isinstance(counts, str) else counts, dtype=np.int64)
        ends = runs.cumsum()
        starts, ends = ends[0:-1:2], ends[1::2]
        filled = ends > starts
        if not filled.any():
            return None
        first, last = starts[filled], ends[filled] - 1
        one_column = first // size[0] == last // size[0]  # a run over several columns has rows from top to bottom
        top, bottom = np.where(one_column, first % size[0], 0), np.where(one_column, last % size[0], size[0] - 1)
        return float(first[0] // size[0]), float(top.min()), float(last[-1] // size[0] + 1), float(bottom.max() + 1)
    if not isinstance(mask, list) or not all(isinstance(part, array) and len(part) % 2 == 0 for part in mask):
        return None
    points = np.concatenate([np.frombuffer(part).reshape(-1, 2) for part in mask]) if mask else np.zeros((0, 2))
    if not len(points) or not np.isfinite(points).all() or np.abs(points).max() > 2**53:
        return None
    low, high = points.min(0), points.max(0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _runs_problem(mask: Mapping[str, Any], height: int, width: int) -> str | None:
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        return f"run lengths: expected a size of [height, width], got {size!r}"
    if size != [height, width]:
        return f"run lengths: a size of {size}, but the picture's is [{height}, {width}]"
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = counts
    else:
        runs = None
    if runs is None or min(runs, default=0) < 0:
        return "run lengths: expected `counts` of whole numbers, or COCO's text form of them"
    if sum(runs) != size[0] * size[1]:
        return f"run lengths: {sum(runs)} pixels in all, but the picture has {size[0] * size[1]}"
    return None


def decode_counts(text: str) -> list[int] | None:
    """The run lengths in COCO's text form (`rleFrString` of its maskApi.c), or None if it is not of that form."""
    runs: list[int] = []
    value = shift = 0
    for char in text:
        digit = ord(char) - 48
        if not 0 <= digit < 64 or shift > 30:
            return None
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs
