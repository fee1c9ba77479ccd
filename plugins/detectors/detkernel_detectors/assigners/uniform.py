"""Uniform matching: as many priors for a small object as for a large one (Chen et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import DynamicAssigner
from detkernel_detection.boxes import cxcywh, iou_of_all
from detkernel_detection.parts import Matches, Predicted, Priors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class UniformAssigner(DynamicAssigner):
    """The nearest predictions of an object, and the nearest priors, by |dx| + |dy| + |dw| + |dh|, whatever its size.

    https://arxiv.org/abs/2103.09460, section 4.3. Anchors that are matched by their IoU are mostly those of large
    objects, where there is one map alone. Both kinds of nearest are pairs, of which an object may have one twice, and a
    prior may have several objects: its class is then that of its last. Neither positive nor negative is a prior that is
    chosen, but hardly overlaps its object, and one that is not, but predicts an object well. The quality of a prior is
    the IoU of its prediction.
    """

    nearest: int = option(default=4, at_least=1, help="predictions for an object, and again as many priors")
    least_iou: float = option(
        default=0.15, at_least=0, at_most=1, help="IoU of prior and object below which a nearest one is ignored"
    )
    ignored_iou: float = option(
        default=0.7, at_least=0, at_most=1, help="IoU of prediction and any object above which others are ignored"
    )

    def assign(self, priors: Priors, targets: Targets, predicted: Predicted) -> Matches:
        wanted = cxcywh(targets.boxes)
        near = [self._nearest(wanted, boxes, priors.valid) for boxes in (predicted.boxes, priors.boxes)]
        ious = iou_of_all(targets.boxes, priors.boxes)  # [B, M, N]
        seen = torch.where(targets.valid[..., None], iou_of_all(targets.boxes, predicted.boxes), 0.0)

        # Where pairs share a prior, the last one says what it is: that of the higher rank, and of two of a rank the
        # nearest prior rather than the nearest prediction, of the later object.
        objects = targets.valid.shape[1]
        last = torch.zeros_like(ious, dtype=torch.int64)
        for number, (places, exist) in enumerate(near):
            turn = 2 * torch.arange(places.shape[2], device=places.device) + number  # [K]
            turn = turn * objects + torch.arange(objects, device=places.device)[:, None] + 1  # [M, K]
            chosen = torch.where(exist & targets.valid[..., None], turn, 0)
            last = torch.maximum(last, torch.zeros_like(last).scatter(2, places, chosen))
        most, matched = last.max(1)  # [B, N]
        taken = most > 0
        positive = taken & (ious.gather(1, matched[:, None])[:, 0] >= self.least_iou)
        negative = priors.valid & ~taken & (seen.amax(1) <= self.ignored_iou)

        matched = torch.where(positive, matched, 0)
        quality = torch.where(positive, seen.gather(1, matched[:, None])[:, 0], 0.0)
        places, exist = (torch.cat(parts, 2) for parts in zip(*near, strict=True))
        close = exist & targets.valid[..., None] & (ious.gather(2, places) >= self.least_iou)
        return Matches(matched, positive, negative, quality, torch.where(close, places, -1))

    def _nearest(self, wanted: Tensor, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, M, K]: the places of the boxes nearest to each of `wanted`, nearest first; bool [B, M, K]: whether
        they are of valid priors, as all are unless there are fewer."""
        apart = torch.where(valid[:, None], torch.cdist(wanted, cxcywh(boxes), p=1), torch.inf)  # [B, M, N]
        least, places = apart.topk(min(self.nearest, apart.shape[2]), largest=False)
        return places, least < torch.inf
