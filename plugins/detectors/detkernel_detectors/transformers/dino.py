"""The decoder of DINO (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from detkernel_detection.parts import Queries
from torch import Tensor, nn

from detkernel_detectors.transformers.deformable_detr import Decoder, DeformableTransformer, Encoded, Proposals, moved
from detkernel_detectors.transformers.denoising import Denoising, blocked
from detkernel_detectors.transformers.encodings import Mlp, box_encoding, inverse_sigmoid, y_first

if TYPE_CHECKING:
    from detkernel_detectors.models.dino import Dino

EPSILON = 1e-3
"""Least distance from 0 and 1 of what noisy queries and refined boxes are the logits of."""


class DinoDecoder(Decoder):
    """Also makes the position of a query from its box, and normalises what every layer gives."""

    def __init__(self, options: Dino, channels: int, points: Sequence[int]) -> None:
        super().__init__(options, channels, points)
        self.ref_point_head = Mlp(2 * channels, channels, channels, 2)
        self.norm = nn.LayerNorm(channels)


class DinoTransformer(DeformableTransformer):
    """Queries of learned contents, whose references are the best proposals, and in training noisy ones before them."""

    options: Dino

    def __init__(self, options: Dino, channels: int, levels: int, classes: int) -> None:
        super().__init__(options, channels, levels, classes, two_stage=True, separate=True)
        self.query_embedding = nn.Embedding(options.queries, channels)
        nn.init.xavier_uniform_(self.query_embedding.weight)
        self.label_embedding = nn.Embedding(classes, channels)

    def make_decoder(self, points: Sequence[int]) -> DinoDecoder:
        return DinoDecoder(self.options, self.channels, points)

    def chosen(self, proposals: Proposals, scale: Tensor) -> Queries:
        """The proposals with the highest scores."""
        count = min(self.options.queries, proposals.logits.shape[1])
        best = proposals.logits.amax(-1).topk(count).indices[..., None]
        logits = proposals.logits.gather(1, best.expand(-1, -1, proposals.logits.shape[-1]))
        boxes = proposals.boxes.gather(1, best.expand(-1, -1, 4)).sigmoid()
        return Queries(logits, boxes, scale, (count,))

    def decode(self, encoded: Encoded, first: Queries, noise: Denoising | None = None) -> tuple[Queries, Queries]:
        """The predictions of all layers, one after the other: of the noisy queries, and of the others."""
        x = self.query_embedding.weight[: first.counts[0]].expand(len(encoded.memory), -1, -1)
        reference = first.boxes.detach()
        unseen, noisy = None, 0
        if noise is not None:
            real, noisy = noise.real[..., None], noise.labels.shape[1]
            x = torch.cat([torch.where(real, self.label_embedding(noise.labels), 0.0), x], 1)
            boxes = torch.where(real, inverse_sigmoid(noise.boxes, EPSILON), 0.0).sigmoid()
            reference = torch.cat([boxes, reference], 1)
            unseen = blocked(noise.group, first.counts[0])

        # Look forward twice: a layer's box is told from the one before, whose gradient reaches one layer back.
        logits, boxes_of = [], []
        before = reference
        ratios = encoded.ratios.repeat(1, 1, 2)[:, None]
        for number, layer in enumerate(self.decoder.layers):
            near = reference[:, :, None] * ratios
            position = self.decoder.ref_point_head(box_encoding(y_first(near[:, :, 0]), self.channels // 2))
            x = layer(x, position, near, encoded.memory, encoded.shapes, encoded.valid, unseen)
            normed = self.decoder.norm(x)
            logits.append(self.cls[number](normed).float())
            boxes_of.append(moved(before, self.reg[number](normed).float()))
            before = moved(reference, self.reg[number](x).float(), EPSILON)
            reference = before.detach()
        return (
            _queries(logits, boxes_of, encoded.scale, slice(0, noisy)),
            _queries(logits, boxes_of, encoded.scale, slice(noisy, None)),
        )


def _queries(logits: Sequence[Tensor], boxes: Sequence[Tensor], scale: Tensor, part: slice) -> Queries:
    """A part of the queries of all layers."""
    logits, boxes = [one[:, part] for one in logits], [one[:, part] for one in boxes]
    counts = tuple(one.shape[1] for one in logits)
    return Queries(torch.cat(logits, 1), torch.cat(boxes, 1), scale, counts)
