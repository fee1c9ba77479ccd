"""CenterNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import Backbone, Head, Heatmap, HeatmapLoss, Neck
from detkernel_detection.boxes import centres, clip
from detkernel_detection.parts import Output

from detkernel_detectors.assigners.heatmap import RadiusHeatmap, map_of
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.heads import Branches
from detkernel_detectors.losses.classes import GaussianFocal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import BaseDetector, KeyMap, Maps, larger
from detkernel_detectors.necks import DeconvNeck
from detkernel_detectors.priors import points

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Centernet(BaseDetector):
    """CenterNet (Zhou et al. 2019): objects as points, the peaks of a map of centres for each class, without NMS.

    https://arxiv.org/abs/1904.07850.
    """

    key_map: ClassVar[KeyMap] = (
        (r"neck\.deconv_layers\.(\d+)\.conv\.", r"neck.layers.\1.conv."),
        (r"neck\.deconv_layers\.(\d+)\.bn\.", r"neck.layers.\1.norm."),
        (r"bbox_head\.heatmap_head\.0\.", "head.before.cls."),
        (r"bbox_head\.heatmap_head\.2\.", "head.cls."),
        (r"bbox_head\.wh_head\.0\.", "head.before.size."),
        (r"bbox_head\.wh_head\.2\.", "head.size."),
        (r"bbox_head\.offset_head\.0\.", "head.before.offset."),
        (r"bbox_head\.offset_head\.2\.", "head.offset."),
    )

    backbone: Backbone = option(factory=lambda: Resnet(depth=18), help="what makes feature maps of an image")
    neck: Neck = option(factory=DeconvNeck, help="what makes one fine map of them")
    head: Head = option(factory=Branches, help="what predicts from that")
    heatmap: Heatmap = option(factory=RadiusHeatmap, help="how near each place is to the centre of an object")
    heatmap_loss: HeatmapLoss = option(factory=GaussianFocal, help="of the map of centres")
    size_weight: float = option(default=0.1, at_least=0, help="factor of the loss of width and height")
    offset_weight: float = option(
        default=1.0, at_least=0, help="factor of the loss of where in its place of the map a centre is"
    )
    peak: int = option(default=3, at_least=1, help="places, odd, of the square whose highest score is an object")
    score_thresh: float = option(default=0.0, at_least=0, at_most=1, help="score above which an object is detected")
    min_size: float | None = option(
        default=0.0,
        at_least=0,
        help="pixels that width and height of a detection must exceed; null: any, even such as have none (MMDetection)",
    )

    def __attrs_post_init__(self) -> None:
        if self.peak % 2 == 0:
            raise ValueError(f"peak: expected an odd number, got {self.peak}")

    # Every place of the map has a logit for each class, that of a score of 0.1 at first, the width and height of the
    # object whose centre it has, and where in the place the centre is, all in strides.

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        if len(strides) != 1:
            name = type(self.neck).__qualname__
            raise wrong(
                self, "neck", f"expected one that gives one map, such as deconv_neck; {name} gives {len(strides)}"
            )
        outputs = [Output("cls", classes, "cls", bias=-2.19), Output("size", 2, "reg"), Output("offset", 2, "reg")]
        return {"head": self.head.build(channels, 1, outputs)}

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {"head.cls.*": ClassOutput()}

    # Training: centres are peaks of their class, and the places around them are wrong the less the nearer they are.
    # Sizes and offsets are learned at the centres alone; of objects in one place, that of the last.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        logits = maps.flat("cls", maps.outputs["cls"][0].shape[1])
        places = points(maps.features, maps.strides, maps.inside(None, 1), offset=0.0)
        wanted = map_of(self.heatmap(places, targets), targets, logits.shape[-1])
        positive = wanted == 1
        count = shared_count(positive)

        centre = centres(targets.boxes) / maps.strides[0]
        sides = (targets.boxes[..., 2:] - targets.boxes[..., :2]) / maps.strides[0]
        corner = centre.floor()
        place = (corner[..., 1] * maps.features[0].shape[-1] + corner[..., 0]).long().clamp(0, logits.shape[1] - 1)
        own = targets.valid & ~replaced(place, targets.valid)
        size, offset = (_at(maps.flat(name, 2), place) for name in ("size", "offset"))
        everywhere = torch.ones_like(logits[..., 0])
        return {
            "loss_center_heatmap": averaged(self.heatmap_loss(logits, wanted, positive), everywhere, count),
            "loss_wh": self.size_weight * averaged((size - sides).abs().sum(-1), own, 2 * count),
            "loss_offset": self.offset_weight * averaged((offset - (centre - corner)).abs().sum(-1), own, 2 * count),
        }

    # Inference: a place whose score is the highest around it is an object.

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any = None) -> Predictions:
        from detkernel_detection.predictions import Predictions

        heat = maps.outputs["cls"][0].float().sigmoid()
        highest = torch.nn.functional.max_pool2d(heat, self.peak, 1, self.peak // 2)
        peaks = torch.where(heat == highest, heat, 0.0).flatten(1)
        room = max(0, self.max_detections - peaks.shape[1])
        scores, found = torch.nn.functional.pad(peaks, (0, room)).topk(self.max_detections)
        height, width = heat.shape[-2:]
        labels, place = found // (height * width), found % (height * width)

        corner = torch.stack([place % width, place // width], -1)
        centre, half = corner + _at(maps.flat("offset", 2), place), _at(maps.flat("size", 2), place) / 2
        boxes = clip(torch.cat([centre - half, centre + half], -1) * maps.strides[0], sizes)
        valid = (scores > self.score_thresh) & larger(boxes, self.min_size)
        return _first(Predictions(boxes, scores, labels, valid))


def replaced(places: Tensor, valid: Tensor) -> Tensor:
    """bool [B, M]: of objects [B, M] at such places, which have a later one at their place."""
    same = (places[:, :, None] == places[:, None]) & valid[:, None]
    order = torch.arange(places.shape[1], device=places.device)
    return (same & (order[:, None] < order)).any(-1)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """[B, N, k] at places [B, K] -> [B, K, k]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def _first(found: Predictions) -> Predictions:
    """Those that are valid first, and zeros in the other places."""
    scores, order = torch.where(found.valid, found.scores, -1.0).topk(found.scores.shape[1])
    valid = scores >= 0
    boxes = torch.where(valid[..., None], _at(found.boxes, order), 0.0)
    labels = torch.where(valid, found.labels.gather(1, order), 0)
    return found._replace(boxes=boxes, scores=scores.clamp(min=0), labels=labels, valid=valid)
