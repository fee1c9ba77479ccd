"""Layers of transformers with residuals that are normalised afterwards (Vaswani et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detkernel_detectors.transformers.deformable import DeformableAttention

Shapes = Sequence[tuple[int, int]]
"""Heights and widths of the maps that a memory is made of."""


class FeedForward(nn.Sequential):
    """Two layers with a ReLU between them, or with a learned slope for what is negative."""

    def __init__(self, channels: int, width: int, dropout: float, slope: bool = False) -> None:
        super().__init__(
            nn.Linear(channels, width),
            nn.PReLU() if slope else nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(width, channels),
            nn.Dropout(dropout),
        )


class Attention(nn.MultiheadAttention):
    """Of queries and keys with their positions added, and values without; gives what is added to the queries."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__(channels, heads, dropout, batch_first=True)
        self.drop = nn.Dropout(dropout)

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        blocked: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """[B, Q, channels]. `blocked`: bool [Q, K], or [B * heads, Q, K], true where a query does not see a key;
        `valid`: bool [B, K], which keys there are."""
        padding = None if valid is None else ~valid
        found: Any = self(queries, keys, values, padding, attn_mask=blocked, need_weights=False)[0]
        dropped: Tensor = self.drop(found)
        return dropped


class DeformableEncoderLayer(nn.Module):
    """Every place looks at a few of all levels."""

    def __init__(self, channels: int, heads: int, points: Sequence[int], width: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(channels, heads, points)
        self.drop = nn.Dropout(dropout)
        self.ffn = FeedForward(channels, width, dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])

    def forward(self, x: Tensor, position: Tensor, references: Tensor, shapes: Shapes, valid: Tensor) -> Tensor:
        x = self.norms[0](x + self.drop(self.self_attn(x + position, references, x, shapes, valid)))
        result: Tensor = self.norms[1](x + self.ffn(x))
        return result


class DeformableDecoderLayer(nn.Module):
    """Queries see each other, and then a few places of the memory around their references."""

    def __init__(self, channels: int, heads: int, points: Sequence[int], width: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads, dropout)
        self.cross_attn = DeformableAttention(channels, heads, points)
        self.drop = nn.Dropout(dropout)
        self.ffn = FeedForward(channels, width, dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(3)])

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        valid: Tensor,
        blocked: Tensor | None = None,
    ) -> Tensor:
        placed = x + position
        x = self.norms[0](x + self.self_attn.attend(placed, placed, x, blocked))
        x = self.norms[1](x + self.drop(self.cross_attn(x + position, references, memory, shapes, valid)))
        result: Tensor = self.norms[2](x + self.ffn(x))
        return result


class EncoderLayer(nn.Module):
    """Every place looks at all places."""

    def __init__(self, channels: int, heads: int, width: int, dropout: float, slope: bool = False) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads, dropout)
        self.ffn = FeedForward(channels, width, dropout, slope)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])

    def forward(self, x: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        placed = x + position
        x = self.norms[0](x + self.self_attn.attend(placed, placed, x, valid=valid))
        result: Tensor = self.norms[1](x + self.ffn(x))
        return result


class DecoderLayer(nn.Module):
    """Queries see each other, and then all places of the memory."""

    def __init__(self, channels: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = (Attention(channels, heads, dropout) for _ in range(2))
        self.ffn = FeedForward(channels, width, dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(3)])

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, places: Tensor, valid: Tensor) -> Tensor:
        placed = x + position
        x = self.norms[0](x + self.self_attn.attend(placed, placed, x))
        x = self.norms[1](x + self.cross_attn.attend(x + position, memory + places, memory, valid=valid))
        result: Tensor = self.norms[2](x + self.ffn(x))
        return result
