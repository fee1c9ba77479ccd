"""Gradients at a step: their mean over the iterations, their norm, clipping, and what is wrong with them."""

from __future__ import annotations

import math

import torch
from detkernel import Run, UserError
from detkernel_detection import Batch, Losses
from torch import Tensor, nn

_SHOWN = 3


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def average(optimizer: torch.optim.Optimizer, count: int) -> None:
    """From the sum over some iterations to their mean."""
    gradients = [parameter.grad for parameter in parameters(optimizer) if parameter.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, count)


def norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of all gradients together, on their device."""
    gradients = [parameter.grad for parameter in parameters(optimizer) if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def clip(optimizer: torch.optim.Optimizer, found: Tensor, largest: float | None, value: float | None) -> None:
    """Clip gradients whose norm was `found`: first all together by their norm, then each by its value."""
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters(optimizer), largest, found)
    if value is not None:
        nn.utils.clip_grad_value_(parameters(optimizer), value)


def invalid(run: Run, batch: Batch, losses: Losses, found: Tensor) -> UserError:
    """What to say of a norm that is not finite, before the step. It asks the device for much, and only this once."""
    values = {name: float(value.detach()) for name, value in losses.items()}
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    named = [(name, p.grad) for name, p in run.named_parameters() if p.grad is not None]
    bad = [name for name, gradient in named if not bool(gradient.isfinite().all())]
    more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    said = ", ".join(wrong) or "each loss finite"
    where = f"; not finite are the gradients of {', '.join(bad[:_SHOWN])}{more}, of {len(named)}" if bad else ""
    return UserError(
        f"iteration {run.iter}: the norm of the gradients is {float(found)}, and {said} "
        f"(images {', '.join(map(str, batch.image_ids))}){where}. {ADVICE}. The weights were not stepped with it"
    )


ADVICE = (
    "Most often the learning rate is too high: lower it, lengthen the schedule's warmup, or set optimizer.clip_norm; "
    "optimizer.invalid_gradients: skip leaves such steps out"
)


class Norms:
    """Norms that nobody has looked at yet: they stay on the device, where asking for one would wait for the step."""

    most = 50
    """So many are kept at most. A line of the log, a save and a validation wait anyway, and look sooner."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Tensor]] = []

    def add(self, iteration: int, found: Tensor) -> None:
        self._kept.append((iteration, found))
        if len(self._kept) >= self.most:
            self.look()

    def look(self) -> None:
        """Raise UserError for the first that is not finite; the weights have been stepped with it. Waits."""
        if not self._kept:
            return
        values = torch.stack([found for _, found in self._kept]).tolist()
        for (iteration, _), value in zip(self._kept, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"iteration {iteration}: the norm of the gradients was {value}, and the weights have been stepped "
                    f"with it before it was seen. {ADVICE}"
                )
        self._kept.clear()
