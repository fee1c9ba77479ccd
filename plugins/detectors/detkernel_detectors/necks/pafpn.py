"""Path aggregation with CSP layers, with MMDetection's names of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.blocks import BatchNorm, ConvNorm, CspLayer

if TYPE_CHECKING:
    from detkernel_detectors.necks import CspPafpn


class PathAggregation(nn.Module):
    """Down from the coarsest map and up again, one CSP layer for each join."""

    def __init__(self, options: CspPafpn, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.strides = options.channels, list(strides)
        norm = BatchNorm(options.norm_eps, options.norm_momentum)
        pairs = list(pairwise(channels))

        def layer(inside: int, outside: int) -> nn.Module:
            return CspLayer(inside, outside, options.blocks, options.block, norm)

        downward = pairs[::-1]
        self.reduce_layers = nn.ModuleList([ConvNorm(coarse, fine, 1, norm) for fine, coarse in downward])
        self.top_down_blocks = nn.ModuleList([layer(2 * fine, fine) for fine, _ in downward])
        self.downsamples = nn.ModuleList([ConvNorm(fine, fine, 3, norm, stride=2) for fine, _ in pairs])
        self.bottom_up_blocks = nn.ModuleList([layer(2 * fine, coarse) for fine, coarse in pairs])
        self.out_convs = nn.ModuleList(
            [ConvNorm(count, options.channels, options.last_size, norm) for count in channels]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x, kept = maps[-1], []
        for finer, reduce, block in zip(maps[-2::-1], self.reduce_layers, self.top_down_blocks, strict=True):
            x = reduce(x)
            kept.append(x)
            x = block(torch.cat([functional.interpolate(x, size=finer.shape[-2:], mode="nearest"), finer], 1))
        found = [x]
        for coarser, down, block in zip(kept[::-1], self.downsamples, self.bottom_up_blocks, strict=True):
            x = block(torch.cat([down(x), coarser], 1))
            found.append(x)
        return [conv(one) for conv, one in zip(self.out_convs, found, strict=True)]
