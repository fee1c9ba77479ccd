"""HRNet with its authors' names of parameters, which MMDetection's are too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.backbones.norms import norm
from detkernel_detectors.backbones.parts import Freezable, begin, load_weights
from detkernel_detectors.backbones.resnet import shortcut

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Hrnet

STEM = 64
"""Channels of the stem and planes of the first stage."""
MODULES = {2: 1, 3: 4, 4: 3}
"""Stage -> how often its branches are run through and fused."""
BLOCKS = 4
"""Blocks of a branch, and of the first stage."""


class Plain(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn1 = norm(kind, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(kind, channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)
        return found


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside an identity; the last has four times the planes."""

    def __init__(self, inside: int, planes: int, kind: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 1, bias=False)
        self.bn1 = norm(kind, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(kind, planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = norm(kind, planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inside, planes * 4, 1, kind)

    def forward(self, x: Tensor) -> Tensor:
        found = self.relu(self.bn1(self.conv1(x)))
        found = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(found)))))
        result: Tensor = self.relu(found + (x if self.downsample is None else self.downsample(x)))
        return result


class Module(nn.Module):
    """Branches of maps of several strides, each of which is then the sum of all."""

    def __init__(self, widths: Sequence[int], kind: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(*(Plain(width, kind) for _ in range(BLOCKS))) for width in widths])
        self.fuse_layers = nn.ModuleList(
            [
                nn.ModuleList([_to(widths, source, target, kind) for source in range(len(widths))])
                for target in range(len(widths))
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        found = []
        for own, layers in zip(maps, self.fuse_layers, strict=True):
            parts: list[Tensor] = [layer(x) for layer, x in zip(layers.children(), maps, strict=True)]
            total = _as_large(parts[0], own)
            for part in parts[1:]:
                total = total + _as_large(part, own)
            found.append(functional.relu(total))
        return found


def _as_large(x: Tensor, other: Tensor) -> Tensor:
    size = other.shape[-2:]
    return x if x.shape[-2:] == size else functional.interpolate(x, size=size, mode="nearest")


def _to(widths: Sequence[int], source: int, target: int, kind: str) -> nn.Module:
    """What makes a map of one branch one of another's: fewer channels for a finer one, whose size it is given later;
    3x3 convolutions of stride 2 for a coarser one."""
    inside, outside = widths[source], widths[target]
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), norm(kind, outside))
    steps = target - source
    return nn.Sequential(
        *(_down(inside, outside if step == steps - 1 else inside, kind, relu=step < steps - 1) for step in range(steps))
    )


def _down(inside: int, outside: int, kind: str, relu: bool = True, stride: int = 2) -> nn.Sequential:
    layers = [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), norm(kind, outside)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class HrNet(Freezable):
    """A stem of stride 4, a stage of bottlenecks, and three stages of one branch more each, of half the size."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 3, 2, 1, bias=False)
        self.bn1 = norm(kind, STEM)
        self.conv2 = nn.Conv2d(STEM, STEM, 3, 2, 1, bias=False)
        self.bn2 = norm(kind, STEM)
        self.relu = nn.ReLU(inplace=True)
        blocks = [Bottleneck(STEM * 4 if number else STEM, STEM, kind) for number in range(BLOCKS)]
        self.layer1 = nn.Sequential(*blocks)
        self.sections = [["conv1", "bn1", "conv2", "bn2"], ["layer1"]]
        self.channels, self.strides = [width * 2**number for number in range(4)], [4, 8, 16, 32]
        before = [STEM * 4]
        for stage, modules in MODULES.items():
            widths = self.channels[:stage]
            self.add_module(f"transition{stage - 1}", _transition(before, widths, kind))
            self.add_module(f"stage{stage}", nn.Sequential(*(Module(widths, kind) for _ in range(modules))))
            self.sections.append([f"transition{stage - 1}", f"stage{stage}"])
            before = widths
        begin(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.relu(self.bn1(self.conv1(images)))
        maps = [self.layer1(self.relu(self.bn2(self.conv2(x))))]
        for stage in MODULES:
            transition = self.get_submodule(f"transition{stage - 1}")
            sources = [*maps, maps[-1]] if stage > 2 else [maps[0], maps[0]]
            maps = [layer(x) for layer, x in zip(transition.children(), sources, strict=True)]
            maps = self.get_submodule(f"stage{stage}")(maps)
        return {str(number): x for number, x in enumerate(maps)}


def _transition(before: Sequence[int], widths: Sequence[int], kind: str) -> nn.ModuleList:
    """What makes the branches of a stage of those before it; the last, a new one, of the coarsest."""
    layers: list[nn.Module] = []
    for number, width in enumerate(widths):
        if number == len(before):
            layers.append(nn.Sequential(_down(before[-1], width, kind)))
        elif before[number] != width:
            layers.append(_down(before[number], width, kind, stride=1))
        else:
            layers.append(nn.Identity())
    return nn.ModuleList(layers)


CLASSIFIER = ("incre_modules.", "downsamp_modules.", "final_layer.", "classifier.")
"""How the names begin of what classifies an image in its authors' files."""


def build(options: Hrnet) -> HrNet:
    model = HrNet(options.width, options.norm)
    if options.weights is not None:
        load_weights(model, options, options.weights, left_out=CLASSIFIER)
    model.freeze(options.trainable_layers)
    return model
