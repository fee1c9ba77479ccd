"""Class outputs of one set of classes for a model of another: taken by name, never by position or shape.

A model says which of its tensors hold classes, and how, in an attribute of the module that `build_model` returns:

    model.class_outputs = {"head.weight": ClassOutput(), "head.bias": ClassOutput()}

Outputs for keypoints are taken by name likewise, where the module says `keypoint_outputs` and `keypoint_names`.
A plugin that imports the kernel alone writes the fields of `ClassOutput` as a dict: `{"head.weight": {"skip": 4}}`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from detkernel import CheckpointError, UserError
from detkernel.errors import printable
from torch import Tensor

BACKGROUNDS = ("__background__", "background")
"""Names of the class of no object, where the names of weights count it."""
_SHOWN = 5


@attrs.frozen(kw_only=True)
class ClassOutput:
    """How a tensor holds classes along one dimension: `before` blocks, in each `skip` entries of other meaning and then
    `after` entries for every class.

    A linear classifier has the defaults; a dense head over 9 anchors `before=9`; R-CNN's boxes for each class
    `after=4`; YOLO's rows of (x, y, w, h, objectness, classes...) for 3 anchors `before=3, skip=5`.
    """

    before: int = 1
    after: int = 1
    skip: int = 0
    dim: int = 0
    background: Literal["none", "first", "last"] = "none"
    """Whether a class of no object is counted, and where."""

    def entries(self, length: int) -> int | None:
        """How many classes, with the background, a dimension of this length holds; None where it can be no number."""
        block, rest = divmod(length, self.before)
        classes, more = divmod(block - self.skip, self.after)
        return None if rest or more or classes < (self.background != "none") else classes


@attrs.frozen
class Mapped:
    """Which classes were taken, which start at random (`new`), and which of the weights nobody asked for (`left`)."""

    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        return self.text("class outputs")

    def text(self, outputs: str) -> str:
        """One line."""
        parts = [
            f"{len(names)} {what} ({_listed(names)})"
            for names, what in (
                (self.taken, "taken by name"),
                (self.new, "at random, since the weights do not have them"),
                (self.left, "of the weights left out"),
            )
            if names
        ]
        return f"{outputs}: {'; '.join(parts)}{self.hint()}"

    def hint(self) -> str:
        """Names that differ in little, as in case: they are not taken for the same, but are most often meant to be."""
        folded = {_folded(name): name for name in self.left}
        near = [f"'{name}' is not '{folded[_folded(name)]}'" for name in self.new if _folded(name) in folded]
        return f". Names are compared letter by letter: {', '.join(near[:_SHOWN])}" if near else ""


def class_outputs(model: Any, attribute: str = "class_outputs") -> dict[str, ClassOutput] | None:
    """What a model says of its class outputs; None if it says nothing. Raises `UserError` if that is not valid."""
    said = getattr(model, attribute, None)
    if said is None:
        return None
    try:
        return {
            str(name): one if isinstance(one, ClassOutput) else ClassOutput(**one) for name, one in dict(said).items()
        }
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{type(model).__name__}.{attribute}: expected a dict of ClassOutput, or of its fields "
            f"({', '.join(field.name for field in attrs.fields(ClassOutput))}), by name of tensor: {error}"
        ) from None


def map_classes(
    own: Mapping[str, Tensor],
    outputs: Mapping[str, ClassOutput],
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    classes: Sequence[str],
    background_first: bool = False,
) -> tuple[dict[str, Tensor], Mapped]:
    """The weights with their class outputs put where a model has the same classes; `own` is that model's state.

    `names` are those of the weights, with or without the background; without any, no class output is taken. What has no
    counterpart stays as in `own`. Tensors that differ in more than classes are left as they are: they do not fit.
    `background_first`: if the weights have a background that `names` do not count, it comes first, also in outputs
    that have none in the model.
    """
    known = [name for name, count in Counter(names).items() if count == 1]
    places = {name: names.index(name) for name in known if name not in BACKGROUNDS or name in classes}
    pairs = [(number, places[name]) for number, name in enumerate(classes) if name in places]
    mapped = {
        name: _moved(name, own[name], value, outputs[name], pairs, names, len(classes), background_first)
        if name in outputs and name in own
        else value
        for name, value in weights.items()
    }
    taken = tuple(name for name in classes if name in places)
    new = tuple(name for name in classes if name not in places)
    left = tuple(name for name in places if name not in classes)
    return mapped, Mapped(taken, new, left)


def _moved(
    name: str,
    own: Tensor,
    value: Tensor,
    output: ClassOutput,
    pairs: Sequence[tuple[int, int]],
    names: Sequence[str],
    classes: int,
    background_first: bool,
) -> Tensor:
    if own.ndim != value.ndim or output.dim >= own.ndim:
        return value
    mine, theirs = own.movedim(output.dim, 0), value.movedim(output.dim, 0)
    with_background = output.background != "none"
    if output.entries(len(mine)) != classes + with_background:
        raise UserError(
            f"the model says that '{name}' holds outputs for {classes} names as {output}, but its shape is "
            f"{list(own.shape)}"
        )
    if not names:
        return own
    if mine.shape[1:] != theirs.shape[1:]:
        return value
    found = output.entries(len(theirs))
    named = next((number for number, one in enumerate(names) if one in BACKGROUNDS), None)
    counted = found == len(names) and named is not None
    more = with_background or (background_first and found != len(names))  # than names: the background
    if found is None or found != len(names) + (more and not counted):
        raise CheckpointError(
            f"the weights are said to be of {len(names)} classes ({_listed(names)}), but '{printable(name)}' "
            f"of shape {list(value.shape)} is not of so many"
        )
    first = int(output.background == "first")
    theirs_first = more and (background_first or bool(first))
    shift = int(theirs_first and not counted)
    result = mine.clone(memory_format=torch.contiguous_format)
    here, there = (tensor.reshape(output.before, -1, *mine.shape[1:]) for tensor in (result, theirs.to(result.dtype)))
    here[:, : output.skip] = there[:, : output.skip]
    places = [(new + first, old + shift) for new, old in pairs]
    if with_background:
        background = named if counted and named is not None else 0 if theirs_first else found - 1
        places.append((0 if first else classes, background))
    for new, old in places:
        target, source = (output.skip + number * output.after for number in (new, old))
        here[:, target : target + output.after] = there[:, source : source + output.after]
    return result.movedim(0, output.dim)


def _folded(name: str) -> str:
    return "".join(char for char in name.casefold() if char.isalnum())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(str(name)) for name in names[:_SHOWN]) + more
