"""YOLOv3's neck, with MMDetection's names of parameters, which count from the coarsest map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.blocks import LeakyConv

if TYPE_CHECKING:
    from detkernel_detectors.necks import YoloNeck


class CoarseToFine(nn.Module):
    """Each map is joined with what the coarser ones gave, half as wide and twice as large."""

    def __init__(self, options: YoloNeck, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.strides = list(options.channels), list(strides[-len(options.channels) :])

        def conv(inside: int, outside: int, size: int) -> LeakyConv:
            norm = nn.BatchNorm2d(outside, options.norm_eps, options.norm_momentum)
            return LeakyConv(inside, outside, size, norm)

        before = 0
        pairs = zip(channels[::-1], self.channels[::-1], strict=False)
        for number, (inside, outside) in enumerate(pairs):
            if number:
                self.add_module(f"conv{number}", conv(before, outside, 1))
                inside += outside
            layers = nn.Sequential()
            for layer in range(5):
                wide = 2 * outside if layer % 2 else outside
                layers.add_module(f"conv{layer + 1}", conv(inside, wide, 3 if layer % 2 else 1))
                inside = wide
            self.add_module(f"detect{number + 1}", layers)
            before = outside

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for number, one in enumerate(reversed(maps[-len(self.channels) :])):
            if found:
                x = self.get_submodule(f"conv{number}")(found[-1])
                one = torch.cat([functional.interpolate(x, size=one.shape[-2:], mode="nearest"), one], 1)
            found.append(self.get_submodule(f"detect{number + 1}")(one))
        return found[::-1]
