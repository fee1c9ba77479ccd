"""COCO segmentations as pixels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detkernel import DataError
from detkernel_detection import Annotations
from numpy.typing import NDArray
from torch import Tensor

from detkernel_data._annotations import MaskView
from detkernel_data._rle import mask_area

MISSING = "`missing_masks` of the loader: drop leaves such objects out, box takes the box as the mask"


def trainable(notes: Annotations) -> NDArray[np.bool_]:
    """[N] neither crowds nor difficult objects."""
    kept: NDArray[np.bool_] = ~(notes.crowd | notes.difficult)
    return kept


def without_mask(notes: Annotations) -> NDArray[np.bool_]:
    """[N] whether an object has no mask."""
    if notes.masks is None:
        return np.ones(len(notes), dtype=bool)
    if isinstance(notes.masks, MaskView):
        return notes.masks.missing()
    return np.array([not _drawn(mask) for mask in notes.masks], dtype=bool)


def target_masks(notes: Annotations, keep: NDArray[np.bool_], policy: str) -> tuple[Tensor, NDArray[np.bool_]]:
    """(masks uint8 [K, H, W], which [N] objects they are of) of the objects to keep; `policy` is `missing_masks`.

    A mask that has no pixel, since it is smaller than one or lies outside of its image, is none.
    """
    given = notes.masks or [[]] * len(notes)
    numbers = np.flatnonzero(keep)
    masks = rasterise([given[number] for number in numbers.tolist()], notes.height, notes.width)
    seen = masks.flatten(1).any(1).numpy().astype(bool)  # torch answers in uint8
    if seen.all():
        return masks, keep
    if policy == "error":
        raise DataError(
            f"{notes.path}: object {numbers[~seen][0] + 1} has no mask with a pixel in the image; {MISSING}"
        )
    if policy == "box":
        for position in np.flatnonzero(~seen).tolist():
            x1, y1, x2, y2 = notes.boxes[numbers[position]].tolist()
            masks[position, int(y1) : max(round(y2), int(y1) + 1), int(x1) : max(round(x2), int(x1) + 1)] = 1
        return masks, keep
    kept = keep.copy()
    kept[numbers[~seen]] = False
    return masks[torch.from_numpy(seen)], kept


def _drawn(mask: Any) -> bool:
    """Whether a segmentation in COCO's form has anything in it."""
    if isinstance(mask, dict):
        counts = mask["counts"]
        return bool(mask_area({**mask, "counts": counts.decode() if isinstance(counts, bytes) else counts}))
    return any(len(part) for part in mask)


def rasterise(masks: Sequence[Any], height: int, width: int) -> Tensor:
    """uint8 [N, H, W] of N segmentations, by pycocotools' rules (polygons of an object are joined)."""
    from pycocotools import mask as coco

    if not masks:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    runs = [_runs(mask, height, width) for mask in masks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 and NumPy 2 disagree on `copy`
        pixels = coco.decode(runs)  # [H, W, N] in Fortran order: [N, W, H] in memory
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _runs(mask: Any, height: int, width: int) -> Any:
    from pycocotools import mask as coco

    if isinstance(mask, list):
        return coco.merge(coco.frPyObjects(mask, height, width)) if mask else _none(height, width)
    if isinstance(mask["counts"], list):
        return coco.frPyObjects(mask, height, width)
    return mask


def _none(height: int, width: int) -> Any:
    from pycocotools import mask as coco

    return coco.encode(np.zeros((height, width), dtype=np.uint8, order="F"))
