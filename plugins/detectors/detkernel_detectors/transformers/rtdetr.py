"""RT-DETR's decoder, whose parts D-FINE's has too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from detkernel_detection.parts import RARE
from torch import Tensor, nn
from torch.nn import functional

from detkernel_detectors.necks.hybrid import ConvNorm
from detkernel_detectors.transformers.deformable import DeformableAttention
from detkernel_detectors.transformers.denoising import Denoising, blocked
from detkernel_detectors.transformers.encodings import Mlp, inverse_sigmoid

if TYPE_CHECKING:
    from detkernel_detectors.models.rtdetr import RtDetr

Shapes = Sequence[tuple[int, int]]
"""Height and width of each map."""


class Selected(NamedTuple):
    """The best places of the encoder's maps."""

    content: Tensor
    """[B, Q, channels], without gradient."""
    logits: Tensor
    """[B, Q, C]."""
    boxes: Tensor
    """float32 [B, Q, 4] cxcywh before the sigmoid; infinite at the border of the image."""


class Selection(nn.Module):
    """Each place of the maps has logits of the classes and a box; the best places are the queries of the decoder."""

    def __init__(self, channels: int, classes: int, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.proj, self.norm = nn.Linear(channels, channels), nn.LayerNorm(channels)
        self.cls, self.reg = nn.Linear(channels, classes), Mlp(channels, channels, 4, 3)
        nn.init.xavier_uniform_(self.proj.weight)
        start_rare(self.cls)
        start_zero(self.reg)

    def forward(self, memory: Tensor, shapes: Shapes) -> Selected:
        boxes = proposals(shapes, memory)
        inside = boxes.isfinite().all(-1, keepdim=True)
        memory = self.norm(self.proj(torch.where(inside, memory, 0.0)))
        logits = self.cls(memory)
        places = logits.detach().amax(-1).topk(min(self.queries, logits.shape[1]), 1).indices
        content = _at(memory, places)
        return Selected(content.detach(), _at(logits, places), self.reg(content).float() + boxes[places])


class DecoderLayer(nn.Module):
    """Queries see each other, then points of the maps around their boxes, and go through two layers; norms behind.

    `gated`: D-FINE's, which joins by a gate and samples the maps as they are.
    """

    def __init__(self, channels: int, heads: int, feedforward: int, points: Sequence[int], gated: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.cross_attn = DeformableAttention(channels, heads, points, projected=not gated)
        self.norm1, self.norm3 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.norm2 = Gate(channels) if gated else nn.LayerNorm(channels)
        self.linear1, self.linear2 = nn.Linear(channels, feedforward), nn.Linear(feedforward, channels)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
        self.gated = gated

    def forward(
        self, x: Tensor, position: Tensor, boxes: Tensor, memory: Tensor, shapes: Shapes, unseen: Tensor | None
    ) -> Tensor:
        query = x + position
        x = self.norm1(x + self.self_attn(query, query, x, attn_mask=unseen, need_weights=False)[0])
        seen = self.cross_attn(x + position, boxes[:, :, None], memory, shapes)
        x = self.norm2(x, seen) if self.gated else self.norm2(x + seen)
        x = x + self.linear2(functional.relu(self.linear1(x)))
        if self.gated:  # so that half precision does not overflow
            x = x.clamp(-65504, 65504)
        found: Tensor = self.norm3(x)
        return found


class Gate(nn.Module):
    """LN(g x + h y): what is kept of each is learned, and at first half of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(2 * channels, 2 * channels), nn.LayerNorm(channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, other = self.gate(torch.cat([x, y], -1)).sigmoid().chunk(2, -1)
        found: Tensor = self.norm(one * x + other * y)
        return found


class Encoded(NamedTuple):
    """What the network says of images before it is asked for objects."""

    features: list[Tensor]
    """The neck's maps, fine to coarse."""
    memory: Tensor
    """[B, S, channels]: the decoder's, one after the other, row by row."""
    shapes: Shapes
    selected: Selected
    scale: Tensor
    """float32 [B, 1, 4]: (width, height, width, height) of the batch's images with their padding, in pixels."""


class Decoded(NamedTuple):
    """What the decoder says of K noisy queries and Q others, of the last layer or of L layers."""

    logits: Tensor
    """float32 [L, B, K + Q, C]."""
    boxes: Tensor
    """float32 [L, B, K + Q, 4] cxcywh in shares of the image."""


class Decoder(nn.Module):
    """Boxes of the best places, made better layer by layer.

    In training, a box is made of that of the layer before with its gradient, and the next layer sees it without.
    """

    def __init__(self, options: RtDetr, channels: int, levels: int, classes: int) -> None:
        super().__init__()
        width, layers = options.channels, options.decoder_layers
        self.inputs = nn.ModuleList([ConvNorm(channels, width, linear=True) for _ in range(levels)])
        self.selection = Selection(width, classes, options.queries)
        self.denoising = nn.Embedding(classes + 1, width, padding_idx=classes)
        self.position = Mlp(4, 2 * width, width, 2)
        self.layers = nn.ModuleList(
            [DecoderLayer(width, options.attention_heads, options.ffn_channels, options.points) for _ in range(layers)]
        )
        self.cls = nn.ModuleList([nn.Linear(width, classes) for _ in range(layers)])
        self.reg = nn.ModuleList([Mlp(width, width, 4, 3) for _ in range(layers)])
        self.evaluated = options.evaluated_layers or layers
        start(self.inputs, self.position, self.cls, self.reg)

    def encode(self, features: list[Tensor], size: tuple[int, int]) -> Encoded:
        return encoded(features, size, self.inputs, self.selection)

    def forward(self, encoded: Encoded, noise: Denoising | None = None, learns: bool = False) -> Decoded:
        """`learns`: of all layers, rather than of the last one that is evaluated."""
        x, seen, unseen = queries(encoded.selected, noise, self.denoising)
        logits, boxes, before = [], [], seen
        count = len(self.layers) if learns else self.evaluated
        for number, (layer, cls, reg) in enumerate(zip(self.layers, self.cls, self.reg, strict=True)):
            if number == count:
                break
            x = layer(x, self.position(seen.to(x.dtype)), seen, encoded.memory, encoded.shapes, unseen)
            change = reg(x).float()
            if learns or number == count - 1:
                logits.append(cls(x).float())
                boxes.append((change + inverse_sigmoid(before)).sigmoid())
            before = (change + inverse_sigmoid(seen)).sigmoid()
            seen = before.detach()
        return Decoded(torch.stack(logits), torch.stack(boxes))


def encoded(features: list[Tensor], size: tuple[int, int], inputs: nn.ModuleList, selection: Selection) -> Encoded:
    maps = [project(one) for project, one in zip(inputs, features, strict=True)]
    shapes = [(one.shape[2], one.shape[3]) for one in maps]
    memory = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], 1)
    across = torch.arange(4, device=memory.device) % 2 == 0
    scale = torch.where(across, float(size[1]), float(size[0])).expand(len(memory), 1, 4)
    return Encoded(features, memory, shapes, selection(memory, shapes), scale)


