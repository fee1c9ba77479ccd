"""The transformer of Deformable DETR (Zhu et al. 2021), whose encoder and proposals DINO has too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from detkernel_detection.normalize import inside
from detkernel_detection.parts import RARE, Queries
from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.transformers.deformable import DeformableAttention
from detkernel_detectors.transformers.encodings import Mlp, box_encoding, inverse_sigmoid, map_encoding
from detkernel_detectors.transformers.layers import DeformableDecoderLayer, DeformableEncoderLayer, Shapes

if TYPE_CHECKING:
    from detkernel_detectors.models.deformable_detr import DeformableFamily

FAR = 1e4
"""The logit of the coordinates of a place that proposes nothing: their sigmoid is 1."""


class Encoded(NamedTuple):
    """What a DETR says of images before it is asked for objects."""

    features: list[Tensor]
    """The neck's maps, fine to coarse."""
    memory: Tensor
    """[B, S, channels]: what the encoder made of them, one after the other, row by row."""
    shapes: Shapes
    """(height, width) of each map."""
    valid: Tensor
    """bool [B, S]: which are of an image rather than of its padding."""
    ratios: Tensor
    """float32 [B, levels, 2]: the shares of a map's width and height that are of the image."""
    scale: Tensor
    """float32 [B, 1, 4]: (width, height, width, height) of each image in pixels."""
    position: Tensor
    """[B, S, channels]: the encodings of the places."""


class Proposals(NamedTuple):
    """What the encoder proposes, at every place."""

    logits: Tensor
    """[B, S, C]."""
    boxes: Tensor
    """[B, S, 4]: logits of cx, cy, w and h."""


class Encoder(nn.Module):
    """Layers, one after the other."""

    def __init__(self, options: DeformableFamily, channels: int, points: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                DeformableEncoderLayer(channels, options.attention_heads, points, options.ffn_channels, options.dropout)
                for _ in range(options.encoder_layers)
            ]
        )


class Decoder(nn.Module):
    """Layers, one after the other."""

    def __init__(self, options: DeformableFamily, channels: int, points: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                DeformableDecoderLayer(channels, options.attention_heads, points, options.ffn_channels, options.dropout)
                for _ in range(options.decoder_layers)
            ]
        )


