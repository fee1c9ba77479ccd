"""Blocks that backbones, necks and heads of YOLOv3 and of the CSP detectors (YOLOX, RTMDet) share, with MMDetection's
names."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class BatchNorm(NamedTuple):
    """What a batch norm is made with."""

    eps: float
    momentum: float


class ConvNorm(nn.Module):
    """A convolution without bias that keeps height and width, or divides them by `stride`; batch norm; SiLU."""

    def __init__(self, inside: int, outside: int, size: int, norm: BatchNorm, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outside, norm.eps, norm.momentum)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.bn(self.conv(x)), inplace=True)


class LeakyConv(nn.Module):
    """The same with a leaky ReLU (Redmon and Farhadi 2018), and a norm of any kind."""

    def __init__(self, inside: int, outside: int, size: int, norm: nn.Module, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
        self.bn = norm

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.bn(self.conv(x)), 0.1, inplace=True)


class SeparableConv(nn.Module):
    """A convolution of each channel alone, then one of 1x1 that mixes them."""

    def __init__(self, inside: int, outside: int, size: int, norm: BatchNorm) -> None:
        super().__init__()
        self.depthwise_conv = ConvNorm(inside, inside, size, norm, groups=inside)
        self.pointwise_conv = ConvNorm(inside, outside, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return found


class DarknetBlock(nn.Module):
    """1x1 and 3x3 (Redmon and Farhadi 2018), beside an identity if asked for."""

    def __init__(self, channels: int, norm: BatchNorm, identity: bool) -> None:
        super().__init__()
        self.conv1: nn.Module = ConvNorm(channels, channels, 1, norm)
        self.conv2: nn.Module = ConvNorm(channels, channels, 3, norm)
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv2(self.conv1(x))
        return found + x if self.identity else found


class CspnextBlock(DarknetBlock):
    """3x3 and a separable 5x5 (Lyu et al. 2022): a wider view for little more arithmetic."""

    def __init__(self, channels: int, norm: BatchNorm, identity: bool) -> None:
        super().__init__(channels, norm, identity)
        self.conv1 = ConvNorm(channels, channels, 3, norm)
        self.conv2 = SeparableConv(channels, channels, 5, norm)


BLOCKS: dict[str, type[DarknetBlock]] = {"darknet": DarknetBlock, "cspnext": CspnextBlock}
BlockName = Literal["darknet", "cspnext"]


class ChannelAttention(nn.Module):
    """Each channel times a factor of 0..1 that follows from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.fc.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        factors: Tensor = self.fc(x.mean((2, 3), keepdim=True))
        return x * nn.functional.hardsigmoid(factors)


class CspLayer(nn.Module):
    """Cross stage partial (Wang et al. 2020): half of the channels go through the blocks, half pass by."""

    def __init__(
        self,
        inside: int,
        outside: int,
        blocks: int,
        kind: BlockName,
        norm: BatchNorm,
        identity: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        half = outside // 2
        self.main_conv = ConvNorm(inside, half, 1, norm)
        self.short_conv = ConvNorm(inside, half, 1, norm)
        self.final_conv = ConvNorm(2 * half, outside, 1, norm)
        self.blocks = nn.Sequential(*(BLOCKS[kind](half, norm, identity) for _ in range(blocks)))
        self.attention: nn.Module = ChannelAttention(2 * half) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.blocks(self.main_conv(x)), self.short_conv(x)], 1)
        found: Tensor = self.final_conv(self.attention(joined))
        return found


class SpatialPyramidPooling(nn.Module):
    """A map beside its largest values within 5, 9 and 13 pixels (He et al. 2015)."""

    def __init__(self, channels: int, norm: BatchNorm) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvNorm(channels, half, 1, norm)
        self.conv2 = ConvNorm(4 * half, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        views = [x]
        for _ in range(3):  # 5 pixels of the maxima of 5 are those of 9, and of 9 those of 13
            views.append(nn.functional.max_pool2d(views[-1], 5, 1, 2))
        found: Tensor = self.conv2(torch.cat(views, 1))
        return found
