"""Geometry of a batch: its images, boxes, masks and keypoints at once, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detkernel_detection import Batch
from detkernel_detection.normalize import inside
from torchvision.transforms.v2 import functional as F

from detkernel_data.transforms.geometry import stretched


def resize_batch(batch: Batch, size: tuple[int, int], field_kinds: Mapping[str, str]) -> None:
    """Resize a batch to (height, width) in place, each image with its share of the padding."""
    height, width = batch.images.shape[-2:]
    if size == (height, width):
        return
    y, x = size[0] / height, size[1] / width
    batch.sizes = [
        (min(size[0], max(1, int(high * y + 0.5))), min(size[1], max(1, int(wide * x + 0.5))))
        for high, wide in batch.sizes
    ]
    batch.scales = [(one * y, other * x) for one, other in batch.scales]
    batch.image_sizes = _on(batch, batch.sizes)
    images = F.resize_image(batch.images, list(size), antialias=True)
    known = inside(batch.image_sizes, *size)[:, None]
    batch.images = (images * known).contiguous(memory_format=torch.channels_last)
    targets = batch.targets
    fields = dict(targets.fields or {})
    for name, kind in field_kinds.items():
        if kind == "angle" and name in fields and x != y:
            fields[name] = stretched(fields[name], y, x)
    batch.targets = targets._replace(
        boxes=targets.boxes * _on(batch, [x, y, x, y]),
        masks=None if targets.masks is None else F.resize_mask(targets.masks, list(size)),
        keypoints=None if targets.keypoints is None else targets.keypoints * _on(batch, [x, y, 1.0]),
        fields=fields or None,
    )


def _on(batch: Batch, values: Any) -> torch.Tensor:
    """A few numbers on the device, without waiting for it."""
    made = torch.tensor(values)
    if batch.images.device.type == "cuda":
        made = made.pin_memory()
    return made.to(batch.images.device, non_blocking=True)
