"""Between the processes of a run: the first one reads and writes, all of them have a say and a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from detkernel import CheckpointError, Run, UserError

T = TypeVar("T")


def gathered(run: Run, state: T) -> list[T]:
    """On the first process, everybody's state by rank; elsewhere, nothing. All processes call it."""
    if run.world_size == 1:
        return [state]
    states: list[Any] | None = [None] * run.world_size if run.is_main else None
    dist.gather_object(state, states)
    return states or []


def from_main(run: Run, make: Callable[[], T]) -> T:
    """What the first process makes, on all of them; a mistake that it finds is everybody's."""
    if run.world_size == 1:
        return make()
    told: list[Any] = [None, None]
    if run.is_main:
        try:
            told = [make(), None]
        except UserError as error:
            told = [None, str(error)]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise CheckpointError(told[1])
    value: T = told[0]
    return value
