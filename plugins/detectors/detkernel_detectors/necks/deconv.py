"""The neck of CenterNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.necks import DeconvNeck


class Layer(nn.Module):
    """A convolution, batch norm, and a ReLU."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(self.conv(x)), inplace=True)


class Deconvolutions(nn.Module):
    """3x3 and 4x4 of stride 2 transposed, again and again, without biases."""

    def __init__(self, options: DeconvNeck, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        inside, layers = channels[-1], []
        for width in options.channels:
            doubling = nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False)
            _begin(doubling)
            layers += [Layer(nn.Conv2d(inside, width, 3, padding=1, bias=False), width), Layer(doubling, width)]
            inside = width
        self.layers = nn.Sequential(*layers)
        self.channels, self.strides = inside, [strides[-1] // 2 ** len(options.channels)]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.layers(maps[-1])]


def _begin(doubling: nn.ConvTranspose2d) -> None:
    """The first channel that it gives begins as the sum of all that it takes, enlarged bilinearly: what its authors'
    code does. The others are random."""
    side = 1 - (torch.arange(4) - 1.5).abs() / 2
    with torch.no_grad():
        doubling.weight[:, 0] = side[:, None] * side
