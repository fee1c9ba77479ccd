"""RetinaNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss, ClassLoss
from detkernel_detection.parts import RARE, Output

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.losses.boxes import L1
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import (
    DENSE_TORCHVISION,
    AnchorDetector,
    Candidates,
    KeyMap,
    Maps,
    box_losses,
    wanted_of,
)
from detkernel_detectors.priors import Anchors

if TYPE_CHECKING:
    from detkernel_detection.structures import Targets
    from torch import Tensor


@plugin
class Retinanet(AnchorDetector):
    """RetinaNet (Lin et al. 2017): nine anchors at every place, and a loss that easy background hardly adds to.

    https://arxiv.org/abs/1708.02002, as MMDetection trains it: the losses are divided by the positive anchors of the
    batch.
    """

    key_map: ClassVar[KeyMap] = ((r"bbox_head\.retina_(cls|reg)\.", r"head.\1."),)

    torchvision_key_map: ClassVar[KeyMap] = (
        *DENSE_TORCHVISION,
        (r"head\.classification_head\.cls_logits\.", "head.cls."),
        (r"head\.regression_head\.bbox_reg\.", "head.reg."),
    )
    torchvision_builders: ClassVar[tuple[str, ...]] = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")

    anchors: Anchors = option(
        factory=lambda: Anchors(scales=[4.0], octaves=3), help="three scales and three shapes at every place"
    )
    assigner: Assigner = option(factory=MaxIouAssigner, help="which anchors are to predict which objects")
    box_coder: BoxCoder = option(factory=DeltaCoder, help="how a box is told, relative to its anchor")
    class_loss: ClassLoss = option(factory=Focal, help="of the classes of all anchors that are not ignored")
    box_loss: BoxLoss = option(factory=L1, help="of the boxes of positive anchors")

    # Every anchor has a logit for each class and four numbers for a box. Each class begins at a probability of 0.01,
    # since background would else outweigh everything at first.

    def outputs(self, classes: int) -> list[Output]:
        return [
            Output("cls", self.per_place * classes, "cls", bias=RARE),
            Output("reg", self.per_place * 4, "reg"),
        ]

    # Training: an anchor that overlaps an object by 0.5 is to find it; one below 0.4 is background.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors = self.priors(maps, sizes)
        logits, deltas = self.logits(maps), maps.flat("reg", 4)
        matches = self.assigner.assign(priors, targets)
        count = shared_count(matches.positive.sum(1).clamp(min=1))  # of each image one at least

        labels, wanted = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
        classes = self.class_loss(logits, labels)
        boxes = box_losses(self.box_loss, self.box_coder, priors.boxes, deltas, wanted)
        return {
            "loss_cls": averaged(classes, matches.positive | matches.negative, count),
            "loss_bbox": averaged(boxes, matches.positive, count),
        }

    # Inference: the best (anchor, class) pairs of each level, then NMS.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.priors(maps, sizes)
        boxes = self.box_coder.decode(priors.boxes, maps.flat("reg", 4))
        return Candidates(self.logits(maps).sigmoid(), boxes, priors.counts)
