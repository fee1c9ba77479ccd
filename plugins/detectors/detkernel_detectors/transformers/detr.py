"""The transformers of DETR (Carion et al. 2020), Conditional DETR (Meng et al. 2021) and DAB-DETR (Liu et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from detkernel_detection.parts import RARE, Queries
from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.transformers.deformable_detr import Encoded, masks_of, moved, ratios_of, scale_of
from detkernel_detectors.transformers.encodings import Mlp, box_encoding, inverse_sigmoid, map_encoding, y_first
from detkernel_detectors.transformers.layers import DecoderLayer, EncoderLayer, FeedForward

if TYPE_CHECKING:
    from detkernel_detectors.models.detr import DetrFamily


class Encoder(nn.Module):
    """Layers, one after the other. With `scaled`, what a place holds says how much its encoding counts (DAB-DETR)."""

    def __init__(self, options: DetrFamily, channels: int, scaled: bool) -> None:
        super().__init__()
        sides = channels, options.attention_heads, options.ffn_channels, options.dropout
        self.layers = nn.ModuleList([EncoderLayer(*sides, slope=scaled) for _ in range(options.encoder_layers)])
        self.query_scale: Any = Mlp(channels, channels, channels, 2) if scaled else None

    def forward(self, x: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, position if self.query_scale is None else position * self.query_scale(x), valid)
        return x


class PlainTransformer(nn.Module):
    """Encoder and prediction branches, which all layers share; what decodes is a subclass'."""

    def __init__(self, options: DetrFamily, channels: int, logits: int, scaled: bool = False) -> None:
        super().__init__()
        self.options, self.channels = options, channels
        self.encoder = Encoder(options, channels, scaled)
        self.cls, self.reg = nn.Linear(channels, logits), Mlp(channels, channels, 4, 3)

    def begin(self) -> None:
        """Xavier's weights in both halves; classes that are rare, where each is a yes or no of its own."""
        for name, parameter in self.named_parameters():
            if name.startswith(("encoder.", "decoder.")) and parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def encode(self, maps: list[Tensor], sizes: Tensor | None, size: tuple[int, int]) -> Encoded:
        (one,) = maps
        (mask,) = masks_of(maps, sizes, size)
        x, valid = one.flatten(2).transpose(1, 2), mask.flatten(1)
        position = map_encoding(mask, self.channels // 2, self.options.temperature)
        shape = (one.shape[2], one.shape[3])
        memory = self.encoder(x, position, valid)
        return Encoded(maps, memory, (shape,), valid, ratios_of(mask)[:, None], scale_of(sizes, size, x), position)


class DetrDecoder(nn.Module):
    """Layers, one after the other, and the norm of what each gives."""

    def __init__(self, options: DetrFamily, channels: int) -> None:
        super().__init__()
        sides = channels, options.attention_heads, options.ffn_channels, options.dropout
        self.layers = nn.ModuleList([DecoderLayer(*sides) for _ in range(options.decoder_layers)])
        self.post_norm = nn.LayerNorm(channels)


class DetrTransformer(PlainTransformer):
    """Queries without references: a learned vector each, and contents of 0."""

    def __init__(self, options: DetrFamily, channels: int, classes: int) -> None:
        super().__init__(options, channels, classes + 1)
        self.decoder = DetrDecoder(options, channels)
        self.query_embedding = nn.Embedding(options.queries, channels)
        self.begin()

    def decode(self, encoded: Encoded) -> Queries:
        """The predictions of all layers, one after the other."""
        position = self.query_embedding.weight.expand(len(encoded.memory), -1, -1)
        x = torch.zeros_like(position)
        found = []
        for layer in self.decoder.layers:
            x = layer(x, position, encoded.memory, encoded.position, encoded.valid)
            found.append(self.decoder.post_norm(x))
        every = torch.cat(found, 1)
        boxes = self.reg(every).float().sigmoid()
        return Queries(self.cls(every).float(), boxes, encoded.scale, (x.shape[1],) * len(found))


class ConditionalAttention(nn.Module):
    """Attention whose queries and keys have contents and positions in layers of their own (Meng et al. 2021).

    Of a memory (`cross`), the positions are further channels of each head: what is alike and what is near are weighed
    apart. `first`: that the first layer's queries and keys have their positions added as well.
    """

    def __init__(self, channels: int, heads: int, dropout: float, cross: bool = False, first: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout, self.first = heads, dropout, first
        self.qcontent_proj, self.kcontent_proj, self.kpos_proj, self.v_proj, self.out_proj = (
            nn.Linear(channels, channels) for _ in range(5)
        )
        self.qpos_proj: Any = nn.Linear(channels, channels) if first or not cross else None
        self.qpos_sine_proj: Any = nn.Linear(channels, channels) if cross else None
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Of queries [B, Q, channels] with such positions to each other."""
        queries = self.qcontent_proj(x) + self.qpos_proj(position)
        keys = self.kcontent_proj(x) + self.kpos_proj(position)
        return self._attend(self._heads(queries), self._heads(keys), self.v_proj(x), None)

    def cross(self, x: Tensor, position: Tensor, place: Tensor, encoded: Encoded) -> Tensor:
        """Of queries to a memory; `place` [B, Q, channels]: the encoding of where a query looks."""
        queries, keys = self.qcontent_proj(x), self.kcontent_proj(encoded.memory)
        places = self.kpos_proj(encoded.position)
        if self.first:
            queries, keys = queries + self.qpos_proj(position), keys + places
        queries = torch.cat([self._heads(queries), self._heads(self.qpos_sine_proj(place))], -1)
        keys = torch.cat([self._heads(keys), self._heads(places)], -1)
        return self._attend(queries, keys, self.v_proj(encoded.memory), encoded.valid[:, None, None])

    def _heads(self, x: Tensor) -> Tensor:
        """[B, N, channels] -> [B, heads, N, channels of each]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(queries, keys, self._heads(values), valid, dropout)
        result: Tensor = self.out_proj(found.transpose(1, 2).flatten(2))
        return result


class ConditionalLayer(nn.Module):
    """Queries see each other, and then all places of the memory."""

    def __init__(self, options: DetrFamily, channels: int, slope: bool, first: bool) -> None:
        super().__init__()
        self.self_attn = ConditionalAttention(channels, options.attention_heads, options.dropout)
        self.cross_attn = ConditionalAttention(channels, options.attention_heads, options.dropout, True, first)
        self.ffn = FeedForward(channels, options.ffn_channels, options.dropout, slope)
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(3)])

    def forward(self, x: Tensor, position: Tensor, place: Tensor, encoded: Encoded) -> Tensor:
        x = self.norms[0](x + self.self_attn(x, position))
        x = self.norms[1](x + self.cross_attn.cross(x, position, place, encoded))
        result: Tensor = self.norms[2](x + self.ffn(x))
        return result


