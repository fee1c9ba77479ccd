"""ResNet with torchvision's names of parameters, which MMDetection's are too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import wrong
from detkernel_detection import torchvision_weights
from torch import Tensor, nn

from detkernel_detectors.backbones.deformable import DeformableConv2d
from detkernel_detectors.backbones.norms import norm
from detkernel_detectors.backbones.paddle import PADDLE
from detkernel_detectors.backbones.parts import Freezable, begin, freeze, kind_of_norm

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Resnet

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Depth -> blocks of each stage; bottlenecks from 50 on."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    def __init__(
        self, inside: int, planes: int, stride: int, options: Resnet, kind: str, stage: int, first: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(kind, planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(kind, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inside, planes, stride, kind, options.variant == "vd", first)

    def forward(self, x: Tensor) -> Tensor:
        found = self.relu(self.bn1(self.conv1(x)))
        found = self.bn2(self.conv2(found))
        found += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(found)
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside an identity; the last has four times the planes."""

    def __init__(
        self, inside: int, planes: int, stride: int, options: Resnet, kind: str, stage: int, first: bool
    ) -> None:
        super().__init__()
        width = planes * options.width_per_group // 64 * options.groups
        before, stride3 = (stride, 1) if options.style == "caffe" else (1, stride)
        self.conv1 = nn.Conv2d(inside, width, 1, before, bias=False)
        self.bn1 = norm(kind, width)
        if options.deformable is not None and stage + 1 in options.deformable_stages:
            self.conv2: nn.Module = DeformableConv2d(
                width, width, stride3, options.groups, options.deformable, options.deformable_groups
            )
        else:
            self.conv2 = nn.Conv2d(width, width, 3, stride3, 1, groups=options.groups, bias=False)
        self.bn2 = norm(kind, width)
        self.conv3 = nn.Conv2d(width, planes * 4, 1, bias=False)
        self.bn3 = norm(kind, planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inside, planes * 4, stride, kind, options.variant == "vd", first)

    def forward(self, x: Tensor) -> Tensor:
        found = self.relu(self.bn1(self.conv1(x)))
        found = self.relu(self.bn2(self.conv2(found)))
        found = self.bn3(self.conv3(found))
        found += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(found)
        return result


class ResNet(Freezable):
    """The stem and up to four stages."""

    def __init__(self, options: Resnet, kind: str) -> None:
        super().__init__()
        block = Bottleneck if options.depth >= 50 else BasicBlock
        self.deep = options.variant == "vd"
        if self.deep:
            self.stem = deep_stem(options.channels, kind)
            self.key_maps = {"RT-DETR": PADDLE}
        else:
            self.conv1 = nn.Conv2d(3, options.channels, 7, 2, 3, bias=False)
            self.bn1 = norm(kind, options.channels)
            self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels, self.strides = [], []
        stages = [[f"layer{stage + 1}"] for stage in range(options.stages)]
        self.sections = [["stem"] if self.deep else ["conv1", "bn1"], *stages]
        inside = options.channels
        for stage in range(options.stages):
            planes = options.channels * 2**stage
            blocks = []
            for number in range(BLOCKS[options.depth][stage]):
                first = number == 0
                blocks.append(block(inside, planes, 2 if stage and first else 1, options, kind, stage, first))
                inside = planes * (4 if block is Bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(inside)
            self.strides.append(4 * 2**stage)
        blocks_of_all = [one for one in self.modules() if isinstance(one, (BasicBlock, Bottleneck))]
        begin(self, [one.bn2 if isinstance(one, BasicBlock) else one.bn3 for one in blocks_of_all])
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                module.begin()
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.eps = options.norm_eps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.maxpool(self.stem(images) if self.deep else self.relu(self.bn1(self.conv1(images))))
        found = {}
        for stage in range(len(self.channels)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            found[str(stage)] = x
        return found


def build(options: Resnet) -> ResNet:
    if options.depth < 50 and (options.groups, options.width_per_group) != (1, 64):
        raise wrong(options, "groups", f"a ResNet-{options.depth} has no groups; ResNeXt begins at depth 50")
    if options.depth < 50 and options.deformable is not None:
        raise wrong(options, "deformable", f"a ResNet-{options.depth} has no bottlenecks; they begin at depth 50")
    model = ResNet(options, kind_of_norm(options))
    if options.weights is not None:
        relatives = [f"resnet{options.depth}", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
        torchvision_weights.load_backbone(model, options, relatives, options.weights, new="conv_offset")
    freeze(model, options)
    return model


def shortcut(
    inside: int, outside: int, stride: int, kind: str, averages: bool = False, first: bool = False
) -> nn.Sequential | None:
    """What stands beside a block whose shape changes: a 1x1 convolution with the stride, or, where it `averages`, a
    mean before one without; such a one stands beside the `first` block of each stage. None: nothing."""
    if stride == 1 and inside == outside and not (averages and first):
        return None
    if averages:
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True)
        return nn.Sequential(pool, nn.Conv2d(inside, outside, 1, bias=False), norm(kind, outside))
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(kind, outside))


def deep_stem(channels: int, kind: str) -> nn.Sequential:
    """Three 3x3 convolutions, the first of stride 2, in place of one of 7x7."""
    layers: list[nn.Module] = []
    for inside, outside, stride in (
        (3, channels // 2, 2),
        (channels // 2, channels // 2, 1),
        (channels // 2, channels, 1),
    ):
        layers += [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), norm(kind, outside), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
