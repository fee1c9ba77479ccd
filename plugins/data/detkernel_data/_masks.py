"""COCO segmentations as pixels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
