"""Weights without a position: those of `load_from`, and those that are tested."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from detkernel import Run
from detkernel.errors import relative
from detkernel_detection.weights import Weights, classes_in, keypoints_in, load_into, read_weights

if TYPE_CHECKING:
    from detkernel_checkpoint._resume import Found
    from detkernel_checkpoint.checkpoint import Checkpoint


def load_from(run: Run, part: Checkpoint) -> None:
    """Load the weights that the option `load_from` names, and log what was taken. Raises CheckpointError."""
    assert part.load_from is not None
    _load(run, part, read_weights(part.load_from), "loaded")


def load_found(run: Run, part: Checkpoint, found: Found) -> None:
    """Load the weights to detect with of a checkpoint of a run."""
    content = found.content
    weights = Weights(content["model"], relative(found.path), classes_in(content), keypoints_in(content))
    _load(run, part, weights, "testing")


def _load(run: Run, part: Checkpoint, weights: Weights, what: str) -> None:
    """A test with class outputs that start at random would be a test of nothing."""
    loaded = load_into(
        run.bare_model,
        weights,
        run.classes,
        given=part.load_from_classes if part.load_from is not None else None,
        option="load_from_classes",
        allow_mismatch=part.allow_mismatch,
        complete=run.mode == "test",
    )
    run.log.log(logging.WARNING if loaded.surprising else logging.INFO, "%s %s", what, loaded.text)
