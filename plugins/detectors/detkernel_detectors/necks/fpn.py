"""The feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.backbones.norms import norm

if TYPE_CHECKING:
    from detkernel_detectors.necks import Fpn


class Pyramid(nn.Module):
    """Laterals of 1x1 and outputs of 3x3, with biases or normalised, without activation."""

    def __init__(self, options: Fpn, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.first = next(number for number, stride in enumerate(strides) if stride >= options.finest)
        inside, self.channels = list(channels[self.first :]), options.channels
        self.strides = list(strides[self.first :])
        width, bias = self.channels, options.norm is None
        self.laterals = nn.ModuleList([nn.Conv2d(count, width, 1, bias=bias) for count in inside])
        self.outputs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=bias) for _ in inside])
        self.lateral_norms, self.output_norms = (
            nn.ModuleList([nn.Identity() if options.norm is None else norm(options.norm, width) for _ in inside])
            for _ in range(2)
        )
        self.extra, self.extra_from, self.extra_relu = options.extra, options.extra_from, options.extra_relu
        for number in range(options.extra):
            self.strides.append(self.strides[-1] * 2)
            if options.extra_from != "pool":
                before = inside[-1] if number == 0 and options.extra_from == "input" else self.channels
                self.outputs.append(nn.Conv2d(before, self.channels, 3, stride=2, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        inside = list(maps)[self.first :]
        sums = [
            norm(lateral(one)) for lateral, norm, one in zip(self.laterals, self.lateral_norms, inside, strict=True)
        ]
        for number in range(len(sums) - 1, 0, -1):
            finer = sums[number - 1]
            sums[number - 1] = finer + functional.interpolate(sums[number], size=finer.shape[-2:], mode="nearest")
        found = [norm(self.outputs[number](sums[number])) for number, norm in enumerate(self.output_norms)]
        for number in range(self.extra):
            if self.extra_from == "pool":
                found.append(found[-1][:, :, ::2, ::2])
                continue
            source = inside[-1] if number == 0 and self.extra_from == "input" else found[-1]
            if self.extra_relu and number:
                source = functional.relu(source)
            found.append(self.outputs[len(inside) + number](source))
        return found