class DeformableTransformer(nn.Module):
    """Encoder, proposals and prediction branches; what decodes is a subclass'."""

    def __init__(
        self, options: DeformableFamily, channels: int, levels: int, classes: int, two_stage: bool, separate: bool
    ) -> None:
        super().__init__()
        self.options, self.channels = options, channels
        points = [options.points] * levels
        self.level_embed = nn.Parameter(torch.empty(levels, channels))
        self.encoder: Any = Encoder(options, channels, points)
        self.decoder: Any = self.make_decoder(points)
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.begin()
        nn.init.normal_(self.level_embed)
        if two_stage:
            self.memory_trans_fc = _linear(channels, channels)
            self.memory_trans_norm = nn.LayerNorm(channels)
        branches = options.decoder_layers + two_stage
        self.cls, self.reg = nn.ModuleList(), nn.ModuleList()
        for number in range(branches):
            if separate or not number:
                cls, reg = nn.Linear(channels, classes), Mlp(channels, channels, 4, 3)
                nn.init.constant_(cls.bias, RARE)
                nn.init.zeros_(reg[-1].weight)  # type: ignore[arg-type]
                nn.init.zeros_(reg[-1].bias)  # type: ignore[arg-type]
            self.cls.append(cls)
            self.reg.append(reg)

    def make_decoder(self, points: Sequence[int]) -> Decoder:
        return Decoder(self.options, self.channels, points)

    def encode(self, maps: list[Tensor], sizes: Tensor | None, size: tuple[int, int]) -> Encoded:
        shapes = tuple((one.shape[2], one.shape[3]) for one in maps)
        masks = masks_of(maps, sizes, size)
        ratios = torch.stack([ratios_of(mask) for mask in masks], 1)
        x = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
        valid = torch.cat([mask.flatten(1) for mask in masks], 1)
        encodings = [
            map_encoding(mask, self.channels // 2, self.options.temperature, self.options.position_offset)
            for mask in masks
        ]
        embedded = zip(encodings, self.level_embed, strict=True)
        position = torch.cat([encoding + level for encoding, level in embedded], 1)
        references = torch.cat(
            [_centres(*shape, ratio) for shape, ratio in zip(shapes, ratios.unbind(1), strict=True)], 1
        )  # [B, S, 2]
        references = references[:, :, None] * ratios[:, None]
        for layer in self.encoder.layers:
            x = layer(x, position, references, shapes, valid)
        return Encoded(maps, x, shapes, valid, ratios, scale_of(sizes, size, x), position)

    def proposed(self, encoded: Encoded) -> Proposals:
        """A box around every place, of 0.05, 0.1, ... of the image, level by level, as the last branches change it. A
        place whose box nearly leaves the image proposes nothing."""
        boxes = []
        for level, ((height, width), ratio) in enumerate(zip(encoded.shapes, encoded.ratios.unbind(1), strict=True)):
            centres = _centres(height, width, ratio)
            boxes.append(torch.cat([centres, torch.full_like(centres, 0.05 * 2**level)], -1))
        whole = torch.cat(boxes, 1)
        good = ((whole > 0.01) & (whole < 0.99)).all(-1, keepdim=True) & encoded.valid[..., None]
        logits = torch.where(good, whole.clamp(0.01, 0.99).logit(), FAR)
        memory = torch.where(good, encoded.memory, 0.0)
        memory = self.memory_trans_norm(self.memory_trans_fc(memory))
        return Proposals(self.cls[-1](memory).float(), self.reg[-1](memory).float() + logits)


class DeformableDetrTransformer(DeformableTransformer):
    """Queries whose references are points, learned, or boxes, proposed by the encoder."""

    def __init__(
        self, options: DeformableFamily, channels: int, levels: int, classes: int, two_stage: bool, refine: bool
    ) -> None:
        super().__init__(options, channels, levels, classes, two_stage, refine)
        self.two_stage, self.refine = two_stage, refine
        if two_stage:
            self.pos_trans_fc = _linear(2 * channels, 2 * channels)
            self.pos_trans_norm = nn.LayerNorm(2 * channels)
        else:
            self.query_embedding = nn.Embedding(options.queries, 2 * channels)
            self.reference_points_fc = _linear(channels, 2)
            nn.init.constant_(self.reg[0][-1].bias[2:], -2.0)  # type: ignore[index]

    def decode(self, encoded: Encoded, proposals: Proposals | None) -> Queries:
        """The predictions of all layers, one after the other."""
        position, x, reference = self._queries(encoded, proposals)
        logits, boxes = [], []
        for number, layer in enumerate(self.decoder.layers):
            ratios = encoded.ratios.repeat(1, 1, reference.shape[-1] // 2)
            near = reference[:, :, None] * ratios[:, None]
            x = layer(x, position, near, encoded.memory, encoded.shapes, encoded.valid)
            logits.append(self.cls[number](x).float())
            box = moved(reference, self.reg[number](x).float())
            boxes.append(box)
            if self.refine:
                reference = box.detach()
        counts = (x.shape[1],) * len(boxes)
        return Queries(torch.cat(logits, 1), torch.cat(boxes, 1), encoded.scale, counts)

    def _queries(self, encoded: Encoded, proposals: Proposals | None) -> tuple[Tensor, Tensor, Tensor]:
        """Their positions, contents and references."""
        if proposals is None:
            position, content = self.query_embedding.weight.expand(len(encoded.memory), -1, -1).chunk(2, -1)
            return position, content, self.reference_points_fc(position).float().sigmoid()
        count = min(self.options.queries, proposals.logits.shape[1])
        best = proposals.logits[..., 0].topk(count).indices[..., None]
        reference = proposals.boxes.gather(1, best.expand(-1, -1, 4)).detach().sigmoid()
        encoding = box_encoding(reference, self.channels // 2)
        position, content = self.pos_trans_norm(self.pos_trans_fc(encoding)).chunk(2, -1)
        return position, content, reference


def moved(reference: Tensor, change: Tensor, epsilon: float = 1e-5) -> Tensor:
    """The box of a reference, a point or a box [..., 2 or 4], and what a branch says of it [..., 4]."""
    logit = inverse_sigmoid(reference, epsilon)
    return (change + functional.pad(logit, (0, 4 - logit.shape[-1]))).sigmoid()


def masks_of(maps: Sequence[Tensor], sizes: Tensor | None, size: tuple[int, int]) -> list[Tensor]:
    """bool [B, height, width] of each map: which places are of an image. `size`: height and width of the batch."""
    if sizes is None:
        return [torch.ones_like(one[:, 0], dtype=torch.bool) for one in maps]
    pixels = inside(sizes, *size)[:, None].float()
    return [functional.interpolate(pixels, one.shape[2:])[:, 0] > 0 for one in maps]


def scale_of(sizes: Tensor | None, size: tuple[int, int], like: Tensor) -> Tensor:
    """float32 [B, 1, 4]: (width, height, width, height)."""
    if sizes is None:
        even = torch.arange(4, device=like.device) % 2 == 0
        return torch.where(even, float(size[1]), float(size[0])).expand(len(like), 1, 4)
    return sizes.flip(1).repeat(1, 2)[:, None].float()


def ratios_of(mask: Tensor) -> Tensor:
    """bool [B, H, W] -> [B, 2]: the shares of columns and rows that are of the image."""
    rows, columns = mask[:, :, 0].float().mean(1), mask[:, 0].float().mean(1)
    return torch.stack([columns, rows], 1)


def _centres(height: int, width: int, ratio: Tensor) -> Tensor:
    """[B, H * W, 2]: the centres of a map's places, x and y in shares of the image, of which `ratio` [B, 2] of the map
    is."""
    y, x = ((torch.arange(side, device=ratio.device) + 0.5) / side for side in (height, width))
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1)
    return grid / ratio[:, None]


def _linear(inside_: int, outside: int) -> nn.Linear:
    layer = nn.Linear(inside_, outside)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