class ConditionalDecoder(nn.Module):
    """Layers, one after the other; the norm of what each gives; and where queries look."""

    def __init__(self, options: DetrFamily, channels: int, boxes: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [ConditionalLayer(options, channels, boxes, not number) for number in range(options.decoder_layers)]
        )
        self.post_norm = nn.LayerNorm(channels)
        self.query_scale = Mlp(channels, channels, channels, 2)
        self.ref_point_head = Mlp(channels * (2 if boxes else 1), channels, channels if boxes else 2, 2)
        self.ref_anchor_head: Any = Mlp(channels, channels, 2, 2) if boxes else None


class ConditionalTransformer(PlainTransformer):
    """Queries with a learned vector each, and a reference point made of it."""

    def __init__(self, options: DetrFamily, channels: int, classes: int) -> None:
        super().__init__(options, channels, classes)
        self.decoder = ConditionalDecoder(options, channels, boxes=False)
        self.query_embedding = nn.Embedding(options.queries, channels)
        self.begin()
        nn.init.constant_(self.cls.bias, RARE)

    def decode(self, encoded: Encoded) -> Queries:
        """The predictions of all layers, one after the other."""
        decoder = self.decoder
        position = self.query_embedding.weight.expand(len(encoded.memory), -1, -1)
        reference = decoder.ref_point_head(position).float().sigmoid()
        near = box_encoding(y_first(reference), self.channels // 2)
        x = torch.zeros_like(position)
        found = []
        for number, layer in enumerate(decoder.layers):
            x = layer(x, position, near * decoder.query_scale(x) if number else near, encoded)
            found.append(decoder.post_norm(x))
        every = torch.cat(found, 1)
        boxes = moved(reference.repeat(1, len(found), 1), self.reg(every).float())
        return Queries(self.cls(every).float(), boxes, encoded.scale, (x.shape[1],) * len(found))


class DabTransformer(PlainTransformer):
    """Queries that are boxes, which each layer refines; their sizes say how far a query looks in x and in y."""

    def __init__(self, options: DetrFamily, channels: int, classes: int) -> None:
        super().__init__(options, channels, classes, scaled=True)
        self.decoder = ConditionalDecoder(options, channels, boxes=True)
        self.query_embedding = nn.Embedding(options.queries, 4)
        self.begin()
        nn.init.constant_(self.cls.bias, RARE)
        nn.init.zeros_(self.reg[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.reg[-1].bias)  # type: ignore[arg-type]

    def decode(self, encoded: Encoded) -> Queries:
        """The predictions of all layers, one after the other."""
        decoder: Any = self.decoder
        reference = self.query_embedding.weight.sigmoid().expand(len(encoded.memory), -1, -1)
        before = reference
        x = torch.zeros_like(encoded.memory[:, :1]).expand(-1, reference.shape[1], -1)
        logits, boxes = [], []
        for number, layer in enumerate(decoder.layers):
            encoding = box_encoding(y_first(reference), self.channels // 2)
            near = encoding[..., : self.channels]
            if number:
                near = near * decoder.query_scale(x)
            sides = decoder.ref_anchor_head(x).float().sigmoid() / reference[..., 2:]  # x first
            near = near * sides.flip(-1).repeat_interleave(self.channels // 2, -1)
            x = layer(x, decoder.ref_point_head(encoding), near, encoded)
            normed = decoder.post_norm(x)
            logits.append(self.cls(normed).float())
            boxes.append((self.reg(normed).float() + inverse_sigmoid(before, 1e-3)).sigmoid())
            before = moved(reference, self.reg(x).float())
            reference = before.detach()
        counts = (x.shape[1],) * len(boxes)
        return Queries(torch.cat(logits, 1), torch.cat(boxes, 1), encoded.scale, counts)
