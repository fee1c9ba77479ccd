"""D-FINE's decoder: the sides of boxes as distributions that each layer refines (Peng et al. 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from detkernel_detection.boxes import cxcywh
from torch import Tensor, nn

from detkernel_detectors.necks.hybrid import ConvNorm
from detkernel_detectors.transformers.denoising import Denoising
from detkernel_detectors.transformers.encodings import Mlp, inverse_sigmoid
from detkernel_detectors.transformers.rtdetr import (
    DecoderLayer,
    Encoded,
    Selection,
    encoded,
    queries,
    start,
    start_zero,
)

if TYPE_CHECKING:
    from detkernel_detectors.models.dfine import Dfine

UP = 0.5
"""Distances are told finely up to this many halves of the anchor box's side (with D-FINE's `reg_scale` of 4)."""
NEAR = 4
"""How many of the most likely distances of a side speak for the quality of a box."""


class Refined(NamedTuple):
    """What the decoder says of K noisy queries and Q others, of the last layer or of L layers."""

    logits: Tensor
    """float32 [L, B, K + Q, C]."""
    boxes: Tensor
    """float32 [L, B, K + Q, 4] cxcywh in shares of the image."""
    sides: Tensor
    """float32 [L, B, K + Q, 4, bins]: logits of the distance of each side from where it is in `anchors`."""
    first_logits: Tensor
    """float32 [B, K + Q, C]: of the first layer, by itself."""
    anchors: Tensor
    """float32 [B, K + Q, 4] cxcywh: its boxes, which the distances go by."""


class Quality(nn.Module):
    """What the distributions of the sides say of how good a box is, added to the logits of the classes: a sharp
    distribution is a good one (LQE)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(4 * (NEAR + 1), 64, 1, 2)
        start_zero(self.mlp)

    def forward(self, logits: Tensor, sides: Tensor) -> Tensor:
        likely = sides.softmax(-1).topk(NEAR).values
        found: Tensor = self.mlp(torch.cat([likely, likely.mean(-1, keepdim=True)], -1).flatten(-2))
        return logits + found


class FineDecoder(nn.Module):
    """The first layer gives boxes; each layer adds to the logits of how far their sides are off."""

    def __init__(self, options: Dfine, channels: int, levels: int, classes: int) -> None:
        super().__init__()
        width, layers = options.channels, options.decoder_layers
        self.evaluated = options.evaluated_layers or layers
        self.inputs = nn.ModuleList(
            [nn.Identity() if channels == width else ConvNorm(channels, width, linear=True) for _ in range(levels)]
        )
        self.scale, self.bins = options.box_scale, options.bins
        self.selection = Selection(width, classes, options.queries)
        self.denoising = nn.Embedding(classes + 1, width, padding_idx=classes)
        self.position = Mlp(4, 2 * width, width, 2)
        self.layers = nn.ModuleList(
            [
                DecoderLayer(width, options.attention_heads, options.ffn_channels, options.points, gated=True)
                for _ in range(layers)
            ]
        )
        self.first = Mlp(width, width, 4, 3)
        self.cls = nn.ModuleList([nn.Linear(width, classes) for _ in range(layers)])
        self.reg = nn.ModuleList([Mlp(width, width, 4 * self.bins, 3) for _ in range(layers)])
        self.quality = nn.ModuleList([Quality() for _ in range(layers)])
        start(self.inputs, self.position, self.cls, [self.first, *self.reg])

    def encode(self, features: list[Tensor], size: tuple[int, int]) -> Encoded:
        return encoded(features, size, self.inputs, self.selection)

    def forward(self, encoded: Encoded, noise: Denoising | None = None, learns: bool = False) -> Refined:
        """`learns`: of all layers, rather than of the last one that is evaluated."""
        if noise is not None:  # sides that have crossed are turned round
            noise = noise._replace(boxes=noise.boxes.abs())
        x, seen, unseen = queries(encoded.selected, noise, self.denoising)
        anchors, first_logits = seen, encoded.selected.logits
        sides: Any = 0.0
        before: Any = 0.0
        distances = steps(self.bins, self.scale, like=seen)
        all_logits, all_boxes, all_sides = [], [], []
        count = len(self.layers) if learns else self.evaluated
        for number, (layer, cls, reg, quality) in enumerate(
            zip(self.layers, self.cls, self.reg, self.quality, strict=True)
        ):
            if number == count:
                break
            position = self.position(seen.to(x.dtype)).clamp(-10, 10)
            x = layer(x, position, seen, encoded.memory, encoded.shapes, unseen)
            if number == 0:
                anchors = (self.first(x).float() + inverse_sigmoid(seen)).sigmoid()
                first_logits = cls(x).float()
            sides = reg(x + before).float().unflatten(-1, (4, self.bins)) + sides
            boxes = moved(anchors.detach(), sides.softmax(-1) @ distances, self.scale)
            if learns or number == count - 1:
                all_logits.append(quality(cls(x), sides.to(x.dtype)).float())
                all_boxes.append(boxes)
                all_sides.append(sides)
            seen, before = boxes.detach(), x.detach()
        return Refined(torch.stack(all_logits), torch.stack(all_boxes), torch.stack(all_sides), first_logits, anchors)


def steps(bins: int, scale: float, like: Tensor) -> Tensor:
    """W(n) of D-FINE's equation 3, [bins]: distances in sides of the box over `scale`, dense around 0.

    With a = `UP` scale: -2a, then 1 - (a + 1)^(i / (bins / 2 - 1)) for falling i, 0, the same mirrored.
    """
    a, half = UP * scale, bins // 2
    number = torch.arange(bins, device=like.device, dtype=torch.float32) - half
    found = number.sign() * ((a + 1.0) ** (number.abs() * (2 / (bins - 3))) - 1)
    return torch.where(number.abs() == half, number.sign() * 2 * a, found)


def moved(anchors: Tensor, distances: Tensor, scale: float) -> Tensor:
    """Boxes cxcywh whose left, upper, right and lower side are further out than in `anchors` by such distances."""
    centre, sides = anchors[..., :2], torch.cat([anchors[..., 2:]] * 2, -1)
    around = (0.5 * scale + distances) * sides / scale
    return cxcywh(torch.cat([centre - around[..., :2], centre + around[..., 2:]], -1))


def distances_of(anchors: Tensor, boxes: Tensor, scale: float) -> Tensor:
    """[..., 4]: how far the sides of boxes, xyxy, are further out than in `anchors`, cxcywh: `moved` turned round."""
    centre, sides = anchors[..., :2], anchors[..., 2:] / scale + 1e-16
    around = torch.cat([(centre - boxes[..., :2]) / sides, (boxes[..., 2:] - centre) / sides], -1)
    return around - 0.5 * scale


def bins_of(distances: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """int64 and float [...]: the bin below each distance, and how far it is on to the next one, 0..1.

    `known`: the distances of the bins, `steps`. What is beyond the first or the last one counts as that.
    """
    below = (torch.searchsorted(known, distances.contiguous(), right=True) - 1).clamp(0, len(known) - 2)
    left, right = known[below], known[below + 1]
    return below, ((distances - left) / (right - left)).clamp(0, 1)
