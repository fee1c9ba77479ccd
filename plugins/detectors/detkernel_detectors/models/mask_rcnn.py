"""Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.models.dense import KeyMap, Maps
from detkernel_detectors.models.faster_rcnn import FasterRcnn
from detkernel_detectors.models.rcnn import MaskedRcnn

if TYPE_CHECKING:
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn


@plugin
class MaskRcnn(MaskedRcnn, FasterRcnn):
    """Mask R-CNN (He et al. 2017): Faster R-CNN that also says which pixels of a box are the object's. Needs masks.

    https://arxiv.org/abs/1703.06870, as MMDetection trains it.
    """

    key_map: ClassVar[KeyMap] = (
        *FasterRcnn.key_map,
        (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.", r"mask_head.convs.\1.conv."),
        (r"roi_head\.mask_head\.convs\.(\d+)\.[bg]n\.", r"mask_head.convs.\1.norm."),
        (r"roi_head\.mask_head\.upsample\.", "mask_head.upsample."),
        (r"roi_head\.mask_head\.conv_logits\.", "mask_head.logits."),
    )

    torchvision_key_map: ClassVar[KeyMap] = (
        *FasterRcnn.torchvision_key_map,
        (r"roi_heads\.mask_head\.(\d+)\.0\.", r"mask_head.convs.\1.conv."),
        (r"roi_heads\.mask_head\.(\d+)\.1\.", r"mask_head.convs.\1.norm."),
        *((rf"roi_heads\.mask_head\.mask_fcn{layer + 1}\.", f"mask_head.convs.{layer}.conv.") for layer in range(4)),
        (r"roi_heads\.mask_predictor\.conv5_mask\.", "mask_head.upsample."),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "mask_head.logits."),
    )
    torchvision_builders: ClassVar[tuple[str, ...]] = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")

    assigner: Assigner = option(
        factory=lambda: MaxIouAssigner(positive=0.5, negative=0.5, best=0.5),
        help="which proposals are to find which objects",
    )

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        return {**super().heads(channels, strides, classes), "mask_head": self.mask_head.build(channels, classes)}

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {**super().class_outputs(), "mask_head.logits.*": ClassOutput()}

    # Training: the masks of the positive ones of the same boxes.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        losses, found = self.both_stages(maps, targets, sizes, heads)
        return {**losses, "loss_mask": self.mask_losses(found, maps, targets, sizes, heads.mask_head)}

    # Inference: the masks of what is detected, in the boxes that it is detected with.

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any) -> Predictions:
        return self.with_masks(super().predictions(maps, sizes, heads), maps, [heads.mask_head])
