"""Deformable attention (Zhu et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class DeformableAttention(nn.Module):
    """Each query looks at a few points around its reference in the maps of all levels, rather than at every place.

    https://arxiv.org/abs/2010.04159, equation 3. `points`: how many in each level, fine to coarse. `projected`: whether
    values go through a layer before they are sampled, and the result through one after; D-FINE has neither. Offsets are
    in places of a map for a reference that is a point (x, y), and for one that is a box (cx, cy, w, h) in halves of its
    sides, divided by the points of the level, as RT-DETRv2 has them for levels of unequal points.
    """

    def __init__(self, channels: int, heads: int, points: Sequence[int], projected: bool = True) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels: expected a multiple of the {heads} heads, got {channels}")
        self.heads, self.points, self.projected = heads, tuple(points), projected
        total = sum(self.points)
        self.sampling_offsets = nn.Linear(channels, heads * total * 2)
        self.attention_weights = nn.Linear(channels, heads * total)
        self.value_proj: Any = nn.Linear(channels, channels) if projected else nn.Identity()
        self.output_proj: Any = nn.Linear(channels, channels) if projected else nn.Identity()
        self.begin()

    def begin(self) -> None:
        """Each head looks in its own direction, at 1, 2, ... places from the reference, at all of them alike."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ring = torch.stack([angle.cos(), angle.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, count + 1) for count in self.points])
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((ring[:, None] * steps[:, None]).flatten())
        if self.projected:
            for layer in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        valid: Tensor | None = None,
    ) -> Tensor:
        """Queries [B, Q, channels] -> [B, Q, channels].

        `references`: [B, Q, levels or 1, 2 or 4] in shares of the maps. `memory`: [B, S, channels], the maps of such
        (height, width) one after the other, row by row. `valid`: bool [B, S], false in the padding, which counts as 0.
        """
        images, count = queries.shape[:2]
        value = self.value_proj(memory)
        if valid is not None:
            value = torch.where(valid[..., None], value, 0.0)
        value = value.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # [B * heads, per head, S]
        places = self._places(queries, references, shapes)
        weights = self.attention_weights(queries).unflatten(-1, (self.heads, -1)).float().softmax(-1)
        weights = weights.to(value.dtype).transpose(1, 2).flatten(0, 1)[:, None]  # [B * heads, 1, Q, points]
        found: Tensor | None = None
        start = first = 0
        for (height, width), points, grid in zip(shapes, self.points, places, strict=True):
            one = value[..., start : start + height * width].unflatten(-1, (height, width))
            grid = grid.to(value.dtype).transpose(1, 2).flatten(0, 1)  # [B * heads, Q, points, 2]
            here = (sampled(one, grid) * weights[..., first : first + points]).sum(-1)
            found = here if found is None else found + here
            start, first = start + height * width, first + points
        assert found is not None
        output: Tensor = self.output_proj(found.view(images, -1, count).transpose(1, 2))
        return output

    def _places(self, queries: Tensor, references: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """float32 [B, Q, heads, points, 2] of each level, -1..1 from edge to edge."""
        offsets = self.sampling_offsets(queries).float().unflatten(-1, (self.heads, -1, 2))
        references = references.float().expand(-1, -1, len(shapes), -1)
        found, first = [], 0
        for level, ((height, width), points) in enumerate(zip(shapes, self.points, strict=True)):
            around = offsets[..., first : first + points, :]
            place = references[:, :, level, None, None]
            if place.shape[-1] == 2:
                around = around / _pair(around, width, height)
            else:
                around = around / points * place[..., 2:] * 0.5
            found.append(2 * (place[..., :2] + around) - 1)
            first += points
        return found


def sampled(one: Tensor, grid: Tensor) -> Tensor:
    """Bilinear: maps [N, C, H, W] at places [N, Q, P, 2], -1..1 from edge to edge, 0 outside -> [N, C, Q, P].

    torch's own has no gradient on GPUs that repeats bit for bit: where `use_deterministic_algorithms` asks for one, the
    four pixels around each place are gathered, which takes longer and more memory.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return functional.grid_sample(one, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    height, width = one.shape[2:]
    x, y = (
        ((axis + 1) * side - 1) / 2 for axis, side in zip(grid.flatten(1, 2).unbind(-1), (width, height), strict=True)
    )
    pixels, left, top = one.flatten(2), x.floor(), y.floor()
    found: Tensor | None = None
    for right, low in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = left + right, top + low
        near = (1 - (x - column).abs()) * (1 - (y - row).abs())
        near = torch.where((column >= 0) & (column < width) & (row >= 0) & (row < height), near, 0.0)
        place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).nan_to_num().long()
        part = pixels.gather(2, place[:, None].expand(-1, one.shape[1], -1)) * near[:, None]
        found = part if found is None else found + part
    assert found is not None
    return found.view(*one.shape[:2], *grid.shape[1:3])


def _pair(like: Tensor, x: float, y: float) -> Tensor:
    """[2]: x and y, made where `like` is, without a copy to the device."""
    return torch.where(torch.arange(2, device=like.device) == 0, float(x), float(y)).to(like.dtype)
