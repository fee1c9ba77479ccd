"""Boxes by the distances of their sides from a point, of FCOS (Tian et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import plugin
from detkernel_detection import BoxCoder
from detkernel_detection.boxes import centres

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class DistanceCoder(BoxCoder):
    """How far the left, upper, right and lower side are from the prior's centre."""

    def encode(self, priors: Tensor, boxes: Tensor) -> Tensor:
        return distances(centres(priors), boxes)

    def decode(self, priors: Tensor, deltas: Tensor) -> Tensor:
        centre = centres(priors)
        return torch.cat([centre - deltas[..., :2], centre + deltas[..., 2:]], -1)


def distances(points: Tensor, boxes: Tensor) -> Tensor:
    """[..., 2] and [..., 4] -> [..., 4]: left, upper, right, lower; all are positive where the point is inside."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def centreness(sides: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of distances [..., 4]: 1 at the centre, 0 at a side."""
    near, far = (torch.stack([pick(sides[..., :2], sides[..., 2:])]) for pick in (torch.minimum, torch.maximum))
    return (near[0].clamp(min=0) / far[0]).prod(-1).sqrt()


def exponential(logarithms: Tensor) -> Tensor:
    """Distances of their logarithms, which count as 20 at most, so that none is infinite."""
    return logarithms.clamp(max=20).exp()
