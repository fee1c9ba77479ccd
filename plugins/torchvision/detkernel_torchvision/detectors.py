"""Builds torchvision's detectors from the options of their plugins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from detkernel import Run, wrong
from detkernel_detection import torchvision_weights
from detkernel_detection.normalize import Normalize
from detkernel_detection.weights import load_into
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_large, vgg
from torchvision.models.detection import _utils
from torchvision.models.detection import faster_rcnn as frcnn
from torchvision.models.detection import keypoint_rcnn as krcnn
from torchvision.models.detection import mask_rcnn as mrcnn
from torchvision.models.detection import ssd as ssds
from torchvision.models.detection import ssdlite as ssdlites
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from detkernel_torchvision.adapter import Adapter
from detkernel_torchvision.necks import Pyramid, pyramid
from detkernel_torchvision.norms import norm_layer
from detkernel_torchvision.outputs import class_outputs

if TYPE_CHECKING:
    from detkernel_torchvision import models

SAME_NAME = (
    "rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test",
    "rpn_nms_thresh", "rpn_fg_iou_thresh", "rpn_bg_iou_thresh", "rpn_batch_size_per_image", "rpn_positive_fraction",
    "rpn_score_thresh", "box_score_thresh", "box_nms_thresh", "box_detections_per_img", "box_fg_iou_thresh",
    "box_bg_iou_thresh", "box_batch_size_per_image", "box_positive_fraction", "bbox_reg_weights", "score_thresh",
    "nms_thresh", "detections_per_img", "topk_candidates", "fg_iou_thresh", "bg_iou_thresh", "center_sampling_radius",
    "iou_thresh", "positive_fraction",
)  # fmt: skip
"""Options that torchvision's classes take under the same name."""


def adapted(options: models.TorchvisionDetector, inner: nn.Module, run: Run) -> Adapter:
    """The detector behind the interface, for the classes of the data."""
    normalize = Normalize(options.image_mean, options.image_std, getattr(options, "size_divisible", 1))
    model = Adapter(
        inner,
        run.classes,
        background=options.background,
        normalize=normalize,
        max_detections=options._max_detections(),
    )
    model.class_outputs = class_outputs(inner, options.background)
    model.mask_threshold = getattr(options, "mask_threshold", model.mask_threshold)
    return model


def load(options: models.TorchvisionDetector, model: Adapter, run: Run) -> None:
    """Load the weights asked for."""
    if options.weights is None:
        return
    weights = torchvision_weights.find(options, options.builders, options.weights)
    loaded = load_into(model, weights, run.classes, given=options.weights_classes)
    run.log.log(logging.WARNING if loaded.surprising else logging.INFO, "loaded %s", loaded.text)


def faster_rcnn(options: models.FasterRcnn, num_classes: int) -> nn.Module:
    neck = pyramid(options, "pool", finest=4)
    model: nn.Module = frcnn.FasterRCNN(neck, num_classes, **_rcnn_parts(options, neck))
    return model


def mask_rcnn(options: models.MaskRcnn, num_classes: int) -> nn.Module:
    neck = pyramid(options, "pool", finest=4)
    head = mrcnn.MaskRCNNHeads(
        neck.out_channels, [256] * 4, 1, norm_layer=norm_layer(options.mask_norm) if options.mask_norm else None
    )
    roi_pool = _roi_pool(options, neck, 14)
    parts = _rcnn_parts(options, neck)
    model: nn.Module = mrcnn.MaskRCNN(neck, num_classes, mask_roi_pool=roi_pool, mask_head=head, **parts)
    return model


def keypoint_rcnn(options: models.KeypointRcnn, num_classes: int, keypoints: int) -> nn.Module:
    neck = pyramid(options, "pool", finest=4)
    parts = _rcnn_parts(options, neck)
    roi_pool = _roi_pool(options, neck, 14)
    predictor = _KeypointPredictor(512, keypoints)
    model: nn.Module = krcnn.KeypointRCNN(
        neck, num_classes, keypoint_predictor=predictor, keypoint_roi_pool=roi_pool, **parts
    )
    for name in ("keypoint_head", "keypoint_predictor"):  # torchvision's loss calls .view on what they give
        model.roi_heads.get_submodule(name).channels_last = False  # type: ignore[union-attr]
    return model


class _KeypointPredictor(krcnn.KeypointRCNNPredictor):  # type: ignore[misc]
    """torchvision's loss takes a view of the heat maps, which channels-last weights would not allow."""

    def forward(self, x: Tensor) -> Tensor:
        heat_maps: Tensor = super().forward(x).contiguous()
        return heat_maps


