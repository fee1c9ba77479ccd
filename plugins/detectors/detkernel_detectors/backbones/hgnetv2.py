"""PP-HGNetV2: chains of convolutions whose maps are all joined at the end of a block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from detkernel import wrong
from detkernel_detection.weights import are_replaced, load_into, read_weights
from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.backbones.norms import norm

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Hgnetv2


class Stage(NamedTuple):
    """A row of the table of an HGNetV2."""

    inside: int
    middle: int
    outside: int
    blocks: int = 1
    light: bool = False
    """Convolutions are a 1x1 and a depthwise one."""
    kernel: int = 3


class Size(NamedTuple):
    """What a network of some size consists of."""

    stem: tuple[int, int]
    """Channels inside and at the end of the stem."""
    stages: tuple[Stage, ...]
    layers: int
    """Convolutions in the chain of a block."""
    affine: bool
    """Whether a scale and a shift are learned after each ReLU (`lab` in PaddlePaddle)."""


SIZES = {
    "b0": Size(
        (16, 16),
        (Stage(16, 16, 64), Stage(64, 32, 256), Stage(256, 64, 512, 2, True, 5), Stage(512, 128, 1024, 1, True, 5)),
        layers=3,
        affine=True,
    ),
    "b2": Size(
        (24, 32),
        (Stage(32, 32, 96), Stage(96, 64, 384), Stage(384, 128, 768, 3, True, 5), Stage(768, 256, 1536, 1, True, 5)),
        layers=4,
        affine=True,
    ),
    "b4": Size(
        (32, 48),
        (
            Stage(48, 48, 128),
            Stage(128, 96, 512),
            Stage(512, 192, 1024, 3, True, 5),
            Stage(1024, 384, 2048, 1, True, 5),
        ),
        layers=6,
        affine=False,
    ),
    "b5": Size(
        (32, 64),
        (
            Stage(64, 64, 128),
            Stage(128, 128, 512, 2),
            Stage(512, 256, 1024, 5, True, 5),
            Stage(1024, 512, 2048, 2, True, 5),
        ),
        layers=6,
        affine=False,
    ),
}


class Affine(nn.Module):
    """One factor and one shift for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class Layer(nn.Module):
    """A convolution and its norm, and a ReLU unless it is linear."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        kind: str,
        affine: bool,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.bn = norm(kind, outside)
        self.act = nn.Identity() if linear else nn.ReLU(inplace=True)
        self.lab = nn.Identity() if linear or not affine else Affine()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lab(self.act(self.bn(self.conv(x))))
        return found


class LightLayer(nn.Module):
    """A linear 1x1 convolution and a depthwise one."""

    def __init__(self, inside: int, outside: int, kernel: int, kind: str, affine: bool) -> None:
        super().__init__()
        self.conv1 = Layer(inside, outside, kind=kind, affine=affine, linear=True)
        self.conv2 = Layer(outside, outside, kernel, kind=kind, affine=affine, groups=outside)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv2(self.conv1(x))
        return found


class Block(nn.Module):
    """A chain of convolutions; its input and all their maps are joined by two 1x1 convolutions."""

    def __init__(self, stage: Stage, size: Size, kind: str, first: bool) -> None:
        super().__init__()
        inside = stage.inside if first else stage.outside
        layers: list[nn.Module] = []
        for number in range(size.layers):
            before = stage.middle if number else inside
            if stage.light:
                layers.append(LightLayer(before, stage.middle, stage.kernel, kind, size.affine))
            else:
                layers.append(Layer(before, stage.middle, stage.kernel, kind=kind, affine=size.affine))
        self.layers = nn.ModuleList(layers)
        joined, half = inside + size.layers * stage.middle, stage.outside // 2
        self.aggregation = nn.Sequential(
            Layer(joined, half, kind=kind, affine=size.affine),
            Layer(half, stage.outside, kind=kind, affine=size.affine),
        )
        self.residual = not first

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        found: Tensor = self.aggregation(torch.cat(maps, 1))
        return found + x if self.residual else found


class Down(nn.Module):
    """Halves the map, but in the first stage, and applies the blocks."""

    def __init__(self, stage: Stage, size: Size, kind: str, halves: bool) -> None:
        super().__init__()
        inside = stage.inside
        self.downsample = (
            Layer(inside, inside, 3, 2, kind=kind, affine=False, groups=inside, linear=True)
            if halves
            else nn.Identity()
        )
        self.blocks = nn.Sequential(*(Block(stage, size, kind, number == 0) for number in range(stage.blocks)))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(self.downsample(x))
        return found


class Stem(nn.Module):
    """From an image to a map of stride 4: beside two convolutions of 2x2 goes a pooling of 2x2."""

    def __init__(self, size: Size, kind: str) -> None:
        super().__init__()
        middle, outside = size.stem
        self.stem1 = Layer(3, middle, 3, 2, kind=kind, affine=size.affine)
        self.stem2a = Layer(middle, middle // 2, 2, kind=kind, affine=size.affine)
        self.stem2b = Layer(middle // 2, middle, 2, kind=kind, affine=size.affine)
        self.stem3 = Layer(middle * 2, middle, 3, 2, kind=kind, affine=size.affine)
        self.stem4 = Layer(middle, outside, kind=kind, affine=size.affine)

    def forward(self, images: Tensor) -> Tensor:
        x = _padded(self.stem1(images))
        pooled = functional.max_pool2d(x, 2, 1)
        found: Tensor = self.stem4(self.stem3(torch.cat([pooled, self.stem2b(_padded(self.stem2a(x)))], 1)))
        return found


class HgNetV2(nn.Module):
    """The stem and four stages."""

    def __init__(self, size: Size, kind: str) -> None:
        super().__init__()
        self.stem = Stem(size, kind)
        self.stages = nn.ModuleList([Down(stage, size, kind, number > 0) for number, stage in enumerate(size.stages)])
        self.channels = [stage.outside for stage in size.stages]
        self.strides = [4 * 2**number for number in range(len(size.stages))]
        self.frozen: tuple[nn.Module, ...] = ()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def freeze(self, trained: int) -> None:
        """Train only so many stages, from the last one: the others get no gradient and keep their statistics."""
        self.frozen = (self.stem, *self.stages)[: 5 - trained]
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> HgNetV2:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = self.stem(images), {}
        for number, stage in enumerate(self.stages):
            x = stage(x)
            found[str(number)] = x
        return found


def build(options: Hgnetv2) -> HgNetV2:
    model = HgNetV2(options.table, options.norm)
    if options.weights is not None and not are_replaced():
        path = Path(options.weights).expanduser()
        if not path.is_file():
            raise wrong(options, "weights", f"there is no file '{options.weights}'")
        load_into(model, read_weights(path))
    model.freeze(options.trainable_layers)
    model.train()
    return model


def _padded(x: Tensor) -> Tensor:
    """One more column at the right and one more row below, of zeros, for kernels of 2x2."""
    return functional.pad(x, (0, 1, 0, 1))
