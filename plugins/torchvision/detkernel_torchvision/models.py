"""torchvision's detectors. Options have the names of torchvision's arguments; the class count comes from the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import Run, option, plugin, state
from detkernel_detection import Backbone
from detkernel_detection.model_plugin import DetectorPlugin

from detkernel_torchvision.backbones import Norm, Resnet

if TYPE_CHECKING:
    from detkernel_detection import Batch
    from torch import nn

    from detkernel_torchvision.adapter import Adapter

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@plugin
class TorchvisionDetector(DetectorPlugin):
    """What all of them share: weights, and normalisation on the device."""

    builders: ClassVar[tuple[str, ...]] = ()
    """torchvision's functions whose published weights fit."""
    background: ClassVar[bool] = True
    """Whether label 0 is the background inside the model."""

    weights: str | None = option(
        default=None,
        help="weights of the whole detector: torchvision's by name, such as COCO_V1; a file; null: random. Outputs for "
        "classes are taken by class name, the others start at random",
    )
    weights_classes: Literal["same_order", "none"] | list[str] | None = option(
        default=None,
        help="classes of the weights, where the file does not say: a list of names in its order; same_order: as the "
        "data's; none: class outputs start at random",
    )
    image_mean: tuple[float, float, float] = option(default=IMAGENET_MEAN, help="of R, G and B, on 0..1")
    image_std: tuple[float, float, float] = option(default=IMAGENET_STD, above=0, help="of R, G and B, on 0..1")

    @property
    def loads_weights(self) -> bool:
        return self.weights is not None

    def build(self, run: Run) -> Adapter:
        from detkernel_torchvision import detectors

        return detectors.adapted(self, self._build(len(run.classes) + self.background), run)

    def load(self, run: Run, model: Any) -> None:
        from detkernel_torchvision import detectors

        detectors.load(self, model, run)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        return {"shapes": batch.sizes, "counts": batch.counts}

    def _build(self, num_classes: int) -> nn.Module:
        raise NotImplementedError

    def _max_detections(self) -> int:
        """How many detections an image it gives at most; evaluators compare their limits with it."""
        raise NotImplementedError


@plugin
class PyramidDetector(TorchvisionDetector):
    """What detectors on a feature pyramid share."""

    backbone: Backbone = option(factory=Resnet, help="what makes feature maps of an image")
    levels: list[int] | None = option(
        default=None, at_least=1, help="strides of the backbone's maps that are used; null: all the detector can use"
    )
    neck_channels: int = option(default=256, at_least=1, help="channels of the feature pyramid")
    neck_norm: Norm | None = option(default=None, help="normalisation in the pyramid; null: none")
    size_divisible: int = option(default=32, at_least=1, help="batches are padded to a multiple of this, in pixels")


