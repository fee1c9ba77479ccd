"""Generalized focal loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss, ClassLoss, Head, Neck, boxes
from detkernel_detection.parts import RARE, Output

from detkernel_detectors.assigners.atss import AtssAssigner
from detkernel_detectors.coders.distance import DistanceCoder
from detkernel_detectors.heads import Towers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import QualityFocal
from detkernel_detectors.losses.distribution import distribution_focal, expected
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import AnchorDetector, Candidates, Maps, box_losses, wanted_of
from detkernel_detectors.necks import Fpn

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Gfl(AnchorDetector):
    """GFL (Li et al. 2020): scores that are the quality of boxes, and distances as distributions.

    https://arxiv.org/abs/2006.04388. Anchors are matched as in ATSS.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.gfl_(cls|reg)\.", r"head.\1."),
        (r"bbox_head\.integral\.project", None),
    )

    neck: Neck = option(factory=lambda: Fpn(extra_from="output"), help="what makes a pyramid of the backbone's maps")
    head: Head = option(factory=lambda: Towers(norm="group"), help="what predicts from the pyramid")
    assigner: Assigner = option(factory=AtssAssigner, help="which anchors are to predict which objects")
    box_coder: BoxCoder = option(factory=DistanceCoder, help="how a box is told, in strides from the anchor's centre")
    class_loss: ClassLoss = option(
        factory=QualityFocal, help="of the scores of all anchors, by the IoU of the boxes of positive ones"
    )
    box_loss: BoxLoss = option(factory=lambda: Giou(weight=2.0), help="of the boxes of positive anchors")
    distribution_weight: float = option(default=0.25, at_least=0, help="factor of the loss of the distributions")
    largest: int = option(default=16, at_least=1, help="the largest distance that can be told, in strides")
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")

    # Every anchor has a logit for each class, and for each side a distribution over the distances 0, 1, ... 16 strides,
    # whose mean is the distance.

    def outputs(self, classes: int) -> list[Output]:
        return [
            Output("cls", self.per_place * classes, "cls", bias=RARE),
            Output("reg", self.per_place * 4 * (self.largest + 1), "reg", scaled=True),
        ]

    # Training: losses of boxes count as much as their scores say. All is in strides.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits, distributions = self.priors(maps, sizes), self.logits(maps), self._distributions(maps)
        matches = self.assigner.assign(priors, targets)
        labels, wanted = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
        place, truth = priors.boxes / priors.strides[:, None], wanted / priors.strides[:, None]

        told, sides = expected(distributions), self.box_coder.encode(place, truth)
        found = self.box_coder.decode(place, told)
        quality = torch.where(matches.positive, boxes.overlap(found.detach(), truth).iou, 0.0)
        box = box_losses(self.box_loss, self.box_coder, place, told, truth)
        distribution = distribution_focal(distributions, sides.clamp(0, self.largest - 0.1)).mean(-1)

        weights = torch.where(matches.positive, logits.detach().amax(-1).sigmoid(), 0.0)
        count = shared_count(matches.positive.sum(1).clamp(min=1))  # of each image one at least
        weight = shared_count(weights)
        classes = self.class_loss(logits, labels, quality)
        return {
            "loss_cls": averaged(classes, matches.positive | matches.negative, count),
            "loss_bbox": averaged(box, weights, weight),
            "loss_dfl": self.distribution_weight * averaged(distribution, weights, weight),
        }

    # Inference: a score is the quality of its box already.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.priors(maps, sizes)
        strides = priors.strides[:, None]
        found = self.box_coder.decode(priors.boxes / strides, expected(self._distributions(maps))) * strides
        return Candidates(self.logits(maps).sigmoid(), found, priors.counts)

    def _distributions(self, maps: Maps) -> Tensor:
        """Logits [B, N, 4, largest + 1]."""
        flat = maps.flat("reg", 4 * (self.largest + 1))
        return flat.reshape(*flat.shape[:2], 4, self.largest + 1)
