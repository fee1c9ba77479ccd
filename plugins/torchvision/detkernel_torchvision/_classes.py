"""Weights of one set of classes for a model of another: the outputs are matched by class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

_BACKGROUND = "__background__"


def fitted(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    categories: Sequence[str] | None,
    classes: Sequence[str],
    background: bool,
) -> dict[str, Tensor]:
    """The weights with the outputs of this model's classes; those of new classes stay as the model was built.

    Without the names of the classes that the weights are for, everything is taken as it is.
    """
    if categories is None:
        return dict(weights)
    wanted = [_BACKGROUND, *classes] if background else list(classes)
    pairs = [(new, categories.index(name)) for new, name in enumerate(wanted) if name in categories]
    own = model.state_dict()
    return {
        name: _taken(own[name], value, pairs, len(wanted), len(categories), "bbox_pred" in name)
        if name in own and own[name].shape != value.shape
        else value
        for name, value in weights.items()
    }


def _taken(
    own: Tensor, value: Tensor, pairs: Sequence[tuple[int, int]], new: int, old: int, class_first: bool
) -> Tensor:
    """Rows are (anchor, class) in heads over anchors, and (class, coordinate) in R-CNN's box predictor."""
    if len(own) % new or len(value) % old or own.shape[1:] != value.shape[1:] or len(own) // new != len(value) // old:
        return value
    size = len(own) // new
    shape, old_shape = ((new, size), (old, size)) if class_first else ((size, new), (size, old))
    mine, theirs = own.clone().view(*shape, *own.shape[1:]), value.view(*old_shape, *value.shape[1:])
    for here, there in pairs:
        if class_first:
            mine[here] = theirs[there]
        else:
            mine[:, here] = theirs[:, there]
    return mine.view(own.shape)
