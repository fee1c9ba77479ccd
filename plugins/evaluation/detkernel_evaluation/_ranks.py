"""Between the processes of a run: the first one computes, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from detkernel import Run, UserError

from detkernel_evaluation._found import Found

T = TypeVar("T")


def merged(run: Run, found: Mapping[int, Found]) -> dict[int, Found]:
    """On the first process, what all of them found, each picture once; elsewhere nothing. All processes call it.

    Samplers show some pictures twice, so that every process gets equally many; the first process's word counts.
    """
    if run.world_size == 1:
        return dict(found)
    parts: list[Any] | None = [None] * run.world_size if run.is_main else None
    dist.gather_object(dict(found), parts)
    return {index: part[index] for part in reversed(parts or []) for index in part}


def from_main(run: Run, make: Callable[[], T]) -> T:
    """What the first process makes, on all of them; a mistake that it finds is everybody's."""
    if run.world_size == 1:
        return make()
    told: list[Any] = [None, None]
    error: UserError | None = None
    if run.is_main:
        try:
            told[0] = make()
        except UserError as caught:
            error, told[1] = caught, str(caught)
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise error or UserError(told[1])
    value: T = told[0]
    return value
