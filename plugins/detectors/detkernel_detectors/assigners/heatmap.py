"""Maps of how near a place is to the centre of an object, and which places may predict it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import Heatmap, Region
from detkernel_detection.boxes import areas, centres
from detkernel_detection.parts import Priors

from detkernel_detectors.coders.distance import distances

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

LEAST = 1e-4
"""Below it, a place is not near a centre at all."""


def map_of(away: Tensor, targets: Targets, classes: int) -> Tensor:
    """[B, M, N], how far each prior is from each centre, -> [B, N, C], 0..1: how near it is to one of each class."""
    near = (-away).exp()
    near = torch.where((near >= LEAST) & targets.valid[..., None], near, 0.0)
    empty = near.new_zeros(len(near), classes, near.shape[-1])
    return empty.scatter_reduce(1, targets.labels[..., None].expand_as(near), near, "amax").transpose(1, 2)


@plugin
class RadiusHeatmap(Heatmap):
    """A Gaussian around the place of each centre, as wide as a corner may move (Law and Deng 2018; Zhou et al. 2019).

    https://arxiv.org/abs/1904.07850, section 3, and https://arxiv.org/abs/1808.01244: exp(-d^2 / (2 s^2)) up to a
    radius of r places, and s = (2 r + 1) / 6. Where Gaussians of one class meet, the higher one counts.
    """

    min_overlap: float = option(
        default=0.3, above=0, at_most=1, help="IoU that a box keeps whose corners are moved by the radius"
    )

    def __call__(self, priors: Priors, targets: Targets) -> Tensor:
        return torch.cat([self._level(places, stride, targets.boxes) for places, stride in _levels(priors)], 2)

    def _level(self, places: Tensor, stride: Tensor, boxes: Tensor) -> Tensor:
        """[B, M, P] of one level, whose places [P, 2] are in pixels."""
        centre = (centres(boxes) / stride).floor()
        radius = corner_radius((boxes[..., 2:] - boxes[..., :2]) / stride, self.min_overlap).floor()
        apart = ((places / stride).floor() - centre[:, :, None]).abs()  # [B, M, P, 2]
        away = apart.square().sum(-1) / (2 * ((2 * radius + 1) / 6).square())[..., None]
        return torch.where(apart.amax(-1) <= radius[..., None], away, torch.inf)


@plugin
class AreaHeatmap(Heatmap):
    """A Gaussian around each centre, as wide as a box may be moved along a diagonal (Zhou et al. 2021).

    https://arxiv.org/abs/2103.07461: exp(-d^2 / r^2), where r^2 = 2 ((1 - o) / (1 + o))^2 times the area, in pixels,
    and 1 at the place in which the centre is.
    """

    min_overlap: float = option(default=0.8, above=0, below=1, help="o: the overlap that a moved box keeps")
    min_radius: float = option(default=4.0, above=0, help="least r, in pixels")

    def __call__(self, priors: Priors, targets: Targets) -> Tensor:
        points, centre = centres(priors.boxes), centres(targets.boxes)[:, :, None]
        share = (1 - self.min_overlap) / (1 + self.min_overlap)
        radius = (2 * share**2 * areas(targets.boxes)).clamp(min=self.min_radius**2)
        away = (points - centre).square().sum(-1) / radius[..., None]
        return torch.where(_steps(priors, targets).amax(-1) < 0.5, 0.0, away)


@plugin
class CentreRegion(Region):
    """The place of the centre and its eight neighbours, inside of the box, at the levels for its size (Zhou et al.
    2021).

    https://arxiv.org/abs/2103.07461. The size is half of the diagonal. Levels overlap, so that most objects have two.
    """

    sizes: tuple[float, float] = option(
        default=(4.0, 10.0),
        above=0,
        help="least and most size of an object, in strides of a level; the finest level has no least, the coarsest no "
        "most",
    )

    def __call__(self, priors: Priors, targets: Targets) -> tuple[Tensor, Tensor]:
        sides = targets.boxes[..., 2:] - targets.boxes[..., :2]
        size = (sides.square().sum(-1).sqrt() / 2)[..., None]
        low, high = (priors.strides * bound for bound in self.sizes)
        level = torch.arange(len(low), device=low.device)
        low = torch.where(level < priors.counts[0], 0.0, low)
        high = torch.where(level >= len(low) - priors.counts[-1], torch.inf, high)
        good = (size >= low) & (size <= high) & targets.valid[..., None]

        steps = _steps(priors, targets).amax(-1)
        inside = distances(centres(priors.boxes), targets.boxes[:, :, None]).amin(-1) > 0
        return good & inside & (steps < 1.5), good & (steps < 0.5)


def corner_radius(sides: Tensor, overlap: float) -> Tensor:
    """[..., 2] -> [...]: how far both corners of a box may move along x and y so that it keeps such an IoU.

    The least of three cases, each a quadratic equation: the box is moved as a whole, (w-r)(h-r) = 2 o wh / (1+o); made
    smaller, (w-2r)(h-2r) = o wh; or made larger, o (w+2r)(h+2r) = wh.
    """
    total, area = sides.sum(-1), sides.prod(-1)
    moved = (total - (total.square() - 4 * area * (1 - overlap) / (1 + overlap)).sqrt()) / 2
    smaller = (total - (total.square() - 4 * area * (1 - overlap)).sqrt()) / 4
    larger = ((overlap * total).square() + 4 * overlap * (1 - overlap) * area).sqrt()
    return torch.stack([moved, smaller, (larger - overlap * total) / (4 * overlap)]).amin(0)


def _levels(priors: Priors) -> Iterator[tuple[Tensor, Tensor]]:
    """The priors' centres [P, 2] and their stride, of each level."""
    start = 0
    for count in priors.counts:
        yield centres(priors.boxes[start : start + count]), priors.strides[start]
        start += count


def _steps(priors: Priors, targets: Targets) -> Tensor:
    """[B, M, N, 2]: how many places along x and y each prior is from that of each centre."""
    strides = priors.strides[:, None]
    centre = (centres(targets.boxes)[:, :, None] / strides).floor()
    return ((centres(priors.boxes) / strides).floor() - centre).abs()
