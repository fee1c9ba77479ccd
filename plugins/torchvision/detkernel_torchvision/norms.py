"""Kinds of normalisation, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torchvision.ops import FrozenBatchNorm2d


class EvalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that never updates its statistics, with a trained scale and shift: MMDetection's `norm_eval`."""

    def train(self, mode: bool = True) -> EvalBatchNorm2d:
        super().train(False)
        return self


def norm_layer(kind: str) -> Callable[..., nn.Module]:
    """What torchvision's builders take as `norm_layer`."""
    layers: dict[str, Any] = {
        "frozen": FrozenBatchNorm2d,
        "eval": EvalBatchNorm2d,
        "batch": nn.BatchNorm2d,
        "group": partial(_group_norm),
    }
    layer: Callable[..., nn.Module] = layers[kind]
    return layer


def _group_norm(channels: int, **_: Any) -> nn.GroupNorm:
    """32 groups, or as many as divide the channels (Wu and He 2018)."""
    groups = next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels)
