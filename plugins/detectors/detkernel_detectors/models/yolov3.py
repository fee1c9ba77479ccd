"""YOLOv3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import Assigner, Backbone, BoxLoss, CellCoder, ClassLoss, Head, Neck
from detkernel_detection.parts import RARE, Output, Priors

from detkernel_detectors.assigners.grid import GridAssigner
from detkernel_detectors.backbones import Darknet
from detkernel_detectors.coders.yolo import YoloCoder
from detkernel_detectors.heads import YoloHead
from detkernel_detectors.losses.boxes import SquaredError
from detkernel_detectors.losses.classes import CrossEntropy
from detkernel_detectors.models.dense import Candidates, DenseDetector, KeyMap, Maps, wanted_of
from detkernel_detectors.necks import YoloNeck
from detkernel_detectors.priors import GridAnchors, grid_anchors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn
else:
    from detkernel_detection import lazy_torch as torch

LEVELS = 3
"""Of what is published."""


@plugin
class Yolov3(DenseDetector):
    """YOLOv3 (Redmon and Farhadi 2018): anchors in the cells of a grid, with an objectness beside the classes.

    https://arxiv.org/abs/1804.02767, as MMDetection trains it: losses are sums over the images of a process, so that
    the learning rate goes with the processes, and not with the images of each.
    """

    key_map: ClassVar[KeyMap] = tuple(  # MMDetection's levels are coarse to fine
        (rf"bbox_head\.convs_{part}\.{level}\.", f"head.{part}.{LEVELS - 1 - level}.")
        for part in ("bridge", "pred")
        for level in range(LEVELS)
    )

    backbone: Backbone = option(factory=Darknet, help="what makes feature maps of an image")
    neck: Neck = option(factory=YoloNeck, help="what makes a pyramid of the backbone's maps")
    head: Head = option(factory=YoloHead, help="what predicts from the pyramid")
    anchors: GridAnchors = option(factory=GridAnchors, help="what boxes are predicted from")
    assigner: Assigner = option(factory=GridAssigner, help="which anchors are to predict which objects")
    box_coder: CellCoder = option(factory=YoloCoder, help="how a box is told, relative to its anchor and cell")
    class_loss: ClassLoss = option(factory=CrossEntropy, help="of the classes of positive anchors")
    objectness_weight: float = option(
        default=1.0, at_least=0, help="factor of the cross-entropy of the objectness of all anchors but ignored ones"
    )
    centre_weight: float = option(
        default=2.0, at_least=0, help="factor of the cross-entropy of where in their cells the centres are"
    )
    size_loss: BoxLoss = option(
        factory=lambda: SquaredError(weight=2.0),
        help="of the logarithms of the sides of positive anchors' boxes; one that compares numbers, such as l1",
    )
    image_mean: tuple[float, float, float] = option(default=(0.0, 0.0, 0.0), help="of R, G and B, on 0..255")
    image_std: tuple[float, float, float] = option(
        default=(255.0, 255.0, 255.0), above=0, help="of R, G and B, on 0..255"
    )
    score_thresh: float = option(
        default=0.05, at_least=0, at_most=1, help="probability of a class, given an object, above which it is detected"
    )
    objectness_thresh: float = option(
        default=0.005, at_least=0, at_most=1, help="objectness from which an anchor detects anything"
    )
    nms_thresh: float = option(default=0.45, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    candidates: int = option(
        default=1000, at_least=1, help="detections of all levels before NMS, by falling probability of the class"
    )

    # Every anchor has four numbers of its box, a logit of whether there is an object, and one for each class.

    def outputs(self, classes: int) -> list[Output]:
        return [Output("pred", self.per_place * (5 + classes), "cls")]

    @property
    def per_place(self) -> int:
        return self.anchors.per_place

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {"head.pred.*": ClassOutput(before=self.per_place, skip=5)}

    def heads(self, channels: Any, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        if len(self.anchors.sizes) != len(strides):
            has = f"the neck has {len(strides)} levels, and these are for {len(self.anchors.sizes)}"
            raise wrong(self, "anchors", f"sizes: {has}")
        if self.size_loss.compares != "deltas":
            used = type(self.size_loss).__qualname__
            raise wrong(self, "size_loss", f"{used} compares boxes, not numbers of the box coder, as l1 does")
        made = super().heads(channels, strides, classes)
        self._begin(made["head"].get_submodule("pred"), strides)
        return made

    def _begin(self, predicting: nn.Module, strides: Sequence[int]) -> None:
        """Biases by which each level at first expects eight objects in a map of 608 pixels, and each class is rare."""
        convs = [module for module in predicting.modules() if isinstance(module, torch.nn.Conv2d)]
        for conv, stride in zip(convs, strides, strict=False):  # one conv for all levels: as for the finest
            cells = (608 / stride) ** 2
            rows = torch.zeros(self.per_place, conv.out_channels // self.per_place)
            rows[:, 4], rows[:, 5:] = -math.log(max(cells / 8 - 1, 1)), RARE
            if conv.bias is not None:
                conv.bias.data.copy_(rows.flatten())

    # Training: a box is told by the best anchor in a cell with its centre. Classes and boxes are learned from these,
    # the objectness also from all that overlap little. Sums are not divided.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, (told, objectness, logits) = self._priors(maps), self._told(maps)
        matches = self.assigner.assign(priors, targets)
        labels, boxes = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
        wanted = self.box_coder.encode(priors.boxes, boxes, priors.strides)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        positive = matches.positive.to(objectness.dtype)
        known = (matches.positive | matches.negative).to(objectness.dtype)
        centres = entropy(told[..., :2], wanted[..., :2], reduction="none").sum(-1)
        return {
            "loss_cls": (self.class_loss(logits, labels) * positive).sum(),
            "loss_conf": self.objectness_weight * (entropy(objectness, positive, reduction="none") * known).sum(),
            "loss_xy": self.centre_weight * (centres * positive).sum(),
            "loss_wh": (self.size_loss(told[..., 2:], wanted[..., 2:]) * positive).sum(),
        }

    # Inference: the best pairs of anchor and class of all levels together, by the class alone; their scores are its
    # probability times the objectness. Boxes are clipped last.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors, (told, objectness, logits) = self._priors(maps), self._told(maps)
        there = objectness.sigmoid()
        scores = torch.where((there >= self.objectness_thresh)[..., None], logits.sigmoid(), 0.0)
        numbers = torch.cat([told[..., :2].sigmoid(), told[..., 2:]], -1)
        boxes = self.box_coder.decode(priors.boxes, numbers, priors.strides)
        return Candidates(scores, boxes, (len(priors.boxes),), factor=there, clipped=False)

    def _priors(self, maps: Maps) -> Priors:
        """The anchors. Those in the padding of an image are background, too."""
        return grid_anchors(self.anchors, maps.features, maps.strides, maps.inside(None, 1))

    def _told(self, maps: Maps) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of boxes [B, N, 4], with logits of the centres; objectness [B, N]; logits of classes [B, N, C]."""
        flat = maps.flat("pred", maps.outputs["pred"][0].shape[1] // self.per_place)
        return flat[..., :4], flat[..., 4], flat[..., 5:]
