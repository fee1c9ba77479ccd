"""A new loss for any detector: say from one layer's features which classes are in the image."""

from __future__ import annotations

from typing import Any

from detkernel import Run, hookimpl, option, plugin, state
from detkernel_detection import Batch


@plugin(priority="high")
class ImageLevelLoss:
    """Add a multi-label classification loss on the features of one layer."""

    layer: str = option(default="backbone", help="the layer whose features are used")
    weight: float = option(default=0.1, above=0, help="factor of the loss")
    _features: Any = state()

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        import torch

        layer = run.bare_model.get_submodule(self.layer)
        layer.register_forward_hook(self._keep)
        training = layer.training
        layer.eval()  # a look at its features changes nothing in it
        with torch.no_grad():
            layer(torch.zeros(1, 3, 64, 64, device=run.device))
        layer.train(training)
        channels = self._features.shape[1]
        layer.image_level = torch.nn.Linear(channels, len(run.classes), device=run.device)  # trained and saved with it

    def _keep(self, _layer: Any, _inputs: Any, output: Any) -> None:
        self._features = list(output.values())[-1] if isinstance(output, dict) else output

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, batch: Batch) -> Any:
        losses = yield
        import torch
        from torch.nn import functional

        present = torch.zeros(len(batch), len(run.classes), device=self._features.device)
        for row, target in zip(present, batch.each_target(), strict=True):
            row[target.labels] = 1
        scores = run.bare_model.get_submodule(self.layer).image_level(self._features.mean((2, 3)))
        loss = functional.binary_cross_entropy_with_logits(scores, present)
        return {**losses, "loss_image_level": self.weight * loss}
