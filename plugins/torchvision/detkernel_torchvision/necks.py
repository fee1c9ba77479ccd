"""From a backbone's maps to a feature pyramid (Lin et al. 2017), with torchvision's names of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel import wrong
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detkernel_torchvision.norms import norm_layer

if TYPE_CHECKING:
    from detkernel_torchvision.models import PyramidDetector


class Pyramid(nn.Module):
    """A backbone's maps of some strides, joined into a pyramid of one width."""

    def __init__(self, body: Any, positions: Sequence[int], channels: int, extra: str, norm: str | None) -> None:
        super().__init__()
        self._positions = list(positions)
        strides = [body.strides[position] for position in positions]
        inside = [body.channels[position] for position in positions]
        blocks = {
            "pool": LastLevelMaxPool,
            "p6p7": lambda: LastLevelP6P7(channels, channels),
            "p6p7_from_c5": lambda: LastLevelP6P7(inside[-1], channels),
        }
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            inside, channels, extra_blocks=blocks[extra](), norm_layer=norm_layer(norm) if norm else None
        )
        self.out_channels = channels
        self.strides = [*strides, *(strides[-1] * 2 ** (n + 1) for n in range(1 if extra == "pool" else 2))]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = list(self.body(images).values())
        chosen = {str(number): maps[position] for number, position in enumerate(self._positions)}
        found: dict[str, Tensor] = self.fpn(chosen)
        return found


def pyramid(options: PyramidDetector, extra: str, finest: int) -> Pyramid:
    """The pyramid of a detector, from the maps of its `levels` (by default those of stride `finest` and more)."""
    body: Any = options.backbone.build()
    for name in ("channels", "strides"):
        if not hasattr(body, name):
            raise wrong(
                options, "backbone", f"{type(options.backbone).__qualname__}.build() gave a module without `{name}`"
            )
    strides = list(body.strides)
    if options.levels is None:
        positions = [position for position, stride in enumerate(strides) if stride >= finest]
    elif set(options.levels) <= set(strides) and sorted(set(options.levels)) == options.levels:
        positions = [len(strides) - 1 - strides[::-1].index(stride) for stride in options.levels]
    else:
        message = f"the backbone has maps of strides {strides}; expected some of them, rising, got {options.levels}"
        raise wrong(options, "levels", message)
    if not positions:
        raise wrong(options, "backbone", f"its maps have strides {strides}; the detector needs one of {finest} or more")
    return Pyramid(body, positions, options.neck_channels, extra, options.neck_norm)
