"""From the losses of all priors to one number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel_detection.processes import mean_over_processes

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 2.0**-23
"""float32's: MMDetection adds it to every divisor."""


def averaged(losses: Tensor, weights: Tensor, divisor: Tensor) -> Tensor:
    """sum(losses * weights) / divisor: one number. What has the weight 0, or false, may be anything but NaN."""
    return (losses * weights).sum() / (divisor + EPSILON)


def shared_count(counts: Tensor, least: float = 1.0) -> Tensor:
    """A sum over the batch as a divisor: the mean over all processes, so that several give the losses of one."""
    return mean_over_processes(counts.sum().float(), least)
