"""Kinds of parts that detectors are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from detkernel.plugin import Part

if TYPE_CHECKING:
    from torch import nn


class Backbone(Part, ABC):
    """A feature extractor for detectors."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the module. It maps float [B, 3, H, W] to a dict of feature maps, fine to coarse, and has the
        attributes `channels: list[int]` and `strides: list[int]`, one entry a map."""
