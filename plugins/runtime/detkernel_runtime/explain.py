"""Errors of torch that a user can fix, as messages that say how."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

import torch
from detkernel import Run, UserError, wrong
from detkernel.errors import ResourceError
from detkernel_detection import Batch

if TYPE_CHECKING:
    from detkernel_runtime.device import Device

_UNREDUCED = "Expected to have finished reduction in the prior iteration"
_INDICES = re.compile(r"did not receive grad for rank (\d+): ([\d ]+)")
_VARYING = re.compile(r"(\S+) does not have a deterministic implementation")
_SHOWN = 12
_VIEW = "view size is not compatible with input tensor's size and stride"
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def explained(options: Device, run: Run, batch: Batch, error: Exception) -> UserError | None:
    """The message for an error of torch that a user can fix; None for any other."""
    if _UNREDUCED in str(error):
        return _unused(options, run, error)
    if _VIEW in str(error):
        return wrong(
            options,
            "channels_last",
            "the model calls .view on a tensor that is channels-last in memory, as the convolutions of a model are by "
            f"default ({_line_of(error)}). Call .reshape or .flatten there; or set device.channels_last: false, or "
            "`channels_last = False` on that module",
        )
    alone = _VARYING.search(str(error))
    if alone:
        return wrong(
            options,
            "deterministic",
            f"torch has no algorithm for {alone[1]} whose results repeat on {run.device}; use a model without it, or "
            "set deterministic: false, and resumed runs are equal but for rounding",
        )
    return _out_of_memory(run, batch, error)


def _line_of(error: Exception) -> str:
    """`heads.py:42 in forward`: where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else "?"


def _unused(options: Device, run: Run, error: Exception) -> UserError:
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


def _out_of_memory(run: Run, batch: Batch, error: Exception) -> UserError | None:
    """With the batch that memory ran out with."""
    on_cpu = _NO_MEMORY in str(error)
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
        return None
    images = [f"{name} ({w}x{h})" for name, (h, w) in zip(batch.image_ids, batch.sizes, strict=True)]
    objects = sum(batch.counts)
    advice = (
        ""
        if on_cpu
        else " and device.precision: bf16; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True saves fragments"
    )
    shown = ", ".join(images[:_SHOWN])
    when, smaller = "in validation after", "val_batch_size"
    if run.mode == "train":
        when, smaller = (
            f"in epoch {run.epoch + 1},",
            "batch_size (with the optimizer's accumulate, steps stay the same)",
        )
    return ResourceError(
        f"{run.device} ran out of memory {when} iteration {run.iter}, with {len(batch)} images "
        f"of up to {batch.images.shape[-1]}x{batch.images.shape[-2]} and {objects} objects: {shown}. Try a smaller "
        f"{smaller}, smaller images{advice}"
    )
