"""Geometry of a sample: its image, boxes, masks and keypoints at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detkernel_detection import Sample, Target
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detkernel_data.transforms.color import require_bytes

Window = tuple[int, int, int, int]
"""x1, y1, x2, y2, in whole pixels."""


def resize(sample: Sample, size: tuple[int, int], antialias: bool) -> Sample:
    """Resize to (height, width), and record the factors. A channels-last uint8 image stays such: ten times faster."""
    height, width = sample.size
    if size == (height, width):
        return sample
    y, x = size[0] / height, size[1] / width
    sample.image = F.resize_image(sample.image, list(size), antialias=antialias)
    target = sample.target
    target.boxes = target.boxes * torch.tensor([x, y, x, y])
    if target.masks is not None:
        target.masks = F.resize_mask(target.masks, list(size))
    if target.keypoints is not None:
        target.keypoints = target.keypoints * torch.tensor([x, y, 1.0])
    if x != y:
        _turn(sample, lambda angle: stretched(angle, y, x))
    sample.scale = sample.scale[0] * y, sample.scale[1] * x
    return sample


def stretched(angle: Tensor, y: float, x: float) -> Tensor:
    """Angles in degrees, in an image that was made y times as high and x times as wide; in (-180, 180]."""
    return torch.rad2deg(torch.atan2(angle.deg2rad().sin() * y, angle.deg2rad().cos() * x))


def _turn(sample: Sample, change: Callable[[Tensor], Tensor]) -> None:
    """Change the fields that are angles, in degrees from the x axis towards the y axis; kept in (-180, 180]."""
    fields = sample.target.fields
    for name, kind in sample.field_kinds.items():
        if kind == "angle":
            fields[name] = 180 - (180 - change(fields[name].float())) % 360


def flip(sample: Sample, axis: int, swapped: Sequence[int]) -> Sample:
    """Mirror along an axis: -1 left to right, -2 upside down."""
    side = sample.image.shape[axis]
    sample.image = sample.image.flip(axis)
    target, low = sample.target, 0 if axis == -1 else 1
    boxes = target.boxes.clone()
    boxes[:, low], boxes[:, low + 2] = side - target.boxes[:, low + 2], side - target.boxes[:, low]
    target.boxes = boxes
    if target.masks is not None:
        target.masks = target.masks.flip(axis)
    if target.keypoints is not None:
        points = target.keypoints.clone()
        points[..., low] = torch.where(points[..., 2] > 0, side - points[..., low], points[..., low])
        target.keypoints = points[:, list(swapped)] if swapped else points  # a mirror image, along either axis
    _turn(sample, lambda angle: 180 - angle if axis == -1 else -angle)
    return sample


def clipped(boxes: Tensor, window: Window) -> Tensor:
    """Boxes cut to a window, in the window's own coordinates."""
    x1, y1, x2, y2 = window
    low, high = torch.tensor([x1, y1, x1, y1]), torch.tensor([x2, y2, x2, y2])
    return boxes.clamp(low, high) - low


def area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def visible_share(boxes: Tensor, window: Window) -> Tensor:
    """[N] how much of each box's area lies in a window."""
    return area(clipped(boxes, window)) / area(boxes).clamp(min=1e-9)


def crop(sample: Sample, window: Window, keep: Tensor) -> Sample:
    """Cut out a window, with the objects of `keep`, bool [N]."""
    x1, y1, x2, y2 = window
    sample.image = sample.image[:, y1:y2, x1:x2]
    target = sample.target.keep(keep)
    target.boxes = clipped(target.boxes, window)
    if target.masks is not None:
        target.masks = target.masks[:, y1:y2, x1:x2]
    if target.keypoints is not None:
        target.keypoints = moved(target.keypoints, -x1, -y1, x2 - x1, y2 - y1)
    sample.target = valid_objects(target)
    return sample


def expand(sample: Sample, ratio: float, top: float, left: float, fill: Sequence[int]) -> Sample:
    """Put the image on a canvas `ratio` times as high and wide, at a place given in shares of the free space."""
    require_bytes(sample.image, "expand")
    height, width = sample.size
    high, wide = int(height * ratio), int(width * ratio)
    y, x = int(top * (high - height)), int(left * (wide - width))
    colour = torch.tensor(fill, dtype=sample.image.dtype)
    canvas = colour.expand(high, wide, 3).clone().permute(2, 0, 1)
    canvas[:, y : y + height, x : x + width] = sample.image
    sample.image = canvas
    target = sample.target
    target.boxes = target.boxes + torch.tensor([x, y, x, y])
    if target.masks is not None:
        target.masks = torch.nn.functional.pad(target.masks, (x, wide - width - x, y, high - height - y))
    if target.keypoints is not None:
        target.keypoints = moved(target.keypoints, x, y, wide, high)
    return sample


