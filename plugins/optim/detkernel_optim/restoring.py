"""From a checkpoint back into an optimizer: what fits, and nothing else. A ValueError says what does not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detkernel import Run
from torch import Tensor

from detkernel_optim.optimizer_settings import group_settings


def optimizer(target: torch.optim.Optimizer, state: Mapping[str, Any], made: Sequence[Mapping[str, Any]]) -> None:
    """Moments and counts, and the groups' settings.

    A setting that the config of the checkpoint and this one agree on is taken as the run left it (a schedule, or a
    plugin, may have changed it since); one that the config now has otherwise is the config's.
    """
    if state["kind"] != type(target).__name__:
        raise ValueError(f"it is of {state['kind']}, and this run steps with {type(target).__name__}")
    saved, before = state["optimizer"], state["made"]
    fresh = group_settings(target)
    sizes = [len(group["params"]) for group in target.param_groups]
    found = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != found or len(before) != len(made):
        raise ValueError(f"it has parameter groups of {found} parameters, this run has {sizes}")
    target.load_state_dict(dict(saved))
    for group, was, now, start in zip(target.param_groups, before, made, fresh, strict=True):
        for key, value in start.items():
            kept = group.get(key) if key in was and was[key] == now[key] else value
            if not _alike(kept, value):
                raise ValueError(f"its '{key}' is {kept!r}, expected such as {value!r}")
            group[key] = kept


def _alike(value: Any, example: Any) -> bool:
    if isinstance(example, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(example)
        return same and all(_alike(one, other) for one, other in zip(value, example, strict=True))
    if isinstance(example, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is type(example)


def scaler(target: torch.amp.GradScaler | None, state: Mapping[str, Any] | None) -> None:
    """The loss scale and how long it has held; how it grows is not the checkpoint's to say."""
    if target is None or state is None:
        return
    scale, held = float(state["scale"]), int(state["_growth_tracker"])
    if not (math.isfinite(scale) and scale > 0 and 0 <= held < 2**31):
        raise ValueError(f"its loss scale is {scale}, held for {held} steps")
    target.load_state_dict({**target.state_dict(), "scale": scale, "_growth_tracker": held})


def gradients(run: Run, state: Mapping[str, Tensor]) -> None:
    """Gradients in the midst of an accumulation."""
    parameters = dict(run.named_parameters())
    for name, gradient in state.items():
        if name not in parameters or gradient.shape != parameters[name].shape:
            raise ValueError(f"it has a gradient of {list(gradient.shape)} for '{name}'")
        # In the memory format that it has: norms are summed in that order, to the last bit.
        parameters[name].grad = gradient.to(parameters[name].device, parameters[name].dtype, copy=True)


def norm(value: Tensor | None) -> Tensor | None:
    if value is not None and (not isinstance(value, Tensor) or value.numel() != 1):
        raise ValueError("its gradient norm is not a number")
    return value


def count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"it counts {value!r}")
    return value