def retinanet(options: models.Retinanet, num_classes: int) -> nn.Module:
    neck = pyramid(options, options.extra_levels, finest=8)
    sizes = [[int(4 * stride * 2 ** (part / 3)) for part in range(3)] for stride in neck.strides]
    anchors = _anchors(options, neck, sizes, options.aspect_ratios)
    norm = norm_layer(options.head_norm) if options.head_norm else None
    head = RetinaNetHead(neck.out_channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
    head.regression_head._loss_type = options.box_loss
    model: nn.Module = RetinaNet(neck, num_classes, anchor_generator=anchors, head=head, **_same_name(options))
    return model


def fcos(options: models.Fcos, num_classes: int) -> nn.Module:
    neck = pyramid(options, "p6p7", finest=8)
    anchors = AnchorGenerator(tuple((stride,) for stride in neck.strides), ((1.0,),) * len(neck.strides))
    head = FCOSHead(neck.out_channels, 1, num_classes, options.head_convs)
    # torchvision starts at 0, before a ReLU: where no output is positive, none ever gets a gradient. The paper's exp
    # starts at 1, one stride to every side.
    nn.init.ones_(head.regression_head.bbox_reg.bias)
    model: nn.Module = FCOS(neck, num_classes, anchor_generator=anchors, head=head, **_same_name(options))
    return model


def ssd(options: models.Ssd, num_classes: int) -> nn.Module:
    trained = options.backbone_weights is not None
    layers = options.trainable_layers
    body = _vgg_features()
    if options.backbone_weights is not None:
        torchvision_weights.load_backbone(body.features, options, ["vgg16"], options.backbone_weights)
    large = options.size == 512
    backbone = ssds._vgg_extractor(body, large, (4 if trained else 5) if layers is None else layers)
    anchors = (
        DefaultBoxGenerator(
            [[2], [2, 3], [2, 3], [2, 3], [2, 3], [2], [2]],
            scales=[0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06],
            steps=[8, 16, 32, 64, 128, 256, 512],
        )
        if large
        else DefaultBoxGenerator(
            [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
            scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
            steps=[8, 16, 32, 64, 100, 300],
        )
    )
    side = (options.size, options.size)
    model: nn.Module = ssds.SSD(backbone, anchors, side, num_classes, **_same_name(options))
    return model


def _vgg_features() -> Any:
    """A VGG-16 without its classifier, whose 123 M parameters take seconds to make and are not used."""
    features = vgg.make_layers(vgg.cfgs["D"])
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return SimpleNamespace(features=features)


def ssdlite(options: models.Ssdlite, num_classes: int) -> nn.Module:
    trained = options.backbone_weights is not None
    norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    body = mobilenet_v3_large(weights=None, norm_layer=norm, reduced_tail=not trained)
    if options.backbone_weights is not None:
        torchvision_weights.load_backbone(body.features, options, ["mobilenet_v3_large"], options.backbone_weights)
    else:
        ssdlites._normal_init(body)
    backbone = ssdlites._mobilenet_extractor(body, options.trainable_layers, norm)
    anchors = DefaultBoxGenerator([[2, 3] for _ in range(6)], min_ratio=0.2, max_ratio=0.95)
    side = (options.size, options.size)
    channels = _utils.retrieve_out_channels(backbone, side)
    head = ssdlites.SSDLiteHead(channels, anchors.num_anchors_per_location(), num_classes, norm)
    model: nn.Module = ssds.SSD(backbone, anchors, side, num_classes, head=head, **_same_name(options))
    return model


def check_fixed(options: models.SsdDetector, sizes: Sequence[tuple[int, int]]) -> None:
    """SSD's anchors are made for images of one size."""
    side = options._side()
    for height, width in sizes:
        if (height, width) != (side, side):
            raise wrong(
                options,
                "size",
                f"it takes images of {side}x{side}, got one of {width}x{height}: end the loader's train_transforms "
                f"and val_transforms with {{use: resize, size: [{side}, {side}]}}",
            )


def keypoint_names(options: models.KeypointRcnn, run: Run) -> tuple[str, ...]:
    """Those of the data; none where it has none and `num_keypoints` is given."""
    for loader in run.loaders.values():
        if loader.dataset.keypoint_names:
            return tuple(loader.dataset.keypoint_names)
    if options.num_keypoints is not None:
        return ()
    raise wrong(
        options, "num_keypoints", "the data has no keypoints; use data that has, such as COCO's person_keypoints"
    )


def _same_name(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in SAME_NAME if hasattr(options, name)}


def _rcnn_parts(options: models.FasterRcnn, neck: Pyramid) -> dict[str, Any]:
    anchors = _anchors(options, neck, [[8 * stride] for stride in neck.strides], options.aspect_ratios)
    parts = {
        **_same_name(options),
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(neck.out_channels, anchors.num_anchors_per_location()[0], options.rpn_convs),
        "box_roi_pool": _roi_pool(options, neck, 7),
        "box_head": frcnn.TwoMLPHead(neck.out_channels * 49, 1024),
    }
    if options.box_head == "four_conv_fc":
        shape = (neck.out_channels, 7, 7)
        parts["box_head"] = frcnn.FastRCNNConvFCHead(shape, [256] * 4, [1024], norm_layer=nn.BatchNorm2d)
    return parts


def _roi_pool(options: models.FasterRcnn, neck: Pyramid, side: int) -> nn.Module:
    """From every level but the last, which is only for proposals."""
    names = [str(number) for number in range(len(neck.strides) - 1)]
    pool: nn.Module = MultiScaleRoIAlign(names, side, options.roi_sampling_ratio)
    return pool


def _anchors(options: Any, neck: Pyramid, sizes: Sequence[Sequence[int]], ratios: Sequence[float]) -> AnchorGenerator:
    given = options.anchor_sizes or sizes
    if len(given) != len(neck.strides):
        message = (
            f"expected a list for each of the {len(neck.strides)} levels (strides {neck.strides}), got {len(given)}"
        )
        raise wrong(options, "anchor_sizes", message)
    if len({len(level) for level in given}) > 1:
        raise wrong(options, "anchor_sizes", "expected as many sizes at each level: they share a head")
    return AnchorGenerator(tuple(map(tuple, given)), (tuple(ratios),) * len(given))
