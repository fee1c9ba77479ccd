"""ATSS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss, ClassLoss, Head, Neck
from detkernel_detection.boxes import centres
from detkernel_detection.parts import RARE, Output

from detkernel_detectors.assigners.atss import AtssAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.coders.distance import centreness, distances
from detkernel_detectors.heads import Towers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import Focal
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
class Atss(AnchorDetector):
    """ATSS (Zhang et al. 2020): one anchor at every place, and a threshold of its own for each object.

    https://arxiv.org/abs/1912.02424: what separates RetinaNet from FCOS is which anchors are positive.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.atss_centerness\.", "head.centreness."),
        (r"bbox_head\.atss_(cls|reg)\.", r"head.\1."),
    )

    neck: Neck = option(factory=lambda: Fpn(extra_from="output"), help="what makes a pyramid of the backbone's maps")
    head: Head = option(factory=lambda: Towers(norm="group"), help="what predicts from the pyramid")
    assigner: Assigner = option(factory=AtssAssigner, help="which anchors are to predict which objects")
    box_coder: BoxCoder = option(
        factory=lambda: DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2)), help="how a box is told, relative to its anchor"
    )
    class_loss: ClassLoss = option(factory=Focal, help="of the classes of all anchors")
    box_loss: BoxLoss = option(
        factory=lambda: Giou(weight=2.0), help="of the boxes of positive anchors, weighted by their centre-ness"
    )
    centreness_weight: float = option(default=1.0, at_least=0, help="factor of the loss of the centre-ness")
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")

    # Every anchor has a logit for each class, four numbers for a box with a learned factor for each level, and a logit
    # of how central it is in its object.

    def outputs(self, classes: int) -> list[Output]:
        return [
            Output("cls", self.per_place * classes, "cls", bias=RARE),
            Output("reg", self.per_place * 4, "reg", scaled=True),
            Output("centreness", self.per_place, "reg"),
        ]

    # Training: an object takes, of its nearest anchors, those that overlap it more than most of them do.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits, deltas = self.priors(maps, sizes), self.logits(maps), maps.flat("reg", 4)
        matches = self.assigner.assign(priors, targets)
        labels, wanted = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
        central = centreness(distances(centres(priors.boxes), wanted))

        boxes = box_losses(self.box_loss, self.box_coder, priors.boxes, deltas, wanted)
        weights = torch.where(matches.positive, central, 0.0)

        logit = maps.flat("centreness", 1)[..., 0]
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logit, central, reduction="none")
        count = shared_count(matches.positive.sum(1).clamp(min=1))  # of each image one at least
        return {
            "loss_cls": averaged(self.class_loss(logits, labels), matches.positive | matches.negative, count),
            "loss_bbox": averaged(boxes, weights, shared_count(weights)),
            "loss_centerness": self.centreness_weight * averaged(entropy, matches.positive, count),
        }

    # Inference: anchors are chosen by their class alone; the centre-ness then lowers their scores.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.priors(maps, sizes)
        boxes = self.box_coder.decode(priors.boxes, maps.flat("reg", 4))
        central = maps.flat("centreness", 1)[..., 0].sigmoid()
        return Candidates(self.logits(maps).sigmoid(), boxes, priors.counts, central)
