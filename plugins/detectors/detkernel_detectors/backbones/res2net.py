"""Res2Net with MMDetection's names of parameters; its authors' are read, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detkernel_detectors.backbones.norms import norm
from detkernel_detectors.backbones.parts import Freezable, begin, freeze, kind_of_norm, load_weights
from detkernel_detectors.backbones.resnet import BLOCKS, deep_stem, shortcut

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Res2net

STEM = 64
"""Channels of the stem and planes of the first stage."""


class Block(nn.Module):
    """A bottleneck whose 3x3 convolution is a row of smaller ones, each of which is given what the one before found.

    The first block of a stage begins the row anew for each part, since its maps shrink.
    """

    def __init__(self, inside: int, planes: int, stride: int, options: Res2net, kind: str, first: bool) -> None:
        super().__init__()
        width = planes * options.width // STEM
        self.width, self.first, averages = width, first, options.variant == "vd"
        self.conv1 = nn.Conv2d(inside, width * options.scales, 1, bias=False)
        self.bn1 = norm(kind, width * options.scales)
        row = range(options.scales - 1)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, stride, 1, bias=False) for _ in row])
        self.bns = nn.ModuleList([norm(kind, width) for _ in row])
        smooths = first and (stride > 1 or options.smooth_first)
        self.pool = nn.AvgPool2d(3, stride, 1) if smooths else nn.Identity()
        self.conv3 = nn.Conv2d(width * options.scales, planes * 4, 1, bias=False)
        self.bn3 = norm(kind, planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inside, planes * 4, stride, kind, averages, first)

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = self.relu(self.bn1(self.conv1(x))).split(self.width, 1)
        found: list[Tensor] = []
        for part, conv, bn in zip(parts, self.convs, self.bns, strict=True):
            given = part if self.first or not found else found[-1] + part
            found.append(self.relu(bn(conv(given))))
        joined = self.bn3(self.conv3(torch.cat([*found, self.pool(last)], 1)))
        joined += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(joined)
        return result


AUTHORS = [(r"conv1\.(\d)\.", r"stem.\1."), (r"bn1\.", "stem.7.")]
"""How the names of parameters of the deep stem begin in its authors' files (v1b), and ours."""


class Res2Net(Freezable):
    """The stem and four stages."""

    def __init__(self, options: Res2net, kind: str) -> None:
        super().__init__()
        self.deep = options.variant == "vd"
        if self.deep:
            self.stem = deep_stem(STEM, kind)
            self.key_maps = {"its authors": AUTHORS}
        else:
            self.conv1 = nn.Conv2d(3, STEM, 7, 2, 3, bias=False)
            self.bn1 = norm(kind, STEM)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels, self.strides = [], []
        self.sections = [["stem"] if self.deep else ["conv1", "bn1"]]
        inside = STEM
        for stage, count in enumerate(BLOCKS[options.depth]):
            planes, made = STEM * 2**stage, []
            for number in range(count):
                stride = 2 if stage and number == 0 else 1
                made.append(Block(inside, planes, stride, options, kind, number == 0))
                inside = planes * 4
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
            self.sections.append([f"layer{stage + 1}"])
            self.channels.append(inside)
            self.strides.append(4 * 2**stage)
        begin(self, [one.bn3 for one in self.modules() if isinstance(one, Block)])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(self.stem(images) if self.deep else self.relu(self.bn1(self.conv1(images))))
        found = {}
        for number in range(len(self.channels)):
            x = self.get_submodule(f"layer{number + 1}")(x)
            found[str(number)] = x
        return found


def build(options: Res2net) -> Res2Net:
    model = Res2Net(options, kind_of_norm(options))
    if options.weights is not None:
        load_weights(model, options, options.weights)
    freeze(model, options)
    return model
