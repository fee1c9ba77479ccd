"""RTMDet's masks: features that all objects share, and a small network of each object's own that reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.blocks import BatchNorm, ConvNorm

INSIDE = 8
"""Channels of the features, and of each layer of an object's network."""
SCALE = 8
"""Strides that a distance from the object's point is told in."""
PARAMETERS = (INSIDE + 2) * INSIDE + INSIDE * INSIDE + INSIDE + INSIDE + INSIDE + 1
"""Of an object's network: the weights of three layers, and then their biases."""


class MaskFeatures(nn.Module):
    """From the maps of a pyramid to features [B, 8, H, W] at its finest stride."""

    def __init__(self, channels: int, width: int, levels: int, convs: int, norm: BatchNorm) -> None:
        super().__init__()
        self.fusion = nn.Conv2d(levels * channels, channels, 1)
        self.convs = nn.ModuleList([ConvNorm(width if at else channels, width, 3, norm) for at in range(convs)])
        self.projection = nn.Conv2d(width if convs else channels, INSIDE, 1)
        for conv in (self.fusion, self.projection):
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[-2:]
        coarse = [functional.interpolate(one, size, mode="bilinear", align_corners=False) for one in maps[1:]]
        x = self.fusion(torch.cat([maps[0], *coarse], 1))
        for conv in self.convs:
            x = conv(x)
        found: Tensor = self.projection(x)
        return found


def read_masks(features: Tensor, parameters: Tensor, points: Tensor, strides: Tensor, stride: int) -> Tensor:
    """Features [B, 8, H, W] at a stride, parameters [B, K, 169], points [B, K, 2], strides [B, K] -> logits
    float32 [B, K, H, W].

    The first layer sees where a pixel lies from the object's point, and the features; it is linear in the pixel's
    place, so that no object has maps of its own before it.
    """
    batch, _, height, width = features.shape
    count = parameters.shape[1]
    sizes = [(INSIDE + 2) * INSIDE, INSIDE * INSIDE, INSIDE, INSIDE, INSIDE, 1]
    first, second, third, *biases = torch.split(parameters.float(), sizes, -1)
    first = first.view(batch, count, INSIDE, INSIDE + 2)
    place = first[..., :2] / (SCALE * strides)[..., None, None]
    constant = (place * points[:, :, None]).sum(-1) + biases[0]

    y, x = (torch.arange(side, device=features.device) * float(stride) for side in (height, width))
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    seen = torch.cat([grid.expand(batch, -1, -1, -1), features.float()], 1).flatten(2)  # [B, 10, H * W]
    weights = torch.cat([-place, first[..., 2:]], -1).flatten(1, 2)
    found = torch.baddbmm(constant.flatten(1)[..., None], weights, seen).relu()
    found = found.view(batch * count, INSIDE, -1)
    second = second.reshape(batch * count, INSIDE, INSIDE)
    found = torch.baddbmm(biases[1].reshape(batch * count, INSIDE, 1), second, found).relu()
    found = torch.baddbmm(biases[2].reshape(batch * count, 1, 1), third.reshape(batch * count, 1, INSIDE), found)
    return found.view(batch, count, height, width)


def dice(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Dice loss with squares (Milletari et al. 2016): 1 - 2 sum(p m) / (sum(p^2) + sum(m^2)), of [..., H, W]."""
    shared = (probabilities * masks).sum((-2, -1))
    both = probabilities.square().sum((-2, -1)) + masks.square().sum((-2, -1))
    return 1 - 2 * shared / (both + 1e-5)
