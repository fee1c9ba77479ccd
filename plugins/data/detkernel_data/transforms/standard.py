"""The standard transforms. Images stay uint8 and channels-last; models normalise on the device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from detkernel import option, plugin, state
from detkernel_detection import Dataset, Sample, Transform


@plugin
class Resize(Transform):
    """Resize to a short and a long side with the aspect kept, or to a fixed size.

    With several `short` sides one is drawn for each image (multi-scale training); with `factor`, how large it becomes
    relative to these (large-scale jitter).
    """

    scales_only: ClassVar[bool] = True
    moves_fields: ClassVar[tuple[str, ...]] = ("value", "angle")

    short: int | list[int] | None = option(
        default=None, at_least=1, help="the shorter side in pixels, or several to draw from"
    )
    long: int | None = option(default=None, at_least=1, help="what the longer side may be at most, in pixels")
    size: tuple[int, int] | None = option(
        default=None, at_least=1, help="[height, width] to resize to, whatever the aspect"
    )
    factor: tuple[float, float] = option(
        default=(1.0, 1.0), above=0, help="least and most of what the size is multiplied by, drawn for each image"
    )
    antialias: bool = option(default=True, help="low-pass before making smaller, as Pillow does")

    def __attrs_post_init__(self) -> None:
        if self.factor[0] > self.factor[1]:
            raise ValueError(f"factor: expected the smaller number first, got {list(self.factor)}")
        if (self.size is None) == (self.short is None and self.long is None):
            raise ValueError("size: give either `size`, or `short` and `long`")
        if self.short == []:
            raise ValueError("short: expected at least one side")

    def __call__(self, sample: Sample) -> Sample:
        from detkernel_data.transforms import geometry

        return geometry.resize(sample, self._target(*sample.size), self.antialias)

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        most = self.factor[1]
        if self.size is not None:
            return _times(self.size, most)
        if size is None:
            return None if self.long is None else _times((self.long, self.long), most)
        return self._scaled(*size, max(self.short) if isinstance(self.short, list) else self.short, most)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        import torch

        (low, most), short = self.factor, self.short
        factor = low + float(torch.rand(())) * (most - low) if low < most else low
        if self.size is not None:
            return _times(self.size, factor)
        if isinstance(short, list):
            short = short[int(torch.randint(len(short), ()))]
        return self._scaled(height, width, short, factor)

    def _scaled(self, height: int, width: int, short: int | None, larger: float) -> tuple[int, int]:
        factors = []
        if short is not None:
            factors.append(short / min(height, width))
        if self.long is not None:
            factors.append(self.long / max(height, width))
        return _times((height, width), min(factors) * larger)


@plugin
class Pad(Transform):
    """Make an image larger at the right and the bottom, up to a size, as YOLOX and RTMDet do.

    Batches are padded in any case, with what a network takes for nothing; this is part of the image.
    """

    scales_only: ClassVar[bool] = True
    moves_fields: ClassVar[tuple[str, ...]] = ("any",)

    size: tuple[int, int] = option(at_least=1, help="[height, width] at least")
    fill: tuple[int, int, int] = option(
        default=(114, 114, 114), at_least=0, at_most=255, help="colour where no image is"
    )

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if size is None else self._target(size)

    def __call__(self, sample: Sample) -> Sample:
        from detkernel_data.transforms import geometry

        return geometry.place(sample, 0, 0, self._target(sample.size), self.fill)

    def _target(self, size: tuple[int, int]) -> tuple[int, int]:
        return max(size[0], self.size[0]), max(size[1], self.size[1])


@plugin
class Flip(Transform):
    """Mirror an image at random; keypoints whose names say left and right (`left_eye`, `Right Eye`, `l_eye`) swap."""

    moves_fields: ClassVar[tuple[str, ...]] = ("value", "angle")

    probability: float = option(default=0.5, at_least=0, at_most=1, help="share of the images that are mirrored")
    direction: Literal["horizontal", "vertical", "both"] = option(
        default="horizontal", help="left to right, upside down, or one of the two and both at once, at random"
    )
    _swapped: list[int] = state(factory=list)

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size

    def prepare(self, dataset: Dataset) -> None:
        names = list(dataset.keypoint_names)
        partners = [_other_side(name) for name in names]
        self._swapped = [names.index(name) if name in names else number for number, name in enumerate(partners)]

    def __call__(self, sample: Sample) -> Sample:
        import torch

        from detkernel_data.transforms import geometry

        chance, choice = torch.rand(2).tolist()
        if chance >= self.probability:
            return sample
        horizontal = self.direction == "horizontal" or (self.direction == "both" and choice < 2 / 3)
        vertical = self.direction == "vertical" or (self.direction == "both" and choice >= 1 / 3)
        if horizontal:
            sample = geometry.flip(sample, -1, self._swapped)
        return geometry.flip(sample, -2, self._swapped) if vertical else sample


@plugin
class Crop(Transform):
    """Cut a random window out of an image; objects are clipped to it, and left out if too little of them is seen."""

    moves_fields: ClassVar[tuple[str, ...]] = ("value", "angle")

    size: tuple[int, int] | None = option(default=None, at_least=1, help="[height, width] in pixels, at most")
    share: tuple[float, float] = option(
        default=(0.3, 1.0), above=0, at_most=1, help="without `size`: least and most of each side that is kept"
    )
    sides: tuple[int, int] | None = option(
        default=None, at_least=1, help="instead of `share`: least and most pixels of each side, of which each is drawn"
    )
    resize: Resize | None = option(
        default=None, help="what is done to an image before it is cropped, and only then, as DETR does"
    )
    visible: float = option(default=0.25, at_least=0, at_most=1, help="share of its box that an object must keep")
    probability: float = option(default=1.0, at_least=0, at_most=1, help="share of the images that are cropped")
    keep_objects: bool = option(default=True, help="leave an image whole if the window would have no object")

    def __attrs_post_init__(self) -> None:
        for name, span in (("share", self.share), ("sides", self.sides)):
            if span is not None and span[0] > span[1]:
                raise ValueError(f"{name}: expected the smaller number first, got {list(span)}")

    def __call__(self, sample: Sample) -> Sample:
        import torch

        from detkernel_data.transforms import geometry

        chance, high, wide, top, left = torch.rand(5).tolist()
        if chance >= self.probability:
            return sample
        if self.resize is not None:
            sample = self.resize(sample)
        height, width = sample.size
        given = self.size or (self._side(height, high), self._side(width, wide))
        h, w = (max(1, min(side, whole)) for side, whole in zip(given, (height, width), strict=True))
        y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
        window = (x, y, x + w, y + h)
        boxes = sample.target.boxes
        keep = geometry.visible_share(boxes, window) >= max(self.visible, 1e-6)
        keep &= geometry.is_valid(geometry.clipped(boxes, window))
        if self.keep_objects and len(keep) and not keep.any():
            return sample
        return geometry.crop(sample, window, keep)

    def _side(self, whole: int, drawn: float) -> int:
        """The side of the window, where a number of 0..1 is drawn for it."""
        if self.sides is None:
            least, most = self.share
            return round(whole * (least + drawn * (most - least)))
        low, high = (min(whole, side) for side in self.sides)
        return low + int(drawn * (high - low + 1))


@plugin
class MinIouCrop(Transform):
    """SSD's crop (Liu et al. 2016): a window whose overlap with some object is at least a drawn one, or no crop.

    Objects stay whose centre lies in the window; one at least does.
    """

    moves_fields: ClassVar[tuple[str, ...]] = ("value", "angle")

    overlaps: list[float] = option(
        factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.7, 0.9],
        at_least=0,
        at_most=1,
        help="the least overlaps (IoU) to draw from, beside the whole image; 0: any window",
    )
    smallest: float = option(default=0.3, above=0, at_most=1, help="least share of each side that a window has")
    tries: int = option(default=50, at_least=1, help="windows that are tried before another overlap is drawn")
    probability: float = option(
        default=1.0, at_least=0, at_most=1, help="share of the images for which an overlap is drawn"
    )

    def __attrs_post_init__(self) -> None:
        if not self.overlaps:
            raise ValueError("overlaps: expected at least one")

    def __call__(self, sample: Sample) -> Sample:
        import torch

        if self.probability < 1 and torch.rand(()).item() >= self.probability:
            return sample
        from detkernel_data.transforms import geometry

        return geometry.min_iou_crop(sample, self.overlaps, self.smallest, self.tries)


@plugin
class Expand(Transform):
    """Put an image at a random place on a larger canvas (SSD's zoom out): small objects to learn from."""

    moves_fields: ClassVar[tuple[str, ...]] = ("value", "angle")

    ratio: tuple[float, float] = option(default=(1.0, 4.0), at_least=1, help="least and most that each side grows by")
    probability: float = option(default=0.5, at_least=0, at_most=1, help="share of the images that are expanded")
    fill: tuple[int, int, int] = option(default=(124, 116, 104), at_least=0, at_most=255, help="colour of the canvas")

    def __attrs_post_init__(self) -> None:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio: expected the smaller number first, got {list(self.ratio)}")

    def __call__(self, sample: Sample) -> Sample:
        import torch

        from detkernel_data.transforms import geometry

        chance, grow, top, left = torch.rand(4).tolist()
        if chance >= self.probability:
            return sample
        return geometry.expand(sample, self.ratio[0] + grow * (self.ratio[1] - self.ratio[0]), top, left, self.fill)


@plugin
class Color(Transform):
    """Change brightness, contrast, saturation and hue at random, all in one pass over the image.

    The four are one affine map of RGB: contrast turns about the image's mean grey, and hue is a rotation in YIQ.
    """

    scales_only: ClassVar[bool] = True
    moves_fields: ClassVar[tuple[str, ...]] = ("any",)

    brightness: float = option(default=0.125, at_least=0, at_most=1, help="factor from 1 less this to 1 plus this")
    contrast: float = option(default=0.5, at_least=0, at_most=1, help="the same for the distance to the mean grey")
    saturation: float = option(default=0.5, at_least=0, at_most=1, help="the same for the distance to the own grey")
    hue: float = option(default=0.05, at_least=0, at_most=0.5, help="most turn of the hue, in turns")
    probability: float = option(default=0.5, at_least=0, at_most=1, help="share of the images, for each of the four")

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size

    def __call__(self, sample: Sample) -> Sample:
        from detkernel_data.transforms import color

        spans = (self.brightness, self.contrast, self.saturation, self.hue)
        sample.image = color.jitter(sample.image, spans, self.probability)
        return sample


@plugin
class Normalize(Transform):
    """Make an image float32, less a mean, divided by a deviation.

    The models of detkernel do this on the device, in a quarter of the traffic; they leave a float image as it is.
    """

    scales_only: ClassVar[bool] = True
    moves_fields: ClassVar[tuple[str, ...]] = ("any",)

    mean: tuple[float, float, float] = option(default=(123.675, 116.28, 103.53), help="of R, G and B, on 0..255")
    std: tuple[float, float, float] = option(default=(58.395, 57.12, 57.375), above=0, help="of R, G and B, on 0..255")

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size

    def __call__(self, sample: Sample) -> Sample:
        import torch

        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        sample.image = (sample.image.float() - mean) / std
        return sample


@plugin
class V2(Transform):
    """Any transform of torchvision.transforms.v2, by name, such as `{use: v2, name: RandomGrayscale, args: {p: 0.2}}`.

    Objects whose box it makes smaller than a pixel are left out. One that does not know boxes is refused.
    """

    name: str = option(help="the class, such as RandomRotation")
    args: dict[str, Any] = option(factory=dict, help="its arguments, by name")
    _made: Any = state(default=None)

    def prepare(self, dataset: Dataset) -> None:
        from detkernel_data.transforms import v2

        self._made = v2.make(self, self.name, self.args)
        v2.try_boxes(self, self._made)

    def __call__(self, sample: Sample) -> Sample:
        from detkernel_data.transforms import v2

        return v2.apply(self._made or v2.make(self, self.name, self.args), sample)


_NEEDS_COLOURS = frozenset(
    ("ColorJitter", "GaussianNoise", "JPEG", "RandomAdjustSharpness", "RandomAutocontrast", "RandomEqualize")
) | frozenset(("RandomGrayscale", "RandomInvert", "RandomPhotometricDistort", "RandomPosterize", "RandomSolarize"))
"""Transforms of torchvision that take colours of a known range; they cut normalised ones off."""


def _times(size: tuple[int, int], factor: float) -> tuple[int, int]:
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def misplaced(transforms: Sequence[Transform]) -> str:
    """What is wrong with their order: a transform of colours behind one that normalises them, or ""."""
    normalised = False
    for number, transform in enumerate(transforms):
        name = transform.name if isinstance(transform, V2) else ""
        if normalised and (isinstance(transform, (Color, Expand, Normalize, Pad)) or name in _NEEDS_COLOURS):
            called = name or type(transform).__name__
            return f"{called} (number {number}) takes colours of 0 to 255; put it before what normalises them"
        normalised = normalised or isinstance(transform, Normalize) or name == "Normalize"
    return ""


def _other_side(name: str) -> str:
    """The keypoint's name with left and right exchanged, however they are written."""
    sides = {"left": "right", "right": "left", "l": "r", "r": "l"}

    def exchanged(found: re.Match[str]) -> str:
        text = found.group()
        other = sides[text.lower()]
        return other.upper() if text.isupper() else other.capitalize() if text[0].isupper() else other

    return re.sub(r"left|right|(?<![a-z])[lr](?![a-z])|(?-i:(?<=[a-z])[LR]$)", exchanged, name, flags=re.IGNORECASE)
