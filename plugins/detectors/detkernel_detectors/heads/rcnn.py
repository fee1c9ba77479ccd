"""The heads of R-CNNs: of the proposals, and of what is pooled of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detkernel_detectors.backbones.norms import norm
from detkernel_detectors.heads.towers import over_levels, side_by_side

if TYPE_CHECKING:
    from detkernel_detectors.heads import FcBoxHead, FcnMaskHead

FINEST = 56
"""Pixels: the side from which a box is pooled of the second level."""


class RpnHead(nn.Module):
    """Convolutions, and of them an objectness and four numbers for every anchor."""

    def __init__(self, channels: int, anchors: int, convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convs)])
        self.cls = nn.Conv2d(channels, anchors, 1)
        self.reg = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (*self.convs, self.cls, self.reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        features = list(maps)
        for conv in self.convs:
            features = [one.relu() for one in over_levels(conv, features)]
        return {"cls": [self.cls(one) for one in features], "reg": [self.reg(one) for one in features]}


class Layer(nn.Module):
    """A 3x3 convolution, its normalisation if any, and a ReLU."""

    def __init__(self, inside: int, channels: int, kind: str | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, channels, 3, padding=1, bias=kind is None)
        self.norm = nn.Identity() if kind is None else norm(kind, channels)
        _begin(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(self.conv(x)), inplace=True)


def _layers(count: int, inside: int, channels: int, kind: str | None) -> nn.Sequential:
    return nn.Sequential(*(Layer(channels if number else inside, channels, kind) for number in range(count)))


def _begin(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class FullyConnected(nn.Module):
    """What is pooled of a box goes through some layers, and gives logits and boxes."""

    def __init__(self, options: FcBoxHead, channels: int, classes: int, boxes: int) -> None:
        super().__init__()
        self.convs = _layers(options.convs, channels, options.conv_channels, options.norm)
        width = (options.conv_channels if options.convs else channels) * options.pooled**2
        widths = [width, *([options.channels] * options.fcs)]
        self.fcs = nn.ModuleList([nn.Linear(one, other) for one, other in pairwise(widths)])
        self.cls = nn.Linear(widths[-1], classes)
        self.reg = nn.Linear(widths[-1], 4 * boxes)
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)
        for layer in (*self.fcs, self.cls, self.reg):
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(pooled).flatten(1)
        for layer in self.fcs:
            x = layer(x).relu()
        return self.cls(x), self.reg(x)


class FullyConvolutional(nn.Module):
    """Convolutions, one that doubles height and width, and a mask: of the class of each box, of all that are known."""

    def __init__(self, options: FcnMaskHead, channels: int, classes: int) -> None:
        super().__init__()
        self.side = options.pooled * 2
        width = options.channels
        self.convs = _layers(options.convs, channels, width, options.norm)
        self.upsample = nn.ConvTranspose2d(width if options.convs else channels, width, 2, 2)
        self.logits = nn.Conv2d(width, classes, 1)
        for layer in (self.upsample, self.logits):
            _begin(layer)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        features = self.upsample(self.convs(pooled)).relu()
        # The masks of the other classes are not needed: of eighty, they would be the largest tensor of a training. The
        # weights are chosen by a product, since the gradient of an index is added in any order on a GPU.
        last: Any = self.logits
        classes = torch.arange(last.out_channels, device=labels.device)
        own = (labels.clamp(max=len(classes) - 1)[:, None] == classes).to(last.weight.dtype)
        weight, bias = own @ last.weight.flatten(1), own @ last.bias[:, None]
        found: Tensor = torch.bmm(weight[:, None], features.flatten(2)) + bias[:, None]
        return found.view(len(labels), self.side, self.side)


def pooled_of(
    maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, side: int, samples: int, aligned: bool
) -> Tensor:
    """RoIAlign (He et al. 2017): [B * S, channels, side, side] of boxes [B, S, 4] within their images, each of the
    level that its size asks for, of as many levels as there are strides.

    The levels lie in one map, so that all boxes are pooled at once, and no shape depends on how many a level has.
    """
    joined, corners = framed_maps([one.float() for one, _ in zip(maps, strides, strict=False)])
    levels = levels_of(boxes, len(strides))
    scales, shifts = boxes.new_tensor([1 / stride for stride in strides]), boxes.new_tensor(corners)
    places = boxes * scales[levels][..., None] + shifts[levels].repeat(1, 1, 2)
    number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
    rois = torch.cat([number.expand(-1, boxes.shape[1], 1), places], -1).flatten(0, 1)
    pooled: Tensor = roi_align(joined, rois, side, 1.0, samples, aligned)
    return pooled


def framed_maps(maps: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """One map with the largest at its left and the others below each other beside it, and x and y of where each begins.

    RoIAlign goes on with the outermost value for up to half a place beyond a map: each has a frame of these.
    """
    framed = []
    for one in maps:
        one = torch.cat([one[:, :, :1], one, one[:, :, -1:]], 2)
        framed.append(torch.cat([one[..., :1], one, one[..., -1:]], 3))
    width, others = framed[0].shape[3], framed[1:]
    starts = accumulate([one.shape[2] for one in others[:-1]], initial=0)
    corners = [(1, 1), *((width + 1, start + 1) for start in starts)][: len(maps)]
    return side_by_side(framed, gap=0), corners


def levels_of(boxes: Tensor, levels: int) -> Tensor:
    """int64 [...]: the level of each box, by the root of its area (Lin et al. 2017)."""
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    return (area.sqrt() / FINEST + 1e-6).log2().floor().clamp(0, levels - 1).long()
