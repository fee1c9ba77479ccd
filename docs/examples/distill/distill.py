"""Distillation: a trained model of the same make, perhaps trained longer, teaches what it says of each batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detkernel import Run, hookimpl, option, plugin, wrong
from detkernel_detection import Batch


@plugin
class Distill:
    """Add a loss that draws one of the model's outputs to that of a teacher (Hinton et al. 2015)."""

    teacher: Path = option(help="a checkpoint of the teacher, a model of the same config")
    output: str = option(default="logits", help="the output that is compared, by its name among `forward_outputs`")
    weight: float = option(default=1.0, above=0, help="factor of the loss")

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        import torch

        if not run.trains:
            return
        teacher = copy.deepcopy(run.bare_model)
        try:
            kept = torch.load(self.teacher, map_location="cpu", weights_only=True)
            teacher.load_state_dict(kept["model"])
        except (OSError, KeyError, RuntimeError) as error:
            raise wrong(self, "teacher", f"expected a checkpoint of this model: {error}") from None
        run.add_module("teacher", teacher, trained=False, saved=True)  # saved: a resumed run does not need the file's

    @hookimpl
    def after_forward(self, run: Run, batch: Batch, outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        import torch
        from torch.nn import functional

        if self.output not in outputs:
            raise wrong(self, "output", f"expected one of {', '.join(outputs)}, got '{self.output}'")
        teacher, sizes = run.modules["teacher"], batch.image_sizes
        with torch.no_grad():
            taught = teacher.forward_outputs(teacher.normalize(batch.images, sizes), sizes)
        return {"loss_distill": self.weight * functional.mse_loss(outputs[self.output], taught[self.output])}
