"""Non-maximum suppression of padded detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from detkernel_detection.predictions import Predictions

ROUNDS = 4
"""Between two questions to the device."""
PAIRS = 2**26
"""Most pairs of boxes that are compared at once: 128 MiB, and in eager mode several times as much for a moment."""


def suppressed(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    valid: Tensor,
    iou: float,
    most: int,
    counts: Sequence[int] | None = None,
    fields: Mapping[str, Tensor] | None = None,
) -> Predictions:
    """The best of B images, `most` places each: of boxes [B, K, 4] of one class that overlap by more than `iou`, the
    one with the highest score. `valid` [B, K]: which are detections at all. `counts`: the K in runs that have no label
    in common, so that fewer pairs are compared. `fields`: further values [B, K] of the boxes, for `Predictions.fields`.

    Classes are held apart by moving their boxes (as MMDetection and torchvision do). It asks the device a few times,
    and compiles without a break.
    """
    scores = torch.where(valid, scores, -1.0)
    reach = torch.where(valid[..., None], boxes, 0.0).amax((1, 2))[:, None] + 1
    apart = torch.where(valid[..., None], boxes + (labels * reach)[..., None], -1.0)  # no area: they suppress nothing
    few = max(counts or boxes.shape[1:2]) ** 2 <= PAIRS
    at_once = few and boxes.device.type != "cpu"
    kept = in_rounds(apart, scores, iou, counts) if at_once else _one_by_one(apart, scores, iou)
    chosen, places = torch.where(kept, scores, -1.0).topk(min(most, scores.shape[1]))
    found = chosen >= 0
    boxes = torch.where(found[..., None], boxes.gather(1, places[..., None].expand(-1, -1, 4)), 0.0)
    labels = torch.where(found, labels.gather(1, places), 0)
    room = most - scores.shape[1]
    if room > 0:
        boxes = torch.nn.functional.pad(boxes, (0, 0, 0, room))
        chosen, labels, found = (torch.nn.functional.pad(value, (0, room)) for value in (chosen, labels, found))
    carried = None
    if fields is not None:
        carried = {
            name: torch.nn.functional.pad(values.gather(1, places), (0, max(room, 0)))
            for name, values in fields.items()
        }
    return Predictions(boxes, chosen.clamp(min=0), labels, found, fields=carried)


@torch.library.custom_op("detkernel::nms", mutates_args=())
def _one_by_one(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """bool [B, K]: torchvision's, image by image."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for number in range(len(boxes)):
        kept[number, nms(boxes[number], scores[number], iou)] = True
    return kept


def in_rounds(boxes: Tensor, scores: Tensor, iou: float, counts: Sequence[int] | None = None) -> Tensor:
    """bool [B, K], the same, for devices that do much at once (docs/performance.md has what that brought)."""
    kept, start = [], 0
    for count in counts or [boxes.shape[1]]:
        order = scores[:, start : start + count].argsort(dim=1, descending=True, stable=True)
        some = boxes[:, start : start + count].gather(1, order[..., None].expand(-1, -1, 4))
        images = max(1, PAIRS // max(count, 1) ** 2)
        parts = [some[first : first + images] for first in range(0, len(some), images)]
        each = torch.cat([_first_of_overlapping(_overlapping(part, iou)) for part in parts])
        kept.append(torch.zeros_like(each).scatter(1, order, each))
        start += count
    return torch.cat(kept, 1)


def _overlapping(boxes: Tensor, iou: float) -> Tensor:
    """float16 [B, K, K]: 1 where a box, the row's, overlaps a later one by more than `iou`."""
    one, other = boxes[:, :, None], boxes[:, None]
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    shared, areas = sides[..., 0] * sides[..., 1], (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    places = torch.arange(boxes.shape[1], device=boxes.device)
    over = shared / (areas[:, :, None] + areas[:, None] - shared) > iou
    return (over & (places[:, None] < places)).half()


@torch.library.custom_op("detkernel::first_of_overlapping", mutates_args=())
def _first_of_overlapping(overlapping: Tensor) -> Tensor:
    """bool [B, K]: a box is kept if none that is kept before it overlaps it.

    Each round applies this to all boxes at once, beginning with all. After k rounds the first k are right and stay so;
    as soon as nothing changes, all are. It takes as many rounds as one box decides on the next in a row, hardly ever
    more than 20.
    """
    kept = overlapping.new_ones(overlapping.shape[:2], dtype=torch.bool)
    while True:
        before = kept
        for _ in range(ROUNDS):
            kept = torch.bmm(kept[:, None].half(), overlapping)[:, 0] == 0
        if torch.equal(before, kept):
            return kept


@_one_by_one.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@_first_of_overlapping.register_fake
def _(overlapping: Tensor) -> Tensor:
    return overlapping.new_empty(overlapping.shape[:2], dtype=torch.bool)
