"""Colour as one affine map: ColorJitter takes four passes, one of them through HSV, and fifty times as long."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detkernel import UserError
from torch import Tensor

GREY = torch.tensor([0.299, 0.587, 0.114])
"""ITU-R BT.601 luma."""
TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = torch.linalg.inv(TO_YIQ)


def jitter(image: Tensor, spans: Sequence[float], probability: float) -> Tensor:
    """A uint8 [3, H, W] image in other colours, channels-last."""
    require_bytes(image, "color")
    chances, amounts = torch.rand(2, 4).tolist()
    drawn = [
        (2 * amount - 1) * span if chance < probability else 0.0
        for chance, amount, span in zip(chances, amounts, spans, strict=True)
    ]
    if not any(drawn):
        return image
    pixels = image.permute(1, 2, 0).float()
    mean = float(pixels.mean((0, 1)) @ GREY)
    matrix, offset = affine(drawn, mean)
    changed = torch.addmm(offset, pixels.reshape(-1, 3), matrix.T)
    return changed.round_().clamp_(0, 255).to(torch.uint8).reshape(pixels.shape).permute(2, 0, 1)


def require_bytes(image: Tensor, transform: str) -> None:
    """Raises `UserError` for an image that has been made float: its values are no longer 0 to 255."""
    if image.dtype != torch.uint8:
        raise UserError(
            f"{transform}: expected a uint8 image, got {str(image.dtype).removeprefix('torch.')}; put it before "
            "`normalize`, and before any transform that makes floats"
        )


def affine(changes: Sequence[float], mean: float) -> tuple[Tensor, Tensor]:
    """[3, 3] and [3] that change RGB: brightness, then contrast about the mean grey, then saturation, then hue."""
    brightness, contrast, saturation, hue = changes
    matrix = torch.eye(3) * (1 + brightness) * (1 + contrast)
    offset = torch.full((3,), -mean * (1 + brightness) * contrast)
    saturate = torch.eye(3) * (1 + saturation) - saturation * GREY.expand(3, 3)
    sine, cosine = math.sin(2 * math.pi * hue), math.cos(2 * math.pi * hue)
    turn = torch.tensor([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])  # from red to yellow, as HSV counts hues
    after = FROM_YIQ @ turn @ TO_YIQ @ saturate
    return after @ matrix, after @ offset
