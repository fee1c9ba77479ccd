"""COCO segmentations, checked: the C code that draws and compares them trusts what it is given."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any


def mask_problem(mask: Any, height: int, width: int) -> str | None:
    """What is wrong with a COCO segmentation of an image of that size, or None.

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
            return f"polygon {number}: a coordinate that is not a finite number"
        if min(part) < -side or max(part) > 2 * side:
            farthest = max(part, key=abs)
            return f"polygon {number}: a coordinate of {farthest:.6g}, far outside an image of {width}x{height}"
    return None


def _runs_problem(mask: Mapping[str, Any], height: int, width: int) -> str | None:
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        return f"run lengths: expected a size of [height, width], got {size!r}"
    if size != [height, width]:
        return f"run lengths: a size of {size}, but the image's is [{height}, {width}]"
    if isinstance(counts, str):
        runs = decode_counts(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        runs = counts
    else:
        runs = None
    if runs is None or min(runs, default=0) < 0:
        return "run lengths: expected `counts` of whole numbers, or COCO's text form of them"
    if sum(runs) != size[0] * size[1]:
        return f"run lengths: {sum(runs)} pixels in all, but the image has {size[0] * size[1]}"
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
