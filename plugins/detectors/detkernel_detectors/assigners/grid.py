"""Anchors go to the object whose centre lies in their cell (Redmon and Farhadi 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner
from detkernel_detection.boxes import centres, iou_of_all
from detkernel_detection.parts import Matches, Priors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class GridAssigner(Assigner):
    """Anchors in a cell with the centre of an object may be positive, the others are background or ignored.

    https://arxiv.org/abs/1804.02767, section 2.1, as MMDetection does it: of the anchors in such cells, of all levels,
    those that overlap an object most are its own (of several objects the last one's), and those that overlap any more
    than a threshold are positive too; of all anchors, those that overlap none more than another are background.
    """

    by_level: ClassVar[bool] = True

    positive: float = option(default=0.5, at_least=0, at_most=1, help="IoU above which an anchor is positive")
    negative: float = option(default=0.5, at_least=0, at_most=1, help="IoU up to which an anchor is background")
    best: float = option(
        default=0.0, at_least=0, at_most=1, help="the anchors that overlap an object most need an IoU above this"
    )

    def assign(self, priors: Priors, targets: Targets) -> Matches:
        exists = targets.valid[:, :, None] & priors.valid[:, None]
        ious = torch.where(exists, iou_of_all(targets.boxes, priors.boxes), -1.0)  # [B, M, N]
        background = ious.amax(1) <= self.negative
        responsible = (exists & _same_cell(priors, targets)).any(1)  # [B, N]
        ious = torch.where(responsible[:, None], ious, -1.0)
        most, index = ious.max(1)
        best = ious.amax(2, keepdim=True)
        own = (ious == best) & (best > self.best)
        places = torch.arange(ious.shape[1], device=ious.device)[:, None]
        last = torch.where(own, places, -1).amax(1)
        owned = last >= 0
        positive = owned | (most > self.positive)
        matched = torch.where(owned, last, index)
        return Matches(torch.where(positive, matched, 0), positive, background & ~positive & priors.valid)


def _same_cell(priors: Priors, targets: Targets) -> Tensor:
    """bool [B, M, N]: whether the centre of an object lies in the cell of a prior."""
    cells = (centres(priors.boxes) / priors.strides[:, None]).floor()  # [N, 2]
    wanted = (centres(targets.boxes)[:, :, None] / priors.strides[:, None]).floor()  # [B, M, N, 2]
    return (wanted == cells).all(-1)
