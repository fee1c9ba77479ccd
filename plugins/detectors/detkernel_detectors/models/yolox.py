"""YOLOX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import Run, Span, hookimpl, option, plugin, state
from detkernel_detection import Backbone, BoxCoder, BoxLoss, ClassLoss, DynamicAssigner, Head, Neck
from detkernel_detection.parts import RARE, Output, Predicted, Priors

from detkernel_detectors.assigners.dynamic import SimOta
from detkernel_detectors.backbones import CspDarknet
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import LevelTowers
from detkernel_detectors.losses.boxes import L1, Iou
from detkernel_detectors.losses.classes import CrossEntropy
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import Candidates, DenseDetector, Maps, around, box_losses, wanted_of
from detkernel_detectors.necks import CspPafpn
from detkernel_detectors.priors import points

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

NORM: Any = {"norm_eps": 1e-3, "norm_momentum": 0.03}


@plugin
class Yolox(DenseDetector):
    """YOLOX (Ge et al. 2021): no anchors, towers of their own for classes and boxes, and SimOTA.

    https://arxiv.org/abs/2107.08430. The defaults are those of its size l.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.multi_level_(cls|reg)_convs\.(\d+)\.(\d+)\.conv\.", r"head.\1_tower.convs.\2.\3."),
        (r"bbox_head\.multi_level_(cls|reg)_convs\.(\d+)\.(\d+)\.bn\.", r"head.\1_tower.norms.\2.\3."),
        (r"bbox_head\.multi_level_conv_(cls|reg)\.", r"head.\1."),
        (r"bbox_head\.multi_level_conv_obj\.", r"head.objectness."),
    )

    backbone: Backbone = option(factory=CspDarknet, help="what makes feature maps of an image")
    neck: Neck = option(
        factory=lambda: CspPafpn(block="darknet", last_size=1, **NORM),
        help="what makes a pyramid of the backbone's maps",
    )
    head: Head = option(
        factory=lambda: LevelTowers(share=False, deviation=None, **NORM), help="what predicts from the pyramid"
    )
    assigner: DynamicAssigner = option(factory=SimOta, help="which points are to predict which objects")
    box_coder: BoxCoder = option(
        factory=lambda: DeltaCoder(bound=20.0),
        help="how a box is told, relative to a square of one stride at its point",
    )
    class_loss: ClassLoss = option(
        factory=CrossEntropy, help="of the classes of positive points, by the IoU of their boxes"
    )
    box_loss: BoxLoss = option(
        factory=lambda: Iou(form="square", weight=5.0),
        help="of the boxes of positive points",
    )
    objectness_weight: float = option(default=1.0, at_least=0, help="factor of the loss of the objectness")
    further_box_loss: BoxLoss = option(
        factory=L1, help="a second loss of the boxes of positive points, from `further_from` on"
    )
    further_from: Span | None = option(
        default=None, help="where in the run it begins: '285 epochs' of 300 in the recipe; null: never"
    )
    image_mean: tuple[float, float, float] = option(default=(0.0, 0.0, 0.0), help="of R, G and B, on 0..255")
    image_std: tuple[float, float, float] = option(default=(1.0, 1.0, 1.0), above=0, help="of R, G and B, on 0..255")
    channel_order: Literal["rgb", "bgr"] = option(default="bgr", help="of what the backbone is given")
    score_thresh: float = option(default=0.01, at_least=0, at_most=1, help="score above which an object is detected")
    nms_thresh: float = option(default=0.65, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    candidates: int = option(default=10000, at_least=1, help="detections of a level before NMS, by falling score")
    max_detections: int = option(default=1000, at_least=1, help="detections an image")

    _further: bool = state(default=False)

    # Every place has one point, in its upper left corner, with a logit for each class, one of whether there is any
    # object, and the centre and the logarithms of the sides of its box, in strides.

    def outputs(self, classes: int) -> list[Output]:
        return [
            Output("cls", classes, "cls", bias=RARE),
            Output("reg", 4, "reg"),
            Output("objectness", 1, "reg", bias=RARE),
        ]

    # Training: objects take the points in their middle that predict them best. Classes and boxes are learned from
    # these, the objectness from all.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        squares, logits, told = self._squares(maps), self.logits(maps), maps.flat("reg", 4)
        objectness = maps.flat("objectness", 1)[..., 0]
        scores = (logits.detach().sigmoid() * objectness.detach().sigmoid()[..., None]).sqrt()
        predicted = Predicted(scores, self.box_coder.decode(squares, told).detach())
        matches = self.assigner.assign(_points(maps, 0.5), targets, predicted)
        assert matches.quality is not None
        labels, wanted = wanted_of(matches, targets, squares, logits.shape[-1])

        truth = matches.positive.to(objectness.dtype)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(objectness, truth, reduction="none")
        boxes = box_losses(self.box_loss, self.box_coder, squares, told, wanted)
        count = shared_count(matches.positive)
        found = {
            "loss_cls": averaged(self.class_loss(logits, labels, matches.quality), matches.positive, count),
            "loss_bbox": averaged(boxes, matches.positive, count),
            "loss_obj": self.objectness_weight * averaged(entropy, torch.ones_like(truth), count),
        }
        if self._further:
            further = box_losses(self.further_box_loss, self.box_coder, squares, told, wanted)
            found["loss_l1"] = averaged(further, matches.positive, count)
        return found

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        self._further = self.further_from is not None and run.iter >= self.further_from.iters(run.epoch_length)

    # Inference: a point detects its best class alone. Boxes are clipped last.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = _points(maps, 0.0)
        boxes = self.box_coder.decode(self._squares(maps), maps.flat("reg", 4))
        best, labels = self.logits(maps).sigmoid().max(-1)
        scores = best * maps.flat("objectness", 1)[..., 0].sigmoid()
        return Candidates(scores[..., None], boxes, priors.counts, labels=labels, clipped=False)

    def _squares(self, maps: Maps) -> Tensor:
        """[N, 4]: boxes of one stride around the points."""
        return around(_points(maps, 0.0), sides=1.0)


def _points(maps: Maps, offset: float) -> Priors:
    return points(maps.features, maps.strides, maps.inside(None, 1), offset)
