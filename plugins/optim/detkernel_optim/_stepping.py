"""What stepping needs of torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from detkernel import UserError, wrong
from detkernel.detection import Losses
from detkernel.errors import did_you_mean
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_optim.stepping import Stepping, TorchOptimizer

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_UNFIT = {"LBFGS", "SparseAdam", "Optimizer"}
"""They need a closure, or sparse gradients."""
_OURS = {"params", "lr", "weight_decay"}


def total(losses: Losses) -> Tensor:
    """The sum of every entry whose name contains "loss"."""
    chosen = [value for name, value in losses.items() if "loss" in name]
    if not chosen:
        raise UserError(
            f"the model's train_step gave {sorted(losses)}: no name contains 'loss', so nothing is minimised"
        )
    loss = chosen[0]
    for value in chosen[1:]:
        loss = loss + value
    return loss


def parameter_groups(options: Stepping, model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters, those of equal settings in one group: a step costs by the group, not by the parameter."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    matched: set[str] = set()
    for owner_name, owner in model.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            settings = _settings(options, owner, leaf, name, matched)
            if parameter.requires_grad:
                groups.setdefault(settings, []).append(parameter)
    for group in options.groups:
        if group.match not in matched:
            names = [name for name, _ in model.named_parameters()]
            hint = did_you_mean(group.match, names) or f"; they are called such as {names[0]}"
            raise wrong(options, "groups", f"no parameter's name matches '{group.match}'{hint}")
    if not groups:
        raise UserError("every parameter of the model is frozen: there is nothing to train")
    return [{"params": _unique(found), "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]


def _settings(options: Stepping, owner: nn.Module, leaf: str, name: str, matched: set[str]) -> tuple[float, float]:
    """(learning rate, weight decay) of a parameter."""
    decay = options.weight_decay
    if options.norm_weight_decay is not None and isinstance(owner, _NORMS):
        decay = options.norm_weight_decay
    elif options.bias_weight_decay is not None and leaf == "bias":
        decay = options.bias_weight_decay
    hits = [group for group in options.groups if fnmatchcase(name, group.match)]
    matched.update(group.match for group in hits)
    if not hits:
        return options.lr, decay
    return options.lr * hits[0].lr_mult, decay * hits[0].weight_decay_mult


def _unique(parameters: list[Tensor]) -> list[Tensor]:
    """A parameter that two modules share, once."""
    return list({id(parameter): parameter for parameter in parameters}.values())


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


def clip(optimizer: torch.optim.Optimizer, norm: float | None, value: float | None) -> Tensor | None:
    """Clip gradients; returns their norm before, where that is computed."""
    if norm is None and value is None:
        return None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = None
    if norm is not None:
        found = nn.utils.clip_grad_norm_(parameters, norm)
    if value is not None:
        nn.utils.clip_grad_value_(parameters, value)
    return found


def autocast(precision: str, device: Any) -> AbstractContextManager[None]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    context: AbstractContextManager[None] = torch.autocast(torch.device(device).type, dtype=dtype)
    return context


def scaler(precision: str, device: Any) -> torch.amp.GradScaler | None:
    """Loss scaling, which float16 needs: its gradients underflow."""
    return torch.amp.GradScaler(torch.device(device).type) if precision == "fp16" else None


def by_name(options: TorchOptimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    cls = optimizer_class(options, options.name, options.args)
    given = dict(options.args)
    if "weight_decay" not in inspect.signature(cls).parameters:
        groups = [{key: value for key, value in group.items() if key != "weight_decay"} for group in groups]
    try:
        made: torch.optim.Optimizer = cls(groups, lr=options.lr, **given)
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
