"""A new backbone, for every detector that takes one: non-overlapping patches, then depthwise mixing."""

from __future__ import annotations

from typing import Any

from detkernel import option, plugin
from detkernel_detection import Backbone


@plugin
class PatchBackbone(Backbone):
    """Patch embedding and three stages of depthwise convolutions, at strides 8, 16 and 32."""

    width: int = option(default=64, at_least=8, help="channels of the finest stage; each coarser one has twice as many")

    def build(self) -> Any:
        from torch import Tensor, nn

        class Stage(nn.Sequential):
            def __init__(self, before: int, after: int, stride: int) -> None:
                super().__init__(
                    nn.Conv2d(before, after, stride, stride),
                    nn.BatchNorm2d(after),
                    nn.GELU(),
                    nn.Conv2d(after, after, 5, padding=2, groups=after),
                    nn.BatchNorm2d(after),
                    nn.GELU(),
                )

        class Patches(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.channels = [width, 2 * width, 4 * width]
                self.strides = [8, 16, 32]
                self.stages = nn.ModuleList(
                    [Stage(3, width, 8), Stage(width, 2 * width, 2), Stage(2 * width, 4 * width, 2)]
                )

            def forward(self, images: Tensor) -> dict[str, Tensor]:
                maps = {}
                for level, stage in enumerate(self.stages):
                    images = stage(images)
                    maps[str(level)] = images
                return maps

        return Patches(self.width)
