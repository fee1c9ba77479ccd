"""Between the processes of a run, for plugins: what one finds out is everybody's.

Every process must call these at the same place, or the others wait for it. A run of one process asks nobody, and needs
no torch; one of several has it from the plugin that made the process group.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from detkernel.errors import UserError
from detkernel.run import Run

T = TypeVar("T")


def gathered(run: Run, value: T) -> list[T]:
    """On the first process, everybody's value by rank; elsewhere nothing."""
    if run.world_size == 1:
        return [value]
    values: list[Any] | None = [None] * run.world_size if run.is_main else None
    import_module("torch.distributed").gather_object(value, values)
    return values or []


def from_main(run: Run, make: Callable[[], T]) -> T:
    """What the first process makes, on all of them. A `UserError` that it raises is everybody's."""
    if run.world_size == 1:
        return make()
    told: list[Any] = [None, None]
    error: UserError | None = None
    if run.is_main:
        try:
            told[0] = make()
        except UserError as caught:
            error, told[1] = caught, str(caught)
    import_module("torch.distributed").broadcast_object_list(told)
    if told[1] is not None:
        raise error or UserError(told[1])
    value: T = told[0]
    return value
