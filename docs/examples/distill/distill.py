"""Distillation: a trained model of the same make, perhaps trained longer, teaches one layer's features."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from detkernel import Run, hookimpl, option, plugin, state, wrong
from detkernel_detection import Batch


@plugin
class Distill:
    """Add a loss that draws one layer's features to those of a teacher."""

    teacher: Path = option(help="a checkpoint of the teacher, a model of the same config")
    layer: str = option(default="backbone", help="the layer whose features are compared")
    weight: float = option(default=1.0, above=0, help="factor of the loss")
    _teacher: Any = state()
    _features: dict[str, Any] = state(factory=dict)

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        import torch

        self._teacher = copy.deepcopy(run.bare_model).to(run.device)
        try:
            kept = torch.load(self.teacher, map_location=run.device, weights_only=True)
            self._teacher.load_state_dict(kept["model"])
        except (OSError, KeyError, RuntimeError) as error:
            raise wrong(self, "teacher", f"expected a checkpoint of this model: {error}") from None
        self._teacher.requires_grad_(False)
        for name, model in (("student", run.bare_model), ("teacher", self._teacher)):
            model.get_submodule(self.layer).register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(_layer: Any, _inputs: Any, output: Any) -> None:
            self._features[name] = list(output.values()) if isinstance(output, dict) else [output]

        return keep

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, batch: Batch) -> Any:
        losses = yield
        import torch
        from torch.nn import functional

        with torch.no_grad(), torch.random.fork_rng():  # the student's random numbers stay as they were
            run.bus.plugins["model"].train_step(run=run, model=self._teacher, batch=batch)  # type: ignore[attr-defined]
        pairs = zip(self._features["student"], self._features["teacher"], strict=True)
        return {**losses, "loss_distill": self.weight * sum(functional.mse_loss(s, t) for s, t in pairs)}
