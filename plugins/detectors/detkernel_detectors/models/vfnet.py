"""VarifocalNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss, ClassLoss, Head, Neck
from detkernel_detection.boxes import centres, overlap
from detkernel_detection.parts import RARE, Output, Priors

from detkernel_detectors.assigners.atss import AtssAssigner
from detkernel_detectors.coders.distance import DistanceCoder, exponential
from detkernel_detectors.heads import REACH, StarTowers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import Varifocal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import AnchorDetector, Candidates, Maps, box_losses, wanted_of
from detkernel_detectors.necks import Fpn

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

LEAST = 1e-6
"""Least IoU of a positive prior, as a score."""


@plugin
class Vfnet(AnchorDetector):
    """VarifocalNet (Zhang et al. 2021): scores that are the IoU of boxes, and boxes that are corrected by what is seen
    along them.

    https://arxiv.org/abs/2008.13367. Anchors are matched as in ATSS.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.vfnet_reg_conv\.conv\.", "head.reg_conv.conv."),
        (r"bbox_head\.vfnet_reg_conv\.[bg]n\.", "head.reg_conv.norm."),
        (r"bbox_head\.vfnet_reg_refine_dconv\.", "head.reg_star."),
        (r"bbox_head\.vfnet_cls_dconv\.", "head.cls_star."),
        (r"bbox_head\.vfnet_reg_refine\.", "head.refined."),
        (r"bbox_head\.vfnet_(cls|reg)\.", r"head.\1."),
        (r"bbox_head\.scales_refine\.(\d+)\.scale", r"head.refined_scales.\1"),
    )

    neck: Neck = option(
        factory=lambda: Fpn(extra_from="output", extra_relu=True), help="what makes a pyramid of the backbone's maps"
    )
    head: Head = option(factory=StarTowers, help="what predicts from the pyramid")
    assigner: Assigner = option(factory=AtssAssigner, help="which anchors are to predict which objects")
    box_coder: BoxCoder = option(factory=DistanceCoder, help="how a box is told, relative to its anchor's centre")
    class_loss: ClassLoss = option(
        factory=lambda: Varifocal(differentiable=True),
        help="of the scores of all anchors, by the IoU of the corrected boxes of positive ones",
    )
    first_box_loss: BoxLoss = option(
        factory=lambda: Giou(weight=1.5), help="of the boxes of positive anchors at first, weighted by their IoU"
    )
    box_loss: BoxLoss = option(factory=lambda: Giou(weight=2.0), help="the same of the corrected boxes")
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")

    # Every anchor has a logit for each class, four distances, and four factors that correct them.

    def outputs(self, classes: int) -> list[Output]:
        self.check_one_per_place()
        return [
            Output("cls", classes, "cls", bias=RARE),
            Output("reg", 4, "reg", scaled=True),
            Output("refined", 4, "reg", scaled=True),
        ]

    # Training: both boxes are learned, each counting as much as it overlaps its object. Classes are learned from all
    # places, those in the padding too.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits = self.priors(maps, sizes), self.logits(maps)
        matches = self.assigner.assign(priors, targets)
        labels, wanted = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
        place = centres(priors.boxes).repeat(1, 2)

        found, ious = {}, []
        losses = (("loss_bbox", self.first_box_loss), ("loss_bbox_rf", self.box_loss))
        for (name, loss), told in zip(losses, self._distances(maps, priors), strict=True):
            boxes = self.box_coder.decode(place, told).detach()
            ious.append(torch.where(matches.positive, overlap(boxes, wanted).iou.clamp(min=LEAST), 0.0))
            each = box_losses(loss, self.box_coder, place, told, wanted)
            found[name] = averaged(each, ious[-1], shared_count(ious[-1]))
        classes = self.class_loss(logits, labels, ious[-1])
        count = shared_count(matches.positive)
        return {"loss_cls": averaged(classes, torch.ones_like(classes), count), **found}

    # Inference: a score is the IoU of its corrected box already.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.priors(maps, sizes)
        _, refined = self._distances(maps, priors)
        boxes = self.box_coder.decode(centres(priors.boxes).repeat(1, 2), refined)
        return Candidates(self.logits(maps).sigmoid(), boxes, priors.counts)

    def _distances(self, maps: Maps, priors: Priors) -> tuple[Tensor, Tensor]:
        """[B, N, 4] in pixels: at first, and corrected."""
        first = exponential(maps.flat("reg", 4)) * (REACH * priors.strides[:, None])
        return first, exponential(maps.flat("refined", 4)) * first.detach()
