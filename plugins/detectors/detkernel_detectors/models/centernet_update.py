"""CenterNetUpdate, the first stage of CenterNet2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import BoxCoder, BoxLoss, Head, Heatmap, HeatmapLoss, Neck, Region
from detkernel_detection.parts import RARE, Matches, Output, Priors

from detkernel_detectors.assigners.heatmap import AreaHeatmap, CentreRegion, map_of
from detkernel_detectors.coders.distance import DistanceCoder
from detkernel_detectors.heads import Towers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import GaussianFocal, one_hot
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
class CenternetUpdate(DenseDetector):
    """CenterNetUpdate (Zhou et al. 2021): a map of centres at each level of a pyramid, and distances of sides.

    https://arxiv.org/abs/2103.07461, section 4: the one-stage detector, CenterNet*, that CenterNet2 has for proposals.
    """

    key_map: ClassVar[KeyMap] = ((r"bbox_head\.conv_(cls|reg)\.", r"head.\1."),)

    neck: Neck = option(
        factory=lambda: Fpn(extra_from="output", extra_relu=True), help="what makes a pyramid of the backbone's maps"
    )
    head: Head = option(factory=lambda: Towers(norm="group"), help="what predicts from the pyramid")
    heatmap: Heatmap = option(factory=AreaHeatmap, help="how near each place is to the centre of an object")
    region: Region = option(factory=CentreRegion, help="which places may be an object's")
    box_coder: BoxCoder = option(factory=DistanceCoder, help="how a box is told, relative to its point")
    heatmap_loss: HeatmapLoss = option(
        factory=lambda: GaussianFocal(yes=0.25, no=0.75, least=1e-4), help="of the classes of all points"
    )
    box_loss: BoxLoss = option(factory=lambda: Giou(weight=2.0), help="of the boxes of the points in regions")
    good_points: int = option(
        default=9,
        at_least=1,
        help="an object has fewer centres than this: its own, always, and the points of its region with the best boxes",
    )
    good_loss: float = option(
        default=0.2, above=0, help="loss of its box, without the weight, below which a point is a centre too"
    )
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")

    # Every place has one point, in its middle, with a logit for each class and four distances in strides, through a
    # ReLU, with a learned factor for each level; distances begin at eight strides.

    def outputs(self, classes: int) -> list[Output]:
        return [Output("cls", classes, "cls", bias=RARE), Output("reg", 4, "reg", bias=8.0, scaled=True)]

    # Training: points around a centre learn the box. That of the centre itself is a yes of its class, and so are those
    # around it that predict the box best; others are wrong the less the nearer they are.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits, told = self._points(maps), self.logits(maps), maps.flat("reg", 4).relu()
        away = self.heatmap(priors, targets)
        region, middle = self.region(priors, targets)
        nearest = torch.where(region, away, torch.inf).argmin(1)
        matches = Matches(nearest, region.any(1), ~region.any(1))
        _, wanted = wanted_of(matches, targets, around(priors), 0)

        unit = priors.strides[:, None]
        boxes = box_losses(self.box_loss, self.box_coder, priors.boxes / unit, told, wanted / unit)
        centre = self._centres(priors, told.detach(), targets, region, middle)
        yes = centre.transpose(1, 2).float() @ one_hot(targets.labels, logits.shape[-1]).float()  # [B, N, C]
        near = map_of(away, targets, logits.shape[-1])
        everywhere = torch.ones_like(logits[..., 0])
        return {
            "loss_cls": averaged(self.heatmap_loss(logits, near, yes), everywhere, shared_count(centre)),
            "loss_bbox": averaged(boxes, matches.positive, shared_count(matches.positive)),
        }

    def _centres(self, priors: Priors, told: Tensor, targets: Targets, region: Tensor, middle: Tensor) -> Tensor:
        """bool [B, M, N]: the points that are a yes of each object's class."""
        if not self.box_loss.weight:
            return middle
        unit = priors.strides[:, None]
        # [B, M, N, 4], without a gradient: as much memory as FCOS's assigner takes.
        truth = torch.where(region[..., None], targets.boxes[:, :, None], around(priors)) / unit
        found = told[:, None].expand(-1, truth.shape[1], -1, -1)
        loss = box_losses(self.box_loss, self.box_coder, priors.boxes / unit, found, truth) / self.box_loss.weight
        loss = torch.where(middle, 0.0, torch.where(region, loss, torch.inf))
        least = loss.topk(min(self.good_points, loss.shape[-1]), largest=False).values[..., -1:]
        return middle | (loss < least.clamp(max=self.good_loss))

    # Inference: points are chosen by their class.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self._points(maps)
        unit = priors.strides[:, None]
        boxes = self.box_coder.decode(priors.boxes / unit, maps.flat("reg", 4).relu()) * unit
        return Candidates(self.logits(maps).sigmoid(), boxes, priors.counts)

    def _points(self, maps: Maps) -> Priors:
        return points(maps.features, maps.strides, maps.inside(None, 1))
