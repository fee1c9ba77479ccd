"""The feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from detkernel_detectors.necks import Fpn


class Pyramid(nn.Module):
    """Laterals of 1x1 and outputs of 3x3, with biases, without normalisation or activation."""

    def __init__(self, options: Fpn, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.first = next(number for number, stride in enumerate(strides) if stride >= options.finest)
        inside, self.channels = list(channels[self.first :]), options.channels
        self.strides = list(strides[self.first :])
        self.laterals = nn.ModuleList([nn.Conv2d(count, self.channels, 1) for count in inside])
        self.outputs = nn.ModuleList([nn.Conv2d(self.channels, self.channels, 3, padding=1) for _ in inside])
        self.extra, self.extra_from, self.extra_relu = options.extra, options.extra_from, options.extra_relu
        for number in range(options.extra):
            self.strides.append(self.strides[-1] * 2)
            if options.extra_from != "pool":
                before = inside[-1] if number == 0 and options.extra_from == "input" else self.channels
                self.outputs.append(nn.Conv2d(before, self.channels, 3, stride=2, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        inside = list(maps)[self.first :]
        sums = [lateral(one) for lateral, one in zip(self.laterals, inside, strict=True)]
        for number in range(len(sums) - 1, 0, -1):
            finer = sums[number - 1]
            sums[number - 1] = finer + functional.interpolate(sums[number], size=finer.shape[-2:], mode="nearest")
        found = [self.outputs[number](one) for number, one in enumerate(sums)]
        for number in range(self.extra):
            if self.extra_from == "pool":
                found.append(found[-1][:, :, ::2, ::2])
                continue
            source = inside[-1] if number == 0 and self.extra_from == "input" else found[-1]
            if self.extra_relu and number:
                source = functional.relu(source)
            found.append(self.outputs[len(inside) + number](source))
        return found