def queries(
    selected: Selected, noise: Denoising | None, embedding: nn.Embedding
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Content, boxes (cxcywh, 0..1, no gradient) and what does not see what, of the noisy and the selected."""
    boxes = selected.boxes.detach().sigmoid()
    if noise is None:
        return selected.content, boxes, None
    labels = torch.where(noise.real, noise.labels, embedding.num_embeddings - 1)
    noisy = inverse_sigmoid(torch.where(noise.real[..., None], noise.boxes, 0.0)).sigmoid()
    content = torch.cat([embedding(labels).to(selected.content.dtype), selected.content], 1)
    return content, torch.cat([noisy, boxes], 1), blocked(noise.group, boxes.shape[1])


def proposals(shapes: Shapes, like: Tensor) -> Tensor:
    """float32 [S, 4]: a box around each place of the maps, cxcywh before the sigmoid, with sides of 0.05 of the image
    in the finest map and twice of these in each next one. Infinite where a number is not within 0.01..0.99."""
    found = []
    for level, (height, width) in enumerate(shapes):
        place = torch.arange(height * width, device=like.device)
        x, y = (place % width + 0.5) / width, (place // width + 0.5) / height
        side = torch.full_like(x, 0.05 * 2**level)
        found.append(torch.stack([x, y, side, side], -1))
    boxes = torch.cat(found)
    inside = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return torch.where(inside, (boxes / (1 - boxes)).log(), torch.inf)


def start(inputs: nn.Module, position: Mlp, cls: Iterable[nn.Module], reg: Iterable[nn.Module]) -> None:
    """What RT-DETR begins with: each class at 0.01, each box as it came."""
    for layer in (*inputs.modules(), *position):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight)
    for one in cls:
        start_rare(one)
    for one in reg:
        start_zero(one)


def start_rare(cls: nn.Module) -> None:
    nn.init.constant_(cls.bias, RARE)  # type: ignore[arg-type]


def start_zero(mlp: nn.Module) -> None:
    last = mlp[-1]  # type: ignore[index]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """[B, S, D] and [B, Q] -> [B, Q, D]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
