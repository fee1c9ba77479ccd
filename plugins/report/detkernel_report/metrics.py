"""Average precision by class, size and overlap, and the curves behind it.

The rules are those of COCO's evaluation of boxes (pycocotools' `COCOeval`): greedy matching by falling score, crowds
and difficult objects neither found nor missed, precision at 101 recalls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from detkernel_report.results import MOST, Bools, Floats, ImageResult, Labels, Results

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's ranges of areas, in square pixels of the file."""


@attrs.frozen(eq=False)
class Matches:
    """The detections of all images, whether each hit an object of its class."""

    image: Labels
    """[D] which image, as a position in `Results.images`."""
    label: Labels
    score: Floats
    hit: Bools
    """[T, A, D]"""
    ignored: Bools
    """[T, A, D] neither right nor wrong: it hit what is not counted, or is itself of another size."""
    truth: Labels
    """[D] the object of its image that it hit at the first threshold, of any size; -1: none."""
    positives: NDArray[np.int64]
    """[A, K] objects to be found."""
    thresholds: Sequence[float]


def matched(
    results: Results, thresholds: Sequence[float] = tuple(THRESHOLDS), sizes: Sequence[str] = tuple(SIZES)
) -> Matches:
    """Match the detections of every image."""
    ranges = np.array([SIZES[name] for name in sizes])
    parts = [_match_image(image, np.minimum(thresholds, 1 - 1e-10), ranges) for image in results.images]
    positives = np.zeros((len(ranges), len(results.classes)), np.int64)
    for image in results.images:
        counted = ~image.ignore & _inside(image.area, ranges)
        for size in range(len(ranges)):
            positives[size] += np.bincount(image.labels[counted[size]], minlength=len(results.classes))
    empty = np.zeros((len(thresholds), len(ranges), 0), bool)
    number = [np.full(len(part[0]), at) for at, part in enumerate(parts)]
    none = np.zeros(0, np.int64)
    return Matches(
        image=np.concatenate([none, *number]),
        label=np.concatenate([none, *(part[0] for part in parts)]),
        score=np.concatenate([np.zeros(0), *(part[1] for part in parts)]),
        hit=np.concatenate([empty, *(part[2] for part in parts)], axis=2),
        ignored=np.concatenate([empty, *(part[3] for part in parts)], axis=2),
        truth=np.concatenate([none, *(part[4] for part in parts)]),
        positives=positives,
        thresholds=list(thresholds),
    )


def _inside(area: Floats, ranges: Floats) -> Bools:
    """[A, N]"""
    inside: Bools = (area[None] >= ranges[:, :1]) & (area[None] <= ranges[:, 1:])
    return inside


def _match_image(image: ImageResult, thresholds: Floats, ranges: Floats) -> tuple[Labels, Floats, Bools, Bools, Labels]:
    """Label, score, hit [T, A, D], ignored [T, A, D] and hit object of the detections of an image."""
    kept = counted_detections(image)
    labels, scores, boxes = image.found_labels[kept], image.scores[kept], image.found_boxes[kept]
    if len(thresholds) == len(ranges) == 1 and not ranges[0, 0]:
        return labels, scores, *_match_once(image, kept, float(thresholds[0]))
    shape = (len(thresholds), len(ranges), len(kept))
    hit, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    truth = np.full(len(kept), -1)
    overlaps = image.iou()[kept]
    for label in np.intersect1d(labels, image.labels).tolist():
        same = np.flatnonzero(image.labels == label)
        out = image.ignore[same][None] | ~_inside(image.area[same], ranges)
        taken = np.zeros((*shape[:2], len(same)), bool)
        # what overlaps nothing of its class that much cannot hit: of 100 detections of an image that is most
        for at in np.flatnonzero((labels == label) & (overlaps[:, same] >= thresholds.min()).any(1)).tolist():
            overlap = overlaps[at, same]
            free = (overlap >= thresholds[:, None, None]) & (~taken | image.crowd[same])
            found, which = _best(free & ~out, overlap)
            other, instead = _best(free & out & ~found[..., None], overlap)
            hit[:, :, at], ignored[:, :, at] = found, other
            which = np.where(found, which, instead)
            size, threshold = np.nonzero((found | other).T)
            taken[threshold, size, which[threshold, size]] = True
            truth[at] = same[which[0, 0]] if found[0, 0] else -1
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    ignored |= ~hit & ~ignored & ~_inside(area, ranges)[None]
    return labels, scores, hit, ignored, truth


