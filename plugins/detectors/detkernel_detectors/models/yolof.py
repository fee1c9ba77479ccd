"""YOLOF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import BoxCoder, BoxLoss, ClassLoss, DynamicAssigner, Head, Neck
from detkernel_detection.parts import RARE, Matches, Output, Predicted, Priors

from detkernel_detectors.assigners.uniform import UniformAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import UnequalTowers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import AnchorDetector, Candidates, KeyMap, Maps, box_losses, wanted_of
from detkernel_detectors.necks import DilatedEncoder
from detkernel_detectors.priors import Anchors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Yolof(AnchorDetector):
    """You Only Look One-level Feature (Chen et al. 2021): no pyramid, but one map, of stride 32.

    https://arxiv.org/abs/2103.09460. What a pyramid is good for is less that it joins levels than that it parts objects
    by their sizes. Here a neck of dilated convolutions sees all sizes, and a matching of its own is fair to all.
    """

    key_map: ClassVar[KeyMap] = (
        (r"neck\.lateral_conv\.", "neck.lateral."),
        (r"neck\.fpn_conv\.", "neck.output."),
        (r"neck\.fpn_norm\.", "neck.output_norm."),
        (r"neck\.dilated_encoder_blocks\.", "neck.blocks."),
        (r"bbox_head\.cls_subnet\.(\d+)\.conv\.", r"head.cls_tower.\1.conv."),
        (r"bbox_head\.cls_subnet\.(\d+)\.bn\.", r"head.cls_tower.\1.norm."),
        (r"bbox_head\.bbox_subnet\.(\d+)\.conv\.", r"head.reg_tower.\1.conv."),
        (r"bbox_head\.bbox_subnet\.(\d+)\.bn\.", r"head.reg_tower.\1.norm."),
        (r"bbox_head\.cls_score\.", "head.cls."),
        (r"bbox_head\.bbox_pred\.", "head.reg."),
        (r"bbox_head\.object_pred\.", "head.objectness."),
    )

    neck: Neck = option(factory=DilatedEncoder, help="what makes the map that all is predicted from")
    head: Head = option(factory=UnequalTowers, help="what predicts from it")
    anchors: Anchors = option(
        factory=lambda: Anchors(scales=[1.0, 2.0, 4.0, 8.0, 16.0], ratios=[1.0]), help="squares of 32 to 512 pixels"
    )
    assigner: DynamicAssigner = option(factory=UniformAssigner, help="which anchors are to predict which objects")
    box_coder: BoxCoder = option(
        factory=lambda: DeltaCoder(largest_shift=32.0, bound_below=False), help="how a box is told, from its anchor"
    )
    class_loss: ClassLoss = option(factory=Focal, help="of the classes of all anchors that are not ignored")
    box_loss: BoxLoss = option(factory=Giou, help="of the boxes of all pairs of an anchor and an object")
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")

    # Every anchor has a logit for each class, four numbers for a box, and, from the tower for boxes, a logit of any
    # object. That one is learned through the classes alone: a score is the product of both probabilities, whose logit
    # is c + o - ln(1 + e^c + e^o) = c - ln(1 + e^(ln(1 + e^c) - o)) (section 4.4).

    def outputs(self, classes: int) -> list[Output]:
        return [
            Output("cls", self.per_place * classes, "cls", bias=RARE),
            Output("reg", self.per_place * 4, "reg"),
            Output("objectness", self.per_place, "reg"),
        ]

    def logits(self, maps: Maps) -> Tensor:
        return of_both(super().logits(maps), maps.flat("objectness", 1))

    # Training: an object is learned by the anchors whose boxes are nearest to it and by the nearest anchors, where they
    # overlap it by 0.15. The box of an anchor is learned once for each pair that it is in.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits, deltas = self.priors(maps, sizes), self.logits(maps), maps.flat("reg", 4)
        boxes = self.box_coder.decode(priors.boxes, deltas).detach()
        predicted = Predicted(logits.detach().sigmoid(), boxes, logits.detach())
        matches = self.assigner.assign(priors, targets, predicted)
        count = shared_count(matches.positive.sum(1).clamp(min=1))  # of each image one at least

        labels, _ = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
        classes = self.class_loss(logits, labels, matches.quality)
        return {
            "loss_cls": averaged(classes, matches.positive | matches.negative, count),
            "loss_bbox": self._box_loss(priors, deltas, matches, targets, count),
        }

    def _box_loss(self, priors: Priors, deltas: Tensor, matches: Matches, targets: Targets, count: Tensor) -> Tensor:
        if matches.pairs is None:
            _, wanted = wanted_of(matches, targets, priors.boxes, 0)
            boxes = box_losses(self.box_loss, self.box_coder, priors.boxes, deltas, wanted)
            return averaged(boxes, matches.positive, count)
        valid, places = matches.pairs >= 0, matches.pairs.clamp(min=0)  # [B, M, K]
        anchors = priors.boxes[places]  # [B, M, K, 4]
        told = deltas.gather(1, places.flatten(1)[..., None].expand(-1, -1, 4)).view_as(anchors)
        wanted = torch.where(valid[..., None], targets.boxes[:, :, None], anchors)
        return averaged(box_losses(self.box_loss, self.box_coder, anchors, told, wanted), valid, count)

    # Inference: the best (anchor, class) pairs, then NMS.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.priors(maps, sizes)
        boxes = self.box_coder.decode(priors.boxes, maps.flat("reg", 4))
        return Candidates(self.logits(maps).sigmoid(), boxes, priors.counts)


def of_both(one: Tensor, other: Tensor) -> Tensor:
    """The logit of the product of the probabilities of two logits, which no logit makes infinite."""
    softplus = torch.nn.functional.softplus
    return one - softplus(softplus(one) - other)
