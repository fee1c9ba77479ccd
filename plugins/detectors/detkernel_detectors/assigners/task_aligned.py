"""Task alignment: the priors that are good at both tasks (Feng et al. 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import DynamicAssigner
from detkernel_detection.boxes import centres, iou_of_all
from detkernel_detection.parts import Matches, Predicted, Priors

from detkernel_detectors.assigners.atss import MARGIN
from detkernel_detectors.coders.distance import distances

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

LEAST = 1e-7
"""Added to the largest alignment of an object before it divides."""


@plugin
class TaskAlignedAssigner(DynamicAssigner):
    """The priors inside an object with the largest alignment, score^alpha IoU^beta.

    https://arxiv.org/abs/2108.07755. Their quality is the alignment, such that an object's largest is its best IoU.
    """

    nearest: int = option(default=13, at_least=1, help="priors that an object gets at most")
    alpha: float = option(default=1.0, at_least=0, help="power of the score of the object's class")
    beta: float = option(default=6.0, at_least=0, help="power of the IoU")

    def assign(self, priors: Priors, targets: Targets, predicted: Predicted) -> Matches:
        ious = iou_of_all(targets.boxes, predicted.boxes)  # [B, M, N]
        labels = targets.labels[..., None].expand(-1, -1, ious.shape[2])
        aligned = predicted.scores.transpose(1, 2).gather(1, labels) ** self.alpha * ious**self.beta
        aligned = torch.where(priors.valid[:, None], aligned, 0.0)
        best, places = aligned.topk(min(self.nearest, aligned.shape[2]), 2)
        inside = distances(centres(priors.boxes)[places], targets.boxes[:, :, None]).amin(-1) > MARGIN
        good = (best > 0) & inside & targets.valid[..., None]
        wanted = torch.full_like(ious, -1.0).scatter(2, places, torch.where(good, ious.gather(2, places), -1.0))
        most, matched = wanted.max(1)
        positive = most >= 0
        matched = torch.where(positive, matched, 0)
        quality = _normalised(aligned, ious, positive, matched)
        return Matches(matched, positive, priors.valid & ~positive, quality)


def _normalised(aligned: Tensor, ious: Tensor, positive: Tensor, matched: Tensor) -> Tensor:
    """[B, N]: alignments of the positive priors by the largest of their object's, times its largest IoU."""
    places = torch.arange(ious.shape[1], device=ious.device)[:, None]
    own = positive[:, None] & (matched[:, None] == places)  # [B, M, N]
    largest, best = (torch.where(own, part, 0.0).amax(2) for part in (aligned, ious))
    factor = (best / (largest + LEAST)).gather(1, matched)
    return torch.where(positive, aligned.gather(1, matched[:, None])[:, 0] * factor, 0.0)
