"""Whether a state holds finite numbers only: one that does not is worth less than the checkpoint before it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from detkernel import CheckpointError
from torch import Tensor, nn

_SHOWN = 3


class NonFiniteError(CheckpointError):
    """A state with NaN or infinite weights, buffers or optimizer moments."""


def check(content: Mapping[str, Any], infinite: Collection[str]) -> None:
    """Raise NonFiniteError for a checkpoint's content that cannot be trained on, with three of the tensors."""
    found = list(_broken(content, infinite))
    if found:
        raise NonFiniteError(f"{listed(found)} not finite (NaN or infinite)")


def listed(names: list[str]) -> str:
    """`model.0.weight, model.0.bias and 4 other tensors are`."""
    more = len(names) - _SHOWN
    text = ", ".join(names[:_SHOWN]) + (f" and {more} other tensor{'s' * (more > 1)}" if more > 0 else "")
    return f"{text} {'are' if len(names) > 1 else 'is'}"


def broken_weights(weights: Mapping[str, Any], infinite: Collection[str]) -> Iterator[str]:
    """The names of parameters and buffers that are not finite."""
    for name, value in weights.items():
        if name not in infinite and isinstance(value, Tensor) and not is_finite(value):
            yield name


def infinite_buffers(model: nn.Module) -> frozenset[str]:
    """The buffers that hold infinities as the model is built, such as an attention mask: they may."""
    return frozenset(
        name
        for name, buffer in model.named_buffers()
        if not is_finite(buffer) and not (buffer != buffer).any()  # NaN is unequal to itself
    )


def is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass without a temporary."""
    if value.numel() == 0 or value.device.type == "meta" or not (value.is_floating_point() or value.is_complex()):
        return True
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.itemsize == 1:  # float8 has no arithmetic
        value = value.float()
    return all(bool(bound.isfinite()) for bound in torch.aminmax(value.detach()))


def _broken(content: Mapping[str, Any], infinite: Collection[str]) -> Iterator[str]:
    for holder in "model", "training_model":
        yield from (f"{holder}.{name}" for name in broken_weights(content.get(holder) or {}, infinite))
    for module, weights in (content.get("modules") or {}).items():
        yield from (f"{module}.{name}" for name in broken_weights(weights, ()))
    for states in (content["plugins"], *content["ranks"]):
        for plugin, state in states.items():
            for moments in _moments(state):
                yield from (f"{plugin}.{path}" for path, value in _tensors(moments) if not is_finite(value))


def _moments(state: Any) -> Iterator[Any]:
    """What torch's optimizers keep by parameter, wherever a plugin has their `state_dict()` in its own."""
    if not isinstance(state, Mapping):
        return
    if "state" in state and "param_groups" in state:
        yield state["state"]
        return
    for value in state.values():
        yield from _moments(value)


def _tensors(tree: Any, path: str = "state") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{path}.{key}")
