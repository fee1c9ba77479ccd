"""Darknet-53 with MMDetection's names of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel_detection.weights import are_replaced
from torch import Tensor, nn

from detkernel_detectors.backbones.norms import norm
from detkernel_detectors.backbones.parts import Freezable, load_weights
from detkernel_detectors.blocks import LeakyConv

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Darknet

DEPTHS = (1, 2, 8, 8, 4)
"""Residual blocks of each stage."""


class Residual(nn.Module):
    """1x1 to half of the channels and 3x3 back, beside an identity; nothing is bent after the sum."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv1 = LeakyConv(channels, channels // 2, 1, norm(kind, channels // 2))
        self.conv2 = LeakyConv(channels // 2, channels, 3, norm(kind, channels))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv2(self.conv1(x))
        return found + x


class Stage(nn.Sequential):
    """A convolution to half of the height and width and twice the channels, and residual blocks."""

    def __init__(self, inside: int, blocks: int, kind: str) -> None:
        super().__init__()
        self.add_module("conv", LeakyConv(inside, inside * 2, 3, norm(kind, inside * 2), stride=2))
        for number in range(blocks):
            self.add_module(f"res{number}", Residual(inside * 2, kind))


class Stages(Freezable):
    """A convolution of full size and five stages; the last three give maps."""

    sections = (
        ("conv1", "conv_res_block1"),
        *((f"conv_res_block{stage}",) for stage in range(2, len(DEPTHS) + 1)),
    )

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv1 = LeakyConv(3, channels, 3, norm(kind, channels))
        for stage, blocks in enumerate(DEPTHS):
            self.add_module(f"conv_res_block{stage + 1}", Stage(channels * 2**stage, blocks, kind))
        self.channels, self.strides = [channels * 2**stage for stage in (3, 4, 5)], [8, 16, 32]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = self.conv1(images), {}
        for stage in range(1, len(DEPTHS) + 1):
            x = self.get_submodule(f"conv_res_block{stage}")(x)
            if stage > 2:
                found[str(stage)] = x
        return found


def build(options: Darknet) -> Stages:
    made = Stages(options.channels, options.norm or ("batch" if options.weights is None else "eval"))
    if options.weights is not None and not are_replaced():
        load_weights(made, options, options.weights)
    made.freeze(options.trainable_layers)
    return made
