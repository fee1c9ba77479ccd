"""From a model to one that trains: moved, normalised together, compiled, and wrapped for several processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from detkernel import Run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detkernel_runtime.parallel.sync_batchnorm import over_all_processes

if TYPE_CHECKING:
    from detkernel_runtime.device import Device
    from detkernel_runtime.parallel.group import Group


_LOCAL_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters  # in newer torch
    else {"broadcast_buffers": False}
)
"""torch's wrapper broadcasts all buffers in every forward, else."""


def wrapped(options: Device, run: Run, model: nn.Module) -> nn.Module:
    """The placed model as used in training: behind what exchanges gradients, if there are several processes."""
    if not several(run):
        return model
    share_buffers(model)
    return distributed(options, run, model)


def several(run: Run) -> bool:
    """Whether gradients are exchanged."""
    return run.world_size > 1 and run.trains


def placed(options: Device, run: Run, group: Group | None, module: nn.Module) -> nn.Module:
    """A network where it is trained, as the options say: on the device, with its memory format and its norms."""
    module = module.to(run.device)
    if options.channels_last:
        turn(module)
    if not (options.sync_batchnorm and several(run) and group is not None):
        return module
    if run.device.type == "cpu":
        return over_all_processes(module, group)
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    return converted


def place_modules(options: Device, run: Run, group: Group | None) -> None:
    """Place what `run.add_module` was given; one that is not trained needs no gradients and no wrapper."""
    for name, module in run.modules.items():
        if name not in run.trained_modules:
            run.modules[name] = module.to(run.device).requires_grad_(False).eval()
            if options.channels_last:
                turn(run.modules[name])
            continue
        made = placed(options, run, group, module)
        if several(run):
            share_buffers(made)
            made = distributed(options, run, made)
        run.modules[name] = made


def turn(module: nn.Module) -> None:
    """Turn the weights of convolutions channels-last, all but those of modules that say `channels_last = False`.

    What a convolution gives is then channels-last too, and a `.view` across its channels fails. Other parameters stay:
    they gain nothing, and a `.view` of them would fail as well.
    """
    if getattr(module, "channels_last", True) is False:
        return
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        module.to(memory_format=torch.channels_last)
    for child in module.children():
        turn(child)


def distributed(options: Device, run: Run, model: nn.Module) -> nn.Module:
    """The model wrapped for several processes; the bare one where no parameter is trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    return DistributedDataParallel(
        model,
        device_ids=[run.device.index] if run.device.type == "cuda" else None,
        **_LOCAL_BUFFERS,
        find_unused_parameters=options.find_unused_parameters,
        static_graph=options.static_graph,
        gradient_as_bucket_view=True,
    )


class Trained:
    """Which parameters are trained: the wrapper knows those that were when it was made, and waits for all of them."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(unwrapped(model).parameters())
        self._flags = self._now()

    def has_changed(self) -> bool:
        before, self._flags = self._flags, self._now()
        return before != self._flags

    def _now(self) -> list[bool]:
        return [parameter.requires_grad for parameter in self._parameters]


def rewrapped(options: Device, run: Run) -> nn.Module:
    """The model in a new wrapper, since other parameters are trained now. On all processes at once."""
    if isinstance(run.model, DistributedDataParallel):
        # or the old wrapper would go on waiting for its gradients
        run.model._remove_autograd_hooks()  # type: ignore[no-untyped-call]
    return distributed(options, run, unwrapped(run.model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrapper for several processes."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def bare(model: nn.Module) -> nn.Module:
    """The model without any wrapper: neither for several processes nor of `torch.compile(model)`."""
    while model is not (inner := getattr(unwrapped(model), "_orig_mod", unwrapped(model))):
        model = inner
    return model


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: in training each updates its own running statistics.

    At the start, and before each validation. A checkpoint has the first one's, and beside them those of the others.
    """
    with torch.no_grad():
        works = [dist.broadcast(buffer, src=0, async_op=True) for buffer in model.buffers()]
    for work in works:
        if work is not None:
            work.wait()


def own_buffers(run: Run) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of the buffers of a process that is not the first."""
    return {name: buffer.cpu() for name, buffer in _buffers(run)}


def _buffers(run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the model and of the modules that are trained, those that are saved."""
    for network, module in run.trained_networks.items():
        kept = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in kept:
                yield f"{network}.{name}" if network else name, buffer


def load_own_buffers(run: Run, state: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in _buffers(run):
            if name in state:
                if state[name].shape != buffer.shape:
                    raise ValueError(f"its buffer '{name}' is {list(state[name].shape)}")
                buffer.copy_(state[name])
