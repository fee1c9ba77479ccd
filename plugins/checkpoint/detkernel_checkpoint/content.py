"""What a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detkernel import Run, declared

from detkernel_checkpoint.checkpoint_file import FORMAT


def own_states(run: Run) -> dict[str, Any]:
    """The states that every process has for itself (`state_per_rank`, `rank_state_dict`), by plugin."""
    own = {name: plugin.state_dict() for name, plugin in run.bus.stateful() if _per_rank(plugin)}
    also = {name: plugin.rank_state_dict() for name, plugin in run.bus.stateful() if hasattr(plugin, "rank_state_dict")}
    return own | also


def content(run: Run, ranks: list[dict[str, Any]], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a run needs to go on.

    `model` has the weights to detect with. Where a plugin offers better ones than those in training (an average of
    them, by `model_state_dict()`), these are under `training_model`.
    """
    training = run.bare_model.state_dict()
    offers = [plugin.model_state_dict() for plugin in run.bus.plugins.values() if hasattr(plugin, "model_state_dict")]
    better = next((weights for weights in offers if weights is not None), None)
    return {
        "format": FORMAT,
        "position": {**run.state_dict(), "epoch_length": run.epoch_length},
        "classes": list(run.classes),
        "keypoints": list(getattr(run.bare_model, "keypoint_names", ())),
        "model": training if better is None else better,
        "training_model": None if better is None else training,
        "modules": {name: module.state_dict() for name, module in run.saved_networks.items()},
        "plugins": {name: plugin.state_dict() for name, plugin in run.bus.stateful() if not _per_rank(plugin)},
        "ranks": ranks,
        "provenance": provenance,
    }


def _per_rank(plugin: object) -> bool:
    return declared(plugin).state_per_rank
