"""Faster R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.losses.boxes import L1
from detkernel_detectors.models.dense import KeyMap, Maps
from detkernel_detectors.models.rcnn import Drawn, Rcnn

if TYPE_CHECKING:
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn


@plugin
class FasterRcnn(Rcnn):
    """Faster R-CNN (Ren et al. 2015) with a feature pyramid (Lin et al. 2017): proposals, and what is in them.

    https://arxiv.org/abs/1506.01497, https://arxiv.org/abs/1612.03144. Between the two stages lies the one place where
    the device is asked: NMS of the proposals.
    """

    key_map: ClassVar[KeyMap] = (
        *Rcnn.key_map,
        (r"roi_head\.bbox_head\.shared_convs\.(\d+)\.conv\.", r"box_head.convs.\1.conv."),
        (r"roi_head\.bbox_head\.shared_convs\.(\d+)\.[bg]n\.", r"box_head.convs.\1.norm."),
        (r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.", r"box_head.fcs.\1."),
        (r"roi_head\.bbox_head\.fc_(cls|reg)\.", r"box_head.\1."),
    )

    torchvision_builders: ClassVar[tuple[str, ...]] = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")

    assigner: Assigner = option(
        factory=lambda: MaxIouAssigner(positive=0.5, negative=0.5, best=None),
        help="which proposals are to find which objects",
    )
    box_coder: BoxCoder = option(
        factory=lambda: DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2)), help="how a box is told, relative to its proposal"
    )
    box_loss: BoxLoss = option(factory=L1, help="of the boxes of positive proposals")

    # What is pooled of a box goes through two layers, and gives logits and a box for every class.

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        self.check_assigners(assigner=self.assigner)
        box_head = self.box_head.build(channels, classes + 1, classes)
        return {"head": self.rpn_head(channels), "box_head": box_head}

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {"box_head.cls.*": ClassOutput(background="last"), "box_head.reg.*": ClassOutput(after=4)}

    # Training: the proposals of the first stage, with the objects themselves, are told apart and made to fit.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        return self.both_stages(maps, targets, sizes, heads)[0]

    def both_stages(
        self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any
    ) -> tuple[dict[str, Tensor], Drawn]:
        """The losses, and the boxes that the second stage learned from."""
        losses, proposals = self.first_stage(maps, targets, sizes)
        found = self.draw(self.assigner, proposals.boxes, proposals.valid, targets, len(heads.classes))
        logits, deltas = self.read(heads.box_head, maps, found.boxes)
        return {**losses, **self.box_losses(found, logits, deltas, self.box_coder, self.box_loss)}, found

    # Inference: each proposal has a box for every class.

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any) -> Predictions:
        proposals = self.proposed(maps, sizes)
        logits, deltas = self.read(heads.box_head, maps, proposals.boxes)
        boxes = self.box_coder.decode(proposals.boxes[:, :, None], deltas)
        return self.detected(logits, boxes, proposals.valid, sizes)
