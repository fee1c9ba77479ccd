"""Arithmetic of boxes: xyxy, absolute pixels, the width is `x2 - x1`. All shapes are [..., 4]; nothing is clipped
that is not said to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

EPSILON = 1e-6
"""Least area of a union and of an enclosing box."""


def areas(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def centres(boxes: Tensor) -> Tensor:
    """[..., 4] -> [..., 2]: x and y."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def cxcywh(boxes: Tensor) -> Tensor:
    """[..., 4]: centre and sides of boxes that are given by corners."""
    return torch.cat([centres(boxes), boxes[..., 2:] - boxes[..., :2]], -1)


def xyxy(boxes: Tensor) -> Tensor:
    """[..., 4]: corners of boxes that are given by centre and sides."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


class Overlap(NamedTuple):
    """Of pairs of boxes."""

    iou: Tensor
    """[...] intersection over union."""
    union: Tensor
    """[...] area, at least `epsilon`."""


def overlap(one: Tensor, other: Tensor, epsilon: float = EPSILON) -> Overlap:
    """Of boxes that are paired, or broadcast to each other."""
    low, high = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    sides = (high - low).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = (areas(one) + areas(other) - shared).clamp(min=epsilon)
    return Overlap(shared / union, union)


def iou_of_all(one: Tensor, other: Tensor) -> Tensor:
    """[..., M, 4] and [N, 4], or [..., N, 4], -> [..., M, N]."""
    return overlap(one[..., :, None, :], other[..., None, :, :]).iou


def generalized_iou(one: Tensor, other: Tensor, epsilon: float = EPSILON) -> Tensor:
    """GIoU (Rezatofighi et al. 2019): IoU - |C \\ union| / |C|, C the smallest box around both. [...], -1..1."""
    found = overlap(one, other, epsilon)
    around = _around(one, other)
    area = (around[..., 0] * around[..., 1]).clamp(min=epsilon)
    return found.iou - (area - found.union) / area


def distance_iou(one: Tensor, other: Tensor, epsilon: float = EPSILON) -> Tensor:
    """DIoU (Zheng et al. 2020): IoU - d^2 / c^2, d between the centres, c the diagonal of the box around both."""
    diagonal = _around(one, other).square().sum(-1) + epsilon
    apart = (centres(one) - centres(other)).square().sum(-1)
    return overlap(one, other, epsilon).iou - apart / diagonal


def _around(one: Tensor, other: Tensor) -> Tensor:
    """[..., 2]: the sides of the smallest box around both."""
    low, high = torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    return (high - low).clamp(min=0)


def clip(boxes: Tensor, sizes: Tensor | None) -> Tensor:
    """[B, N, 4] clipped to images of `sizes` [B, 2], (height, width); None: as they are."""
    if sizes is None:
        return boxes
    limit = sizes.flip(1).to(boxes.dtype).repeat(1, 2)[:, None]
    return torch.minimum(boxes.clamp(min=0), limit)
