"""What R-CNNs share: a first stage that proposes, boxes that are drawn of its proposals, and what is found in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from detkernel import option, plugin, wrong
from detkernel_detection import Assigner, BoxCoder, BoxHead, BoxLoss, MaskHead, Neck
from detkernel_detection.boxes import clip
from detkernel_detection.parts import Matches, Priors

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import FcBoxHead, FcnMaskHead
from detkernel_detectors.losses.boxes import L1
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import KeyMap, Maps, NativeDetector, box_losses, larger, wanted_of
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import Anchors, anchors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn
else:
    from detkernel_detection import lazy_torch as torch


class Drawn(NamedTuple):
    """The boxes that a second stage learns from: S places an image, those with an object first."""

    boxes: Tensor
    """[B, S, 4]."""
    labels: Tensor
    """[B, S]: of their objects; the number of classes where there is none."""
    wanted: Tensor
    """[B, S, 4]: the boxes of their objects; their own where there is none."""
    matched: Tensor
    """[B, S]: the places of their objects in `Targets`."""
    given: Tensor
    """bool [B, S]: they are objects themselves, not proposals."""
    chosen: Tensor
    """bool [B, S]: they are drawn; the other places play no part."""
    positive: Tensor
    """bool [B, S]: they have an object."""


@plugin
class Rcnn(NativeDetector):
    """What R-CNNs share. A family says what it learns of the boxes that are drawn, and what it finds in proposals."""

    key_map: ClassVar[KeyMap] = (
        (r"rpn_head\.rpn_conv\.(\d+)\.conv\.", r"head.convs.\1."),
        (r"rpn_head\.rpn_conv\.", "head.convs.0."),
        (r"rpn_head\.rpn_(cls|reg)\.", r"head.\1."),
    )
    torchvision_key_map: ClassVar[KeyMap] = (
        (r"rpn\.head\.conv\.(\d+)\.0\.", r"head.convs.\1."),
        (r"rpn\.head\.conv\.(weight|bias)", r"head.convs.0.\1"),
        (r"rpn\.head\.cls_logits\.", "head.cls."),
        (r"rpn\.head\.bbox_pred\.", "head.reg."),
        (r"roi_heads\.box_head\.fc6\.", "box_head.fcs.0."),
        (r"roi_heads\.box_head\.fc7\.", "box_head.fcs.1."),
        (r"roi_heads\.box_head\.(\d+)\.0\.", r"box_head.convs.\1.conv."),
        (r"roi_heads\.box_head\.(\d+)\.1\.", r"box_head.convs.\1.norm."),
        (r"roi_heads\.box_head\.5\.", "box_head.fcs.0."),  # behind four convolutions and a flattening
        (r"roi_heads\.box_predictor\.cls_score\.", "box_head.cls."),
        (r"roi_heads\.box_predictor\.bbox_pred\.", "box_head.reg."),
    )

    neck: Neck = option(
        factory=lambda: Fpn(finest=4, extra=1, extra_from="pool"), help="what makes a pyramid of the backbone's maps"
    )
    anchors: Anchors = option(factory=Anchors, help="three shapes at every place, of 8 strides")
    rpn_convs: int = option(default=1, at_least=1, help="convolutions of the head that proposes")
    rpn_assigner: Assigner = option(
        factory=lambda: MaxIouAssigner(positive=0.7, negative=0.3, best=0.3),
        help="which anchors are to propose which objects",
    )
    rpn_border: int | None = option(
        default=None,
        at_least=0,
        help="pixels by which an anchor may reach over a side of its image to be learned from; null: any",
    )
    rpn_sampled: int = option(default=256, at_least=1, help="anchors of an image that are drawn for the loss")
    rpn_positive: float = option(default=0.5, above=0, at_most=1, help="largest share of positive ones among them")
    rpn_box_coder: BoxCoder = option(factory=DeltaCoder, help="how a proposal is told, relative to its anchor")
    rpn_box_loss: BoxLoss = option(factory=L1, help="of the proposals of positive anchors")
    rpn_nms_thresh: float = option(default=0.7, at_least=0, at_most=1, help="IoU above which a proposal is dropped")
    rpn_min_size: float = option(default=0.0, at_least=0, help="pixels that width and height of a proposal must exceed")
    candidates_train: int = option(default=2000, at_least=1, help="proposals of a level before NMS, in training")
    candidates: int = option(default=1000, at_least=1, help="the same in validation")
    proposals_train: int = option(default=1000, at_least=1, help="proposals of an image, in training")
    proposals: int = option(default=1000, at_least=1, help="the same in validation")

    sampled: int = option(default=512, at_least=1, help="proposals of an image that are drawn for the loss")
    positive: float = option(default=0.25, above=0, at_most=1, help="largest share of positive ones among them")
    sampling_ratio: int = option(default=0, at_least=0, help="samples of each pooled value and axis; 0: by its size")
    aligned: bool = option(
        default=True,
        help="boxes are pooled half a pixel further up and to the left, where pixels are (torchvision: no)",
    )
    min_size: float | None = option(
        default=None, at_least=0, help="pixels that width and height of a detection must exceed; null: they may be 0"
    )
    box_head: BoxHead = option(factory=FcBoxHead, help="what predicts classes and boxes of what is pooled of a box")

    def check_assigners(self, **assigners: Assigner) -> None:
        """Raise `ConfigError` for one of the second stage that cannot match proposals."""
        for name, assigner in assigners.items():
            if assigner.by_level:
                kind = type(assigner).__qualname__
                raise wrong(self, name, f"{kind} goes by the levels of a pyramid, which proposals do not have")

    def rpn_head(self, channels: int) -> nn.Module:
        from detkernel_detectors.heads.rcnn import RpnHead

        return RpnHead(channels, len(self.anchors.sides), self.rpn_convs)

    # First stage: an anchor that overlaps an object by 0.7 is to propose it; one below 0.3 is background.

    def first_stage(self, maps: Maps, targets: Targets, sizes: Tensor | None) -> tuple[dict[str, Tensor], Predictions]:
        """Its losses and its proposals."""
        priors, logits, deltas = self._anchors(maps, sizes), maps.flat("cls", 1)[..., 0], maps.flat("reg", 4)
        learned = priors if self.rpn_border is None else within(priors, self.rpn_border, maps, sizes)
        matches = drawn(self.rpn_assigner.assign(learned, targets), self.rpn_sampled, self.rpn_positive)
        _, wanted = wanted_of(matches, targets, priors.boxes, 0)
        counts = matches.positive.sum(1).clamp(min=1) + matches.negative.sum(1).clamp(min=1)
        count = shared_count(counts)
        truth = matches.positive.to(logits.dtype)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        boxes = box_losses(self.rpn_box_loss, self.rpn_box_coder, priors.boxes, deltas, wanted)
        losses = {
            "loss_rpn_cls": averaged(entropy, matches.positive | matches.negative, count),
            "loss_rpn_bbox": averaged(boxes, matches.positive, count),
        }
        return losses, self._proposed(maps, sizes, priors, self.candidates_train, self.proposals_train)

    def proposed(self, maps: Maps, sizes: Tensor | None) -> Predictions:
        """The proposals of validation."""
        return self._proposed(maps, sizes, self._anchors(maps, sizes), self.candidates, self.proposals)

    def _proposed(self, maps: Maps, sizes: Tensor | None, priors: Priors, candidates: int, most: int) -> Predictions:
        """The best proposals of all levels, without those that a better one of their level overlaps. No gradient."""
        from detkernel_detection.nms import suppressed

        with torch.no_grad():
            scores, deltas = maps.flat("cls", 1)[..., 0].sigmoid(), maps.flat("reg", 4)
            chosen, levels, counts, start = [], [], [], 0
            for level, count in enumerate(priors.counts):
                best = scores[:, start : start + count].topk(min(candidates, count)).indices + start
                chosen.append(best)
                levels.append(torch.full_like(best, level))
                counts.append(best.shape[1])
                start += count
            place = torch.cat(chosen, 1)
            deltas = deltas.gather(1, place[..., None].expand(-1, -1, 4))
            boxes = clip(self.rpn_box_coder.decode(priors.boxes[place], deltas), sizes)
            valid = larger(boxes, self.rpn_min_size)
            scores = scores.gather(1, place)
            return suppressed(boxes, scores, torch.cat(levels, 1), valid, self.rpn_nms_thresh, most, counts)

    def _anchors(self, maps: Maps, sizes: Tensor | None) -> Priors:
        return anchors(self.anchors, maps.features, maps.strides, maps.inside(sizes, self.size_divisible), maps.size)

    # Second stage: of the objects themselves and the proposals, 512 are drawn, a quarter of them positive.

    def draw(self, assigner: Assigner, boxes: Tensor, valid: Tensor, targets: Targets, background: int) -> Drawn:
        """What is learned from: of the objects and of boxes [B, N, 4] where they are `valid`."""
        start = targets.valid.shape[1]
        given = torch.cat([targets.valid, torch.zeros_like(valid)], 1)
        exists, boxes = torch.cat([targets.valid, valid], 1), torch.cat([targets.boxes, boxes], 1)
        boxes = torch.where(exists[..., None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))
        priors = Priors(boxes[:, start:], boxes.new_ones(valid.shape[1]), valid, (valid.shape[1],))
        matches = drawn(with_objects(assigner.assign(priors, targets), targets), self.sampled, self.positive)
        labels, wanted = wanted_of(matches, targets, boxes, background)
        order = matches.positive.int() * 2 + matches.negative.int()  # those that are drawn, in as many places
        known, places = order.topk(min(self.sampled, order.shape[1]))
        boxes, wanted = (value.gather(1, places[..., None].expand(-1, -1, 4)) for value in (boxes, wanted))
        labels, matched, given = (value.gather(1, places) for value in (labels, matches.matched, given))
        return Drawn(boxes, labels, wanted, matched, given, known > 0, known > 1)

    def read(self, head: Any, maps: Maps, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Of boxes [B, S, 4]: logits [B, S, C + 1], the last for background, and the coder's numbers [B, S, K, 4], K
        boxes for each, one or one a class."""
        logits, deltas = head(self.pool(maps, boxes, self.box_head.pooled))
        shape = boxes.shape[:2]
        return logits.float().view(*shape, -1), deltas.float().view(*shape, -1, 4)

    def pool(self, maps: Maps, boxes: Tensor, side: int) -> Tensor:
        """[B * S, channels, side, side] of boxes [B, S, 4]. The coarsest level is for proposals alone."""
        from detkernel_detectors.heads.rcnn import pooled_of

        return pooled_of(maps.features, maps.strides[:-1], boxes, side, self.sampling_ratio, self.aligned)

    def box_losses(
        self, found: Drawn, logits: Tensor, deltas: Tensor, coder: BoxCoder, loss: BoxLoss
    ) -> dict[str, Tensor]:
        """Softmax cross-entropy of all that are drawn, and the boxes of the positive ones, both divided by how many are
        drawn."""
        kinds = deltas.shape[2]
        own = (found.labels.clamp(max=kinds - 1) if kinds > 1 else found.labels * 0)[..., None, None]
        told = deltas.gather(2, own.expand(-1, -1, 1, 4))[:, :, 0]
        # A refined box may have no extent, from which no background box can be told.
        plain = found.boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
        priors, wanted = (torch.where(found.positive[..., None], one, plain) for one in (found.boxes, found.wanted))
        count = shared_count(found.chosen)
        labels = found.labels
        entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        right = (logits.argmax(-1) == labels) & found.chosen
        return {
            "loss_cls": averaged(entropy.view_as(labels), found.chosen, count),
            "loss_bbox": averaged(box_losses(loss, coder, priors, told, wanted), found.positive, count),
            "acc": 100 * right.sum() / found.chosen.sum().clamp(min=1),
        }

    # Inference: a box for every class; what overlaps another of its class is dropped.

    def detected(self, logits: Tensor, boxes: Tensor, valid: Tensor, sizes: Tensor | None) -> Predictions:
        """Of logits [B, N, C + 1] and boxes [B, N, K, 4], one or one a class, where they are `valid` [B, N]."""
        from detkernel_detection.nms import suppressed

        scores = torch.where(valid[..., None], logits.softmax(-1)[..., :-1], -1.0)
        classes, kinds = scores.shape[-1], boxes.shape[2]
        most = min(classes, int(1 / max(self.score_thresh, 1 / classes))) * scores.shape[1]
        best, places = scores.flatten(1).topk(most)
        box = places if kinds > 1 else places // classes
        boxes = clip(boxes.flatten(1, 2).gather(1, box[..., None].expand(-1, -1, 4)), sizes)
        valid = (best > self.score_thresh) & larger(boxes, self.min_size)
        return suppressed(boxes, best, places % classes, valid, self.nms_thresh, self.max_detections)


