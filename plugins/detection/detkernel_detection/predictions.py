"""From what a detector predicts, in the padded batch, to detections in the coordinates of the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from detkernel_detection.structures import Batch, Detections

if TYPE_CHECKING:
    from detkernel_detection.detector import Detector


class Predictions(NamedTuple):
    """What a detector finds in B images: K places each, those that are `valid` first and by falling score."""

    boxes: Tensor
    """float32 [B, K, 4] xyxy in pixels of the batch's images."""
    scores: Tensor
    """float32 [B, K], 0..1."""
    labels: Tensor
    """int64 [B, K], 0-based positions in the model's `classes`."""
    valid: Tensor
    """bool [B, K]: which are detections."""
    masks: Tensor | None = None
    """float32 [B, K, h, w], 0..1: how likely each pixel is the object's, on a grid over its box (`mask_space = "box"`)
    or over the batch's images (`"image"`)."""
    keypoints: Tensor | None = None
    """float32 [B, K, P, 3] x, y in pixels of the batch's images, and a score."""
    fields: dict[str, Tensor] | None = None
    """Further values, [B, K] or [B, K, ...], by name, as they are wanted in `Detections.fields`."""


def detect(model: Any, batch: Batch, detector: Detector | None = None, **arguments: Any) -> list[Detections]:
    """What a model finds in a batch, one `Detections` an image. `detector`: the model without what wraps it."""
    predictions = model(batch.images, None, batch.image_sizes, **arguments)
    return to_detections(predictions, batch, model if detector is None else detector)


def to_detections(predictions: Predictions, batch: Batch, model: Detector) -> list[Detections]:
    """One `Detections` an image, in the coordinates of its file, clipped to it. Asks the device for the counts."""
    counts = predictions.valid.sum(1).tolist()
    return [_detections(predictions, batch, number, int(count), model) for number, count in enumerate(counts)]


def _detections(found: Predictions, batch: Batch, number: int, count: int, model: Detector) -> Detections:
    (y, x), (height, width) = batch.scales[number], batch.original_sizes[number]
    boxes = found.boxes[number, :count].float()
    if (y, x) != (1.0, 1.0):
        boxes = boxes / boxes.new_tensor([x, y, x, y])
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    masks = keypoints = None
    if found.masks is not None:
        grid = found.masks[number, :count].float()
        if model.mask_space == "box":
            paste = paste_masks if model.mask_paste == "expanded" else paste_masks_exactly
            pasted = paste(grid, boxes, (height, width))
        else:
            pasted = resize_masks(grid, batch.sizes[number], (height, width))
        masks = (pasted >= model.mask_threshold).to(torch.uint8)
    if found.keypoints is not None:
        keypoints = found.keypoints[number, :count].float() / boxes.new_tensor([x, y, 1.0])
    return Detections(
        image_id=batch.image_ids[number],
        index=batch.indices[number],
        boxes=boxes,
        scores=found.scores[number, :count].float(),
        labels=found.labels[number, :count],
        masks=masks,
        keypoints=keypoints,
        fields={name: values[number, :count] for name, values in (found.fields or {}).items()},
    )


def paste_masks(grid: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, h, w] over the boxes [N, 4] -> [N, height, width] over the image, as torchvision pastes them."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    pasted: Tensor = paste_masks_in_image(grid[:, None], boxes, size)
    return pasted[:, 0]


def paste_masks_exactly(grid: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, h, w] over the boxes [N, 4] -> [N, height, width] over the image: at the centre of each pixel what lies there
    between the centres of the grid's cells, and nothing beyond (as MMDetection pastes them)."""
    height, width = size
    rows = _shares(grid.shape[1], boxes[:, 1], boxes[:, 3], height)
    columns = _shares(grid.shape[2], boxes[:, 0], boxes[:, 2], width)
    return rows @ grid @ columns.transpose(1, 2)


def _shares(cells: int, low: Tensor, high: Tensor, pixels: int) -> Tensor:
    """[N, pixels, cells]: how much of each cell between `low` and `high` [N] is in each pixel, along one axis."""
    centres = torch.arange(pixels, device=low.device) + 0.5
    extent = (high - low).clamp(min=1e-6)[:, None]
    places = (centres - low[:, None]) / extent * cells - 0.5
    return (1 - (places[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)


def resize_masks(grid: Tensor, size: Sequence[int], original: tuple[int, int]) -> Tensor:
    """[N, H, W] over the padded batch -> [N, height, width] over the file's image; `size`: (h, w) without padding."""
    if not len(grid):
        return grid.new_zeros((0, *original))
    height, width = size
    resized = functional.interpolate(grid[:, None, :height, :width], original, mode="bilinear", align_corners=False)
    return resized[:, 0]
