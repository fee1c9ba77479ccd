"""Boxes as plain numbers, for contracts: xyxy."""

from __future__ import annotations

from collections.abc import Sequence

Box = Sequence[float]


def iou(one: Box, other: Box) -> float:
    """Intersection over union; 0 for boxes without area."""
    wide, high = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return wide * high / (sum(areas) - wide * high)


def contains(outer: Box, inner: Box, slack: float) -> bool:
    """Whether a box lies in another, give or take some pixels."""
    low = all(inner[side] >= outer[side] - slack for side in (0, 1))
    return low and all(inner[side] <= outer[side] + slack for side in (2, 3))


def rounded(box: Box) -> list[float]:
    """For messages."""
    return [round(side, 1) for side in box]
