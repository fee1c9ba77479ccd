"""The assignment of least cost as one operation: no graph is cut by it, and the device waits once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def _on_host(value: Tensor) -> Tensor:
    """From a GPU, as contiguous memory that it writes to itself, which is several times as fast as any other."""
    if not value.is_cuda:
        return value.cpu()
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value.contiguous())


@torch.library.custom_op("detkernel::linear_sum_assignment", mutates_args=())
def assigned(costs: Tensor, counts: Sequence[int]) -> Tensor:
    """The column of each row, or -1: costs [B, N, M] -> int64 [B, N].

    `counts`: how many of the rows are of each set; each set of each image is assigned by itself. Columns that do not
    exist stand last and are infinite. 16 images with 8 objects each, 7 sets and 900 queries take a core about 10 ms.
    """
    host = _on_host(costs.transpose(1, 2)).numpy()  # SciPy is twice as fast where rows are fewer than columns
    matched = np.full(costs.shape[:2], -1, dtype=np.int64)
    exists = np.isfinite(host[:, :, 0]).sum(1)
    for cost, places, exist in zip(host, matched, exists, strict=True):
        start = 0
        for count in counts:
            found, rows = linear_sum_assignment(cost[:exist, start : start + count])
            places[start + rows] = found
            start += count
    return torch.from_numpy(matched).to(costs.device, non_blocking=True)


@assigned.register_fake
def _(costs: Tensor, counts: Sequence[int]) -> Tensor:
    return costs.new_empty(costs.shape[:2], dtype=torch.int64)
