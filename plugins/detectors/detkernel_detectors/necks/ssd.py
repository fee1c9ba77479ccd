"""The neck of SSD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from detkernel import UserError
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from detkernel_detectors.necks import SsdNeck


class L2Norm(nn.Module):
    """x / |x| of the channels of each pixel, times a factor of each channel. Without it, the values of so fine a map
    are many times those of the coarser ones."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        long = functional.normalize(x.float(), dim=1, eps=1e-10)
        return (self.weight[:, None, None] * long).to(x.dtype)


class Coarser(nn.Module):
    """1x1 to half of the channels, and a larger one to a coarser map, with biases and ReLUs."""

    def __init__(self, inside: int, outside: int, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(inside, outside // 2, 1)
        self.reduce = nn.Conv2d(outside // 2, outside, size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), size, padding = x.shape[-2:], self.reduce.kernel_size[0], self.reduce.padding[0]
        if not torch.compiler.is_exporting() and min(height, width) + 2 * padding < size:  # type: ignore[operator]
            raise UserError(
                f"the images are too small: a further level of ssd_neck is a convolution of {size}x{size} on a map of "
                f"{height}x{width}. Give larger images, 300x300 for its default levels, or fewer levels (neck.extra)"
            )
        return functional.relu(self.reduce(functional.relu(self.narrow(x))))


class Levels(nn.Module):
    """The backbone's maps, and what is made of the coarsest of them."""

    def __init__(self, options: SsdNeck, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.first = next(number for number, stride in enumerate(strides) if stride >= options.finest)
        self.channels, self.strides = list(channels[self.first :]), list(strides[self.first :])
        self.l2_norm = nn.Identity() if options.scale is None else L2Norm(self.channels[0], options.scale)
        self.extra = nn.ModuleList()
        for outside, stride, padding in zip(options.extra, options.extra_strides, options.extra_paddings, strict=True):
            size = options.last_size if len(self.extra) == len(options.extra) - 1 else 3
            self.extra.append(Coarser(self.channels[-1], outside, size, stride, padding))
            self.channels.append(outside)
            self.strides.append(self.strides[-1] * stride)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found = list(maps)[self.first :]
        source = found[-1]
        found[0] = self.l2_norm(found[0])
        for level in self.extra:
            source = level(source)
            found.append(source)
        return found
