"""Weights: torchvision's by name, or from a file; never a pickle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision.models
from detkernel import CheckpointError, UserError, wrong
from detkernel.errors import did_you_mean, relative
from torch import Tensor, nn

_SHOWN = 6
_COUNTER = "num_batches_tracked"
"""Frozen batch norm has none."""


def state_dict(part: Any, builders: Sequence[str], name: str) -> tuple[dict[str, Tensor], Sequence[str] | None]:
    """The weights that the option `weights` of a part asks for, and the names of the classes that they were trained on
    (torchvision's: with the background first). `builders` are torchvision's functions whose weights may be meant."""
    if Path(name).suffix or "/" in name:
        if Path(name).is_file():
            return _from_file(Path(name)), None
        if "Weights." not in name:
            raise wrong(part, "weights", f"there is no file '{name}'")
    found = _named(part, builders, name)
    try:
        loaded: dict[str, Tensor] = dict(found.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        file = found.url.rsplit("/", 1)[-1]
        raise UserError(
            f"weights {found} cannot be downloaded from {found.url} ({getattr(error, 'reason', error)}); "
            f"where there is no network, put the file at {folder / file}, or give its path as `weights`"
        ) from None
    return loaded, found.meta.get("categories")


def _named(part: Any, builders: Sequence[str], name: str) -> Any:
    choices = {
        f"{type(item).__name__}.{item.name}": item for b in builders for item in torchvision.models.get_model_weights(b)
    }
    first = {item.name: item for item in torchvision.models.get_model_weights(builders[0])}
    first["DEFAULT"] = torchvision.models.get_model_weights(builders[0])["DEFAULT"]
    if name in choices or name in first:
        return choices.get(name) or first[name]
    raise wrong(
        part, "weights", f"no weights are named '{name}'{did_you_mean(name, [*first, *choices])}; or give a file"
    )


def _from_file(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for files that are no checkpoint
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{relative(path)}: no weights that can be loaded safely ({reason})") from None
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    weights = (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not weights:
        raise CheckpointError(f"{relative(path)}: no weights: expected a dict of tensors, plain or under 'model'")
    return weights


def below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a child module."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def load_into(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load all of a module's tensors. Raises `CheckpointError` for one that is missing, strange or of another shape."""
    own = module.state_dict()
    optional = {name for name in own if name.endswith(_COUNTER)}
    missing = [name for name in own if name not in weights and name not in optional]
    shapes = [
        f"{name} ({list(weights[name].shape)} for {list(own[name].shape)})"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    strange = [name for name in weights if name not in own and not name.endswith(_COUNTER)]
    problems = {"missing": missing, "of another shape": shapes, "not of this model": strange}
    said = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names)
    if said:
        raise CheckpointError(f"weights {source} do not fit: {said}")
    module.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
