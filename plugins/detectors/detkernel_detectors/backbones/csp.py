"""CSPDarknet and CSPNeXt with MMDetection's names of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from detkernel import wrong
from detkernel_detection.weights import are_replaced, load_into, read_weights
from torch import Tensor, nn

from detkernel_detectors.blocks import BatchNorm, BlockName, ConvNorm, CspLayer, SpatialPyramidPooling

if TYPE_CHECKING:
    from detkernel_detectors.backbones import CspDarknet, Cspnext

WIDTHS = (64, 128, 256, 512, 1024)
"""Channels of the stem and of each stage, before the factor `width`."""


class Focus(nn.Module):
    """The four pixels of every square of 2x2 as channels, then a 3x3 convolution."""

    def __init__(self, channels: int, norm: BatchNorm) -> None:
        super().__init__()
        self.conv = ConvNorm(12, channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        found: Tensor = self.conv(torch.cat(corners, 1))
        return found


class CspStages(nn.Module):
    """A stem of stride 2 and four stages; the last three give maps."""

    def __init__(
        self,
        options: CspDarknet | Cspnext,
        stem: nn.Module,
        depths: tuple[int, int, int, int],
        kind: BlockName,
        attention: bool,
    ) -> None:
        super().__init__()
        norm = BatchNorm(options.norm_eps, options.norm_momentum)
        self.stem = stem
        inside, *widths = scaled(options.width)
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
            last = stage == len(depths)
            blocks = max(round(depth * options.depth), 1)
            layers: list[nn.Module] = [ConvNorm(inside, width, 3, norm, stride=2)]
            if last:
                layers.append(SpatialPyramidPooling(width, norm))
            layers.append(CspLayer(width, width, blocks, kind, norm, identity=not last, attention=attention))
            self.add_module(f"stage{stage}", nn.Sequential(*layers))
            inside = width
        self.channels, self.strides = widths[1:], [8, 16, 32]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = self.stem(images), {}
        for stage in (1, 2, 3, 4):
            x = self.get_submodule(f"stage{stage}")(x)
            if stage > 1:
                found[str(stage)] = x
        return found


def scaled(width: float) -> list[int]:
    return [int(channels * width) for channels in WIDTHS]


def csp_darknet(options: CspDarknet) -> CspStages:
    stem = Focus(scaled(options.width)[0], BatchNorm(options.norm_eps, options.norm_momentum))
    return _loaded(options, CspStages(options, stem, (3, 9, 9, 3), "darknet", attention=False))


def cspnext(options: Cspnext) -> CspStages:
    norm, channels = BatchNorm(options.norm_eps, options.norm_momentum), scaled(options.width)[0]
    half = int(WIDTHS[0] * options.width // 2)
    stem = nn.Sequential(
        ConvNorm(3, half, 3, norm, stride=2), ConvNorm(half, half, 3, norm), ConvNorm(half, channels, 3, norm)
    )
    return _loaded(options, CspStages(options, stem, (3, 6, 6, 3), "cspnext", attention=True))


def _loaded(options: CspDarknet | Cspnext, made: CspStages) -> CspStages:
    if options.weights is not None and not are_replaced():
        path = Path(options.weights).expanduser()
        if not path.is_file():
            raise wrong(options, "weights", f"there is no file '{options.weights}'")
        load_into(made, read_weights(path))
    return made
