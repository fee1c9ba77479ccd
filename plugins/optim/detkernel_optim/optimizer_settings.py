"""What stepping needs of torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from detkernel import UserError, wrong
from detkernel.errors import did_you_mean

if TYPE_CHECKING:
    from detkernel_optim.stepping import Stepping, TorchOptimizer

_UNFIT = {"LBFGS", "SparseAdam", "Optimizer"}
"""They need a closure, or sparse gradients."""
_OURS = {"params", "lr", "weight_decay"}


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Copies of everything in the parameter groups but the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def misfit(error: Exception) -> Exception:
    """For the first step after a resume, where a state that does not fit its parameters first shows."""
    if isinstance(error, torch.OutOfMemoryError):
        return error
    reason = (str(error).splitlines() or [""])[0]
    return UserError(
        f"the optimizer could not step with its state from the checkpoint: {type(error).__name__}: {reason}. Resume an "
        "older checkpoint, or start with its weights alone (load_from)"
    )


def scaler(precision: str, device: Any) -> torch.amp.GradScaler | None:
    """Loss scaling, which float16 needs: its gradients underflow."""
    return torch.amp.GradScaler(torch.device(device).type) if precision == "fp16" else None


def by_name(options: TorchOptimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    cls = optimizer_class(options, options.name, options.args)
    given = dict(options.args)
    if "weight_decay" not in inspect.signature(cls).parameters:
        groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    try:
        made: torch.optim.Optimizer = cls(groups, lr=groups[0]["lr"], **given)
    except (TypeError, ValueError) as error:
        raise wrong(options, "args", f"{options.name}: {error}") from None
    return made


def optimizer_class(options: Stepping, name: str, args: Mapping[str, Any]) -> Any:
    """The class in torch.optim. Raises `ConfigError` for a name or an argument that it does not have."""
    known = {
        other
        for other, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and other not in _UNFIT
    }
    if name not in known:
        raise wrong(options, "name", f"torch.optim has no '{name}' that fits here{did_you_mean(name, known)}")
    cls = getattr(torch.optim, name)
    allowed = set(inspect.signature(cls).parameters) - _OURS
    for argument in args:
        if argument in _OURS:
            raise wrong(options, "args", f"give `{argument}` as an option beside `args`")
        if argument not in allowed:
            raise wrong(options, "args", f"{name} has no argument '{argument}'{did_you_mean(argument, allowed)}")
    return cls
