"""VFNet's head: a star of nine points on each box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from detkernel_detection.parts import Output
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from detkernel_detectors.coders.distance import exponential
from detkernel_detectors.heads import REACH
from detkernel_detectors.heads.towers import Layer, over_levels, tower

if TYPE_CHECKING:
    from detkernel_detectors.heads import StarTowers


class StarHead(nn.Module):
    """Weights begin with a deviation of 0.01, biases with 0 or what the output asks for."""

    def __init__(self, options: StarTowers, channels: int, levels: int, outputs: Sequence[Output]) -> None:
        super().__init__()
        self.cls_tower, self.reg_tower = (tower(options, channels) for _ in range(2))
        width = options.channels
        self.reg_conv = Layer(options, width if options.convs else channels)
        inside = width if options.convs else channels
        self.cls_star, self.reg_star = (nn.Conv2d(inside, width, 3, padding=1, bias=False) for _ in range(2))
        self.cls, self.reg, self.refined = (
            nn.Conv2d(width, next(output.channels for output in outputs if output.name == name), 3, padding=1)
            for name in ("cls", "reg", "refined")
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for output in outputs:
            nn.init.constant_(self.get_submodule(output.name).bias, output.bias)  # type: ignore[arg-type]
        self.scales, self.refined_scales = (
            nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(levels)]) for _ in range(2)
        )
        self.gradient = options.gradient

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        cls, reg = self.cls_tower(maps), self.reg_tower(maps)
        first = self._scaled(self.reg, self.reg_conv(reg), self.scales)
        offsets = [star(exponential(one.float()) * REACH, self.gradient) for one in first]
        cls, reg = (
            [
                deform_conv2d(x.float(), where, conv.weight.float(), padding=1).relu()
                for x, where in zip(features, offsets, strict=True)
            ]
            for features, conv in ((cls, self.cls_star), (reg, self.reg_star))
        )
        refined = self._scaled(self.refined, reg, self.refined_scales)
        return {"cls": over_levels(self.cls, cls), "reg": first, "refined": refined}

    @staticmethod
    def _scaled(conv: nn.Module, features: Sequence[Tensor], scales: nn.ParameterList) -> list[Tensor]:
        return [value * scale for value, scale in zip(over_levels(conv, features), scales, strict=True)]


def star(sides: Tensor, gradient: float) -> Tensor:
    """Distances [B, 4, H, W] in strides -> offsets [B, 18, H, W], y and x, by which the nine places of a 3x3
    convolution become the corners, the middles of the sides and the centre of a box."""
    left, top, right, bottom = (sides.detach() * (1 - gradient) + sides * gradient).unbind(1)
    none = torch.zeros_like(left)
    points = []
    for row, y in ((-1, -top), (0, none), (1, bottom)):
        for column, x in ((-1, -left), (0, none), (1, right)):
            points += [y - row, x - column]
    return torch.stack(points, 1)
