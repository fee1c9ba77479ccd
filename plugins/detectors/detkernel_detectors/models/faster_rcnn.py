"""Faster R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Assigner, BoxCoder, BoxLoss, Neck
from detkernel_detection.boxes import clip
from detkernel_detection.parts import Matches, Priors

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.losses.boxes import L1
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import Maps, NativeDetector, box_losses, wanted_of
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import Anchors, anchors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class FasterRcnn(NativeDetector):
    """Faster R-CNN (Ren et al. 2015) with a feature pyramid (Lin et al. 2017): proposals, and what is in them.

    https://arxiv.org/abs/1506.01497, https://arxiv.org/abs/1612.03144. Between the two stages lies the one place where
    the device is asked: NMS of the proposals.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"rpn_head\.rpn_(conv|cls|reg)\.", r"head.\1."),
        (r"roi_head\.bbox_head\.shared_fcs\.(\d+)\.", r"box_head.fcs.\1."),
        (r"roi_head\.bbox_head\.fc_(cls|reg)\.", r"box_head.\1."),
    )

    neck: Neck = option(
        factory=lambda: Fpn(finest=4, extra=1, extra_from="pool"), help="what makes a pyramid of the backbone's maps"
    )
    anchors: Anchors = option(factory=Anchors, help="three shapes at every place, of 8 strides")
    rpn_assigner: Assigner = option(
        factory=lambda: MaxIouAssigner(positive=0.7, negative=0.3, best=0.3),
        help="which anchors are to propose which objects",
    )
    rpn_sampled: int = option(default=256, at_least=1, help="anchors of an image that are drawn for the loss")
    rpn_positive: float = option(default=0.5, above=0, at_most=1, help="largest share of positive ones among them")
    rpn_box_coder: BoxCoder = option(factory=DeltaCoder, help="how a proposal is told, relative to its anchor")
    rpn_box_loss: BoxLoss = option(factory=L1, help="of the proposals of positive anchors")
    rpn_nms_thresh: float = option(default=0.7, at_least=0, at_most=1, help="IoU above which a proposal is dropped")
    candidates_train: int = option(default=2000, at_least=1, help="proposals of a level before NMS, in training")
    candidates: int = option(default=1000, at_least=1, help="the same in validation")
    proposals_train: int = option(default=1000, at_least=1, help="proposals of an image, in training")
    proposals: int = option(default=1000, at_least=1, help="the same in validation")

    assigner: Assigner = option(
        factory=lambda: MaxIouAssigner(positive=0.5, negative=0.5, best=None),
        help="which proposals are to find which objects",
    )
    sampled: int = option(default=512, at_least=1, help="proposals of an image that are drawn for the loss")
    positive: float = option(default=0.25, above=0, at_most=1, help="largest share of positive ones among them")
    box_coder: BoxCoder = option(
        factory=lambda: DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2)), help="how a box is told, relative to its proposal"
    )
    box_loss: BoxLoss = option(factory=L1, help="of the boxes of positive proposals")
    pooled: int = option(default=7, at_least=1, help="height and width of what is pooled of a proposal")
    sampling_ratio: int = option(default=0, at_least=0, help="samples of each pooled value and axis; 0: by its size")
    fc_channels: int = option(default=1024, at_least=1, help="of the two layers that a proposal goes through")

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        from detkernel_detectors.heads.rcnn import BoxHead, RpnHead

        box_head = BoxHead(channels, self.pooled, self.sampling_ratio, self.fc_channels, classes, strides[:-1])
        return {"head": RpnHead(channels, len(self.anchors.sides)), "box_head": box_head}

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        scores, boxes = ClassOutput(background="last"), ClassOutput(after=4)
        return {
            f"box_head.{name}.{kind}": output
            for name, output in (("cls", scores), ("reg", boxes))
            for kind in ("weight", "bias")
        }

    # First stage: an anchor that overlaps an object by 0.7 is to propose it; one below 0.3 is background.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits, deltas = self._anchors(maps, sizes), maps.flat("cls", 1)[..., 0], maps.flat("reg", 4)
        matches = drawn(self.rpn_assigner.assign(priors, targets), self.rpn_sampled, self.rpn_positive)
        _, wanted = wanted_of(matches, targets, priors.boxes, 0)
        counts = matches.positive.sum(1).clamp(min=1) + matches.negative.sum(1).clamp(min=1)
        count = shared_count(counts)
        truth = matches.positive.to(logits.dtype)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        boxes = box_losses(self.rpn_box_loss, self.rpn_box_coder, priors.boxes, deltas, wanted)
        found = self._proposed(maps, sizes, priors, self.candidates_train, self.proposals_train)
        return {
            "loss_rpn_cls": averaged(entropy, matches.positive | matches.negative, count),
            "loss_rpn_bbox": averaged(boxes, matches.positive, count),
            **self._second_losses(maps, targets, found, heads.box_head),
        }

    # Second stage: of the proposals and the objects themselves, 512 are drawn, a quarter of them positive.

    def _second_losses(self, maps: Maps, targets: Targets, found: Predictions, head: Any) -> dict[str, Tensor]:
        valid = torch.cat([targets.valid, found.valid], 1)
        boxes = torch.cat([targets.boxes, found.boxes], 1)
        boxes = torch.where(valid[..., None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
        priors = Priors(boxes, boxes.new_ones(boxes.shape[1]), valid, (boxes.shape[1],))
        matches = drawn(self.assigner.assign(priors, targets), self.sampled, self.positive)
        background = head.classes
        labels, wanted = wanted_of(matches, targets, boxes, background)

        order = matches.positive.int() * 2 + matches.negative.int()  # those that are drawn, in as many places
        known, places = order.topk(min(self.sampled, order.shape[1]))
        labels = labels.gather(1, places)
        boxes, wanted = (value.gather(1, places[..., None].expand(-1, -1, 4)) for value in (boxes, wanted))
        logits, deltas = head(maps.features, boxes)  # [B, S, C + 1], [B, S, C, 4]
        own = labels.clamp(max=background - 1)[..., None, None].expand(-1, -1, 1, 4)
        told = deltas.gather(2, own)[:, :, 0]

        chosen, positive = known > 0, known > 1
        count = shared_count(chosen)
        entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        right = (logits.argmax(-1) == labels) & chosen
        return {
            "loss_cls": averaged(entropy.view_as(labels), chosen, count),
            "loss_bbox": averaged(box_losses(self.box_loss, self.box_coder, boxes, told, wanted), positive, count),
            "acc": 100 * right.sum() / chosen.sum().clamp(min=1),
        }

    # Inference: each proposal has a box for every class; what overlaps another of its class is dropped.

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any) -> Predictions:
        from detkernel_detection.nms import suppressed

        priors = self._anchors(maps, sizes)
        found = self._proposed(maps, sizes, priors, self.candidates, self.proposals)
        logits, deltas = heads.box_head(maps.features, found.boxes)
        scores = torch.where(found.valid[..., None], logits.softmax(-1)[..., :-1], -1.0)
        classes = scores.shape[-1]
        boxes = self.box_coder.decode(found.boxes[:, :, None], deltas).flatten(1, 2)
        most = min(classes, int(1 / max(self.score_thresh, 1 / classes))) * scores.shape[1]
        best, places = scores.flatten(1).topk(most)
        boxes = clip(boxes.gather(1, places[..., None].expand(-1, -1, 4)), sizes)
        valid = best > self.score_thresh
        return suppressed(boxes, best, places % classes, valid, self.nms_thresh, self.max_detections)

    def _proposed(self, maps: Maps, sizes: Tensor | None, priors: Priors, candidates: int, most: int) -> Predictions:
        """The best proposals of all levels, without those that a better one of their level overlaps. No gradient."""
        from detkernel_detection.nms import suppressed

        with torch.no_grad():
            scores, deltas = maps.flat("cls", 1)[..., 0].sigmoid(), maps.flat("reg", 4)
            chosen, levels, start = [], [], 0
            for level, count in enumerate(priors.counts):
                best = scores[:, start : start + count].topk(min(candidates, count)).indices + start
                chosen.append(best)
                levels.append(torch.full_like(best, level))
                start += count
            place = torch.cat(chosen, 1)
            deltas = deltas.gather(1, place[..., None].expand(-1, -1, 4))
            boxes = clip(self.rpn_box_coder.decode(priors.boxes[place], deltas), sizes)
            valid = (boxes[..., 2:] > boxes[..., :2]).all(-1)
            return suppressed(boxes, scores.gather(1, place), torch.cat(levels, 1), valid, self.rpn_nms_thresh, most)

    def _anchors(self, maps: Maps, sizes: Tensor | None) -> Priors:
        return anchors(self.anchors, maps.features, maps.strides, maps.inside(sizes, self.size_divisible))


def drawn(matches: Matches, count: int, share: float) -> Matches:
    """At most `count` priors of each image by chance, at most that `share` of them positive; the others are ignored.

    A prior's random number ranks it among its kind, so that shapes do not depend on how many there are.
    """
    chance = torch.rand_like(matches.matched, dtype=torch.float32)
    positive = _first(matches.positive, chance, torch.full_like(matches.matched[:, :1], int(count * share)))
    negative = _first(matches.negative, chance, count - positive.sum(1, keepdim=True))
    return Matches(matches.matched, positive, negative)


def _first(which: Tensor, chance: Tensor, count: Tensor) -> Tensor:
    """bool [B, N]: the `count` [B, 1] of `which` with the highest chance."""
    order = torch.where(which, chance, -1.0).argsort(1, descending=True)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return which & (torch.zeros_like(order).scatter(1, order, rank) < count)