def _match_once(image: ImageResult, kept: Labels, threshold: float) -> tuple[Bools, Bools, Labels]:
    """The same for one overlap and all sizes, as a validation asks for it: in plain Python, some times faster."""
    hit, ignored, truth = np.zeros((1, 1, len(kept)), bool), np.zeros((1, 1, len(kept)), bool), np.full(len(kept), -1)
    if not len(image.boxes):
        return hit, ignored, truth
    labels = image.found_labels[kept]
    overlaps = image.iou()[kept] * (labels[:, None] == image.labels[None])
    order = np.argsort(image.ignore, kind="stable").tolist()  # what counts goes before what does not
    taken, ignore, crowd = [False] * len(order), image.ignore.tolist(), image.crowd.tolist()
    for at in np.flatnonzero((overlaps >= threshold).any(1)).tolist():
        overlap, best, most = overlaps[at].tolist(), -1, threshold
        for number in order:
            if best >= 0 and ignore[number] and not ignore[best]:
                break
            if overlap[number] >= most and (not taken[number] or crowd[number]):
                best, most = number, overlap[number]
        if best >= 0:
            taken[best] = True
            hit[0, 0, at], ignored[0, 0, at] = not ignore[best], ignore[best]
            truth[at] = -1 if ignore[best] else best
    return hit, ignored, truth


def _best(allowed: Bools, overlap: Floats) -> tuple[Bools, Labels]:
    """Of the objects [T, A, N] that are allowed, the one of the greatest overlap, the last of equals."""
    value = np.where(allowed, overlap, -1.0)[..., ::-1]
    return np.asarray(allowed.any(-1)), value.shape[-1] - 1 - np.asarray(value.argmax(-1))


def counted_detections(image: ImageResult) -> Labels:
    """The detections that count, by falling score: the best `MOST` of each class."""
    order = np.argsort(-image.scores, kind="stable")
    labels = image.found_labels[order]
    rank = np.zeros(len(order), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange((labels == label).sum())
    return order[rank < MOST]


@attrs.frozen(eq=False)
class Curves:
    """Average precision, and precision over recall; nan where there is nothing to find."""

    ap: Floats
    """[T, A, K]"""
    precision: Floats
    """[T, A, K, 101] at `RECALLS`"""
    recall: Floats
    """[T, A, K] the greatest one"""
    positives: NDArray[np.int64]
    """[A, K]"""


def curves(matches: Matches) -> Curves:
    """COCO's accumulation: precision that never rises, at 101 recalls, and its mean."""
    many, sizes, classes = len(matches.thresholds), *matches.positives.shape
    precision = np.full((many, sizes, classes, len(RECALLS)), np.nan)
    recall = np.full((many, sizes, classes), np.nan)
    for label in range(classes):
        mine = np.flatnonzero(matches.label == label)
        mine = mine[np.argsort(-matches.score[mine], kind="stable")]
        hit, counts = matches.hit[:, :, mine], ~matches.ignored[:, :, mine]
        right, wrong = (hit & counts).cumsum(2), (~hit & counts).cumsum(2)
        for size in range(sizes):
            if matches.positives[size, label]:
                for at in range(many):
                    reached, values = _interpolated(right[at, size], wrong[at, size], matches.positives[size, label])
                    precision[at, size, label], recall[at, size, label] = values, reached
    return Curves(precision.mean(-1), precision, recall, matches.positives)


def _interpolated(right: Labels, wrong: Labels, positives: int) -> tuple[float, Floats]:
    """(greatest recall, precision [101])."""
    values = np.zeros(len(RECALLS))
    if not len(right):
        return 0.0, values
    recall = right / positives
    precision = np.maximum.accumulate((right / np.maximum(right + wrong, np.spacing(1)))[::-1])[::-1]
    places = np.searchsorted(recall, RECALLS, side="left")
    reached = places < len(precision)
    values[reached] = precision[places[reached]]
    return float(recall[-1]), values


def average_precision(hit: Bools, score: Floats, positives: int) -> float:
    """AP at one overlap of detections in any order; nan where there is nothing to find."""
    if positives <= 0:
        return math.nan
    order = np.argsort(-score, kind="stable")
    right = hit[order].cumsum()
    return float(_interpolated(right, np.arange(1, len(right) + 1) - right, positives)[1].mean())


def mean(values: Floats) -> float:
    """The mean of what is not nan; nan where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


@attrs.frozen
class Operating:
    """What a detector does at one score threshold, at an overlap of 0.5."""

    score: float
    precision: float
    recall: float
    f1: float


def best_threshold(matches: Matches, label: int | None = None) -> Operating:
    """The score threshold of the greatest F1, of one class or over all detections."""
    chosen = np.ones(len(matches.label), bool) if label is None else matches.label == label
    positives = int(matches.positives[0].sum() if label is None else matches.positives[0, label])
    chosen &= ~matches.ignored[0, 0]
    order = np.flatnonzero(chosen)[np.argsort(-matches.score[chosen], kind="stable")]
    if not len(order) or not positives:
        return Operating(math.nan, math.nan, math.nan, math.nan)
    right = matches.hit[0, 0, order].cumsum()
    precision, recall = right / np.arange(1, len(order) + 1), right / positives
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    scores = matches.score[order]
    f1[:-1][scores[:-1] == scores[1:]] = -1  # a threshold takes all that have its score
    at = int(f1.argmax())
    return Operating(float(scores[at]), float(precision[at]), float(recall[at]), float(f1[at]))
