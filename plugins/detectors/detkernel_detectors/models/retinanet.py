"""RetinaNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss, ClassLoss
from detkernel_detection.parts import Output, Priors

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.losses.boxes import L1
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import Candidates, DenseDetector, Maps
from detkernel_detectors.priors import Anchors, anchors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Retinanet(DenseDetector):
    """RetinaNet (Lin et al. 2017): nine anchors at every place, and a loss that easy background hardly adds to.

    https://arxiv.org/abs/1708.02002, as MMDetection trains it: the losses are divided by the positive anchors of the
    batch.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = ((r"bbox_head\.retina_(cls|reg)\.", r"head.\1."),)

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
        shapes = len(self.anchors.sides)
        return [Output("cls", shapes * classes, "cls", prior=0.01), Output("reg", shapes * 4, "reg")]

    def class_outputs(self, classes: int) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        output = ClassOutput(before=len(self.anchors.sides))
        return {"head.cls.weight": output, "head.cls.bias": output}

    # Training: an anchor that overlaps an object by 0.5 is to find it; one below 0.4 is background.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None) -> dict[str, Tensor]:
        priors = self._anchors(maps, sizes)
        logits, deltas = self._logits(maps), maps.flat("reg", 4)
        matches = self.assigner.assign(priors, targets)
        count = shared_count(matches.positive.sum(1).clamp(min=1))  # of each image one at least

        labels = torch.where(matches.positive, targets.labels.gather(1, matches.matched), logits.shape[-1])
        classes = self.class_loss(logits, labels)

        wanted = targets.boxes.gather(1, matches.matched[..., None].expand(-1, -1, 4))
        wanted = torch.where(matches.positive[..., None], wanted, priors.boxes)  # any box that has an extent
        if self.box_loss.compares == "deltas":
            boxes = self.box_loss(deltas, self.box_coder.encode(priors.boxes, wanted))
        else:
            boxes = self.box_loss(self.box_coder.decode(priors.boxes, deltas), wanted)
        return {
            "loss_cls": averaged(classes, matches.positive | matches.negative, count),
            "loss_bbox": averaged(boxes, matches.positive, count),
        }

    # Inference: the best (anchor, class) pairs of each level, then NMS.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self._anchors(maps, sizes)
        boxes = self.box_coder.decode(priors.boxes, maps.flat("reg", 4))
        return Candidates(self._logits(maps).sigmoid(), boxes, priors.counts)

    def _anchors(self, maps: Maps, sizes: Tensor | None) -> Priors:
        return anchors(self.anchors, maps.features, maps.strides, maps.inside(sizes, self.size_divisible))

    def _logits(self, maps: Maps) -> Tensor:
        """[B, N, C]."""
        channels = maps.outputs["cls"][0].shape[1]
        return maps.flat("cls", channels // len(self.anchors.sides))