@plugin(needs=("masks",))
class MaskedRcnn(Rcnn):
    """What R-CNNs with masks share."""

    mask_head: MaskHead = option(factory=FcnMaskHead, help="what predicts masks of what is pooled of a box")
    mask_threshold: float = option(default=0.5, above=0, below=1, help="probability from which a pixel is the object's")
    mask_paste: Literal["exact", "expanded"] = option(
        default="exact",
        help="how masks come onto the image: exactly where the box is (MMDetection), or enlarged by a pixel and to "
        "whole pixels (torchvision)",
    )

    # The mask of its object's class for each positive box, from a pooling of its own.

    def mask_losses(self, found: Drawn, maps: Maps, targets: Targets, sizes: Tensor | None, head: Any) -> Tensor:
        """The mean cross-entropy of the pixels of positive boxes."""
        assert targets.masks is not None
        most = min(int(self.sampled * self.positive), found.labels.shape[1])  # the first ones; no others are positive
        most = needed(found.positive, most)
        found = Drawn(*(value[:, :most] for value in found))
        logits = self._masks(maps, found.boxes, found.labels, head)
        truth = _masks_of(found, targets.masks, sizes, head.side).to(logits.dtype)
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-2, -1))
        return averaged(entropy, found.positive, shared_count(found.positive))

    def with_masks(self, found: Predictions, maps: Maps, heads: Any) -> Predictions:
        """Detections with their masks: the mean of what each of some heads says."""
        masks = [self._masks(maps, found.boxes, found.labels, head).sigmoid() for head in heads]
        return found._replace(masks=torch.stack(masks).mean(0))

    def _masks(self, maps: Maps, boxes: Tensor, labels: Tensor, head: Any) -> Tensor:
        """Logits [B, S, side, side] of boxes [B, S, 4], each of its class."""
        logits: Tensor = head(self.pool(maps, boxes, self.mask_head.pooled), labels.flatten()).float()
        return logits.view(*labels.shape, *logits.shape[1:])


