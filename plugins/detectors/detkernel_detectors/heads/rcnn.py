"""The heads of R-CNNs: of the proposals, and of what is pooled of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

FINEST = 56
"""Pixels: the side from which a proposal is pooled of the second level."""


class RpnHead(nn.Module):
    """A convolution, and of it an objectness and four numbers for every anchor."""

    def __init__(self, channels: int, anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls = nn.Conv2d(channels, anchors, 1)
        self.reg = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (self.conv, self.cls, self.reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        features = [self.conv(one).relu() for one in maps]
        return {"cls": [self.cls(one) for one in features], "reg": [self.reg(one) for one in features]}


class BoxHead(nn.Module):
    """What is pooled of a box goes through two layers, and gives logits and a box for every class."""

    def __init__(
        self, channels: int, pooled: int, sampling: int, width: int, classes: int, strides: Sequence[int]
    ) -> None:
        super().__init__()
        self.pooled, self.sampling, self.classes, self.strides = pooled, sampling, classes, tuple(strides)
        self.fcs = nn.ModuleList([nn.Linear(channels * pooled**2, width), nn.Linear(width, width)])
        self.cls = nn.Linear(width, classes + 1)
        self.reg = nn.Linear(width, 4 * classes)
        for layer in self.fcs:
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        nn.init.normal_(self.cls.weight, std=0.01)
        nn.init.normal_(self.reg.weight, std=0.001)
        for layer in (*self.fcs, self.cls, self.reg):
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [B, S, 4] -> logits [B, S, C + 1], the last for background, and the coder's numbers [B, S, C, 4]."""
        x = self.features(maps, boxes).flatten(1)
        for layer in self.fcs:
            x = layer(x).relu()
        shape = boxes.shape[:2]
        return self.cls(x).float().view(*shape, -1), self.reg(x).float().view(*shape, self.classes, 4)

    def features(self, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """[B * S, channels, pooled, pooled], each box of the level that its size asks for.

        Every level pools all boxes, those of other levels as boxes without extent, which cost and give nothing: no
        shape depends on how many a level has.
        """
        levels = levels_of(boxes, len(self.strides))
        number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None]
        number = number.expand(-1, boxes.shape[1], 1)
        found: Tensor | None = None
        for level, (one, stride) in enumerate(zip(maps, self.strides, strict=False)):
            here = torch.where((levels == level)[..., None], boxes, 0.0)
            rois = torch.cat([number, here], -1).flatten(0, 1)
            pooled = roi_align(one.float(), rois, self.pooled, 1 / stride, self.sampling, aligned=True)
            found = pooled if found is None else found + pooled
        assert found is not None
        return found


def levels_of(boxes: Tensor, levels: int) -> Tensor:
    """int64 [...]: the level of each box, by the root of its area (Lin et al. 2017)."""
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    return (area.sqrt() / FINEST + 1e-6).log2().floor().clamp(0, levels - 1).long()
