"""From the losses of all priors to one number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel_detection.processes import mean_over_processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

EPSILON = 2.0**-23
"""float32's: MMDetection adds it to every divisor."""


def averaged(losses: Tensor, weights: Tensor, divisor: Tensor) -> Tensor:
    """sum(losses * weights) / divisor: one number. What has the weight 0, or false, may be anything but NaN."""
    return (losses * weights).sum() / (divisor + EPSILON)


def shared_count(counts: Tensor, least: float = 1.0) -> Tensor:
    """A sum over the batch as a divisor: the mean over all processes, so that several give the losses of one."""
    return mean_over_processes(counts.sum().float(), least)


def hardest(losses: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """bool [B, N]: so many of the priors that are `among` (bool [B, N]), those of the largest losses of each image, or
    all if there are fewer. `counts` [B]. Hard negative mining (Liu et al. 2016): most of an image is easy background.
    """
    falling = torch.where(among, losses.detach(), -1.0).argsort(1, descending=True)
    first = torch.arange(losses.shape[1], device=losses.device) < counts[:, None]
    return torch.zeros_like(among).scatter(1, falling, first) & among
