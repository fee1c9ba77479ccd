"""Hard-example mining: look at the whole batch, learn from its hardest pictures."""

from __future__ import annotations

from typing import Any

from detkernel import Run, hookimpl, option, plugin
from detkernel_detection import Batch


@plugin
class HardExamples:
    """Train on the pictures of each batch that have the highest loss."""

    share: float = option(default=0.5, above=0, at_most=1, help="share of the batch that is kept")

    @hookimpl
    def before_train_iter(self, run: Run, batch: Batch) -> None:
        import torch

        with torch.no_grad():
            losses = [self._loss(run, batch.keep([number])) for number in range(len(batch))]
        keep = max(1, round(self.share * len(batch)))
        order = torch.stack(losses).topk(keep).indices.sort().values.tolist()
        kept = batch.keep(order)
        for name in Batch.__annotations__:
            setattr(batch, name, getattr(kept, name))

    @staticmethod
    def _loss(run: Run, batch: Batch) -> Any:
        losses = run.hook.train_step(run=run, model=run.model, batch=batch)
        return sum(value for name, value in losses.items() if "loss" in name)
