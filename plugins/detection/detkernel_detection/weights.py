"""Weights from a file into a model: tensors by their names, class outputs by the names of classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs
from detkernel import CheckpointError
from detkernel.errors import printable, relative
from torch import Tensor, nn

from detkernel_detection import tensor_file
from detkernel_detection.class_mapping import ClassOutput, Mapped, class_outputs, map_classes

Classes: TypeAlias = "Literal['same_order', 'none'] | list[str] | None"
"""What an option says of the classes of weights: the data's in their order, none, these, what the file says."""

_HOLDERS = ("model", "state_dict", "model_state_dict", "model_state", "weights", "params", "network", "net")
_COUNTER = "num_batches_tracked"
"""Frozen batch norm has none."""
_SHOWN = 8


_REPLACED = ContextVar("_REPLACED", default=False)


@contextmanager
def without_pretrained() -> Iterator[None]:
    """Models that are built meanwhile load no weights that their options name, which may be a download: a checkpoint's
    will replace them all."""
    token = _REPLACED.set(True)
    try:
        yield
    finally:
        _REPLACED.reset(token)


def are_replaced() -> bool:
    """Whether models are being built `without_pretrained` weights."""
    return _REPLACED.get()


@attrs.define
class Weights:
    """Named tensors, and the classes that they are for where that is known."""

    tensors: dict[str, Any]
    """Some may be `safe_pickle.Foreign`: sparse or quantised."""
    source: str
    """The file or the published name, for messages."""
    classes: tuple[str, ...] | None = None
    keypoints: tuple[str, ...] | None = None
    background_first: bool = False
    """Whether a class of no object that their names do not count is their first one, wherever the model has it."""


@attrs.frozen
class Loaded:
    """What was loaded into a model, in a few lines."""

    text: str
    classes: Mapped | None
    """None where the classes are the same in the same order, or the model has no class outputs."""

    @property
    def surprising(self) -> bool:
        """Whether the classes are worth a warning: none was taken, or one only differs in case."""
        return self.classes is not None and (not self.classes.taken or bool(self.classes.hint()))


def read_weights(path: Path) -> Weights:
    """The weights in a checkpoint, or in any file of `torch.save` that holds a dict of tensors.

    The dict is the content itself, or under `model`, `state_dict` or the like. Classes are taken from `classes` or
    `names` of a checkpoint, or from MMDetection's `meta`. Raises `CheckpointError`.
    """
    content = tensor_file.read(path, foreign=True)
    tensors = _tensors(content)
    if tensors is None:
        found = f" has only {', '.join(map(_short, content))}" if isinstance(content, Mapping) and content else ""
        raise CheckpointError(
            f"{relative(path)}: no weights: expected a dict of tensors, plain or under 'model'{found and ';' + found}"
        )
    return Weights(tensors, relative(path), classes_in(content), keypoints_in(content))


def load_into(
    model: nn.Module,
    weights: Weights,
    classes: Sequence[str] = (),
    *,
    given: Classes = None,
    option: str = "weights_classes",
    allow_mismatch: bool | None = None,
    complete: bool = False,
    ignore: Sequence[str] = (),
) -> Loaded:
    """Load weights into a model of `classes` (none: a backbone), and say what was done with each class.

    `given`, the value of `option`, tells the classes of the weights where these do not. Raises `CheckpointError` where
    they are not known; where `complete` and one of the model's is missing; and, unless `allow_mismatch` (None: there is
    no such option), for tensors that are missing, unexpected or of another shape. Names that begin with one of `ignore`
    may be any of that.
    """
    own = model.state_dict()
    weights = in_own_names(model, own, weights)
    tensors = _renamed(weights, own, only_part=not classes)
    mapped = None
    said = ""
    if classes:
        tensors, said = _keypoints_by_name(model, own, attrs.evolve(weights, tensors=tensors), complete)
        tensors, mapped = _by_name(
            model, own, attrs.evolve(weights, tensors=tensors), classes, given, option, bool(allow_mismatch)
        )
        if complete and mapped is not None and mapped.new:
            raise CheckpointError(
                f"{weights.source} has no outputs for {len(mapped.new)} classes of the data: {_listed(mapped.new)}; it "
                f"has {_listed([*mapped.taken, *mapped.left])}{mapped.hint()}. Give the data the classes that it was "
                f"trained on, or say what its classes are in the data's words with {option}: [...]"
            )
    text = _load(model, own, tensors, weights.source, bool(allow_mismatch), tuple(ignore), allow_mismatch is not None)
    return Loaded(f"{text}{said}\n  {mapped}" if mapped is not None else f"{text}{said}", mapped)


