"""Boxes relative to anchors in the cells of a grid, of YOLO (Redmon and Farhadi 2017, 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import CellCoder

from detkernel_detectors.coders.delta import split

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

LEAST = 1e-6
"""Lower bound of a share of a cell (1 less this is the upper one), and of the ratio of sides."""


@plugin
class YoloCoder(CellCoder):
    """Where in its cell the centre lies, 0..1, and the logarithm of the ratio of sides to the anchor's.

    https://arxiv.org/abs/1804.02767, section 2.1: x = (s_x - 1/2) stride + x_a and w = w_a e^t_w, and the same for y
    and h. A network predicts the logit of s_x; both here are s_x itself.
    """

    bound: float = option(default=20.0, above=0, help="largest t_w and t_h, so that a box is finite")

    def encode(self, priors: Tensor, boxes: Tensor, strides: Tensor) -> Tensor:
        (centre, sides), (wanted, wanted_sides) = split(priors), split(boxes)
        shares = (wanted - centre) / strides[..., None] + 0.5
        return torch.cat([shares.clamp(LEAST, 1 - LEAST), (wanted_sides / sides).clamp(min=LEAST).log()], -1)

    def decode(self, priors: Tensor, deltas: Tensor, strides: Tensor) -> Tensor:
        centre, sides = split(priors)
        centre = centre + (deltas[..., :2] - 0.5) * strides[..., None]
        half = sides * deltas[..., 2:].clamp(max=self.bound).exp() / 2
        return torch.cat([centre - half, centre + half], -1)
