"""Conditional DETR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import plugin

from detkernel_detectors.models.detr import DetrFamily

if TYPE_CHECKING:
    from torch import nn


@plugin
class ConditionalDetr(DetrFamily):
    """Conditional DETR (Meng et al. 2021): queries that know where they look, so that training takes a third.

    https://arxiv.org/abs/2108.06152.
    """

    def transformer(self, channels: int, classes: int) -> nn.Module:
        from detkernel_detectors.transformers.detr import ConditionalTransformer

        return ConditionalTransformer(self, channels, classes)
