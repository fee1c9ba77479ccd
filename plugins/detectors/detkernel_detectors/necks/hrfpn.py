"""The pyramid of HRNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from detkernel_detectors.necks import Hrfpn


class HighResolutionPyramid(nn.Module):
    """All maps as large as the finest, joined and reduced by a 1x1 convolution; each level is pooled of that."""

    def __init__(self, options: Hrfpn, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.pool = options.channels, options.pool
        self.strides = [strides[0] * options.stride * 2**number for number in range(options.levels)]
        self.reduction = nn.Conv2d(sum(channels), options.channels, 1)
        self.outputs = nn.ModuleList(
            [nn.Conv2d(options.channels, options.channels, 3, options.stride, padding=1) for _ in range(options.levels)]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        size = maps[0].shape[-2:]
        large = [maps[0], *(functional.interpolate(one, size=size, mode="bilinear") for one in maps[1:])]
        joined = self.reduction(torch.cat(large, 1))
        pool = functional.avg_pool2d if self.pool == "mean" else functional.max_pool2d
        found = [self.outputs[0](joined)]
        for number in range(1, len(self.outputs)):
            found.append(self.outputs[number](pool(joined, 2**number, 2**number)))
        return found
