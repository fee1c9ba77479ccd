"""Maps of how near a place is to the centre of an object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import Heatmap
from detkernel_detection.boxes import centres
from detkernel_detection.parts import Priors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class RadiusHeatmap(Heatmap):
    """A Gaussian around the place of each centre, as wide as a corner may move (Law and Deng 2018; Zhou et al. 2019).

    https://arxiv.org/abs/1904.07850, section 3, and https://arxiv.org/abs/1808.01244: exp(-d^2 / (2 s^2)) up to a
    radius of r places, and s = (2 r + 1) / 6. Where Gaussians of one class meet, the higher one counts.
    """

    min_overlap: float = option(
        default=0.3, above=0, at_most=1, help="IoU that a box keeps whose corners are moved by the radius"
    )

    def __call__(self, priors: Priors, targets: Targets, classes: int) -> Tensor:
        maps, start = [], 0
        for count in priors.counts:
            stride, places = priors.strides[start], centres(priors.boxes[start : start + count])
            maps.append(self._level((places / stride).floor(), stride, targets, classes))
            start += count
        return torch.cat(maps, 1)

    def _level(self, places: Tensor, stride: Tensor, targets: Targets, classes: int) -> Tensor:
        """[B, P, C] of one level, whose places [P, 2] are x and y in strides."""
        centre = (centres(targets.boxes) / stride).floor()
        radius = corner_radius((targets.boxes[..., 2:] - targets.boxes[..., :2]) / stride, self.min_overlap).floor()
        away = (places - centre[:, :, None]).abs()  # [B, M, P, 2]
        near = (away.square().sum(-1) / (-2 * ((2 * radius + 1) / 6).square())[..., None]).exp()
        near = torch.where((away.amax(-1) <= radius[..., None]) & targets.valid[..., None], near, 0.0)
        empty = near.new_zeros(len(near), classes, len(places))
        return empty.scatter_reduce(1, targets.labels[..., None].expand_as(near), near, "amax").transpose(1, 2)


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
