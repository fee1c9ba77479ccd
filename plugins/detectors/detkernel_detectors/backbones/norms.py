"""Kinds of normalisation, by name."""

from __future__ import annotations

from torch import nn


class EvalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always goes by its running statistics and never updates them."""

    def train(self, mode: bool = True) -> EvalBatchNorm2d:
        super().train(False)
        return self


def norm(kind: str, channels: int) -> nn.Module:
    """`frozen` and `eval`: constant statistics, without and with a trained scale and shift; `batch`; `group`."""
    if kind == "group":  # 32 groups, or as many as divide the channels (Wu and He 2018)
        return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0), channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    made = EvalBatchNorm2d(channels)
    if kind == "frozen":
        made.requires_grad_(False)
    return made
