"""FCOS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss, ClassLoss, Head, Neck
from detkernel_detection.parts import RARE, Output, Priors

from detkernel_detectors.assigners.points import FcosAssigner
from detkernel_detectors.coders.distance import DistanceCoder, centreness, distances, exponential
from detkernel_detectors.heads import Towers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import Candidates, DenseDetector, KeyMap, Maps, around, box_losses, wanted_of
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import points

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Fcos(DenseDetector):
    """FCOS (Tian et al. 2019): a point of every place says how far the sides of its object are.

    https://arxiv.org/abs/1904.01355. The defaults are those of its improved version: centre sampling, distances in
    strides, centre-ness beside the boxes, the GIoU loss. The first version has `assigner: {use: fcos_assigner, radius:
    null}`, `distance: pixels`, `centreness_branch: cls`, `box_loss: iou`, `nms_thresh: 0.5` and a head without biases.
    """

    key_map: ClassVar[KeyMap] = (
        (r"bbox_head\.conv_centerness\.", "head.centreness."),
        (r"bbox_head\.conv_(cls|reg)\.", r"head.\1."),
    )

    torchvision_key_map: ClassVar[KeyMap] = (
        *(
            (rf"head\.{theirs}_head\.conv\.{3 * layer + place}\.", f"head.{ours}_tower.{layer}.{kind}.")
            for theirs, ours in (("classification", "cls"), ("regression", "reg"))
            for layer in range(4)
            for place, kind in enumerate(("conv", "norm"))
        ),
        (r"head\.classification_head\.cls_logits\.", "head.cls."),
        (r"head\.regression_head\.bbox_reg\.", "head.reg."),
        (r"head\.regression_head\.bbox_ctrness\.", "head.centreness."),
    )
    torchvision_builders: ClassVar[tuple[str, ...]] = ("fcos_resnet50_fpn",)

    neck: Neck = option(
        factory=lambda: Fpn(extra_from="output", extra_relu=True), help="what makes a pyramid of the backbone's maps"
    )
    head: Head = option(factory=lambda: Towers(norm="group", bias=True), help="what predicts from the pyramid")
    assigner: Assigner = option(factory=FcosAssigner, help="which points are to predict which objects")
    box_coder: BoxCoder = option(factory=DistanceCoder, help="how a box is told, relative to its point")
    class_loss: ClassLoss = option(factory=Focal, help="of the classes of all points")
    box_loss: BoxLoss = option(factory=Giou, help="of the boxes of positive points, weighted by their centre-ness")
    centreness_weight: float = option(default=1.0, at_least=0, help="factor of the loss of the centre-ness")
    distance: Literal["strides", "pixels"] = option(
        default="strides", help="what a distance is told in: strides, through a ReLU; or pixels, through an exponential"
    )
    centreness_branch: Literal["cls", "reg"] = option(
        default="reg", help="which branch of the head tells the centre-ness"
    )
    scaled: bool = option(default=True, help="whether each level has a learned factor for its distances")
    offset: float = option(
        default=0.5, at_least=0, at_most=1, help="strides from the corner of a place to its point (torchvision: 0)"
    )
    fitted: bool = option(
        default=False,
        help="places are as far apart as the batch is larger than the map, in whole pixels (torchvision); false: by "
        "the stride",
    )
    score: Literal["product", "root"] = option(
        default="product",
        help="what points are scored by: their class, by which they are also chosen, times their centre-ness; or the "
        "square root of that product, by which they are then chosen too (torchvision)",
    )
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")

    # Every point has a logit for each class, four distances with a learned factor for each level, and a logit of how
    # central it is in its object, by which scores of points near a side are lowered. Distances begin at one stride (or
    # pixel): before the ReLU, where all were below 0, none would ever get a gradient.

    def outputs(self, classes: int) -> list[Output]:
        return [
            Output("cls", classes, "cls", bias=RARE),
            Output("reg", 4, "reg", bias=float(self.distance == "strides"), scaled=self.scaled),
            Output("centreness", 1, self.centreness_branch),
        ]

    # Training: the classes of all points, those in the padding too; boxes and centre-ness of the positive ones.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits = self._points(maps), self.logits(maps)
        matches = self.assigner.assign(priors, targets)
        labels, wanted = wanted_of(matches, targets, around(priors), logits.shape[-1])
        centre = priors.boxes[:, :2]
        central = centreness(distances(centre, wanted))

        unit = self._unit(priors)
        told, truth = self._distances(maps), wanted / unit
        boxes = box_losses(self.box_loss, self.box_coder, priors.boxes / unit, told, truth)
        weights = torch.where(matches.positive, central, 0.0)

        logit = maps.flat("centreness", 1)[..., 0]
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logit, central, reduction="none")
        count = shared_count(matches.positive)
        return {
            "loss_cls": averaged(self.class_loss(logits, labels), matches.positive | matches.negative, count),
            "loss_bbox": averaged(boxes, weights, shared_count(weights, least=1e-6)),
            "loss_centerness": self.centreness_weight * averaged(entropy, matches.positive, count),
        }

    # Inference: points are chosen by their class alone, and the centre-ness then lowers their scores; or by both.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self._points(maps)
        unit = self._unit(priors)
        boxes = self.box_coder.decode(priors.boxes / unit, self._distances(maps)) * unit
        scores, central = self.logits(maps).sigmoid(), maps.flat("centreness", 1)[..., 0].sigmoid()
        if self.score == "root":
            return Candidates((scores * central[..., None]).sqrt(), boxes, priors.counts)
        return Candidates(scores, boxes, priors.counts, central)

    def _points(self, maps: Maps) -> Priors:
        fitted = maps.size if self.fitted else None
        return points(maps.features, maps.strides, maps.inside(None, 1), self.offset, fitted)

    def _distances(self, maps: Maps) -> Tensor:
        """[B, N, 4], in what `distance` says."""
        found = maps.flat("reg", 4)
        return found.relu() if self.distance == "strides" else exponential(found)

    def _unit(self, priors: Priors) -> Tensor:
        """[N, 1]: pixels of what distances are told in."""
        return priors.strides[:, None] if self.distance == "strides" else torch.ones_like(priors.strides[:, None])
