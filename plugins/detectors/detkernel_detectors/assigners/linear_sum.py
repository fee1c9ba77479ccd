"""The assignment of least cost as one operation: no graph is cut by it, and the device waits once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@torch.library.custom_op("detkernel::linear_sum_assignment", mutates_args=())
def assigned(costs: Tensor, counts: Sequence[int]) -> Tensor:
    """The column of each row, or -1: costs [B, N, M] -> int64 [B, N].

    `counts`: how many of the rows are of each set; each set of each image is assigned by itself. Columns that do not
    exist stand last and are infinite.
    """
    host = costs.cpu().numpy()
    matched = np.full(host.shape[:2], -1, dtype=np.int64)
    columns = np.isfinite(host[:, 0]).sum(1) if host.shape[1] else np.zeros(len(host), dtype=np.int64)
    for cost, places, exist in zip(host, matched, columns, strict=True):
        start = 0
        for count in counts:
            rows, found = linear_sum_assignment(cost[start : start + count, :exist])
            places[start + rows] = found
            start += count
    return torch.from_numpy(matched).to(costs.device, non_blocking=True)


@assigned.register_fake
def _(costs: Tensor, counts: Sequence[int]) -> Tensor:
    return costs.new_empty(costs.shape[:2], dtype=torch.int64)
