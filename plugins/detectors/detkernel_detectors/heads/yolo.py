"""The head of YOLOv3: two convolutions of its own for each level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel_detection.parts import Output
from torch import Tensor, nn

from detkernel_detectors.blocks import LeakyConv

if TYPE_CHECKING:
    from detkernel_detectors.heads import YoloHead


class YoloConvs(nn.Module):
    """A 3x3 convolution of each level, and on it one of 1x1 for each output."""

    def __init__(self, options: YoloHead, channels: Sequence[int], outputs: Sequence[Output]) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.bridge: Any = nn.ModuleList(
            [
                LeakyConv(inside, width, 3, nn.BatchNorm2d(width, options.norm_eps, options.norm_momentum))
                for inside, width in zip(channels, options.channels, strict=True)
            ]
        )
        for output in outputs:
            convs = [nn.Conv2d(width, output.channels, 1) for width in options.channels]
            self.add_module(output.name, nn.ModuleList(convs))
            for conv in convs:
                nn.init.constant_(conv.bias, output.bias)  # type: ignore[arg-type]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=options.deviation)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        features = [bridge(one) for bridge, one in zip(self.bridge, maps, strict=True)]
        return {output.name: self._predicted(output.name, features) for output in self.outputs}

    def _predicted(self, name: str, features: Sequence[Tensor]) -> list[Tensor]:
        convs: Any = self.get_submodule(name)
        return [conv(one) for conv, one in zip(convs, features, strict=True)]
