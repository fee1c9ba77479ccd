"""Non-maximum suppression of padded detections."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from detkernel_detection.predictions import Predictions


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, iou: float, most: int) -> Predictions:
    """The best of B images, `most` places each: of boxes [B, K, 4] of one class that overlap by more than `iou`, the
    one with the highest score. `valid` [B, K]: which are detections at all.

    Classes are held apart by moving their boxes (as MMDetection and torchvision do). Asks the device once an image.
    """
    scores = torch.where(valid, scores, -1.0)
    reach = torch.where(valid[..., None], boxes, 0.0).amax((1, 2))[:, None] + 1
    apart = torch.where(valid[..., None], boxes + (labels * reach)[..., None], -1.0)  # no area: they suppress nothing
    kept = torch.zeros_like(valid)
    for number in range(len(boxes)):
        kept[number, nms(apart[number], scores[number], iou)] = True
    chosen, places = torch.where(kept, scores, -1.0).topk(min(most, scores.shape[1]))
    found = chosen >= 0
    boxes = torch.where(found[..., None], boxes.gather(1, places[..., None].expand(-1, -1, 4)), 0.0)
    labels = torch.where(found, labels.gather(1, places), 0)
    room = most - scores.shape[1]
    if room > 0:
        boxes = torch.nn.functional.pad(boxes, (0, 0, 0, room))
        chosen, labels, found = (torch.nn.functional.pad(value, (0, room)) for value in (chosen, labels, found))
    return Predictions(boxes, chosen.clamp(min=0), labels, found)
