"""Pascal VOC's average precision: matching as in the development kit's `VOCevaldet.m`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import attrs
import numpy as np
from numpy.typing import NDArray

from detkernel_evaluation.found import ImageResult

Metric = Literal["11points", "area"]
Floats = NDArray[np.float64]


@attrs.frozen(eq=False)
class Matches:
    """Every detection of one class with the object that it overlaps most, by falling score."""

    iou: Floats
    """[D] with that object; -1 where the image has none of the class."""
    truth: NDArray[np.int64]
    """[D] that object's number, over all images."""
    ignored: NDArray[np.bool_]
    """[D] whether that object is difficult (or a crowd)."""
    positives: int
    """Objects to be found: those not difficult."""


def match(images: Sequence[ImageResult], label: int, legacy_widths: bool) -> Matches:
    """Pair the detections of a class with its objects, whatever the threshold will be."""
    columns: list[tuple[Any, ...]] = [(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))]
    positives = first = 0
    for notes, found in images:
        ours, theirs = notes.labels == label, found.labels == label
        ignored = (notes.difficult | notes.crowd)[ours]
        positives += int(np.count_nonzero(~ignored))
        if theirs.any():
            best, overlap = _best(found.boxes[theirs], notes.boxes[ours], legacy_widths)
            flags = ignored[best] if len(ignored) else np.zeros(len(best), bool)
            columns.append((found.scores[theirs], overlap, best + first, flags))
        first += len(ignored)
    scores, iou, truth, flags = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.argsort(-scores, kind="stable")
    return Matches(iou[order], truth[order], flags[order], positives)


def _best(boxes: NDArray[Any], objects: NDArray[Any], legacy_widths: bool) -> tuple[NDArray[np.int64], Floats]:
    """For each box the object of the greatest IoU, the first of equals, and that IoU."""
    if not len(objects):
        return np.zeros(len(boxes), np.int64), np.full(len(boxes), -1.0)
    iou = box_iou(boxes.astype(np.float64), objects.astype(np.float64), 1.0 if legacy_widths else 0.0)
    best = iou.argmax(1)
    return best, iou[np.arange(len(boxes)), best]


def box_iou(boxes: Floats, others: Floats, extra: float) -> Floats:
    """IoU [N, M] of xyxy boxes; `extra` is added to every width and height."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low + extra).clip(min=0).prod(2)
    area, other = (np.prod(b[:, 2:] - b[:, :2] + extra, axis=1) for b in (boxes, others))
    union = area[:, None] + other[None] - shared
    iou: Floats = shared / np.where(union > 0, union, 1.0)
    return iou


def average_precision(matches: Matches, threshold: float, metric: Metric) -> float:
    """AP at one IoU threshold; nan where there is nothing to find."""
    if matches.positives == 0:
        return math.nan
    hit = matches.iou >= threshold
    counted = np.flatnonzero(hit & ~matches.ignored)
    _, first = np.unique(matches.truth[counted], return_index=True)
    right = np.zeros(len(hit), bool)
    right[counted[first]] = True  # later ones found the same object again
    wrong = ~right & ~(hit & matches.ignored)
    found, amiss = right.cumsum(), wrong.cumsum()
    recall = found / matches.positives
    precision = found / np.maximum(found + amiss, 1)
    return _eleven_points(recall, precision) if metric == "11points" else _area(recall, precision)


def _eleven_points(recall: Floats, precision: Floats) -> float:
    """The mean of the best precision at a recall of at least 0, .1, ... 1 (VOC 2007).

    The points are NumPy's, as in Girshick's `voc_eval.py` and MMDetection: some lie one bit above the decimal fraction.
    """
    return float(np.mean([precision[recall >= point].max(initial=0) for point in np.arange(0.0, 1.1, 0.1)]))


def _area(recall: Floats, precision: Floats) -> float:
    """The area under the curve once precision never rises (VOC 2010 and later)."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
