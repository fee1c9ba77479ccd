"""Weights from a file into a model: all of them, or those that fit with a list of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detkernel import CheckpointError
from detkernel.errors import printable, relative
from torch import Tensor, nn

from detkernel_checkpoint import _file

_HOLDERS = ("model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 8


def load_weights(model: nn.Module, path: Path, allow_mismatch: bool, classes: Sequence[str]) -> str:
    """Load a checkpoint's or any state dict's weights. Returns one line that says what was loaded.

    Raises CheckpointError for a file that cannot be read, for one that fits nowhere, for one of other classes than the
    data's, and, unless `allow_mismatch`, for every tensor of another shape, missing or unexpected.
    """
    content = _file.load(path)
    if not allow_mismatch:
        check_classes(content, path, classes)
    return fit(model, _weights(content, path), path, allow_mismatch)


def fit(model: nn.Module, weights: Mapping[str, Any], path: Path, allow_mismatch: bool) -> str:
    """Load tensors by their names. Returns one line about them; raises CheckpointError as `load_weights` does."""
    own = model.state_dict()
    odd = [name for name, value in weights.items() if not _usable(value)]
    if odd:
        raise CheckpointError(f"{relative(path)}: {len(odd)} weights are no plain tensors: {_listed(odd)}")
    problems = {
        "of another shape": [
            f"{name} {list(weights[name].shape)}, expected {list(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
    }
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    lines = [f"  {len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names]
    said = "\n".join(["", *lines])
    if lines and not (allow_mismatch and fitting):
        advice = "none fits" if not fitting else "to load those that fit, set allow_mismatch: true"
        raise CheckpointError(f"{relative(path)}: {len(fitting)} of the model's {len(own)} tensors fit; {advice}{said}")
    model.load_state_dict(fitting, strict=False)
    return f"{len(fitting)} of {len(own)} tensors from {relative(path)}{said}"


def check_classes(content: Any, path: Path, classes: Sequence[str]) -> None:
    """Outputs go by position: weights of other classes, or of these in another order, would name things wrongly."""
    trained = content.get("classes") if isinstance(content, Mapping) else None
    if not isinstance(trained, list) or trained == list(classes):
        return
    same = sorted(map(str, trained)) == sorted(classes)
    what = "the same classes in another order" if same else "other classes"
    raise CheckpointError(
        f"{relative(path)} is of {what}: {_listed(list(map(str, trained)))}; the data has {_listed(list(classes))}. "
        f"Give the data `class_names` in the checkpoint's order{'' if same else ', or set allow_mismatch: true'}"
    )


def _weights(content: Any, path: Path) -> dict[str, Tensor]:
    for holder in _HOLDERS:
        if isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            content = content[holder]
    if not isinstance(content, Mapping) or not any(isinstance(item, Tensor) for item in content.values()):
        raise CheckpointError(f"{relative(path)}: no weights: expected a dict of tensors, plain or under 'model'")
    weights = {str(name): item for name, item in content.items() if isinstance(item, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): item for name, item in weights.items()}
    return weights


def _usable(value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return plain and value.device.type != "meta" and not value.is_complex()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(str(name)) for name in names[:_SHOWN]) + more
