"""What detectors share that predict a set (Carion et al. 2020): one query for each object, and no NMS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel import option, plugin, wrong
from detkernel_detection import BoxLoss, ClassLoss, SetAssigner
from detkernel_detection.boxes import clip, cxcywh, xyxy
from detkernel_detection.parts import Matches, Queries
from detkernel_detection.processes import mean_over_processes

from detkernel_detectors.assigners.hungarian import HungarianAssigner
from detkernel_detectors.losses.boxes import L1, Giou
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.losses.sums import averaged
from detkernel_detectors.models.dense import BaseDetector, wanted_of

if TYPE_CHECKING:
    import torch
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class SetDetector(BaseDetector):
    """What set detectors share: how queries are matched to objects, and what is minimised and found then."""

    assigner: SetAssigner = option(factory=HungarianAssigner, help="which queries are to predict which objects")
    class_loss: ClassLoss = option(factory=lambda: Focal(weight=2.0), help="of the classes of all queries")
    box_loss: BoxLoss = option(factory=lambda: L1(weight=5.0), help="of the boxes of matched queries, in shares")
    iou_loss: BoxLoss = option(factory=lambda: Giou(weight=2.0), help="of the same boxes, a second loss")
    size_divisible: int = option(default=1, at_least=1, help="batches are padded to a multiple of this, in pixels")

    def check_heads(self, channels: int, heads: int) -> None:
        """Raise `ConfigError` where the neck's channels are not for these heads, or for sines and cosines of places."""
        if channels % heads or channels % 4:
            message = f"expected channels of the neck that are a multiple of 4 and of {heads} heads, got {channels}"
            raise wrong(self, "attention_heads", message)

    def set_losses(
        self, queries: Queries, matches: Matches, targets: Targets, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The losses of each set, called `d0.loss_cls` where its name is `d0.`.

        Those of boxes are divided by the matched queries, as many as objects; that of classes by `class_counts`.
        """
        corners = xyxy(queries.boxes) * queries.scale
        labels, wanted = wanted_of(matches, targets, _somewhere(corners), self.background(queries.logits))
        losses = {
            "loss_cls": (self.class_loss(queries.logits, labels), matches.positive | matches.negative),
            "loss_bbox": (self.box_losses(self.box_loss, queries, corners, wanted), matches.positive),
            "loss_iou": (self.box_losses(self.iou_loss, queries, corners, wanted), matches.positive),
        }
        sides = list(queries.counts)
        positive, negative = (
            torch.stack([part.sum() for part in torch.split(value, sides, 1)]).float()
            for value in (matches.positive, matches.negative)
        )
        counts = mean_over_processes(torch.stack([self.class_counts(positive, negative), positive]), 1.0)
        found: dict[str, Tensor] = {}
        for name, (values, weights) in losses.items():
            parts = (torch.split(value, sides, 1) for value in (values, weights))
            each = zip(names, *parts, counts[int(name != "loss_cls")].unbind(), strict=True)
            found |= {prefix + name: averaged(value, weight, count) for prefix, value, weight, count in each}
        return found

    def background(self, logits: Tensor) -> int:
        """The label of no object."""
        return logits.shape[-1]

    def class_counts(self, positive: Tensor, negative: Tensor) -> Tensor:
        """What the losses of classes are divided by, of the numbers of matched and of other queries of each set."""
        return positive

    def box_losses(self, loss: BoxLoss, queries: Queries, corners: Tensor, wanted: Tensor) -> Tensor:
        """[B, N]. What compares numbers of a box coder is given cx, cy, w and h in shares of the image."""
        if loss.compares == "deltas":
            return loss(queries.boxes, cxcywh(wanted) / queries.scale)
        return loss(corners, wanted)

    def predicted(self, outputs: Any, heads: Any) -> Queries:
        """What all layers predict, one after the other."""
        raise NotImplementedError

    def predictions(self, outputs: Any, sizes: Tensor | None, heads: Any) -> Predictions:
        """The best pairs of query and class of the last layer."""
        return self.best(last_set(self.predicted(outputs, heads)))

    def best(self, queries: Queries) -> Predictions:
        """The best pairs of query and class."""
        classes = queries.logits.shape[-1]
        scores, places = queries.logits.sigmoid().flatten(1).topk(min(self.max_detections, queries.logits[0].numel()))
        corners = (xyxy(queries.boxes) * queries.scale).gather(1, (places // classes)[..., None].expand(-1, -1, 4))
        return padded(corners, scores, places % classes, queries.scale, self.max_detections)


def padded(corners: Tensor, scores: Tensor, labels: Tensor, scale: Tensor, most: int) -> Predictions:
    """Detections clipped to images, with `most` places each."""
    from detkernel_detection.predictions import Predictions

    boxes = clip(corners, scale[:, 0, :2].flip(1))
    room, valid = most - scores.shape[1], torch.ones_like(labels, dtype=torch.bool)
    if room:
        boxes = torch.nn.functional.pad(boxes, (0, 0, 0, room))
        scores, labels, valid = (torch.nn.functional.pad(value, (0, room)) for value in (scores, labels, valid))
    return Predictions(boxes, scores, labels, valid)


def layer_names(layers: int) -> list[str]:
    """How the losses of the layers of a decoder are called: those of the last have no prefix."""
    return [f"d{number}." for number in range(layers - 1)] + [""]


def joined(*queries: Queries) -> Queries:
    """The sets of the first, then those of the second, ..."""
    logits = torch.cat([each.logits for each in queries], 1)
    boxes = torch.cat([each.boxes for each in queries], 1)
    return Queries(logits, boxes, queries[0].scale, sum((each.counts for each in queries), ()))


def parted(matches: Matches, *queries: Queries) -> list[Matches]:
    """The matches of each, of what they were joined to."""
    sides = [sum(each.counts) for each in queries]
    parts = (torch.split(value, sides, 1) for value in matches[:3])
    return [Matches(*each) for each in zip(*parts, strict=True)]


def last_set(queries: Queries) -> Queries:
    """The last set alone, such as of the last layer."""
    count = queries.counts[-1]
    return queries._replace(
        logits=queries.logits[:, -count:], boxes=queries.boxes[:, -count:], counts=queries.counts[-1:]
    )


def _somewhere(like: Tensor) -> Tensor:
    """A box of positive extent, [1, 4]."""
    return torch.where(torch.arange(4, device=like.device) < 2, 0.0, 1.0)[None]