@plugin
class FasterRcnn(PyramidDetector):
    """Faster R-CNN (Ren et al. 2015) with a feature pyramid."""

    builders: ClassVar[tuple[str, ...]] = (
        "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
    )  # fmt: skip

    anchor_sizes: list[list[int]] | None = option(
        default=None, at_least=1, help="sides of the anchors in pixels, a list for each level; null: 8 times its stride"
    )
    aspect_ratios: list[float] = option(factory=lambda: [0.5, 1.0, 2.0], above=0, help="height to width of the anchors")
    rpn_convs: int = option(default=1, at_least=1, help="convolutions in the proposal head; 2 in torchvision's v2")
    rpn_pre_nms_top_n_train: int = option(default=2000, at_least=1, help="proposals of a level before NMS, in training")
    rpn_pre_nms_top_n_test: int = option(default=1000, at_least=1, help="the same in validation")
    rpn_post_nms_top_n_train: int = option(default=2000, at_least=1, help="proposals after NMS, in training")
    rpn_post_nms_top_n_test: int = option(default=1000, at_least=1, help="the same in validation")
    rpn_nms_thresh: float = option(default=0.7, at_least=0, at_most=1, help="IoU above which a proposal is dropped")
    rpn_fg_iou_thresh: float = option(default=0.7, at_least=0, at_most=1, help="IoU from which an anchor is positive")
    rpn_bg_iou_thresh: float = option(default=0.3, at_least=0, at_most=1, help="IoU below which it is negative")
    rpn_batch_size_per_image: int = option(default=256, at_least=1, help="anchors sampled for the loss")
    rpn_positive_fraction: float = option(default=0.5, above=0, at_most=1, help="share of positive ones among them")
    rpn_score_thresh: float = option(default=0.0, at_least=0, at_most=1, help="objectness below which none is proposed")
    roi_sampling_ratio: int = option(default=2, at_least=0, help="samples per bin and axis of RoI align; 0: adaptive")
    box_head: Literal["two_fc", "four_conv_fc"] = option(
        default="two_fc", help="two layers of 1024, or torchvision's v2: four convolutions with batch norm, then one"
    )
    box_score_thresh: float = option(default=0.05, at_least=0, at_most=1, help="score below which nothing is detected")
    box_nms_thresh: float = option(default=0.5, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    box_detections_per_img: int = option(default=100, at_least=1, help="detections an image")
    box_fg_iou_thresh: float = option(default=0.5, at_least=0, at_most=1, help="IoU from which a proposal is positive")
    box_bg_iou_thresh: float = option(default=0.5, at_least=0, at_most=1, help="IoU below which it is negative")
    box_batch_size_per_image: int = option(default=512, at_least=1, help="proposals sampled for the loss")
    box_positive_fraction: float = option(default=0.25, above=0, at_most=1, help="share of positive ones among them")
    bbox_reg_weights: tuple[float, float, float, float] = option(
        default=(10.0, 10.0, 5.0, 5.0), above=0, help="weights of dx, dy, dw and dh in the box targets"
    )

    def _max_detections(self) -> int:
        return self.box_detections_per_img

    def _build(self, num_classes: int) -> nn.Module:
        from detkernel_torchvision import detectors

        return detectors.faster_rcnn(self, num_classes)


@plugin(needs=("masks",))
class MaskRcnn(FasterRcnn):
    """Mask R-CNN (He et al. 2017): boxes and masks. Needs data with segmentations."""

    builders: ClassVar[tuple[str, ...]] = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")

    mask_norm: Norm | None = option(default=None, help="normalisation in the mask head; batch in torchvision's v2")
    mask_threshold: float = option(default=0.5, above=0, below=1, help="probability from which a pixel is the object's")

    def _build(self, num_classes: int) -> nn.Module:
        from detkernel_torchvision import detectors

        return detectors.mask_rcnn(self, num_classes)


@plugin(needs=("keypoints",))
class KeypointRcnn(FasterRcnn):
    """Keypoint R-CNN (He et al. 2017): boxes and keypoints. Needs data with keypoints."""

    builders: ClassVar[tuple[str, ...]] = ("keypointrcnn_resnet50_fpn",)

    num_keypoints: int | None = option(default=None, at_least=1, help="keypoints of an object; null: as in the data")
    _found: int = state(default=17)

    def build(self, run: Run) -> Adapter:
        from detkernel_torchvision import detectors, outputs

        names = detectors.keypoint_names(self, run)
        self._found = self.num_keypoints or len(names)
        model = super().build(run)
        model.keypoint_outputs = outputs.keypoint_outputs()
        model.keypoint_names = names if len(names) == self._found else ()
        return model

    def _build(self, num_classes: int) -> nn.Module:
        from detkernel_torchvision import detectors

        return detectors.keypoint_rcnn(self, num_classes, self._found)


@plugin
class Retinanet(PyramidDetector):
    """RetinaNet (Lin et al. 2017): dense anchors and the focal loss."""

    builders: ClassVar[tuple[str, ...]] = ("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2")
    background: ClassVar[bool] = False

    anchor_sizes: list[list[int]] | None = option(
        default=None, at_least=1, help="sides of the anchors in pixels, a list for each level; null: 4, 5 and 6 strides"
    )
    aspect_ratios: list[float] = option(factory=lambda: [0.5, 1.0, 2.0], above=0, help="height to width of the anchors")
    extra_levels: Literal["p6p7", "p6p7_from_c5"] = option(
        default="p6p7", help="where the two coarsest levels come from: the pyramid, or the backbone (torchvision's v2)"
    )
    head_norm: Norm | None = option(default=None, help="normalisation in the heads; group in torchvision's v2")
    box_loss: Literal["l1", "giou"] = option(default="l1", help="loss of the boxes; giou in torchvision's v2")
    score_thresh: float = option(default=0.05, at_least=0, at_most=1, help="score below which nothing is detected")
    nms_thresh: float = option(default=0.5, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    detections_per_img: int = option(default=300, at_least=1, help="detections an image")
    topk_candidates: int = option(default=1000, at_least=1, help="detections of a level before NMS")
    fg_iou_thresh: float = option(default=0.5, at_least=0, at_most=1, help="IoU from which an anchor is positive")
    bg_iou_thresh: float = option(default=0.4, at_least=0, at_most=1, help="IoU below which it is negative")

    def _max_detections(self) -> int:
        return self.detections_per_img

    def _build(self, num_classes: int) -> nn.Module:
        from detkernel_torchvision import detectors

        return detectors.retinanet(self, num_classes)


@plugin
class Fcos(PyramidDetector):
    """FCOS (Tian et al. 2019): no anchors, with centre sampling and the GIoU loss."""

    builders: ClassVar[tuple[str, ...]] = ("fcos_resnet50_fpn",)
    background: ClassVar[bool] = False

    head_convs: int = option(default=4, at_least=1, help="convolutions in each of the two heads")
    center_sampling_radius: float = option(
        default=1.5, above=0, help="strides from an object's centre that are positive"
    )
    score_thresh: float = option(default=0.2, at_least=0, at_most=1, help="score below which nothing is detected")
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    detections_per_img: int = option(default=100, at_least=1, help="detections an image")
    topk_candidates: int = option(default=1000, at_least=1, help="detections of a level before NMS")

    def __attrs_post_init__(self) -> None:
        if self.neck_channels % 32:
            found = self.neck_channels
            raise ValueError(f"neck_channels: FCOS normalises in 32 groups: expected a multiple of 32, got {found}")

    def _max_detections(self) -> int:
        return self.detections_per_img

    def _build(self, num_classes: int) -> nn.Module:
        from detkernel_torchvision import detectors

        return detectors.fcos(self, num_classes)


@plugin
class SsdDetector(TorchvisionDetector):
    """What SSD and SSDlite share."""

    score_thresh: float = option(default=0.01, at_least=0, at_most=1, help="score below which nothing is detected")
    nms_thresh: float = option(default=0.45, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    detections_per_img: int = option(default=200, at_least=1, help="detections an image")
    topk_candidates: int = option(default=400, at_least=1, help="detections of a class before NMS")
    iou_thresh: float = option(default=0.5, at_least=0, at_most=1, help="IoU from which an anchor is positive")
    positive_fraction: float = option(default=0.25, above=0, below=1, help="share of positive anchors in the loss")
    backbone_weights: str | None = option(
        default=None, help="weights of the backbone: torchvision's by name; a file; null: random"
    )

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        from detkernel_torchvision import detectors

        detectors.check_fixed(self, sizes)

    def _max_detections(self) -> int:
        return self.detections_per_img

    def _side(self) -> int:
        raise NotImplementedError


@plugin
class Ssd(SsdDetector):
    """SSD (Liu et al. 2016) with a VGG-16. Images must be of its size: `{use: resize, size: [300, 300]}`."""

    builders: ClassVar[tuple[str, ...]] = ("ssd300_vgg16",)

    size: Literal[300, 512] = option(default=300, help="height and width of the images")
    trainable_layers: int | None = option(
        default=None, at_least=0, at_most=5, help="stages of the backbone trained; null: 4 with weights, else 5"
    )
    image_mean: tuple[float, float, float] = option(default=(0.48235, 0.45882, 0.40784), help="of R, G, B, on 0..1")
    image_std: tuple[float, float, float] = option(default=(1 / 255, 1 / 255, 1 / 255), above=0, help="the deviation")

    def _build(self, num_classes: int) -> nn.Module:
        from detkernel_torchvision import detectors

        return detectors.ssd(self, num_classes)

    def _side(self) -> int:
        return self.size


@plugin
class Ssdlite(SsdDetector):
    """SSDlite (Sandler et al. 2018) with a MobileNetV3. Images must be of its size: `{use: resize, size: ...}`."""

    builders: ClassVar[tuple[str, ...]] = ("ssdlite320_mobilenet_v3_large",)

    size: int = option(default=320, at_least=64, help="height and width of the images")
    trainable_layers: int = option(default=6, at_least=0, at_most=6, help="stages of the backbone trained")
    score_thresh: float = option(default=0.001, at_least=0, at_most=1, help="score below which nothing is detected")
    nms_thresh: float = option(default=0.55, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    detections_per_img: int = option(default=300, at_least=1, help="detections an image")
    topk_candidates: int = option(default=300, at_least=1, help="detections of a class before NMS")
    image_mean: tuple[float, float, float] = option(default=(0.5, 0.5, 0.5), help="of R, G and B, on 0..1")
    image_std: tuple[float, float, float] = option(default=(0.5, 0.5, 0.5), above=0, help="of R, G and B, on 0..1")

    def _build(self, num_classes: int) -> nn.Module:
        from detkernel_torchvision import detectors

        return detectors.ssdlite(self, num_classes)

    def _side(self) -> int:
        return self.size
