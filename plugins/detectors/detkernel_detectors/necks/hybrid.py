"""RT-DETR's hybrid encoder, and D-FINE's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from detkernel_detectors.necks import HybridEncoder


class ConvNorm(nn.Module):
    """A convolution, batch norm, and a SiLU unless it is linear."""

    def __init__(
        self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.act = nn.Identity() if linear else nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.norm(self.conv(x)))
        return found


class RepVgg(nn.Module):
    """A 3x3 and a 1x1 convolution, added (Ding et al. 2021, https://arxiv.org/abs/2101.03697)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, linear=True)
        self.conv2 = ConvNorm(channels, channels, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.conv1(x) + self.conv2(x))


class Csp(nn.Module):
    """Two branches, one of them through RepVGG layers, added."""

    def __init__(self, inside: int, outside: int, layers: int, expansion: float = 1.0) -> None:
        super().__init__()
        hidden = int(outside * expansion)
        self.conv1, self.conv2 = ConvNorm(inside, hidden), ConvNorm(inside, hidden)
        self.bottlenecks = nn.Sequential(*(RepVgg(hidden) for _ in range(layers)))
        self.conv3 = nn.Identity() if hidden == outside else ConvNorm(hidden, outside)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))
        return found


class Elan(nn.Module):
    """GELAN (Wang et al. 2024, https://arxiv.org/abs/2402.13616): two halves, two CSP blocks in a row, all joined."""

    def __init__(self, channels: int, layers: int, expansion: float) -> None:
        super().__init__()
        width = round(expansion * channels // 2)
        self.cv1 = ConvNorm(channels * 2, channels * 2)
        self.cv2 = nn.Sequential(Csp(channels, width, layers), ConvNorm(width, width, 3))
        self.cv3 = nn.Sequential(Csp(width, width, layers), ConvNorm(width, width, 3))
        self.cv4 = ConvNorm(channels * 2 + width * 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.append(self.cv2(parts[-1]))
        parts.append(self.cv3(parts[-1]))
        found: Tensor = self.cv4(torch.cat(parts, 1))
        return found


class Attention(nn.Module):
    """A transformer's layer over the places of a map, with the norms behind."""

    def __init__(self, channels: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(channels, feedforward), nn.Linear(feedforward, channels)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, one: Tensor) -> Tensor:
        places = one.flatten(2).transpose(1, 2)
        query = places + positions(one)
        places = self.norm1(places + self.self_attn(query, query, places, need_weights=False)[0])
        places = self.norm2(places + self.linear2(functional.gelu(self.linear1(places))))
        found: Tensor = places.transpose(1, 2).reshape(one.shape)
        return found


class Encoder(nn.Module):
    """The modules' names are RT-DETR's but for `inputs`, `attention`, `laterals`, `downs`, `top_down`, `bottom_up`."""

    def __init__(self, options: HybridEncoder, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.first = next(number for number, stride in enumerate(strides) if stride >= options.finest)
        inside, self.strides, self.channels = (
            list(channels[self.first :]),
            list(strides[self.first :]),
            options.channels,
        )
        width, elan, steps = options.channels, options.fusion == "elan", len(inside) - 1
        self.inputs = nn.ModuleList([ConvNorm(count, width, linear=True) for count in inside])
        self.attention = Attention(width, options.attention_heads, options.ffn_channels)
        self.laterals = nn.ModuleList([ConvNorm(width, width, linear=elan) for _ in range(steps)])
        self.top_down, self.bottom_up = (nn.ModuleList([_joining(options) for _ in range(steps)]) for _ in range(2))
        self.downs = nn.ModuleList([_halving(width, elan) for _ in range(steps)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        inside = [project(one) for project, one in zip(self.inputs, list(maps)[self.first :], strict=True)]
        inside[-1] = self.attention(inside[-1])
        found = [inside[-1]]  # coarse to fine
        for lateral, join, finer in zip(self.laterals, self.top_down, reversed(inside[:-1]), strict=True):
            found[-1] = lateral(found[-1])
            larger = functional.interpolate(found[-1], size=finer.shape[-2:], mode="nearest")
            found.append(join(torch.cat([larger, finer], 1)))
        found.reverse()
        for number, (down, join) in enumerate(zip(self.downs, self.bottom_up, strict=True)):
            found[number + 1] = join(torch.cat([down(found[number]), found[number + 1]], 1))
        return found


def positions(one: Tensor) -> Tensor:
    """[H * W, channels]: sin a, cos a, sin b, cos b of each place of a map, at frequencies 10000^(-k / (channels / 4)).

    a and b are column and row of a place as if places went column by column, which they do not: on a square map they
    have changed their roles, on others they are neither (so in RT-DETR, whose published weights have learned it).
    """
    channels, height, width = one.shape[1:]
    place = torch.arange(height * width, device=one.device)
    powers = torch.arange(channels // 4, device=one.device, dtype=torch.float32) / (channels // 4)
    angles = [number[:, None] * 10000.0**-powers for number in (place // height, place % height)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)


def _joining(options: HybridEncoder) -> nn.Module:
    layers = round(3 * options.depth)
    if options.fusion == "elan":
        return Elan(options.channels, layers, options.expansion)
    return Csp(options.channels * 2, options.channels, layers, options.expansion)


def _halving(channels: int, elan: bool) -> nn.Module:
    if not elan:
        return ConvNorm(channels, channels, 3, 2)
    depthwise = ConvNorm(channels, channels, 3, 2, channels, linear=True)
    return nn.Sequential(OrderedDict(cv1=ConvNorm(channels, channels, linear=True), cv2=depthwise))
