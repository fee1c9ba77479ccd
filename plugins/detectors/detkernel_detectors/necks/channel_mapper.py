"""The neck of DETRs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.necks import ChannelMapper


class Mapped(nn.Module):
    """A convolution and its group norm, or a convolution with a bias."""

    def __init__(self, inside: int, options: ChannelMapper, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, options.channels, kernel, stride, kernel // 2, bias=options.groups is None)
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm = nn.Identity() if options.groups is None else nn.GroupNorm(options.groups, options.channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.conv(x))
        return result


class Mapper(nn.Module):
    """1x1 for each map; further ones by 3x3 of stride 2, the first of the backbone's coarsest map."""

    def __init__(self, options: ChannelMapper, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.first = next(number for number, stride in enumerate(strides) if stride >= options.finest)
        inside, self.channels = list(channels[self.first :]), options.channels
        self.strides = list(strides[self.first :])
        self.convs = nn.ModuleList([Mapped(count, options, 1, 1) for count in inside])
        self.extra_convs = nn.ModuleList()
        for number in range(options.extra):
            self.strides.append(self.strides[-1] * 2)
            self.extra_convs.append(Mapped(self.channels if number else inside[-1], options, 3, 2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        inside = list(maps)[self.first :]
        found = [conv(one) for conv, one in zip(self.convs, inside, strict=True)]
        source = inside[-1]
        for conv in self.extra_convs:
            source = conv(source)
            found.append(source)
        return found
