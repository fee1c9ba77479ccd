"""The head of YOLOX and RTMDet: towers of their own for each level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel_detection.parts import Output
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.heads import LevelTowers


class Tower(nn.Module):
    """Convolutions of each level, or one set for all, and the norms of each level."""

    def __init__(self, options: LevelTowers, channels: int, levels: int, share: bool) -> None:
        super().__init__()
        width, numbers = options.channels, range(options.convs)

        def convs() -> nn.ModuleList:
            return nn.ModuleList(
                [nn.Conv2d(width if number else channels, width, 3, padding=1, bias=False) for number in numbers]
            )

        def norms() -> nn.ModuleList:
            return nn.ModuleList([nn.BatchNorm2d(width, options.norm_eps, options.norm_momentum) for _ in numbers])

        self.convs: Any = nn.ModuleList([convs() for _ in range(1 if share else levels)])
        self.norms: Any = nn.ModuleList([norms() for _ in range(levels)])

    def forward(self, x: Tensor, level: int) -> Tensor:
        for conv, norm in zip(self.convs[level % len(self.convs)], self.norms[level], strict=True):
            x = nn.functional.silu(norm(conv(x)), inplace=True)
        return x


class TowersEach(nn.Module):
    """The outputs of a level are convolutions of 1x1 on its towers, of which each branch has one."""

    def __init__(self, options: LevelTowers, channels: int, levels: int, outputs: Sequence[Output]) -> None:
        super().__init__()
        self.branches = tuple(dict.fromkeys(output.branch for output in outputs))
        for branch in self.branches:
            share = options.share and branch != "kernel"
            self.add_module(f"{branch}_tower", Tower(options, channels, levels, share))
        width = options.channels if options.convs else channels
        for output in outputs:
            self.add_module(output.name, nn.ModuleList([nn.Conv2d(width, output.channels, 1) for _ in range(levels)]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and options.deviation is not None:
                nn.init.normal_(module.weight, std=options.deviation)
        for output in outputs:
            for conv in self._convs(output):
                nn.init.constant_(conv.bias, output.bias)
        self.outputs = tuple(outputs)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {output.name: [] for output in self.outputs}
        for level, one in enumerate(maps):
            features = {branch: self.get_submodule(f"{branch}_tower")(one, level) for branch in self.branches}
            for output in self.outputs:
                found[output.name].append(self._convs(output)[level](features[output.branch]))
        return found

    def _convs(self, output: Output) -> Any:
        """One for each level."""
        return self.get_submodule(output.name)
