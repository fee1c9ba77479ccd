"""Transforms that make one image of several: mosaic, mixup, copy-paste.

They fetch other images as they are in the data set, so they stand before those that resize, flip or crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from detkernel import UserError, option, plugin
from detkernel_detection import Context, Sample, Target, Transform

if TYPE_CHECKING:
    from torch import Tensor

_KINDS = ("value", "angle")
_GREY = (114, 114, 114)


@plugin
class Mosaic(Transform):
    """Four images around a point (YOLOv4, Bochkovskiy et al. 2020): many small objects, and others beside them."""

    moves_fields: ClassVar[tuple[str, ...]] = _KINDS

    size: tuple[int, int] = option(default=(640, 640), at_least=2, help="[height, width] of the result")
    center: tuple[float, float] = option(
        default=(0.25, 0.75), above=0, below=1, help="least and most share of height and width at which the four meet"
    )
    scale: tuple[float, float] = option(
        default=(0.4, 1.0), above=0, at_most=2, help="least and most size of each image, 1: as large as fits the result"
    )
    visible: float = option(default=0.25, at_least=0, at_most=1, help="share of its box that an object must keep")
    probability: float = option(default=1.0, at_least=0, at_most=1, help="share of the images")
    fill: tuple[int, int, int] = option(default=_GREY, at_least=0, at_most=255, help="colour where no image is")

    def __attrs_post_init__(self) -> None:
        for name, (low, high) in (("center", self.center), ("scale", self.scale)):
            if low > high:
                raise ValueError(f"{name}: expected the smaller number first, got {[low, high]}")

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return self.size if self.probability == 1 else None

    def most_objects(self, most: int, another: int) -> int:
        return most + 3 * another

    def __call__(self, sample: Sample) -> Sample:
        import torch

        from detkernel_data.transforms import geometry

        context = _context(sample, self)
        chance, down, right, *scales = torch.rand(7).tolist()
        if chance >= self.probability:
            return sample
        (height, width), (low, high) = self.size, self.center
        y = min(max(round(height * (low + down * (high - low))), 1), height - 1)
        x = min(max(round(width * (low + right * (high - low))), 1), width - 1)
        tiles = []
        for number, (one, drawn) in enumerate(
            zip([sample, *(context.another() for _ in range(3))], scales, strict=True)
        ):
            tile = geometry.fit(one, self.size, self.scale[0] + drawn * (self.scale[1] - self.scale[0]))
            window = (0 if number % 2 == 0 else x, 0 if number < 2 else y)
            room = (y if number < 2 else height - y, x if number % 2 == 0 else width - x)
            tiles.append(self._tile(tile, number, room, window))
        canvas = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
        canvas[:, :y, :x], canvas[:, :y, x:] = tiles[0].image[:, :y, :x], tiles[1].image[:, :y, x:]
        canvas[:, y:, :x], canvas[:, y:, x:] = tiles[2].image[:, y:, :x], tiles[3].image[:, y:, x:]
        sample = tiles[0]
        sample.image, sample.target = canvas, geometry.joined([tile.target for tile in tiles])
        return sample

    def _tile(self, tile: Sample, number: int, room: tuple[int, int], at: tuple[int, int]) -> Sample:
        """The corner of an image that lies at the meeting point, in its quarter of the canvas."""
        from detkernel_data.transforms import geometry

        height, width = tile.size
        x, y = max(0, width - room[1]) if number % 2 == 0 else 0, max(0, height - room[0]) if number < 2 else 0
        window = (x, y, min(width, x + room[1]), min(height, y + room[0]))
        boxes = tile.target.boxes
        keep = geometry.visible_share(boxes, window) >= max(self.visible, 1e-6)
        tile = geometry.crop(tile, window, keep & geometry.is_valid(geometry.clipped(boxes, window)))
        height, width = tile.size
        left = at[0] + (room[1] - width if number % 2 == 0 else 0)
        top = at[1] + (room[0] - height if number < 2 else 0)
        return geometry.place(tile, left, top, self.size, self.fill)


@plugin
class Mixup(Transform):
    """Two images over each other, with the objects of both (mixup, Zhang et al. 2018; for detection, 2019)."""

    moves_fields: ClassVar[tuple[str, ...]] = _KINDS

    ratio: tuple[float, float] = option(
        default=(0.5, 0.5), above=0, below=1, help="least and most share of the image itself in the result"
    )
    probability: float = option(default=0.5, at_least=0, at_most=1, help="share of the images")
    weights: bool = option(
        default=False,
        help="multiply the field `weight` of each object by its image's share, for losses that go by it; false: every "
        "object counts in full, as in YOLOX and RTMDet",
    )

    def __attrs_post_init__(self) -> None:
        if self.ratio[0] > self.ratio[1]:
            raise ValueError(f"ratio: expected the smaller number first, got {list(self.ratio)}")

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size

    def most_objects(self, most: int, another: int) -> int:
        return most + another

    def adds_fields(self) -> Mapping[str, float]:
        return {"weight": 1.0} if self.weights else {}

    def __call__(self, sample: Sample) -> Sample:
        import torch

        from detkernel_data.transforms import geometry
        from detkernel_data.transforms.color import require_bytes

        require_bytes(sample.image, "mixup")
        context = _context(sample, self)
        chance, drawn = torch.rand(2).tolist()
        if chance >= self.probability:
            return sample
        share = self.ratio[0] + drawn * (self.ratio[1] - self.ratio[0])
        other = geometry.place(geometry.fit(context.another(), sample.size), 0, 0, sample.size, _GREY)
        mixed = sample.image.float().mul_(share).add_(other.image.float(), alpha=1 - share)
        sample.image = mixed.round_().clamp_(0, 255).to(torch.uint8)
        if self.weights:
            sample.target.fields["weight"] = share * sample.target.fields["weight"]
            other.target.fields["weight"] = (1 - share) * other.target.fields["weight"]
        sample.target = geometry.joined([sample.target, other.target])
        return sample


@plugin(needs=("masks",))
class CopyPaste(Transform):
    """Objects of another image pasted into this one by their masks (Ghiasi et al. 2021), which hide what is below."""

    moves_fields: ClassVar[tuple[str, ...]] = _KINDS

    most: int = option(default=10, at_least=1, help="the most objects that are pasted; as many as that are drawn")
    scale: tuple[float, float] = option(
        default=(0.5, 1.0), above=0, at_most=1, help="least and most size of the other image, 1: as large as fits"
    )
    visible: float = option(default=0.1, at_least=0, at_most=1, help="share of its mask that an object must keep")
    probability: float = option(default=0.5, at_least=0, at_most=1, help="share of the images")

    def __attrs_post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: expected the smaller number first, got {list(self.scale)}")

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        return size

    def most_objects(self, most: int, another: int) -> int:
        return most + min(self.most, another)

    def __call__(self, sample: Sample) -> Sample:
        import torch

        from detkernel_data.transforms import geometry

        context = _context(sample, self)
        if sample.target.masks is None:
            raise UserError("CopyPaste: it needs masks, and the data has none")
        chance, size, down, right = torch.rand(4).tolist()
        if chance >= self.probability:
            return sample
        height, width = sample.size
        other = geometry.fit(context.another(), sample.size, self.scale[0] + size * (self.scale[1] - self.scale[0]))
        free = height - other.size[0], width - other.size[1]
        other = geometry.place(other, int(right * (free[1] + 1)), int(down * (free[0] + 1)), sample.size, _GREY)
        if not len(other.target):
            return sample
        count = int(torch.randint(1, min(self.most, len(other.target)) + 1, ()))
        pasted = other.target.keep(torch.randperm(len(other.target))[:count].sort().values)
        assert pasted.masks is not None  # where one image has them, all have
        pasted = pasted.keep(pasted.masks.flatten(1).any(1).bool())
        assert pasted.masks is not None
        hidden = pasted.masks.any(0).bool()
        sample.image = torch.where(hidden, other.image, sample.image)
        sample.target = geometry.joined([self._below(sample, hidden), pasted])
        return sample

    def _below(self, sample: Sample, hidden: Tensor) -> Target:
        """What is left of the objects of the image, where [H, W] is hidden."""
        import torch

        from detkernel_data.transforms import geometry

        target = sample.target
        assert target.masks is not None
        masks = target.masks * ~hidden
        before, left = target.masks.flatten(1).sum(1), masks.flatten(1).sum(1)
        boxes = target.boxes.clone()
        for number in torch.nonzero((left < before) & (left > 0)).flatten().tolist():
            boxes[number] = geometry.mask_box(masks[number])
        target.boxes, target.masks = boxes, masks
        if target.keypoints is not None:
            height, width = hidden.shape
            points = target.keypoints.clone()
            x, y = points[..., 0].long().clamp(0, width - 1), points[..., 1].long().clamp(0, height - 1)
            points[..., 2] = torch.where(hidden[y, x], points[..., 2].clamp(max=1), points[..., 2])
            target.keypoints = points
        return geometry.valid_objects(target.keep((left >= self.visible * before) & (left > 0)))


def _context(sample: Sample, transform: Transform) -> Context:
    if sample.context is None:
        raise UserError(f"{type(transform).__name__}: it needs other images, which only training has")
    return sample.context
