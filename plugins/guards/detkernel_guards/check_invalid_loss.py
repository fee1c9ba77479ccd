"""Stops a run whose loss is no number."""

from __future__ import annotations

from typing import ClassVar

from detkernel import Run, UserError, hookimpl, option, plugin
from detkernel.detection import Batch, Losses


@plugin
class CheckInvalidLoss:
    """Stop the run when a loss is NaN or infinite, before the weights are stepped with it."""

    priority = "very_high"
    resume_neutral: ClassVar[tuple[str, ...]] = ("*",)

    interval: int = option(
        default=50,
        at_least=1,
        help="iterations between checks (each waits for the device); the first is always checked",
    )

    @hookimpl
    def after_train_iter(self, run: Run, batch: Batch, losses: Losses) -> None:
        if run.iter != 1 and run.iter % self.interval:
            return
        values = {name: float(value.detach()) for name, value in losses.items() if "loss" in name}
        wrong = [f"{name} is {value}" for name, value in values.items() if not abs(value) < float("inf")]
        if wrong:
            pictures = ", ".join(map(str, batch.image_ids))
            raise UserError(
                f"iteration {run.iter}: {', '.join(wrong)} (pictures {pictures}). Most often the learning rate is too "
                "high: lower it, lengthen the schedule's warmup, or give the optimizer a clip_norm. "
                "The weights were not stepped with it"
            )
