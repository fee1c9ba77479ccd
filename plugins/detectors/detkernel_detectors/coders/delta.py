"""Boxes relative to anchors, of R-CNN (Girshick et al. 2014)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import BoxCoder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

LARGEST = math.log(1000 / 16)
"""Bound of dw and dh: a box has at most 62.5 times its anchor's width, at least its 62.5th part."""


@plugin
class DeltaCoder(BoxCoder):
    """Shift of the centre in sides of the anchor, and logarithm of the ratio of sides.

    dx = (x - x_a) / w_a, dy = (y - y_a) / h_a, dw = ln(w / w_a), dh = ln(h / h_a), each divided by its entry of `stds`.
    """

    stds: tuple[float, float, float, float] = option(
        default=(1.0, 1.0, 1.0, 1.0), above=0, help="what dx, dy, dw and dh are divided by, so that they are near 1"
    )

    bound: float = option(
        default=LARGEST, above=0, help="largest |dw| and |dh|: by default 62.5 times the anchor's side"
    )

    bound_below: bool = option(default=True, help="whether dw and dh are bounded below too (torchvision: not)")

    largest_shift: float | None = option(
        default=None,
        above=0,
        help="pixels that a centre is moved by at most in x and in y (YOLOF: 32); null: any number",
    )

    def encode(self, priors: Tensor, boxes: Tensor) -> Tensor:
        (centre, sides), (wanted, wanted_sides) = split(priors), split(boxes)
        deltas = torch.cat([(wanted - centre) / sides, (wanted_sides / sides).log()], -1)
        return deltas if self._plain else deltas / deltas.new_tensor(self.stds)

    def decode(self, priors: Tensor, deltas: Tensor) -> Tensor:
        centre, sides = split(priors)
        if not self._plain:
            deltas = deltas * deltas.new_tensor(self.stds)
        shift = deltas[..., :2] * sides
        if self.largest_shift is not None:
            shift = shift.clamp(-self.largest_shift, self.largest_shift)
        centre = centre + shift
        half = sides * deltas[..., 2:].clamp(-self.bound if self.bound_below else None, self.bound).exp() / 2
        return torch.cat([centre - half, centre + half], -1)

    @property
    def _plain(self) -> bool:
        return self.stds == (1.0, 1.0, 1.0, 1.0)


def split(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and sides, [..., 2] each."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
