"""Semi-supervised detection: an average of the model labels images that nobody has labelled (Tarvainen and Valpola
2017; Unbiased Teacher, Liu et al. 2021)."""

from __future__ import annotations

import copy
from collections.abc import Generator
from typing import Any

from detkernel import Run, hookimpl, option, plugin
from detkernel_detection import Batch, Losses


@plugin(loaders=("unlabelled",))
class MeanTeacher:
    """Train also on images without labels: what a moving average of the model is sure of is taken for the truth.

    The images come from a loader of their own, `data: {further: {unlabelled: ...}}`.
    """

    decay: float = option(default=0.999, at_least=0, below=1, help="share of the teacher that a step keeps")
    score: float = option(default=0.7, at_least=0, below=1, help="how sure the teacher must be of an object")
    weight: float = option(default=1.0, above=0, help="factor of the losses on images without labels")

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        if run.mode == "train":
            run.add_module("teacher", copy.deepcopy(run.bare_model), trained=False, saved=True)

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, model: Any, batch: Batch) -> Generator[None, Losses, Losses]:
        losses = yield
        if model is not run.model:
            return losses
        unlabelled = run.next_batch("unlabelled")
        unlabelled.move(run.device)
        targets = self._labels(run, unlabelled)
        own = model(unlabelled.images, targets, unlabelled.image_sizes)
        return {**losses, **{f"{name}_unlabelled": self.weight * value for name, value in own.items()}}

    @hookimpl
    def after_optimizer_step(self, run: Run) -> None:
        import torch

        teacher = run.modules["teacher"].state_dict()
        with torch.no_grad():
            for name, value in run.bare_model.state_dict().items():
                if value.is_floating_point():
                    teacher[name].lerp_(value, 1 - self.decay)
                else:
                    teacher[name].copy_(value)

    def _labels(self, run: Run, batch: Batch) -> Any:
        import torch
        from detkernel_detection.structures import Targets

        with torch.no_grad():
            found = run.modules["teacher"](batch.images, None, batch.image_sizes)
        return Targets(found.boxes, found.labels, found.valid & (found.scores >= self.score))
