"""Weights without a position: those of `load_from`, and those that are tested."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from detkernel import CheckpointError, Run
from detkernel.errors import relative
from detkernel_detection.weights import Weights, classes_in, keypoints_in, load_into, read_weights

if TYPE_CHECKING:
    from detkernel_checkpoint.checkpoint import Checkpoint
    from detkernel_checkpoint.folder import Folder
    from detkernel_checkpoint.resuming import Found


def load_from(run: Run, part: Checkpoint) -> None:
    """Load the weights that the option `load_from` names, and log what was taken. Raises CheckpointError."""
    assert part.load_from is not None
    _load(run, part, read_weights(part.load_from), "loaded")


def load_found(run: Run, part: Checkpoint, found: Found) -> None:
    """Load the weights to detect with of a checkpoint of a run."""
    content = found.content
    weights = Weights(content["model"], relative(found.path), classes_in(content), keypoints_in(content))
    if run.mode == "predict":
        run.metrics.update(content["position"]["metrics"])  # what was measured of these weights
    _load(run, part, weights, "testing" if run.mode == "test" else "predicting with")


def classes_to_predict(part: Checkpoint, folder: Folder) -> tuple[str, ...]:
    """The classes of the weights that a prediction will load, or none where nobody can know."""
    if isinstance(part.load_from_classes, list) and part.load_from is not None:
        return tuple(part.load_from_classes)
    paths = [entry.path for entry in folder.entries()] if part.resume == "auto" else []
    if part.resume not in ("auto", "never"):
        paths = [Path(part.resume)]
    for path in paths if part.load_from is None else [part.load_from]:
        with suppress(CheckpointError):  # reported when the weights are loaded
            return read_weights(path).classes or ()
    return ()


def _load(run: Run, part: Checkpoint, weights: Weights, what: str) -> None:
    """A test with class outputs that start at random would be a test of nothing."""
    loaded = load_into(
        run.bare_model,
        weights,
        run.classes,
        given=part.load_from_classes if part.load_from is not None else None,
        option="load_from_classes",
        allow_mismatch=part.allow_mismatch,
        complete=not run.trains,
    )
    run.log.log(logging.WARNING if loaded.surprising else logging.INFO, "%s %s", what, loaded.text)
