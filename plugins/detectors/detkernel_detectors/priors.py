"""What boxes are predicted from: anchors and points, for the maps of a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detkernel import option, plugin, wrong
from detkernel_detection.parts import Priors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Anchors:
    """Boxes of some sizes and shapes at every place of a map, centred on its upper left corner (as MMDetection's).

    An anchor of scale s and ratio r has, at a level of stride b, the width b s / sqrt(r) and the height b s sqrt(r).
    """

    scales: list[float] = option(factory=lambda: [8.0], above=0, help="sides in strides of their level")
    octaves: int | None = option(
        default=None, at_least=1, help="scales at each of `scales`: itself, and times 2^(i/octaves); null: itself"
    )
    ratios: list[float] = option(factory=lambda: [0.5, 1.0, 2.0], above=0, help="height to width")
    rounded: bool = option(
        default=False, help="in whole pixels, as torchvision's: scales are cut to them and corners are rounded"
    )
    fitted: bool = option(
        default=False,
        help="places are as far apart as the batch is larger than the map, in whole pixels, as torchvision's: by 61 "
        "where 13 are for 800; false: by the stride",
    )

    def __attrs_post_init__(self) -> None:
        for name in ("scales", "ratios"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")

    @property
    def sides(self) -> list[tuple[float, float]]:
        """(width, height) in strides, of each anchor of a place: by ratio, then by scale."""
        return self._shaped(self._sizes)

    @property
    def _sizes(self) -> list[float]:
        """In strides."""
        parts = self.octaves or 1
        return [scale * 2 ** (part / parts) for scale in self.scales for part in range(parts)]

    def _shaped(self, sizes: Sequence[float]) -> list[tuple[float, float]]:
        return [(size / ratio**0.5, size * ratio**0.5) for ratio in self.ratios for size in sizes]

    def _corners(self, stride: int) -> list[tuple[float, float]]:
        """x and y of the lower right corner of each anchor around (0, 0), in pixels."""
        if not self.rounded:
            return [(width * stride / 2, height * stride / 2) for width, height in self.sides]
        sides = self._shaped([int(size * stride) for size in self._sizes])
        return [(round(width / 2), round(height / 2)) for width, height in sides]

    def boxes(self, stride: int, places: Tensor) -> Tensor:
        """[P, 2], x and y -> [P * A, 4], place by place."""
        corners = places.new_tensor(self._corners(stride))
        around = torch.cat([-corners, corners], 1)  # [A, 4]
        return (places.repeat(1, 2)[:, None] + around).flatten(0, 1)


@plugin
class GridAnchors:
    """Boxes of given widths and heights at every place of a map, centred on the middle of its cell (YOLOv3)."""

    sizes: list[list[tuple[float, float]]] = option(
        factory=lambda: [
            [(10.0, 13.0), (16.0, 30.0), (33.0, 23.0)],
            [(30.0, 61.0), (62.0, 45.0), (59.0, 119.0)],
            [(116.0, 90.0), (156.0, 198.0), (373.0, 326.0)],
        ],
        help="(width, height) in pixels of each anchor of a place, for each level, fine to coarse; by default those of "
        "the paper, for COCO in 416 pixels",
    )

    def __attrs_post_init__(self) -> None:
        counts = [len(level) for level in self.sizes]
        if len(set(counts)) != 1 or not counts[0]:
            raise ValueError(f"sizes: expected as many anchors at each level, and at least one, got {counts}")
        small = [side for level in self.sizes for size in level for side in size if side <= 0]
        if small:
            raise ValueError(f"sizes: expected numbers above 0, got {small[0]:g}")

    @property
    def per_place(self) -> int:
        """How many anchors are at a place of each level."""
        return len(self.sizes[0])


def grid_anchors(options: GridAnchors, maps: Sequence[Tensor], strides: Sequence[int], inside: Tensor) -> Priors:
    """The anchors for maps [B, _, H, W] of such strides, of which `inside` is as for `anchors`."""
    grids = [_grid(one, stride, None) for one, stride in zip(maps, strides, strict=True)]
    boxes = []
    for places, stride, sizes in zip(grids, strides, options.sizes, strict=True):
        half = places.new_tensor(sizes) / 2
        centres = (places + stride / 2).repeat(1, 2)[:, None]
        boxes.append((centres + torch.cat([-half, half], 1)).flatten(0, 1))
    return _priors(boxes, grids, strides, inside)


@plugin
class LevelAnchors:
    """SSD's default boxes (Liu et al. 2016): each level has a size, and shapes, of its own.

    At a place there are, around its middle: a square of the level's side s, a larger one of sqrt(s s'), where s' is the
    side of the next level, and for each ratio r boxes of s sqrt(r) by s / sqrt(r), lying and standing.
    """

    sides: list[float] = option(
        factory=lambda: [21.0, 45.0, 99.0, 153.0, 207.0, 261.0, 315.0],
        above=0,
        help="of the squares of each level in pixels, and of one that would follow; those for COCO at 300x300",
    )
    ratios: list[list[float]] = option(
        factory=lambda: [[2.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [2.0], [2.0]],
        above=0,
        help="of long to short side, beside the squares, at each level",
    )
    steps: list[int] = option(
        factory=lambda: [8, 16, 32, 64, 100, 300], above=0, help="how far places are apart in pixels, at each level"
    )

    def __attrs_post_init__(self) -> None:
        levels = len(self.steps)
        if not levels:
            raise ValueError("steps: expected at least one")
        for name, most in (("ratios", levels), ("sides", levels + 1)):
            if len(getattr(self, name)) != most:
                raise ValueError(f"{name}: expected {most} for the {levels} steps, got {len(getattr(self, name))}")

    @property
    def counts(self) -> tuple[int, ...]:
        """How many are at a place of each level."""
        return tuple(2 + 2 * len(ratios) for ratios in self.ratios)

    def at(self, level: int) -> list[tuple[float, float]]:
        """(width, height) in pixels, of each at a place of a level."""
        side, following = self.sides[level : level + 2]
        found = [(side, side), (math.sqrt(side * following),) * 2]
        for ratio in self.ratios[level]:
            long, short = side * math.sqrt(ratio), side / math.sqrt(ratio)
            found += [(long, short), (short, long)]
        return found


def level_anchors(options: LevelAnchors, maps: Sequence[Tensor], inside: Tensor, size: tuple[int, int]) -> Priors:
    """The default boxes for maps [B, _, H, W], one for each of `options.steps`. `inside` [B, 2]: height and width in
    which they are valid; `size`: those of the batch. Raises `ConfigError` where the steps are not for such images."""
    if not torch.compiler.is_exporting():
        _check_steps(options, [(one.shape[-2], one.shape[-1]) for one in maps], size)
    grids = [_grid(one, step, None) for one, step in zip(maps, options.steps, strict=True)]
    boxes = []
    for level, (places, step) in enumerate(zip(grids, options.steps, strict=True)):
        half = places.new_tensor(options.at(level)) / 2
        middles = places + step / 2
        boxes.append((middles.repeat(1, 2)[:, None] + torch.cat([-half, half], 1)).flatten(0, 1))
    return _priors(boxes, grids, options.steps, inside)


def _check_steps(options: LevelAnchors, maps: Sequence[tuple[int, int]], size: tuple[int, int]) -> None:
    """At each level, places cover the images, to a step."""
    for level, (places, step) in enumerate(zip(maps, options.steps, strict=True)):
        if any(abs(count * step - side) > step for count, side in zip(places, size, strict=True)):
            (height, width), (rows, columns) = size, places
            raise wrong(
                options,
                "steps",
                f"level {level} of images of {height}x{width} pixels has {rows}x{columns} places, which a step of "
                f"{step} does not spread over them: the steps are for images of one size, 300x300 by default; resize "
                "them ({use: resize, size: [300, 300]}), or give other steps",
            )


def anchors(
    options: Anchors,
    maps: Sequence[Tensor],
    strides: Sequence[int],
    inside: Tensor,
    size: tuple[int, int] | None = None,
) -> Priors:
    """The anchors for maps [B, _, H, W] of such strides. `inside` [B, 2]: height and width in which they are valid;
    `size`: those of the batch, to which `fitted` ones are fitted."""
    fitted = size if options.fitted else None
    grids = [_grid(one, stride, fitted) for one, stride in zip(maps, strides, strict=True)]
    boxes = [options.boxes(stride, places) for places, stride in zip(grids, strides, strict=True)]
    return _priors(boxes, grids, strides, inside)


def points(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    inside: Tensor,
    offset: float = 0.5,
    size: tuple[int, int] | None = None,
) -> Priors:
    """A point for each place of the maps, `offset` strides from its upper left corner, as a box without extent.

    `size`: height and width of a batch that places are fitted to; None: they are strides apart."""
    grids = [_grid(one, stride, size) for one, stride in zip(maps, strides, strict=True)]
    boxes = [(places + offset * stride).repeat(1, 2) for places, stride in zip(grids, strides, strict=True)]
    return _priors(boxes, grids, strides, inside)


def _grid(one: Tensor, stride: int, size: tuple[int, int] | None) -> Tensor:
    """float32 [H * W, 2]: x and y of the corner of each place, row by row."""
    height, width = one.shape[-2:]
    steps = (stride, stride) if size is None else (size[0] // height, size[1] // width)
    y, x = (
        torch.arange(side, device=one.device, dtype=torch.float32) * step
        for side, step in zip((height, width), steps, strict=True)
    )
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)


def _priors(boxes: Sequence[Tensor], grids: Sequence[Tensor], strides: Sequence[int], inside: Tensor) -> Priors:
    """A place is valid where its corner lies in the image: its row is below height / stride."""
    valid = []
    for level, places in zip(boxes, grids, strict=True):
        here = (places < inside.flip(1)[:, None]).all(-1)  # [B, P]
        valid.append(here.repeat_interleave(len(level) // len(places), 1))
    counts = tuple(len(level) for level in boxes)
    each = [level.new_full((len(level),), stride) for level, stride in zip(boxes, strides, strict=True)]
    return Priors(torch.cat(list(boxes)), torch.cat(each), torch.cat(valid, 1), counts)
