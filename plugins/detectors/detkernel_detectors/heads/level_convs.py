"""The head of SSD: a convolution for each level and output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel_detection.parts import Output
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.heads import LevelConvs


class ConvsEach(nn.Module):
    """Weights begin as Glorot's (uniform), biases with what the output asks for."""

    def __init__(self, options: LevelConvs, channels: Sequence[int], outputs: Sequence[Output]) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        for output in outputs:
            priors = output.priors or (1,) * len(channels)
            convs = [
                nn.Conv2d(inside, output.channels * count, options.size, padding=options.size // 2)
                for inside, count in zip(channels, priors, strict=True)
            ]
            for conv in convs:
                nn.init.xavier_uniform_(conv.weight)
                nn.init.constant_(conv.bias, output.bias)  # type: ignore[arg-type]
            self.add_module(output.name, nn.ModuleList(convs))

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        found = {}
        for output in self.outputs:
            convs: Any = self.get_submodule(output.name)
            found[output.name] = [conv(one) for conv, one in zip(convs, maps, strict=True)]
        return found
