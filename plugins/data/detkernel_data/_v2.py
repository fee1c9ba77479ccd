"""Transforms of torchvision.transforms.v2, made by name with checked arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from detkernel import UserError, wrong
from detkernel.detection import Sample, Target
from detkernel.errors import did_you_mean
from torchvision import tv_tensors
from torchvision.transforms import v2

from detkernel_data._geometry import moved, sound

_UNFIT = {
    "Compose",
    "RandomApply",
    "RandomChoice",
    "RandomOrder",
    "Lambda",
    "CutMix",
    "MixUp",
    "Transform",
    "FiveCrop",
    "TenCrop",
}
"""What takes transforms, functions or whole batches, or returns several pictures."""


def make(part: object, name: str, args: Mapping[str, Any]) -> v2.Transform:
    """The transform. Raises `ConfigError` for a name or an argument that it does not have."""
    known = {
        other
        for other, cls in vars(v2).items()
        if isinstance(cls, type) and issubclass(cls, v2.Transform) and other not in _UNFIT
    }
    if name not in known:
        raise wrong(
            part, "name", f"torchvision.transforms.v2 has no '{name}' that fits here{did_you_mean(name, known)}"
        )
    cls = getattr(v2, name)
    signature = inspect.signature(cls)
    for argument in args:
        if argument not in signature.parameters:
            hint = did_you_mean(argument, signature.parameters)
            raise wrong(part, "args", f"{name} has no argument '{argument}'{hint}")
    try:
        signature.bind(**args)
        made: v2.Transform = cls(**args)
    except (TypeError, ValueError) as error:
        raise wrong(part, "args", f"{name}{signature}: {error}") from None
    return made


def apply(transform: v2.Transform, sample: Sample) -> Sample:
    """Apply it to the picture and all that is annotated in it."""
    target = sample.target
    given: dict[str, Any] = {
        "image": tv_tensors.Image(sample.image),
        "boxes": tv_tensors.BoundingBoxes(target.boxes, format="XYXY", canvas_size=sample.size),
        "labels": target.labels,
    }
    if target.masks is not None:
        given["masks"] = tv_tensors.Mask(target.masks)
    if target.keypoints is not None:
        if "Flip" in type(transform).__name__:
            raise UserError(f"v2: {type(transform).__name__} does not swap left and right keypoints; use `flip`")
        given["keypoints"] = tv_tensors.KeyPoints(target.keypoints[..., :2], canvas_size=sample.size)
    found = transform(given)
    sample.image = found["image"].as_subclass(torch.Tensor)
    boxes = _clip(found["boxes"].as_subclass(torch.Tensor).float(), sample.size)
    masks = found["masks"].as_subclass(torch.Tensor) if target.masks is not None else None
    keypoints = None
    if target.keypoints is not None:
        places = found["keypoints"].as_subclass(torch.Tensor).float()
        points, (height, width) = torch.cat([places, target.keypoints[..., 2:]], dim=-1), sample.size
        keypoints = moved(points, 0, 0, width, height)
    sample.target = sound(Target(boxes, found["labels"], masks, keypoints))
    return sample


def _clip(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
