"""The head of CenterNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel_detection.parts import Output
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.heads import Branches


class BranchesEach(nn.Module):
    """The last convolutions begin with a deviation of 0.001, and with the biases that the outputs ask for."""

    def __init__(self, options: Branches, channels: int, outputs: Sequence[Output]) -> None:
        super().__init__()
        self.before = nn.ModuleDict(
            {output.name: nn.Conv2d(channels, options.channels, 3, padding=1) for output in outputs}
        )
        for output in outputs:
            last: Any = nn.Conv2d(options.channels, output.channels, 1)
            nn.init.normal_(last.weight, std=0.001)
            nn.init.constant_(last.bias, output.bias)
            self.add_module(output.name, last)
        self.names = tuple(output.name for output in outputs)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        return {
            name: [self.get_submodule(name)(nn.functional.relu(self.before[name](one))) for one in maps]
            for name in self.names
        }
