"""Means of losses that cost the device nothing until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import attrs
import torch
import torch.distributed as dist
from detkernel import Run
from detkernel_detection import Losses
from torch import Tensor

Sums: TypeAlias = list[tuple[tuple[str, ...], list[float], int]]
"""Names, their sums, and over how many iterations."""


@attrs.define(eq=False)
class _Part:
    total: Tensor
    """float32 [N], on the device of the losses."""
    count: int


class Meter:
    """Sums of losses since the last line.

    Iterations that give the same names share one vector: two small operations on the device an iteration, however many
    losses there are, and one transfer a line.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, ...], _Part] = {}

    def add(self, losses: Losses) -> None:
        names = tuple(losses)
        part = self._parts.get(names)
        if part is None:
            if names:
                self._parts[names] = _Part(_stacked(losses), 1)
            return
        with torch.no_grad():
            part.total.add_(torch.stack(tuple(losses.values())))
        part.count += 1

    def take(self, run: Run) -> dict[str, float]:
        """The means since the last line, over all processes, with `loss`, the sum of what is minimised; a new line
        begins. Every process calls it; the result holds on the first one."""
        sums = self._sums()
        self._parts.clear()
        # gathered, and not reduced: the processes' losses may differ in their names
        return means(part for parts in run.processes.gathered(sums) for part in parts)

    def _sums(self) -> Sums:
        if not self._parts:
            return []
        values = iter(torch.cat([part.total for part in self._parts.values()]).tolist())
        return [(names, [next(values) for _ in names], part.count) for names, part in self._parts.items()]

    def state_dict(self) -> list[dict[str, Any]]:
        """Copies of the sums; on the CPU where processes will send them to each other, and on the device elsewhere,
        so that nobody waits for it."""
        several = dist.is_available() and dist.is_initialized()
        return [
            {"names": list(names), "total": part.total.to("cpu" if several else None, copy=True), "count": part.count}
            for names, part in self._parts.items()
        ]

    def load_state_dict(self, state: Iterable[Mapping[str, Any]]) -> None:
        self._parts = {}
        for part in state:
            names, total, count = tuple(part["names"]), part["total"], int(part["count"])
            if not all(isinstance(name, str) for name in names) or total.shape != (len(names),) or count < 1:
                raise ValueError(f"its sums of {names} over {count} iterations are {list(total.shape)}")
            self._parts[names] = _Part(total.clone().float(), count)

    def move(self, device: torch.device | str) -> None:
        """Take sums that were loaded to where the losses are."""
        for part in self._parts.values():
            part.total = part.total.to(device)


def _stacked(losses: Losses) -> Tensor:
    """The losses as a vector of float32. Raises TypeError for what is not a scalar tensor."""
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"train_step returned {found} as '{name}'; expected a scalar tensor")
    with torch.no_grad():
        return torch.stack(tuple(losses.values())).float()


def means(sums: Iterable[tuple[tuple[str, ...], list[float], int]]) -> dict[str, float]:
    """The mean of each name over the iterations that had it, and `loss`: the mean sum of those named "loss"."""
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    loss, iters = 0.0, 0
    for names, values, count in sums:
        iters += count
        for name, value in zip(names, values, strict=True):
            totals[name] = totals.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + count
            loss += value if "loss" in name else 0.0
    found = {name: total / counts[name] for name, total in totals.items() if name != "loss"}
    return {**found, "loss": loss / iters} if any("loss" in name for name in totals) else found
