"""Priors go to the object that they overlap most (Ren et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import Assigner
from detkernel_detection.boxes import iou_of_all
from detkernel_detection.parts import Matches, Priors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class MaxIouAssigner(Assigner):
    """By the largest IoU: positive from one threshold on, background below another, ignored between.

    So that no object goes without, the priors that overlap an object most become its own whatever their IoU, of several
    objects the last one's (as in MMDetection).
    """

    positive: float = option(default=0.5, at_least=0, at_most=1, help="IoU from which a prior is positive")
    negative: float = option(default=0.4, at_least=0, at_most=1, help="IoU below which a prior is background")
    best: float | None = option(
        default=0.0,
        at_least=0,
        at_most=1,
        help="the priors that overlap an object most are its own where that IoU is at least this; null: never",
    )
    all_best: bool = option(default=True, help="all priors with that same IoU, rather than the first")

    def assign(self, priors: Priors, targets: Targets) -> Matches:
        exists = targets.valid[:, :, None] & priors.valid[:, None]
        ious = torch.where(exists, iou_of_all(targets.boxes, priors.boxes), -1.0)  # [B, M, N]
        most, index = ious.max(1)
        positive, negative = most >= self.positive, most < self.negative
        if self.best is not None:
            last = self._last_owner(ious)
            owned = last >= 0
            index, positive, negative = torch.where(owned, last, index), positive | owned, negative & ~owned
        positive = positive & priors.valid
        return Matches(torch.where(positive, index, 0), positive, negative & priors.valid)

    def _last_owner(self, ious: Tensor) -> Tensor:
        """[B, N]: the last object for which a prior is among the best, -1 for none."""
        assert self.best is not None
        best = ious.amax(2, keepdim=True)
        if self.all_best:
            own = ious == best
        else:
            own = torch.arange(ious.shape[2], device=ious.device) == ious.argmax(2, keepdim=True)
        own = own & (best >= max(self.best, 0.0))
        places = torch.arange(ious.shape[1], device=ious.device)[:, None]
        return torch.where(own, places, -1).amax(1)
