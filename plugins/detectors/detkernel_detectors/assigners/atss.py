"""ATSS: a threshold of its own for each object (Zhang et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner
from detkernel_detection.boxes import centres, iou_of_all
from detkernel_detection.parts import Matches, Priors

from detkernel_detectors.coders.distance import distances

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

MARGIN = 0.01
"""Pixels by which a centre must be inside of an object."""


@plugin
class AtssAssigner(Assigner):
    """Of the priors nearest to an object, those whose IoU is at least the mean and deviation of all of these.

    https://arxiv.org/abs/1912.02424. Their centres must be inside the object; a prior that several objects want is that
    one's which it overlaps most.
    """

    by_level: ClassVar[bool] = True

    nearest: int = option(default=9, at_least=1, help="priors of each level that are looked at, by distance of centres")

    def assign(self, priors: Priors, targets: Targets) -> Matches:
        ious = iou_of_all(targets.boxes, priors.boxes)  # [B, M, N]
        near = self._nearest(priors, targets)  # [B, M, K]
        usable = priors.valid[:, None].expand_as(ious).gather(2, near)
        iou = ious.gather(2, near)
        inside = distances(centres(priors.boxes)[near], targets.boxes[:, :, None]).amin(-1) > MARGIN
        good = usable & inside & (iou >= _threshold(iou, usable)) & targets.valid[..., None]
        wanted = torch.full_like(ious, -1.0).scatter(2, near, torch.where(good, iou, -1.0))
        most, matched = wanted.max(1)
        positive = most >= 0
        return Matches(torch.where(positive, matched, 0), positive, priors.valid & ~positive)

    def _nearest(self, priors: Priors, targets: Targets) -> Tensor:
        """int64 [B, M, K]: the places of the nearest valid priors of each level; where there are fewer, of others."""
        apart = (centres(targets.boxes)[:, :, None] - centres(priors.boxes)).square().sum(-1)
        apart = torch.where(priors.valid[:, None], apart, torch.inf)
        found, start = [], 0
        for count in priors.counts:
            level = apart[:, :, start : start + count]
            found.append(level.topk(min(self.nearest, count), largest=False).indices + start)
            start += count
        return torch.cat(found, 2)


def _threshold(iou: Tensor, usable: Tensor) -> Tensor:
    """[B, M, 1]: mean plus unbiased deviation of those that are usable."""
    count = usable.sum(2, keepdim=True)
    mean = (iou * usable).sum(2, keepdim=True) / count.clamp(min=1)
    variance = ((iou - mean).square() * usable).sum(2, keepdim=True) / (count - 1).clamp(min=1)
    return mean + variance.sqrt()
