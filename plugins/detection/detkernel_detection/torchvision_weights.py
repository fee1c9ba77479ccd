"""Weights that an option asks for: torchvision's by name, or those in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchvision.models
from detkernel import wrong
from detkernel.errors import did_you_mean
from torch import nn

from detkernel_detection.downloads import downloaded
from detkernel_detection.weights import Weights, are_replaced, load_into, read_weights

CLASSIFIERS = ("fc.", "classifier.", "heads.", "head.")
"""Beginnings of the names of what classifies an image, in the models of torchvision; a detector has no use for it."""


def find(part: Any, builders: Sequence[str], name: str) -> Weights:
    """The weights that the option `weights` of a part asks for; torchvision's own know their classes.

    `builders` are torchvision's functions whose weights may be meant.
    """
    if Path(name).suffix or "/" in name:
        if Path(name).is_file():
            return read_weights(Path(name))
        if "Weights." not in name:
            raise wrong(part, "weights", f"there is no file '{name}'")
    found = _named(part, builders, name)
    weights = read_weights(downloaded(str(found.url), f"weights {found}"))
    names = [found.meta.get(key) for key in ("categories", "keypoint_names")]
    classes, keypoints = (tuple(given) if given else None for given in names)
    return Weights(weights.tensors, str(found), classes, keypoints)


def load_backbone(module: nn.Module, part: Any, builders: Sequence[str], name: str, new: str | None = None) -> None:
    """Load a classification model's weights, or a detector's backbone of the same kind, but for the classifier.

    What has `new` in its name may be missing from them altogether, and then stays as it is.
    """
    if are_replaced():
        return
    weights = find(part, builders, name)
    ignored: tuple[str, ...] = CLASSIFIERS
    if new is not None and not any(new in key for key in weights.tensors):
        ignored += tuple(key for key in module.state_dict() if new in key)
    load_into(module, weights, ignore=ignored)


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
