"""Batch norm over the images of all processes, where torch has none: its own is for GPUs only."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_runtime.parallel.group import Group

_peers: weakref.ref[Group] | None = None
"""Whose sums the layers add up. A process has one group at a time, and no layer keeps it alive."""


def over_all_processes(model: nn.Module, group: Group) -> nn.Module:
    """Let every batch norm layer take mean and variance over the batches of all processes, in place.

    Raises nothing; layers that are no `nn.BatchNorm1d` to `3d` (frozen ones, say) stay as they are. The layers keep
    their parameters, buffers and names, so that checkpoints fit with and without.
    """
    global _peers
    _peers = weakref.ref(group)
    for layer in model.modules():
        if type(layer) in _SYNCHRONISED:
            layer.__class__ = _SYNCHRONISED[type(layer)]
    return model


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """Mean and variance of all images, each sample with the same weight however they are shared out."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        group = None if _peers is None else _peers()
        if not self.training or group is None:
            alone: Tensor = super().forward(input)
            return alone
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        x = input if input.dtype == torch.float64 else input.float()
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        count = x.new_full((1,), x.numel() / x.shape[1])
        total: Tensor = _Summed.apply(torch.cat([x.sum(dims), count]), group)
        count = total[-1].detach()
        centred = x - (total[:-1] / count).view(shape)
        variance = _Summed.apply(centred.square().sum(dims), group) / count
        self._remember((total[:-1] / count).detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        result: Tensor = normal.to(input.dtype)
        return result

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Summed(torch.autograd.Function):
    """The sum over all processes; so is its gradient, since everybody's loss follows from it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.summed(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.summed(gradients[0]), None


class _Synchronised1d(_Synchronised, nn.BatchNorm1d): ...


class _Synchronised2d(_Synchronised, nn.BatchNorm2d): ...


class _Synchronised3d(_Synchronised, nn.BatchNorm3d): ...


_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _Synchronised1d,
    nn.BatchNorm2d: _Synchronised2d,
    nn.BatchNorm3d: _Synchronised3d,
}
