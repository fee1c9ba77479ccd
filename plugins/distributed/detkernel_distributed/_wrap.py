"""From a model to one that trains: moved, normalised together, compiled, and wrapped for several processes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from detkernel import Run, UserError, wrong
from detkernel.errors import ResourceError
from detkernel_detection import Batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detkernel_distributed._batchnorm import over_all_processes

if TYPE_CHECKING:
    from detkernel_distributed._group import Group
    from detkernel_distributed.device import Device

_UNREDUCED = "Expected to have finished reduction in the prior iteration"
_INDICES = re.compile(r"did not receive grad for rank (\d+): ([\d ]+)")
_VARYING = re.compile(r"(\S+) does not have a deterministic implementation")
_SHOWN = 12
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def prepare(options: Device, run: Run, group: Group | None) -> nn.Module:
    """The model as used in training; a test needs no wrapper."""
    model: nn.Module = run.model.to(run.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    many = run.world_size > 1 and run.mode != "test"
    if options.sync_batchnorm and many and group is not None:
        on_cpu = run.device.type == "cpu"
        model = over_all_processes(model, group) if on_cpu else nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if options.compile:
        model.compile()
    return _distributed(options, run, model) if many else model


def _distributed(options: Device, run: Run, model: nn.Module) -> nn.Module:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("every parameter of the model is frozen: there is nothing to train on several processes")
    return DistributedDataParallel(
        model,
        device_ids=[run.device.index] if run.device.type == "cuda" else None,
        find_unused_parameters=options.find_unused_parameters,
        static_graph=options.static_graph,
        gradient_as_bucket_view=True,
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrapper for several processes."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: in training each updates its own running statistics."""
    with torch.no_grad():
        works = [dist.broadcast(buffer, src=0, async_op=True) for buffer in model.buffers()]
    for work in works:
        if work is not None:
            work.wait()


def explained(options: Device, run: Run, batch: Batch, error: RuntimeError) -> UserError | None:
    """The message for an error of torch that a user can mend; None for any other."""
    if _UNREDUCED in str(error):
        return _unused(options, run, error)
    alone = _VARYING.search(str(error))
    if alone:
        return wrong(
            options,
            "deterministic",
            f"torch has no algorithm for {alone[1]} whose results repeat on {run.device}; use a model without it, or "
            "set deterministic: false, and resumed runs are equal but for rounding",
        )
    return _out_of_memory(run, batch, error)


def _unused(options: Device, run: Run, error: RuntimeError) -> UserError:
    """Of DDP, over parameters without gradient: with their names."""
    found = _INDICES.search(str(error))
    names = [name for name, parameter in run.bare_model.named_parameters() if parameter.requires_grad]
    unused = [names[int(index)] for index in found[2].split()] if found else []
    shown = ", ".join(unused[:_SHOWN]) + (f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else "")
    return wrong(
        options,
        "find_unused_parameters",
        f"{len(unused) or 'some'} parameters took no part in the loss of iteration {run.iter} on rank {run.rank}: "
        f"{shown}. Freeze them (requires_grad: false), use them, or set find_unused_parameters: true",
    )


def _out_of_memory(run: Run, batch: Batch, error: RuntimeError) -> UserError | None:
    """With the batch that memory ran out with."""
    on_cpu = _NO_MEMORY in str(error)
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
        return None
    pictures = [f"{name} ({w}x{h})" for name, (h, w) in zip(batch.image_ids, batch.sizes, strict=True)]
    objects = sum(len(target) for target in batch.targets)
    advice = "" if on_cpu else " and precision bf16; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True saves fragments"
    shown = ", ".join(pictures[:_SHOWN])
    when, smaller = "in validation after", "val_batch_size"
    if run.mode == "train":
        when, smaller = (
            f"in epoch {run.epoch + 1},",
            "batch_size (with the optimizer's accumulate, steps stay the same)",
        )
    return ResourceError(
        f"{run.device} ran out of memory {when} iteration {run.iter}, with {len(batch)} pictures "
        f"of up to {batch.images.shape[-1]}x{batch.images.shape[-2]} and {objects} objects: {shown}. Try a smaller "
        f"{smaller}, smaller pictures{advice}"
    )
