"""The neck of YOLOF."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.necks import DilatedEncoder


class Block(nn.Module):
    """1x1 to few channels, a dilated 3x3, and 1x1 back, beside an identity; each with batch norm and ReLU."""

    def __init__(self, channels: int, inside: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = layer(channels, inside, 1)
        self.conv2 = layer(inside, inside, 3, dilation)
        self.conv3 = layer(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv3(self.conv2(self.conv1(x)))
        return x + found


class Encoder(nn.Module):
    """A projection of the coarsest map, 1x1 and 3x3 without activation, then the blocks."""

    def __init__(self, options: DilatedEncoder, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.strides = options.channels, list(strides[-1:])
        self.lateral = nn.Conv2d(channels[-1], options.channels, 1)
        self.lateral_norm = nn.BatchNorm2d(options.channels)
        self.output = nn.Conv2d(options.channels, options.channels, 3, padding=1)
        self.output_norm = nn.BatchNorm2d(options.channels)
        self.blocks = nn.Sequential(
            *(Block(options.channels, options.block_channels, dilation) for dilation in options.dilations)
        )
        for conv in (self.lateral, self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x = self.lateral_norm(self.lateral(maps[-1]))
        x = self.output_norm(self.output(x))
        return [self.blocks(x)]


def layer(inside: int, outside: int, size: int, dilation: int = 1) -> nn.Sequential:
    """A convolution that keeps height and width and begins with a deviation of 0.01, batch norm, and ReLU."""
    conv = nn.Conv2d(inside, outside, size, padding=size // 2 * dilation, dilation=dilation, bias=False)
    nn.init.normal_(conv.weight, std=0.01)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outside), relu=nn.ReLU(inplace=True)))
