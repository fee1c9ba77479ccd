"""Transforms of torchvision.transforms.v2, made by name with checked arguments."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from detkernel import UserError, wrong
from detkernel.errors import did_you_mean
from detkernel_detection import Sample, Target
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import convert_bounding_box_format

from detkernel_data.transforms.geometry import moved, valid_objects

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
"""What takes transforms, functions or whole batches, or returns several images."""


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


def try_boxes(part: object, transform: v2.Transform) -> None:
    """Raises `ConfigError` for a transform that does not know boxes, such as RandAugment."""
    from detkernel_data.loading.batches import generators_kept

    target = Target(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([0]))
    sample = Sample(torch.zeros(3, 64, 64, dtype=torch.uint8), target, 0, 0, (64, 64))
    with generators_kept():
        try:
            apply(transform, sample)
        except (TypeError, NotImplementedError) as error:
            if "BoundingBoxes" in str(error):
                name = type(transform).__name__
                raise wrong(part, "name", f"{name} does not know boxes ({error}); objects would not move") from None
        except Exception:
            pass


def apply(transform: v2.Transform, sample: Sample) -> Sample:
    """Apply it to the image and all that is annotated in it."""
    target, name = sample.target, type(transform).__name__
    given: dict[str, Any] = {
        "image": tv_tensors.Image(sample.image),
        "boxes": tv_tensors.BoundingBoxes(target.boxes, format="XYXY", canvas_size=sample.size),
        "labels": torch.arange(len(target)),  # which of the objects are left
    }
    if target.masks is not None:
        given["masks"] = tv_tensors.Mask(target.masks)
    if target.keypoints is not None:
        if "Flip" in name:
            raise UserError(f"v2: {name} does not swap left and right keypoints; use `flip`")
        given["keypoints"] = tv_tensors.KeyPoints(target.keypoints[..., :2], canvas_size=sample.size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is currently passing through", UserWarning)  # RandomErasing moves nothing
        warnings.filterwarnings("ignore", ".*capabilities of TorchVision are deprecated")  # JPEG
        found = transform(given)
    sample.image = _image(found["image"], name)
    boxes = _clip(_corners(found["boxes"], name), sample.size)
    masks = found["masks"].as_subclass(torch.Tensor) if target.masks is not None else None
    keypoints = None
    if target.keypoints is not None:
        places = found["keypoints"].as_subclass(torch.Tensor).float()
        if len(places) != len(target.keypoints) or len(boxes) != len(places):
            raise UserError(f"v2: {name} leaves {len(boxes)} boxes and {len(places)} objects with keypoints")
        points, (height, width) = torch.cat([places, target.keypoints[..., 2:]], dim=-1), sample.size
        keypoints = moved(points, 0, 0, width, height)
    left = found["labels"]
    fields = {key: values[left] for key, values in target.fields.items()}
    sample.target = valid_objects(Target(boxes, target.labels[left], masks, keypoints, fields))
    return sample


def _image(image: Any, name: str) -> torch.Tensor:
    if not isinstance(image, torch.Tensor):
        raise UserError(f"v2: {name} gives a {type(image).__module__}.{type(image).__name__}, not a tensor")
    plain = image.as_subclass(torch.Tensor)
    return plain.expand(3, -1, -1) if plain.ndim == 3 and len(plain) == 1 else plain  # Grayscale


def _corners(boxes: Any, name: str) -> torch.Tensor:
    """float32 xyxy, whatever the form that the transform left them in."""
    if isinstance(boxes, tv_tensors.BoundingBoxes):
        if tv_tensors.is_rotated_bounding_format(boxes.format):
            raise UserError(f"v2: {name} gives rotated boxes; expected upright ones")
        boxes = convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    plain: torch.Tensor = boxes.as_subclass(torch.Tensor).float()
    return plain


def _clip(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