def in_own_names(model: nn.Module, own: Mapping[str, Any], weights: Weights) -> Weights:
    """Weights that others have published, under the model's own names: by the one of `model.key_maps` that makes most
    of them known, if any does."""
    best, known = weights, len(own.keys() & weights.tensors.keys())
    for origin, pairs in (getattr(model, "key_maps", None) or {}).items():
        moved = renamed(weights.tensors, pairs)
        count = len(own.keys() & moved.keys())
        if count > known:
            source = f"{weights.source} (names of {origin})"
            first = origin in getattr(model, "background_first", ())
            best, known = attrs.evolve(weights, tensors=moved, source=source, background_first=first), count
    return best


def renamed(tensors: Mapping[str, Any], pairs: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    """Tensors under other names: each by the first (expression, replacement) whose expression its name begins with.

    The replacement None leaves a tensor out; a name that no expression fits stays.
    """
    found: dict[str, Any] = {}
    for name, value in tensors.items():
        pair = next((pair for pair in pairs if re.match(pair[0], name)), None)
        if pair is None:
            found[name] = value
        elif pair[1] is not None:
            found[re.sub(pair[0], pair[1], name, count=1)] = value
    return found


def _keypoints_by_name(
    model: nn.Module, own: Mapping[str, Tensor], weights: Weights, complete: bool
) -> tuple[dict[str, Any], str]:
    """The tensors with outputs for keypoints as the model has its keypoints, and the line that says so."""
    mine, theirs = getattr(model, "keypoint_names", None), weights.keypoints
    outputs = {
        name: one
        for name, one in (class_outputs(model, "keypoint_outputs") or {}).items()
        if name in weights.tensors and name in own
    }
    if not outputs or not mine or theirs is None or list(mine) == list(theirs):
        return weights.tensors, ""
    moved, mapped = map_classes(own, outputs, {name: weights.tensors[name] for name in outputs}, theirs, mine)
    if complete and mapped.new:
        raise CheckpointError(
            f"{weights.source} has no outputs for {len(mapped.new)} keypoints of the data: {_listed(mapped.new)}; it "
            f"has {_listed(theirs)}{mapped.hint()}"
        )
    return {**weights.tensors, **moved}, f"\n  {mapped.text('keypoint outputs')}"


def _by_name(
    model: nn.Module,
    own: Mapping[str, Tensor],
    weights: Weights,
    classes: Sequence[str],
    given: Classes,
    option: str,
    allow_mismatch: bool,
) -> tuple[dict[str, Any], Mapped | None]:
    """The tensors with class outputs as the model has its classes."""
    outputs = class_outputs(model)
    tensors, source = weights.tensors, weights.source
    held = None if outputs is None else {name: one for name, one in outputs.items() if name in tensors and name in own}
    if held is not None and not held:
        return tensors, None
    names = list(classes) if given == "same_order" else [] if given == "none" else given or weights.classes
    if names is None:
        raise CheckpointError(
            f"{source} does not say of which classes its outputs are{_counted(held, tensors)}; the data has "
            f"{len(classes)}: {_listed(classes)}. Equal shapes do not make classes equal. Give {option}: a list of its "
            "class names in its order; same_order if they are those of the data in the same order; none to start class "
            "outputs at random"
        )
    if held is not None:
        given_outputs = {name: tensors[name] for name in held}
        moved, mapped = map_classes(own, held, given_outputs, names, classes, weights.background_first)
        return {**tensors, **moved}, None if list(names) == list(classes) else mapped
    if list(names) == list(classes) or (allow_mismatch and names and len(names) != len(classes)):
        return tensors, None
    raise CheckpointError(
        f"{source} is of the classes {_listed(names) or '(none is wanted)'}; the data has {_listed(classes)}. The "
        "model does not say which of its outputs are for classes, so they cannot be taken by name: set "
        "`model.class_outputs` where it is built (detkernel_detection.class_mapping says how), or give "
        f"{option}: same_order to take all by position"
    )


def _counted(outputs: Mapping[str, ClassOutput] | None, tensors: Mapping[str, Any]) -> str:
    """` (80, it seems)`: how many classes weights without names have, from their shapes."""
    for name, output in (outputs or {}).items():
        if isinstance(tensors[name], Tensor) and tensors[name].ndim > output.dim:
            count = output.entries(tensors[name].shape[output.dim])
            if count is not None:
                return f" ({count - (output.background != 'none')} by their shapes)"
    return ""


def _load(
    model: nn.Module,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Any],
    source: str,
    allow_mismatch: bool,
    ignore: tuple[str, ...],
    can_mismatch: bool,
) -> str:
    wanted = [name for name in own if not name.startswith(ignore)] if ignore else list(own)
    given = [name for name in wanted if name in tensors]
    fitting = [name for name in given if _fits(tensors[name], own[name])]
    odd = [name for name in given if not _plain(tensors[name])]
    problems = {
        "not plain tensors": odd,
        "of another shape": [
            f"{name} {list(tensors[name].shape)}, expected {list(own[name].shape)}"
            for name in given
            if name not in odd and tensors[name].shape != own[name].shape
        ],
        "of another type": [
            f"{name} {tensors[name].dtype}, expected {own[name].dtype}"
            for name in given
            if name not in odd and name not in fitting and tensors[name].shape == own[name].shape
        ],
        "missing": [name for name in wanted if name not in tensors and not name.endswith(_COUNTER)],
        "unexpected": [
            name
            for name in tensors
            if name not in own and not name.endswith(_COUNTER) and not (ignore and name.startswith(ignore))
        ],
    }
    lines = [f"  {len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names]
    said = "\n".join(["", *lines])
    if lines and not (allow_mismatch and fitting):
        advice = "none fits" if not fitting else "it is of another model, or of a part of one"
        if fitting and can_mismatch:
            advice = "to load those that fit, set allow_mismatch: true"
        raise CheckpointError(f"{source}: {len(fitting)} of the model's {len(own)} tensors fit; {advice}{said}")
    model.load_state_dict({name: tensors[name] for name in fitting}, strict=False)
    return f"{len(fitting)} of {len(own)} tensors from {source}{said}"


def _plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == nn.Parameter().layout and not value.is_quantized


def _fits(value: Any, own: Tensor) -> bool:
    """Whether a tensor can be copied into another, so that no part of its values is lost."""
    if not _plain(value) or value.shape != own.shape:
        return False
    if value.is_floating_point() and not own.is_floating_point():
        return not own.is_complex() and bool((value == value.round()).all())  # a counter in a file of halves
    return bool(value.is_complex() == own.is_complex())


def _renamed(weights: Weights, own: Mapping[str, Any], only_part: bool) -> dict[str, Any]:
    """The tensors without what stands before the names of this model in the file: `module.`, `backbone.body.`.

    Where only a part of a larger model is wanted, the rest of the file is left out.
    """
    prefixes = Counter(
        name[:place]
        for name in weights.tensors
        for place in (0, *(number + 1 for number, char in enumerate(name) if char == "."))
        if name[place:] in own
    )
    first, second = [*prefixes.most_common(2), ("", 0), ("", 0)][:2]
    if first[0] and second[0] and first[1] == second[1] and first[1] > 1:
        both = f"'{printable(first[0])}' and '{printable(second[0])}'"
        raise CheckpointError(f"{weights.source}: holds several models, {both}: save one alone")
    stripped = {
        name.removeprefix(first[0]): value for name, value in weights.tensors.items() if name.startswith(first[0])
    }
    rest = {name: value for name, value in weights.tensors.items() if not name.startswith(first[0])}
    return stripped | {name: value for name, value in rest.items() if name in own or not only_part}


def _tensors(content: Any) -> dict[str, Any] | None:
    """The dict of tensors in a content: itself, under a usual name, or the only one there is."""
    if not isinstance(content, Mapping):
        return None
    if any(isinstance(value, Tensor) for value in content.values()):
        return {str(name): value for name, value in content.items()}
    inside = {str(key): _tensors(value) for key, value in content.items() if isinstance(value, Mapping)}
    found = {key: value for key, value in inside.items() if value is not None}
    usual = [key for key in _HOLDERS if key in found]
    if usual:
        return found[usual[0]]
    return next(iter(found.values())) if len(found) == 1 else None


def classes_in(content: Any) -> tuple[str, ...] | None:
    """The names of classes that a checkpoint holds: ours, MMDetection's `meta`, or `names`."""
    if not isinstance(content, Mapping):
        return None
    for place in (("classes",), ("meta", "dataset_meta"), ("meta",), ("names",), ("categories",)):
        value: Any = content
        for key in place:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            value = value.get("classes", value.get("CLASSES", value))
        if isinstance(value, Mapping) and sorted(map(str, value)) == sorted(map(str, range(len(value)))):
            value = [value.get(number, value.get(str(number))) for number in range(len(value))]
        if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
            return tuple(value)
    return None


def keypoints_in(content: Any) -> tuple[str, ...] | None:
    """The names of keypoints that a checkpoint holds."""
    value = content.get("keypoints") if isinstance(content, Mapping) else None
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    return None


def _short(value: Any) -> str:
    return printable(str(value)[:40])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(str(name)) for name in names[:_SHOWN]) + more
