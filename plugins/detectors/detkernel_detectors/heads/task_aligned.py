"""TOOD's head: layers of one tower, decomposed for two tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from detkernel_detection.parts import Output
from torch import Tensor, nn

from detkernel_detectors.coders.distance import exponential
from detkernel_detectors.heads.towers import normalisation, tower

if TYPE_CHECKING:
    from detkernel_detectors.heads import TaskAlignedHead


class Decomposition(nn.Module):
    """A 1x1 convolution of all layers, each of them weighted by attention to the mean of all."""

    def __init__(self, options: TaskAlignedHead) -> None:
        super().__init__()
        width, self.layers = options.channels, options.convs
        least = max(width // 8, 1)
        self.attention = nn.Sequential(
            nn.Conv2d(width * self.layers, least, 1), nn.ReLU(), nn.Conv2d(least, self.layers, 1), nn.Sigmoid()
        )
        bias = options.norm is None if options.bias is None else options.bias
        self.conv = nn.Conv2d(width * self.layers, width, 1, bias=bias)
        self.norm = normalisation(options)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        batch, inside, height, width = x.shape
        weight = self.conv.weight.view(1, -1, self.layers, inside // self.layers)
        weight = (weight * self.attention(mean).view(batch, 1, self.layers, 1)).flatten(2)
        # The weights times the attention are of each image; the layers times it would be as large as the maps.
        found = torch.bmm(weight, x.flatten(2)).view(batch, -1, height, width)
        if self.conv.bias is not None:
            found = found + self.conv.bias[:, None, None]
        return nn.functional.relu(self.norm(found))


class TaskAligned(nn.Module):
    """Weights begin with a deviation of 0.01, of attention and of the offsets with 0.001."""

    def __init__(self, options: TaskAlignedHead, channels: int, levels: int, outputs: Sequence[Output]) -> None:
        super().__init__()
        width = options.channels
        self.tower = tower(options, channels)
        self.cls_decomposition, self.reg_decomposition = (Decomposition(options) for _ in range(2))
        for output in outputs:
            made: nn.Module
            if output.name in ("cls", "reg"):
                made = nn.Conv2d(width, output.channels, 3, padding=1)
            else:
                least = max(width // 4, 1)
                made = nn.Sequential(
                    nn.Conv2d(width * options.convs, least, 1),
                    nn.ReLU(),
                    nn.Conv2d(least, output.channels, 3, padding=1),
                )
            self.add_module(output.name, made)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001 if "attention" in name or "offset" in name else 0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for output in outputs:
            made = self.get_submodule(output.name)
            last: Any = made[-1] if isinstance(made, nn.Sequential) else made
            nn.init.constant_(last.bias, output.bias)
        self.outputs = tuple(outputs)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(levels)])

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {output.name: [] for output in self.outputs}
        layers = []
        for layer in self.tower:
            maps = layer(maps)
            layers.append(maps)
        for level, levels in enumerate(zip(*layers, strict=True)):
            every = torch.cat(levels, 1)
            mean = every.mean((2, 3), keepdim=True)
            features = {"cls": self.cls_decomposition(every, mean), "reg": self.reg_decomposition(every, mean)}
            for output in self.outputs:
                value = self.get_submodule(output.name)(features.get(output.name, every))
                if output.name == "reg":
                    value = value.float() if output.scaled else exponential(value.float())
                    value = value * self.scales[level]
                found[output.name].append(value)
        return found
