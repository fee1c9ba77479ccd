"""LVIS's rules, as a change of what is there and what was found: COCO's evaluation does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs
import numpy as np
from detkernel_detection import Annotations
from detkernel_detection.federated import Federated
from numpy.typing import NDArray
from pycocotools import mask as rle

from detkernel_evaluation.found import Found, ImageResult


def federated(
    images: Sequence[ImageResult],
    classes: Sequence[str],
    known: Federated,
    limit: int,
    kind: Literal["bbox", "segm"],
) -> tuple[list[ImageResult], list[set[int]]]:
    """What counts of each image, and the labels of which not all objects are annotated in it.

    No object is a crowd in LVIS. Detections are limited over all classes first; then those of classes that were not
    looked for are left out. What has no area is not there, object or detection: so it is in the `lvis` package.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    results, not_exhaustive = [], []
    for notes, found in images:
        notes = _some_objects(notes, np.flatnonzero(notes.area > 0))
        negative = [label_of[name] for name in known.negatives_of(notes.image_id) if name in label_of]
        looked_for = np.union1d(notes.labels, np.array(negative, np.int64))
        kept = np.argsort(-found.scores, kind="stable")[:limit]
        kept = kept[np.isin(found.labels[kept], looked_for)]
        found = _some(found, kept)
        results.append((notes, _some(found, np.flatnonzero(_area(found, kind) > 0))))
        names = known.not_exhaustive_of(notes.image_id)
        not_exhaustive.append({label_of[name] for name in names if name in label_of})
    return results, not_exhaustive


def _area(found: Found, kind: Literal["bbox", "segm"]) -> NDArray[np.float64]:
    if kind == "segm":
        return np.array([float(rle.area(mask)) for mask in found.masks])
    sides = (found.boxes[:, 2:] - found.boxes[:, :2]).astype(np.float64)
    area: NDArray[np.float64] = sides[:, 0] * sides[:, 1]
    return area


def _some(found: Found, which: NDArray[np.intp]) -> Found:
    masks = [found.masks[at] for at in which.tolist()] if found.masks else []
    return Found(found.boxes[which], found.scores[which], found.labels[which], masks)


def _some_objects(notes: Annotations, which: NDArray[np.intp]) -> Annotations:
    return attrs.evolve(
        notes,
        boxes=notes.boxes[which],
        labels=notes.labels[which],
        area=notes.area[which],
        crowd=np.zeros(len(which), bool),
        difficult=notes.difficult[which],
        masks=None if notes.masks is None else [notes.masks[at] for at in which.tolist()],
        keypoints=None,
        ids=None,
        fields={},
    )