def needed(positive: Tensor, most: int) -> int:
    """How many of the first `most` places of each image are worth computing, of those that are `positive` [B, S], which
    come first: all, since shapes must not depend on the data; on a CPU, which is not asked but looked at, and where
    every place costs as much, as many as the image with the most of them has, unless the model is being compiled."""
    if positive.device.type != "cpu" or torch.compiler.is_compiling():
        return most
    return min(max(int(positive.sum(1).numpy().max(initial=0)), 1), most)


def _masks_of(found: Drawn, masks: Tensor, sizes: Tensor | None, side: int) -> Tensor:
    """bool [B, S, side, side]: what of its object's mask lies in each box, by RoIAlign.

    Masks end with their image, not with the batch: at the border, the outermost pixel goes on.
    """
    from torchvision.ops import roi_align

    batch, places, height, width = masks.shape
    if sizes is not None:
        rows, columns = (torch.arange(extent, device=masks.device) for extent in (height, width))
        rows, columns = rows.minimum(sizes[:, :1] - 1), columns.minimum(sizes[:, 1:] - 1)  # [B, H], [B, W]
        number = torch.arange(batch, device=masks.device)[:, None, None, None]
        place = torch.arange(places, device=masks.device)[:, None, None]
        masks = masks[number, place, rows[:, None, :, None], columns[:, None, None]]
    number = torch.arange(batch, device=masks.device)[:, None] * places + found.matched
    rois = torch.cat([number[..., None].to(found.boxes.dtype), found.boxes], -1).flatten(0, 1)
    pooled: Tensor = roi_align(masks.flatten(0, 1)[:, None].float(), rois, side, 1.0, 0, True)
    return (pooled >= 0.5).view(batch, -1, side, side)