def min_iou_crop(sample: Sample, overlaps: Sequence[float], smallest: float, tries: int) -> Sample:
    """SSD's crop. One of the choices is the whole image, so that the search ends; an overlap of 0 asks for nothing."""
    boxes, (height, width) = sample.target.boxes, sample.size
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    while len(boxes):
        choice = int(torch.randint(len(overlaps) + 1, ()))
        if choice == len(overlaps):
            return sample
        for high, wide, top, left in torch.rand(tries, 4).tolist():
            h, w = (
                max(1, int(side * (smallest + part * (1 - smallest)))) for side, part in ((height, high), (width, wide))
            )
            if not 0.5 <= h / w <= 2:
                continue
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            window = (x, y, x + w, y + h)
            inside = area(clipped(boxes, window))
            if (inside / (area(boxes) + h * w - inside)).max() < overlaps[choice]:
                continue
            keep = ((centres > torch.tensor([x, y])) & (centres < torch.tensor([x + w, y + h]))).all(1)
            keep &= is_valid(clipped(boxes, window))
            if keep.any():
                return crop(sample, window, keep)
    return sample


def place(sample: Sample, x: int, y: int, size: tuple[int, int], fill: Sequence[int]) -> Sample:
    """Put the image on a canvas of `size`, its upper left corner at x, y; what lies beyond is cut off."""
    require_bytes(sample.image, "a canvas")
    (height, width), (high, wide) = sample.size, size
    window = (max(0, -x), max(0, -y), min(width, wide - x), min(height, high - y))
    boxes = sample.target.boxes
    sample = crop(sample, window, is_valid(clipped(boxes, window)))
    left, top = max(0, x), max(0, y)
    (height, width), target = sample.size, sample.target
    canvas = torch.tensor(fill, dtype=torch.uint8).expand(high, wide, 3).clone().permute(2, 0, 1)
    canvas[:, top : top + height, left : left + width] = sample.image
    sample.image = canvas
    target.boxes = target.boxes + torch.tensor([left, top, left, top])
    if target.masks is not None:
        target.masks = torch.nn.functional.pad(target.masks, (left, wide - width - left, top, high - height - top))
    if target.keypoints is not None:
        target.keypoints = moved(target.keypoints, left, top, wide, high)
    return sample


def fit(sample: Sample, size: tuple[int, int], share: float = 1.0) -> Sample:
    """Resize to as large as it can be within `share` of a (height, width), its aspect kept."""
    height, width = sample.size
    factor = share * min(size[0] / height, size[1] / width)
    return resize(sample, (max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))), antialias=True)


def joined(targets: Sequence[Target]) -> Target:
    """The objects of some targets, one behind the other. All of them have masks, keypoints and fields, or none."""
    first = targets[0]
    return Target(
        torch.cat([target.boxes for target in targets]),
        torch.cat([target.labels for target in targets]),
        None if first.masks is None else torch.cat([target.masks for target in targets]),  # type: ignore[misc]
        None if first.keypoints is None else torch.cat([target.keypoints for target in targets]),  # type: ignore[misc]
        {name: torch.cat([target.fields[name] for target in targets]) for name in first.fields},
    )


def mask_box(mask: Tensor) -> Tensor:
    """float32 [4], xyxy: the box around a mask [H, W] that is not empty."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()


def valid_objects(target: Target) -> Target:
    """Only the objects whose box is at least a pixel wide and high."""
    return target.keep(is_valid(target.boxes))


def is_valid(boxes: Tensor) -> Tensor:
    """[N] whether a box is at least a pixel wide and high."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)


def moved(points: Tensor, x: int, y: int, width: int, height: int) -> Tensor:
    """Keypoints [N, K, 3] moved; those that leave the image are no longer labelled."""
    places = points[..., :2] + torch.tensor([x, y])
    inside = ((places >= 0) & (places <= torch.tensor([width, height]))).all(-1) & (points[..., 2] > 0)
    return torch.cat([places, points[..., 2:]], -1) * inside[..., None]
