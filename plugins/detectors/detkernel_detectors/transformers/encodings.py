"""Places as vectors and back, and the small network that DETRs end in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def inverse_sigmoid(x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """The logit of numbers of 0..1. x and 1 - x count as at least `epsilon`."""
    return (x.clamp(epsilon, 1.0) / (1 - x).clamp(epsilon, 1.0)).log()


def waves(x: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """[...] -> [..., features]: sines (even) and cosines (odd) of growing wave lengths, of angles x (Vaswani et al.
    2017)."""
    number = torch.arange(features, device=x.device)
    angles = x[..., None] / temperature ** (2 * (number // 2) / features)
    return torch.where(number % 2 == 0, angles.sin(), angles.cos())


def map_encoding(valid: Tensor, features: int, temperature: float = 10000.0, offset: float = 0.0) -> Tensor:
    """bool [B, H, W] -> [B, H * W, 2 * features]: the y and x of each place (Carion et al. 2020).

    A place's y is its number among the valid ones of its column, from 1 on and less `-offset`, of their count: 0..2pi.
    """
    y, x = (valid.cumsum(axis).float() for axis in (1, 2))  # of whole numbers: it repeats bit for bit on GPUs
    y = (y + offset) / (y[:, -1:] + 1e-6) * (2 * math.pi)
    x = (x + offset) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat([waves(axis, features, temperature) for axis in (y, x)], -1).flatten(1, 2)


def box_encoding(boxes: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """Points or boxes of 0..1, [..., 2] or [..., 4], -> [..., 2 or 4 times features]: each number one after another."""
    return waves(boxes * (2 * math.pi), features, temperature).flatten(-2)


def y_first(boxes: Tensor) -> Tensor:
    """(x, y) or (x, y, w, h) -> (y, x) or (y, x, w, h): the order in which DINO and DAB-DETR encode."""
    return torch.cat([boxes[..., 1:2], boxes[..., :1], boxes[..., 2:]], -1)


class Mlp(nn.Sequential):
    """Layers with a ReLU between them: `0`, `2`, `4`, ..."""

    def __init__(self, inside: int, width: int, outside: int, layers: int) -> None:
        sides = [inside, *[width] * (layers - 1), outside]
        made: list[nn.Module] = []
        for number in range(layers):
            made += [nn.ReLU()] * (number > 0) + [nn.Linear(sides[number], sides[number + 1])]
        super().__init__(*made)
