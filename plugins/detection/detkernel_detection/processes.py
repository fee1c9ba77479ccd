"""What the processes of a run tell each other, over torch's process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from detkernel import UserError
from detkernel.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class TorchProcesses(Processes):
    """The processes of torch's default group, which must be there: `run.processes = TorchProcesses()`."""

    def gathered(self, value: T) -> list[T]:
        import torch.distributed as dist

        values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(value, values)
        return values or []

    def from_main(self, make: Callable[[], T]) -> T:
        import torch.distributed as dist

        told: list[Any] = [None, None]
        error: UserError | None = None
        if dist.get_rank() == 0:
            try:
                told[0] = make()
            except UserError as caught:
                error, told[1] = caught, str(caught)
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise error or UserError(told[1])
        value: T = told[0]
        return value


def mean_over_processes(value: Tensor, least: float = 0.0) -> Tensor:
    """The mean of a tensor over all processes, without a gradient; `least` is the least that their sum counts as.

    A loss divided by it and averaged by DistributedDataParallel is that of one process with all images.
    """
    import torch.distributed as dist

    value = value.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value.clamp(min=least)
    total = value.clone()
    dist.all_reduce(total)
    return total.clamp(min=least) / dist.get_world_size()
