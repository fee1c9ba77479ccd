"""Weights that an option asks for: torchvision's by name, or those in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision.models
from detkernel import UserError, wrong
from detkernel.errors import did_you_mean
from torch import nn

from detkernel_detection.weights import Weights, load_into, read_weights

_CLASSIFIERS = ("fc.", "classifier.", "heads.", "head.")
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
    weights = read_weights(_downloaded(found))
    names = [found.meta.get(key) for key in ("categories", "keypoint_names")]
    classes, keypoints = (tuple(given) if given else None for given in names)
    return Weights(weights.tensors, str(found), classes, keypoints)


def _downloaded(found: Any) -> Path:
    """Where torchvision keeps the file of some weights; it is fetched the first time."""
    file = str(found.url).rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    digest = re.search(r"-([0-9a-f]{8,})\.", file)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(found.url, str(path), digest and digest[1], progress=False)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash than the name says
        raise UserError(
            f"weights {found} cannot be downloaded from {found.url} ({getattr(error, 'reason', error)}); "
            f"where there is no network, put the file at {path}, or give its path as `weights`"
        ) from None
    return path


def load_backbone(module: nn.Module, part: Any, builders: Sequence[str], name: str) -> None:
    """Load a classification model's weights, or a detector's backbone of the same kind, but for the classifier."""
    load_into(module, find(part, builders, name), ignore=_CLASSIFIERS)


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
