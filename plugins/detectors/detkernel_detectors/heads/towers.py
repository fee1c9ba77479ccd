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
        self.cls_tower, self.reg_tower = (tower(options, channels) for _ in range(2))
        width = options.channels if options.convs else channels
        for output in outputs:
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
        found: dict[str, list[Tensor]] = {output.name: [] for output in self.outputs}
        for level, one in enumerate(maps):
            features = {"cls": self.cls_tower(one), "reg": self.reg_tower(one)}
            for output in self.outputs:
                value = self.get_submodule(output.name)(features[output.branch])
                found[output.name].append(value * self.scales[level] if output.scaled else value)
        return found


class Layer(nn.Module):
    """A convolution, its normalisation if any, and a ReLU."""

    def __init__(self, options: Towers, channels: int) -> None:
        super().__init__()
        bias = options.norm is None if options.bias is None else options.bias
        self.conv = nn.Conv2d(channels, options.channels, 3, padding=1, bias=bias)
        self.norm = normalisation(options)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(self.conv(x)), inplace=True)


def tower(options: Towers, channels: int) -> nn.Sequential:
    return nn.Sequential(*(Layer(options, options.channels if number else channels) for number in range(options.convs)))


def normalisation(options: Towers) -> nn.Module:
    if options.norm == "group":
        return nn.GroupNorm(options.groups, options.channels)
    return nn.BatchNorm2d(options.channels) if options.norm == "batch" else nn.Identity()
