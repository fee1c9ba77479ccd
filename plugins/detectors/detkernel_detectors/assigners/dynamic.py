"""As many priors for an object as its predictions overlap it: SimOTA (Ge et al. 2021) and RTMDet's (Lyu et al. 2022).

Both say what it would cost that a prior predicts an object; the sum of an object's best IoUs says how many it gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from detkernel import option, plugin
from detkernel_detection import DynamicAssigner
from detkernel_detection.boxes import centres, iou_of_all
from detkernel_detection.parts import Matches, Predicted, Priors

from detkernel_detectors.coders.distance import distances

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

LEAST = 1e-7
"""Added to an IoU before its logarithm."""
FAR = 1e5
"""What SimOTA adds to the cost of a prior that is not in the middle of an object."""
LARGEST = 1e30
"""Bound of a cost, which keeps what is far apart from what must not be."""


@plugin
class SimOta(DynamicAssigner):
    """The priors in the middle of an object that predict it best, by classes and IoU.

    https://arxiv.org/abs/2107.08430. The cost is BCE(scores) - 3 ln IoU, and much more outside of the middle.
    """

    nearest: int = option(default=10, at_least=1, help="best IoUs of an object, whose sum is how many priors it gets")
    radius: float = option(default=2.5, above=0, help="half a side of the middle of an object, in strides of the prior")
    class_weight: float = option(default=1.0, at_least=0, help="factor of the classes in the cost")
    iou_weight: float = option(default=3.0, at_least=0, help="factor of the boxes in the cost")

    def assign(self, priors: Priors, targets: Targets, predicted: Predicted) -> Matches:
        points, boxes = centres(priors.boxes), targets.boxes[:, :, None]
        inside = distances(points, boxes).amin(-1) > 0  # [B, M, N]
        reach = (self.radius * priors.strides)[:, None]
        middle = centres(boxes)
        central = distances(points, torch.cat([middle - reach, middle + reach], -1)).amin(-1) > 0
        usable = ((inside | central) & targets.valid[..., None]).any(1) & priors.valid

        ious = iou_of_all(targets.boxes, predicted.boxes)
        # torch's cross-entropy has no logarithm below -100.
        yes, no = (part.log().clamp(min=-100) for part in (predicted.scores, 1 - predicted.scores))
        classes = _of_labels(no - yes, targets) - no.sum(-1)[:, None]
        costs = self.class_weight * classes - self.iou_weight * (ious + LEAST).log() + FAR * ~(inside & central)
        return matched(costs, ious, usable, priors, targets, self.nearest)


@plugin
class DynamicSoftLabel(DynamicAssigner):
    """The priors near the centre of an object that predict it best, by quality focal loss and IoU.

    https://arxiv.org/abs/2212.07784. The cost is QFL(scores) - 3 ln IoU + 10^(d - 3), d the distance of the centres in
    strides.
    """

    nearest: int = option(default=13, at_least=1, help="best IoUs of an object, whose sum is how many priors it gets")
    radius: float = option(default=3.0, at_least=0, help="strides from the centre from which on the cost is large")
    iou_weight: float = option(default=3.0, at_least=0, help="factor of the boxes in the cost")
    centre: Literal["box", "mask"] = option(
        default="box", help="what an object's centre is: that of its box, or the centre of mass of its mask"
    )

    def assign(self, priors: Priors, targets: Targets, predicted: Predicted) -> Matches:
        points, boxes = centres(priors.boxes), targets.boxes[:, :, None]
        inside = distances(points, boxes).amin(-1) > 0  # [B, M, N]
        usable = (inside & targets.valid[..., None]).any(1) & priors.valid

        ious = iou_of_all(targets.boxes, predicted.boxes)
        logits = predicted.scores.logit(LEAST) if predicted.logits is None else predicted.logits
        scores, entropy = logits.sigmoid(), torch.nn.functional.softplus(logits)
        background = entropy * scores.square()  # of a class that is not there
        logit, score, none = (_of_labels(part, targets) for part in (logits, scores, background))
        own = (torch.nn.functional.softplus(logit) - logit * ious) * (ious - score).square()
        classes = background.sum(-1)[:, None] - none + own

        middle = centres(boxes) if self.centre == "box" else _centres_of_mass(targets)[:, :, None]
        apart = (points - middle).square().sum(-1).sqrt() / priors.strides
        costs = classes - self.iou_weight * (ious + LEAST).log() + 10 ** (apart - self.radius)
        return matched(costs, ious, usable, priors, targets, self.nearest)


def matched(costs: Tensor, ious: Tensor, usable: Tensor, priors: Priors, targets: Targets, nearest: int) -> Matches:
    """The cheapest priors for each object, as many as the sum of its `nearest` best IoUs, at least one.

    `costs` and `ious` [B, M, N], `usable` [B, N]. A prior that several objects take is that one's, of all, which it is
    cheapest for. How many an object gets is a rank among the cheapest, so that no shape depends on it.
    """
    among = usable[:, None] & targets.valid[..., None]
    costs = torch.where(among, costs.clamp(max=LARGEST), torch.inf)
    nearest = min(nearest, costs.shape[2])
    counts = torch.where(among, ious, 0.0).topk(nearest, 2).values.sum(2, keepdim=True).int().clamp(min=1)
    cheapest, places = costs.topk(nearest, 2, largest=False)
    chosen = (torch.arange(nearest, device=costs.device) < counts) & (cheapest < torch.inf)
    taken = torch.zeros_like(among).scatter(2, places, chosen)  # [B, M, N]
    takers = taken.sum(1)
    owner = torch.where(takers > 1, costs.argmin(1), taken.int().argmax(1))
    positive = takers > 0
    owner = torch.where(positive, owner, 0)
    quality = torch.where(positive, ious.gather(1, owner[:, None])[:, 0], 0.0)
    return Matches(owner, positive, priors.valid & ~positive, quality)


def _centres_of_mass(targets: Targets) -> Tensor:
    """[B, M, 2], x and y in pixels, of the masks."""
    assert targets.masks is not None
    columns, rows = (targets.masks.sum(dim, dtype=torch.float32) for dim in (2, 3))  # [B, M, W], [B, M, H]
    area = rows.sum(-1).clamp(min=LEAST)
    x, y = (part @ torch.arange(part.shape[-1], device=part.device, dtype=part.dtype) for part in (columns, rows))
    return torch.stack([x / area, y / area], -1)


def _of_labels(values: Tensor, targets: Targets) -> Tensor:
    """[B, N, C] -> [B, M, N]: for each object, those of its class."""
    labels = targets.labels[..., None].expand(-1, -1, values.shape[1])
    return values.transpose(1, 2).gather(1, labels)
