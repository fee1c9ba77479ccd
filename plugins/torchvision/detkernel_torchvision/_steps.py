"""One batch through a detector, in training and in validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detkernel import DataError, Run
from detkernel_detection import Batch, Detections, Losses, Target
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detkernel_torchvision._pictures import Pictures
from detkernel_torchvision._small_maps import explained

if TYPE_CHECKING:
    from detkernel_torchvision.models import Detector

LOSSES = {
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_bbox",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_bbox",
    "classification": "loss_cls",
    "bbox_regression": "loss_bbox",
    "bbox_ctrness": "loss_centerness",
}
"""torchvision's names of losses -> MMDetection's."""


def train(options: Detector, run: Run, batch: Batch) -> Losses:
    """Named losses of a batch."""
    needs = getattr(type(options), "needs", ())
    targets = [_target(target, options.background, needs) for target in batch.each_target()]
    with explained(run, batch):
        losses = run.model(Pictures(batch), targets)
    return {LOSSES.get(name, name): loss for name, loss in losses.items()}


def detect(options: Detector, run: Run, batch: Batch) -> Sequence[Detections]:
    """Detections of a batch, in the coordinates of the files."""
    with explained(run, batch):
        found = run.model(Pictures(batch))
    threshold = getattr(options, "mask_threshold", 0.5)
    return [_detections(batch, number, one, options.background, threshold) for number, one in enumerate(found)]


def _target(target: Target, background: bool, needs: Sequence[str]) -> dict[str, Tensor]:
    given = {"boxes": target.boxes, "labels": target.labels + int(background)}
    for name in needs:
        value = getattr(target, name)
        if value is None:
            raise DataError(f"the model is trained on {name}, but the training data has none; use data with {name}")
        given[name] = value
    return given


def _detections(batch: Batch, number: int, found: dict[str, Tensor], background: bool, threshold: float) -> Detections:
    (y, x), (height, width) = batch.scales[number], batch.original_sizes[number]
    boxes = found["boxes"]
    if (y, x) != (1.0, 1.0):
        boxes = boxes / boxes.new_tensor([x, y, x, y])
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    extra: dict[str, Any] = {}
    if "masks" in found:
        pasted = paste_masks_in_image(found["masks"], boxes, (height, width))[:, 0]
        extra["masks"] = (pasted >= threshold).to(torch.uint8)
    if "keypoints" in found:
        extra["keypoints"] = found["keypoints"] / boxes.new_tensor([x, y, 1.0])
    labels = found["labels"] - int(background)
    return Detections(batch.image_ids[number], batch.indices[number], boxes, found["scores"], labels, **extra)
