"""Stops a run whose loss is not a finite number."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
from detkernel import Run, UserError, hookimpl, option, plugin, state
from detkernel_detection import Batch, ImageId, Losses

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen
class _Seen:
    """The losses of an iteration, still on the device."""

    iteration: int
    names: Sequence[str]
    values: Tensor
    image_ids: Sequence[ImageId]


@plugin(priority="very_high", resume_neutral=("*",))
class CheckInvalidLoss:
    """Stop the run when a loss is NaN or infinite.

    The losses of all iterations are looked at: those since the last look every `interval` iterations, and wherever the
    run waits for the device anyway: at a line of the log, before a checkpoint is saved, before a validation and at the
    end. So no checkpoint is written of what came behind an invalid loss.

    A loss that has had one and the same value since the run began is reported once: what it trains does not learn.

    Where a stepping plugin leaves out invalid steps (it then counts them, as `skipped_steps` in `run.scalars`), an
    invalid loss reaches no weights and stops nothing.
    """

    interval: int = option(
        default=50,
        at_least=1,
        at_most=1000,
        help="iterations between looks that wait for the device; the first iteration is always looked at, and these "
        "looks come before the weights are stepped",
    )

    constant: int | None = option(
        default=50,
        at_least=2,
        help="warn where a loss has had exactly the same value in so many iterations since the run began; null: never",
    )

    _seen: list[_Seen] = state(factory=list)
    _first: dict[str, float] = state(factory=dict)
    """The values of the first iteration of the run, of the losses that have had no other since."""

    @hookimpl
    def before_run(self) -> None:
        self._seen.clear()
        self._first.clear()

    @hookimpl(wrapper=True)
    def after_train_iter(self, run: Run, batch: Batch, losses: Losses) -> Generator[None, None, None]:
        if "skipped_steps" not in run.scalars:
            self._keep(run, batch, losses)
        if run.iter == 1 or run.iter % self.interval == 0 or run.iter >= run.max_iters:
            self._look(run, run.iter)
        yield
        if run.stop_reason is not None:
            self._look(run, run.iter + 1)

    @hookimpl(optionalhook=True)
    def after_log_line(self, run: Run) -> None:
        self._look(run, run.iter + 1)

    @hookimpl(optionalhook=True)
    def before_save(self, run: Run) -> None:
        self._look(run, run.iter + 1)

    @hookimpl(tryfirst=True)
    def before_val_epoch(self, run: Run) -> None:
        self._look(run, run.iter + 1)

    def _keep(self, run: Run, batch: Batch, losses: Losses) -> None:
        import torch

        names = [name for name in losses if "loss" in name]
        if names:
            values = torch.stack([losses[name].detach() for name in names])  # a copy: graphs reuse their outputs
            self._seen.append(_Seen(run.iter, names, values, batch.image_ids))

    def _look(self, run: Run, not_stepped: int) -> None:
        """Raise UserError for the first invalid loss since the last look; one transfer from the device for them all.

        `not_stepped`: the first iteration whose step has not been taken.
        """
        if not self._seen:
            return
        import torch

        seen = self._seen[:]
        self._seen.clear()
        values = iter(torch.cat([one.values.flatten() for one in seen]).tolist())
        for one in seen:
            losses = {name: next(values) for name in one.names}
            wrong = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
            if wrong:
                raise UserError(_message(one, wrong, not_stepped - one.iteration))
            self._compare(run, one.iteration, losses)

    def _compare(self, run: Run, iteration: int, losses: Mapping[str, float]) -> None:
        """Warn of what has not moved in `constant` iterations. A run that is resumed has no first iteration."""
        if iteration == 1:
            self._first.update(losses)
        for name in [name for name, value in self._first.items() if losses.get(name) != value]:
            del self._first[name]
        if iteration == self.constant:
            for name, value in self._first.items() if run.is_main else ():
                run.log.warning(
                    "%s has been exactly %.6g in each of the first %d iterations: what it trains does not learn. Its "
                    "outputs may all be cut off (by a ReLU, say), or have no target: objects are too small or too "
                    "large for the model. Look at the data, start from weights, or try another run.seed or lr",
                    *(name, value, iteration),
                )
            self._first.clear()


def _message(seen: _Seen, wrong: Sequence[str], steps: int) -> str:
    images = ", ".join(map(str, seen.image_ids))
    since = (
        "The weights were not stepped with it"
        if steps == 0
        else f"{steps} iteration{'s' * (steps > 1)} went on with it before it was seen, and cannot be used"
    )
    return (
        f"iteration {seen.iteration}: {', '.join(wrong)} (images {images}). {since}. Most often the learning rate is "
        "too high: lower it, lengthen the schedule's warmup, or give the optimizer a clip_norm; or an annotation of "
        "these images is wrong"
    )
