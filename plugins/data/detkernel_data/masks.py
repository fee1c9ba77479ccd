"""COCO segmentations: measured, and as pixels (`detkernel_detection.segmentations` checks them)."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from detkernel import DataError
from detkernel_detection import Annotations
from detkernel_detection.segmentations import decode_counts, mask_problem

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MISSING = "`missing_masks` of the loader: drop leaves such objects out, box takes the box as the mask"


def trainable(notes: Annotations) -> NDArray[np.bool_]:
    """[N] neither crowds nor difficult objects."""
    kept: NDArray[np.bool_] = ~(notes.crowd | notes.difficult)
    return kept


def without_mask(notes: Annotations) -> NDArray[np.bool_]:
    """[N] whether an object has no mask."""
    if notes.masks is None:
        return np.ones(len(notes), dtype=bool)
    if hasattr(notes.masks, "missing"):  # a `MaskView`, which knows without decoding
        missing: NDArray[np.bool_] = notes.masks.missing()
        return missing
    return np.array([not _drawn(mask) for mask in notes.masks], dtype=bool)


def target_masks(notes: Annotations, keep: NDArray[np.bool_], policy: str) -> tuple[Tensor, NDArray[np.bool_]]:
    """(masks uint8 [K, H, W], which [N] objects they are of) of the objects to keep; `policy` is `missing_masks`.

    A mask that has no pixel, since it is smaller than one or lies outside of its image, is none.
    """
    import torch

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
    import torch
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


def mask_area(mask: Any) -> float:
    """The pixels that a valid segmentation covers: the shoelace formula, or every second run."""
    if isinstance(mask, dict):
        counts = mask["counts"]
        return float(sum((decode_counts(counts) or () if isinstance(counts, str) else counts)[1::2]))
    total = 0.0
    for part in mask:
        x, y = np.frombuffer(part)[0::2], np.frombuffer(part)[1::2]
        total += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    return total


def mask_box(mask: Any) -> tuple[float, float, float, float] | None:
    """The smallest xyxy box around a segmentation; None for one that has none, or that is not valid."""
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
