"""RTMDet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import option, plugin
from detkernel_detection import Backbone, BoxCoder, BoxLoss, ClassLoss, DynamicAssigner, Head, Neck
from detkernel_detection.parts import RARE, Matches, Output, Predicted, Priors

from detkernel_detectors.assigners.dynamic import DynamicSoftLabel
from detkernel_detectors.backbones import Cspnext
from detkernel_detectors.coders.distance import DistanceCoder, exponential
from detkernel_detectors.heads import LevelTowers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import QualityFocal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import Candidates, DenseDetector, Maps, around, box_losses, wanted_of
from detkernel_detectors.necks import CspPafpn
from detkernel_detectors.priors import points

if TYPE_CHECKING:
    from detkernel_detection.structures import Targets
    from torch import Tensor


@plugin
class Rtmdet(DenseDetector):
    """RTMDet (Lyu et al. 2022): large kernels, a head whose convolutions all levels share, and soft labels.

    https://arxiv.org/abs/2212.07784. The defaults are those of its size l.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.(cls|reg)_convs\.0\.(\d+)\.conv\.", r"head.\1_tower.convs.0.\2."),
        (r"bbox_head\.(cls|reg)_convs\.\d+\.\d+\.conv\.", None),  # the same ones again
        (r"bbox_head\.(cls|reg)_convs\.(\d+)\.(\d+)\.bn\.", r"head.\1_tower.norms.\2.\3."),
        (r"bbox_head\.rtm_(cls|reg)\.", r"head.\1."),
    )

    backbone: Backbone = option(factory=Cspnext, help="what makes feature maps of an image")
    neck: Neck = option(factory=CspPafpn, help="what makes a pyramid of the backbone's maps")
    head: Head = option(factory=LevelTowers, help="what predicts from the pyramid")
    assigner: DynamicAssigner = option(factory=DynamicSoftLabel, help="which points are to predict which objects")
    box_coder: BoxCoder = option(factory=DistanceCoder, help="how a box is told, relative to its point")
    class_loss: ClassLoss = option(
        factory=QualityFocal, help="of the scores of all points, by the IoU of the boxes of positive ones"
    )
    box_loss: BoxLoss = option(
        factory=lambda: Giou(weight=2.0), help="of the boxes of positive points, weighted by their IoU"
    )
    distance: Literal["exponential", "linear", "rectified"] = option(
        default="exponential",
        help="how distances are told, in strides: by logarithms; linear: as they are, in tiny and s; through a ReLU",
    )
    channel_order: Literal["rgb", "bgr"] = option(default="bgr", help="of what the backbone is given")
    score_thresh: float = option(default=0.001, at_least=0, at_most=1, help="score above which an object is detected")
    nms_thresh: float = option(default=0.65, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    candidates: int = option(default=30000, at_least=1, help="detections of a level before NMS, by falling score")
    max_detections: int = option(default=300, at_least=1, help="detections an image")

    # Every place has one point, in its upper left corner, with a logit for each class and four distances in strides.
    # Before a ReLU they begin at one stride: where all were below 0, none would ever get a gradient.

    def outputs(self, classes: int) -> list[Output]:
        return [
            Output("cls", classes, "cls", bias=RARE),
            Output("reg", 4, "reg", bias=float(self.distance == "rectified")),
        ]

    # Training: which points are positive follows from what they predict; scores are to be the IoU of their boxes, and
    # boxes count as much as their IoU.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        return self.matched_losses(maps, targets, sizes)[0]

    def matched_losses(
        self, maps: Maps, targets: Targets, sizes: Tensor | None
    ) -> tuple[dict[str, Tensor], Priors, Matches]:
        """The losses, and of which points and matches."""
        priors, logits = self.points_of(maps, sizes), self.logits(maps)
        told = self._distances(maps, priors)
        found = self.box_coder.decode(priors.boxes, told).detach()
        predicted = Predicted(logits.detach().sigmoid(), found, logits.detach())
        matches = self.assigner.assign(priors, targets, predicted)
        assert matches.quality is not None
        labels, wanted = wanted_of(matches, targets, around(priors), logits.shape[-1])

        boxes = box_losses(self.box_loss, self.box_coder, priors.boxes, told, wanted)
        count = shared_count(matches.quality)
        classes = self.class_loss(logits, labels, matches.quality)
        losses = {
            "loss_cls": averaged(classes, matches.positive | matches.negative, count),
            "loss_bbox": averaged(boxes, matches.quality, count),
        }
        return losses, priors, matches

    # Inference: a score is the quality of its box already.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.points_of(maps, sizes)
        boxes = self.box_coder.decode(priors.boxes, self._distances(maps, priors))
        return Candidates(self.logits(maps).sigmoid(), boxes, priors.counts)

    def points_of(self, maps: Maps, sizes: Tensor | None) -> Priors:
        return points(maps.features, maps.strides, maps.inside(sizes, self.size_divisible), offset=0.0)

    def _distances(self, maps: Maps, priors: Priors) -> Tensor:
        """[B, N, 4], in pixels."""
        found = maps.flat("reg", 4)
        if self.distance != "linear":
            found = exponential(found) if self.distance == "exponential" else found.relu()
        return found * priors.strides[:, None]