def within(priors: Priors, border: int, maps: Maps, sizes: Tensor | None) -> Priors:
    """Without the priors that reach over a side of their image by more than `border` pixels."""
    limit = (maps.inside(None, 1) if sizes is None else sizes).flip(1)[:, None]  # [B, 1, 2]: width and height
    low, high = priors.boxes[:, :2] >= -border, priors.boxes[:, 2:] < limit + border
    return priors._replace(valid=priors.valid & low.all(-1) & high.all(-1))


def with_objects(matches: Matches, targets: Targets) -> Matches:
    """The same with the objects in front, each its own. An assigner is not shown them: what it gives an object that no
    proposal overlaps well would be the object itself."""
    own = torch.arange(targets.valid.shape[1], device=targets.valid.device).expand_as(targets.valid)
    parts = (own, targets.valid, torch.zeros_like(targets.valid))
    return Matches(*(torch.cat(each, 1) for each in zip(parts, matches[:3], strict=True)))


def drawn(matches: Matches, count: int, share: float) -> Matches:
    """At most `count` priors of each image by chance, at most that `share` of them positive; the others are ignored.

    A prior's random number ranks it among its kind, so that shapes do not depend on how many there are.
    """
    chance = torch.rand_like(matches.matched, dtype=torch.float32)
    some = torch.full_like(matches.matched[:, :1], int(count * share))
    positive = _first(matches.positive, chance, some, int(count * share))
    negative = _first(matches.negative, chance, count - positive.sum(1, keepdim=True), count)
    return Matches(matches.matched, positive, negative)


def _first(which: Tensor, chance: Tensor, count: Tensor, most: int) -> Tensor:
    """bool [B, N]: the `count` [B, 1] of `which` with the highest chance; no count is above `most`."""
    places = torch.where(which, chance, -1.0).topk(min(most, which.shape[1])).indices
    taken = torch.arange(places.shape[1], device=places.device) < count
    return which & torch.zeros_like(which).scatter(1, places, taken)
