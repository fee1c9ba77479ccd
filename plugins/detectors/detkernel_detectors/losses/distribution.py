"""The loss of a number that is told as a distribution over whole numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


def distribution_focal(logits: Tensor, numbers: Tensor) -> Tensor:
    """Distribution focal loss (Li et al. 2020): all probability is to be at the two whole numbers around the number.

    DFL(S) = -((n + 1 - y) ln S_n + (y - n) ln S_(n+1)), n = floor(y). Logits [..., K] and numbers [...] of 0 to below
    K - 1 -> [...].
    """
    below = numbers.floor()
    return two_bins(logits, below.long(), numbers - below)


def two_bins(logits: Tensor, below: Tensor, rest: Tensor) -> Tensor:
    """Cross-entropy where the truth is shared by two neighbours: 1 - `rest` for the bin `below` (int64 [...]), `rest`
    for the next one. Logits [..., K] -> [...]."""
    logs = logits.log_softmax(-1)
    left, right = (logs.gather(-1, (below + more)[..., None])[..., 0] for more in (0, 1))
    return -(left * (1 - rest) + right * rest)


def expected(logits: Tensor) -> Tensor:
    """The mean of each distribution: logits [..., K] -> [...], 0..K-1."""
    numbers = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return logits.softmax(-1) @ numbers
