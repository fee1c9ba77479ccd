"""SSD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import Assigner, Backbone, BoxCoder, BoxLoss, ClassLoss, Head, Neck
from detkernel_detection.parts import Output, Priors

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.backbones import Vgg
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import LevelConvs
from detkernel_detectors.losses.boxes import SmoothL1
from detkernel_detectors.losses.classes import Softmax
from detkernel_detectors.losses.sums import averaged, hardest, shared_count
from detkernel_detectors.models.dense import (
    IMAGENET_MEAN,
    Candidates,
    DenseDetector,
    KeyMap,
    Maps,
    box_losses,
    wanted_of,
)
from detkernel_detectors.necks import SsdNeck
from detkernel_detectors.priors import LevelAnchors, level_anchors

if TYPE_CHECKING:
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn


@plugin
class Ssd(DenseDetector):
    """SSD (Liu et al. 2016): boxes of each size are predicted from the level of that size, by one convolution.

    https://arxiv.org/abs/1512.02325, as MMDetection trains it. Its anchors are made for images of one size, by default
    300x300: `{use: resize, size: [300, 300]}`.
    """

    key_map: ClassVar[KeyMap] = (
        (r"neck\.extra_layers\.(\d+)\.0\.conv\.", r"neck.extra.\1.narrow."),
        (r"neck\.extra_layers\.(\d+)\.1\.conv\.", r"neck.extra.\1.reduce."),
        (r"bbox_head\.(cls|reg)_convs\.(\d+)\.0\.", r"head.\1.\2."),
    )
    one_choice: ClassVar[bool] = True

    backbone: Backbone = option(factory=Vgg, help="what makes feature maps of an image")
    neck: Neck = option(factory=SsdNeck, help="what makes the levels of them")
    head: Head = option(factory=LevelConvs, help="what predicts from the levels")
    anchors: LevelAnchors = option(factory=LevelAnchors, help="what boxes are predicted from, at each level")
    assigner: Assigner = option(
        factory=lambda: MaxIouAssigner(negative=0.5, all_best=False),
        help="which anchors are to predict which objects",
    )
    box_coder: BoxCoder = option(
        factory=lambda: DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2)), help="how a box is told, relative to its anchor"
    )
    class_loss: ClassLoss = option(
        factory=lambda: Softmax(background=1.0),
        help="of the classes of positive anchors, and of the hardest negative ones",
    )
    box_loss: BoxLoss = option(factory=SmoothL1, help="of the boxes of positive anchors")
    negatives: float = option(
        default=3.0, at_least=0, help="negative anchors in the loss for each positive one of an image: the hardest"
    )
    image_mean: tuple[float, float, float] = option(default=IMAGENET_MEAN, help="of R, G and B, on 0..255")
    image_std: tuple[float, float, float] = option(default=(1.0, 1.0, 1.0), above=0, help="of R, G and B, on 0..255")
    size_divisible: int = option(default=1, at_least=1, help="batches are padded to a multiple of this, in pixels")
    score_thresh: float = option(default=0.02, at_least=0, at_most=1, help="score above which an object is detected")
    nms_thresh: float = option(default=0.45, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    max_detections: int = option(default=200, at_least=1, help="detections an image")

    # Every anchor has a logit for each class and one for no object, and four numbers for a box. Levels have four or six
    # anchors at a place.

    def outputs(self, classes: int) -> list[Output]:
        counts = self.anchors.counts
        return [Output("cls", classes + 1, "cls", priors=counts), Output("reg", 4, "reg", priors=counts)]

    def heads(self, channels: Any, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        levels = len(self.anchors.steps)
        if levels != len(strides):
            raise wrong(self, "anchors", f"expected steps for the {len(strides)} levels of the neck, got {levels}")
        if not self.head.per_prior:
            raise wrong(
                self,
                "head",
                f"{type(self.head).__qualname__} predicts the same number of boxes at a place of each level",
            )
        return super().heads(channels, strides, classes)

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {
            f"head.cls.{level}.*": ClassOutput(before=count, background="last")
            for level, count in enumerate(self.anchors.counts)
        }

    def logits(self, maps: Maps) -> Tensor:
        return maps.flat("cls", maps.outputs["cls"][0].shape[1] // self.anchors.counts[0])

    def priors(self, maps: Maps, sizes: Tensor | None) -> Priors:
        return level_anchors(self.anchors, maps.features, maps.inside(sizes, self.size_divisible), maps.size)

    # Training: an anchor that overlaps an object by 0.5 is to find it, and so is the one that overlaps it most. Of the
    # thousands that are background, those count that look most like objects.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits = self.priors(maps, sizes), self.logits(maps)
        matches = self.assigner.assign(priors, targets)
        counts = matches.positive.sum(1)
        count = shared_count(counts.clamp(min=1))  # of each image one at least

        labels, wanted = wanted_of(matches, targets, priors.boxes, logits.shape[-1] - 1)
        classes = self.class_loss(logits, labels)
        hard = hardest(classes, matches.negative, counts * self.negatives)
        boxes = box_losses(self.box_loss, self.box_coder, priors.boxes, maps.flat("reg", 4), wanted)
        return {
            "loss_cls": averaged(classes, matches.positive | hard, count),
            "loss_bbox": averaged(boxes, matches.positive, count),
        }

    # Inference: the best (anchor, class) pairs of each level, then NMS.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.priors(maps, sizes)
        boxes = self.box_coder.decode(priors.boxes, maps.flat("reg", 4))
        return Candidates(self.logits(maps).softmax(-1)[..., :-1], boxes, priors.counts)
