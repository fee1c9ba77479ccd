"""Sets of queries: each object is one query's, so that the sum of costs is least (Carion et al. 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import MatchCost, SetAssigner, boxes
from detkernel_detection.parts import Matches, Queries

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class FocalCost(MatchCost):
    """The focal loss that an object's class would have, less that of no object (Zhu et al. 2021)."""

    alpha: float = option(default=0.25, at_least=0, at_most=1, help="weight of yes; that of no is 1 - alpha")
    gamma: float = option(default=2.0, at_least=0, help="power of how wrong a probability is")
    epsilon: float = option(default=1e-12, above=0, help="added to probabilities before their logarithm")

    def __call__(self, queries: Queries, targets: Targets) -> Tensor:
        p = _of_labels(queries.logits, targets).sigmoid()
        yes = -(p + self.epsilon).log() * self.alpha * (1 - p).pow(self.gamma)
        no = -(1 - p + self.epsilon).log() * (1 - self.alpha) * p.pow(self.gamma)
        return self.weight * (yes - no)


@plugin
class SoftmaxCost(MatchCost):
    """Less the probability of an object's class, of classes of which one is no object, the last (DETR)."""

    def __call__(self, queries: Queries, targets: Targets) -> Tensor:
        return -self.weight * _of_labels(queries.logits.softmax(-1), targets)


@plugin
class L1Cost(MatchCost):
    """The sum of the absolute differences of cx, cy, w and h, in shares of the image."""

    def __call__(self, queries: Queries, targets: Targets) -> Tensor:
        wanted = boxes.cxcywh(targets.boxes) / queries.scale
        return self.weight * (queries.boxes[:, :, None] - wanted[:, None]).abs().sum(-1)


@plugin
class GiouCost(MatchCost):
    """Less the GIoU (Rezatofighi et al. 2019)."""

    def __call__(self, queries: Queries, targets: Targets) -> Tensor:
        found = boxes.xyxy(queries.boxes) * queries.scale
        return -self.weight * boxes.generalized_iou(found[:, :, None], targets.boxes[:, None])


@plugin
class HungarianAssigner(SetAssigner):
    """Each object gets a query of its own in each set, so that the sum of the costs is least (Kuhn 1955).

    The one place where a DETR waits for the device: the costs of all images and all sets go to the host as one piece,
    and the matches back as one. Costs that are no numbers count as very high.
    """

    costs: list[MatchCost] = option(
        factory=lambda: [FocalCost(weight=2.0), L1Cost(weight=5.0), GiouCost(weight=2.0)],
        help="what is added up; for DETR's softmax, `softmax_cost` in place of `focal_cost`",
    )

    def __attrs_post_init__(self) -> None:
        if not self.costs:
            raise ValueError("costs: expected at least one, got none")

    def assign(self, queries: Queries, targets: Targets) -> Matches:
        from detkernel_detectors.assigners.linear_sum import assigned

        with torch.no_grad():
            costs = self.cost(queries, targets).nan_to_num(HIGHEST, HIGHEST, -HIGHEST)
            costs = torch.where(targets.valid[:, None], costs, torch.inf)
            matched = assigned(costs, queries.counts)
        positive = matched >= 0
        return Matches(matched.clamp(min=0), positive, ~positive)

    def cost(self, queries: Queries, targets: Targets) -> Tensor:
        """[B, N, M]."""
        return torch.stack([cost(queries, targets) for cost in self.costs]).sum(0)


HIGHEST = 1e8
"""What the cost of a prediction that is not a number counts as."""


def _of_labels(values: Tensor, targets: Targets) -> Tensor:
    """[B, N, C] -> [B, N, M]: the value of each object's class."""
    return values.gather(2, targets.labels[:, None].expand(-1, values.shape[1], -1))
