"""The head of the dense detectors: two towers and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detkernel_detection.parts import Output
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.heads import Towers


class TwoTowers(nn.Module):
    """3x3 convolutions begin with a deviation of 0.01, biases with 0 or what the output asks for."""

    def __init__(self, options: Towers, channels: int, levels: int, outputs: Sequence[Output]) -> None:
        super().__init__()
        depths = options.depths
        self.cls_tower, self.reg_tower = (tower(options, channels, depths[branch]) for branch in ("cls", "reg"))
        for output in outputs:
            width = options.channels if depths[output.branch] else channels
            self.add_module(output.name, nn.Conv2d(width, output.channels, 3, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for output in outputs:
            bias: Any = self.get_submodule(output.name).bias
            nn.init.constant_(bias, output.bias)
        self.outputs = tuple(outputs)
        scaled = any(output.scaled for output in outputs)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(levels)] if scaled else [])

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        features = {"cls": self.cls_tower(maps), "reg": self.reg_tower(maps)}
        found = {}
        for output in self.outputs:
            values = over_levels(self.get_submodule(output.name), features[output.branch])
            found[output.name] = (
                [value * scale for value, scale in zip(values, self.scales, strict=True)] if output.scaled else values
            )
        return found


class Layer(nn.Module):
    """A convolution, its normalisation if any, and a ReLU."""

    def __init__(self, options: Towers, channels: int) -> None:
        super().__init__()
        bias = options.norm is None if options.bias is None else options.bias
        self.conv = nn.Conv2d(channels, options.channels, 3, padding=1, bias=bias)
        self.norm = normalisation(options)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        own = not isinstance(self.norm, nn.Identity)  # else it may be a part of a map of several levels
        return [nn.functional.relu(self.norm(x), inplace=own) for x in over_levels(self.conv, maps)]


def tower(options: Towers, channels: int, depth: int | None = None) -> nn.Sequential:
    """So many layers, by default `convs`. Its input and output are the maps of all levels."""
    depth = options.convs if depth is None else depth
    return nn.Sequential(*(Layer(options, options.channels if number else channels) for number in range(depth)))


def over_levels(conv: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """A 3x3 convolution of the maps of all levels, fine to coarse, that pads with a row of zeros.

    A map of 4x4 costs less than the weights that are read for it, and than the gradient that is written for them. So
    the coarse ones, from the third on, lie on one map, with zeros between them as the padding would be: the results are
    the same. An exported model has them one by one, since its sizes may be open.
    """
    fine, coarse = list(maps[:_FINE]), maps[_FINE:]
    if len(coarse) < 2 or torch.compiler.is_exporting():
        return [conv(one) for one in maps]
    height, width = coarse[0].shape[-2:]
    found, below = conv(side_by_side(coarse)), 0
    apart = [found[..., :height, :width]]
    for one in coarse[1:]:
        apart.append(found[..., below : below + one.shape[-2], width + 1 : width + 1 + one.shape[-1]])
        below += one.shape[-2] + 1
    return [conv(one) for one in fine] + apart


_FINE = 2
"""Levels that are large enough for a convolution of their own."""


def side_by_side(maps: Sequence[Tensor], gap: int = 1) -> Tensor:
    """[B, C, H, W]: one map at the left, the others below each other at its right, rows or columns of zeros apart."""
    first, *others = maps
    if not others:
        return first
    height, width = sum(one.shape[-2] + gap for one in others) - gap, max(one.shape[-1] for one in others)
    pad = nn.functional.pad
    column = torch.cat(
        [pad(one, (gap, width - one.shape[-1], gap if number else 0, 0)) for number, one in enumerate(others)], 2
    )
    most = max(height, first.shape[-2])
    return torch.cat([pad(first, (0, 0, 0, most - first.shape[-2])), pad(column, (0, 0, 0, most - height))], 3)


def normalisation(options: Towers) -> nn.Module:
    if options.norm == "group":
        return nn.GroupNorm(options.groups, options.channels)
    return nn.BatchNorm2d(options.channels) if options.norm == "batch" else nn.Identity()
