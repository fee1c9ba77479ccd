"""RegNet with the names of parameters of a ResNet, which are MMDetection's; torchvision's are read, too."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from detkernel_detectors.backbones.norms import norm
from detkernel_detectors.backbones.parts import Freezable, begin, freeze, kind_of_norm, load_weights
from detkernel_detectors.backbones.resnet import shortcut

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Regnet

STEM = 32
"""Channels of the stem."""


class Design(NamedTuple):
    """A row of the tables in the paper's appendix: all that says how deep and wide a network is."""

    depth: int
    """Blocks of all stages."""
    initial: int
    """w_0: width of the first block."""
    slope: float
    """w_a: by how much each block is wider than the one before, before widths are quantised."""
    factor: float
    """w_m: by how much a stage is wider than the one before, about."""
    group: int
    """Channels of a group of the 3x3 convolutions."""
    generous: bool = False
    """Whether widths are moved to multiples of the groups as in torchvision: a half up, and none down by a tenth."""


DESIGNS = {
    "x_400mf": Design(22, 24, 24.48, 2.54, 16),
    "x_400mf_torchvision": Design(22, 24, 24.48, 2.54, 16, generous=True),
    "x_800mf": Design(16, 56, 35.73, 2.28, 16),
    "x_1.6gf": Design(18, 80, 34.01, 2.25, 24),
    "x_3.2gf": Design(25, 88, 26.31, 2.25, 48),
    "x_4.0gf": Design(23, 96, 38.65, 2.43, 40),
    "x_6.4gf": Design(17, 184, 60.83, 2.07, 56),
    "x_8.0gf": Design(23, 80, 49.56, 2.88, 120),
    "x_12gf": Design(19, 168, 73.36, 2.37, 112),
    "x_16gf": Design(22, 216, 55.59, 2.1, 128),
    "x_32gf": Design(23, 320, 69.86, 2.0, 168),
    "y_400mf": Design(16, 48, 27.89, 2.09, 8),
    "y_800mf": Design(14, 56, 38.84, 2.4, 16, generous=True),
    "y_1.6gf": Design(27, 48, 20.71, 2.65, 24),
    "y_3.2gf": Design(21, 80, 42.63, 2.66, 24),
    "y_8.0gf": Design(17, 192, 76.82, 2.19, 56, generous=True),
    "y_16gf": Design(18, 200, 106.23, 2.48, 112),
    "y_32gf": Design(20, 232, 115.89, 2.53, 232),
}
"""Size -> its design, as in Radosavovic et al. 2020; Y and what torchvision alone has, as it rounds widths."""

PUBLISHED = {
    size: f"regnet_{size.removesuffix('_torchvision').replace('.0', '').replace('.', '_')}"
    for size in DESIGNS
    if size not in ("x_400mf", "x_4.0gf", "x_6.4gf", "x_12gf")
}
"""Size -> torchvision's function that has weights of it."""


class Stage(NamedTuple):
    """Blocks of equal width."""

    width: int
    blocks: int
    group: int


def stages(design: Design) -> list[Stage]:
    """The stages of a network: widths on a line, moved to powers of `factor` and then to multiples of 8 and of the
    groups (equations 2 to 4)."""
    line = [design.initial + design.slope * number for number in range(design.depth)]
    powers = [round(math.log(width / design.initial) / math.log(design.factor)) for width in line]
    widths = [round(design.initial * design.factor**power / 8) * 8 for power in powers]
    found = []
    for width, blocks in itertools.groupby(widths):
        group = min(design.group, width)
        groups = round(width / group)
        if design.generous:
            groups = math.floor(width / group + 0.5)
            groups += groups * group < 0.9 * width
        found.append(Stage(groups * group, len(list(blocks)), group))
    return found


class Block(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions of equal width beside an identity; Y: with attention to channels."""

    def __init__(self, inside: int, stage: Stage, stride: int, kind: str, attention: bool) -> None:
        super().__init__()
        width = stage.width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = norm(kind, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=width // stage.group, bias=False)
        self.bn2 = norm(kind, width)
        self.se = SqueezeExcitation(width, round(inside / 4)) if attention else nn.Identity()
        self.conv3 = nn.Conv2d(width, width, 1, bias=False)
        self.bn3 = norm(kind, width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inside, width, stride, kind)

    def forward(self, x: Tensor) -> Tensor:
        found = self.relu(self.bn1(self.conv1(x)))
        found = self.se(self.relu(self.bn2(self.conv2(found))))
        found = self.bn3(self.conv3(found))
        found += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(found)
        return result


TORCHVISION = [
    (r"stem\.0\.", "conv1."),
    (r"stem\.1\.", "bn1."),
    *(
        (rf"trunk_output\.block(\d)\.block\d-(\d+)\.{theirs}\.", rf"layer\1.\2.{ours}.")
        for theirs, ours in (
            ("proj.0", "downsample.0"),
            ("proj.1", "downsample.1"),
            ("f.a.0", "conv1"),
            ("f.a.1", "bn1"),
            ("f.b.0", "conv2"),
            ("f.b.1", "bn2"),
            ("f.se", "se"),
            ("f.c.0", "conv3"),
            ("f.c.1", "bn3"),
        )
    ),
]
"""How torchvision's names of parameters begin, and ours."""


class RegNet(Freezable):
    """A 3x3 convolution of stride 2 and four stages."""

    def __init__(self, size: str, kind: str) -> None:
        super().__init__()
        self.key_maps = {"torchvision": TORCHVISION}
        self.conv1 = nn.Conv2d(3, STEM, 3, 2, 1, bias=False)
        self.bn1 = norm(kind, STEM)
        self.relu = nn.ReLU(inplace=True)
        self.channels, self.strides, self.sections = [], [], [["conv1", "bn1"]]
        inside = STEM
        for number, stage in enumerate(stages(DESIGNS[size]), 1):
            made = []
            for block in range(stage.blocks):
                made.append(Block(inside, stage, 1 if block else 2, kind, size.startswith("y")))
                inside = stage.width
            self.add_module(f"layer{number}", nn.Sequential(*made))
            self.sections.append([f"layer{number}"])
            self.channels.append(inside)
            self.strides.append(2 * 2**number)
        begin(self, [one.bn3 for one in self.modules() if isinstance(one, Block)])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x, found = self.relu(self.bn1(self.conv1(images))), {}
        for number in range(len(self.channels)):
            x = self.get_submodule(f"layer{number + 1}")(x)
            found[str(number)] = x
        return found


def build(options: Regnet) -> RegNet:
    model = RegNet(options.size, kind_of_norm(options))
    if options.weights is not None:
        builders = [PUBLISHED[options.size]] if options.size in PUBLISHED else []
        load_weights(model, options, options.weights, builders)
    freeze(model, options)
    return model
