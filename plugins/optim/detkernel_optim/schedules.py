"""Learning rate schedules: each is a factor that follows from the iteration alone, so a resume needs no state."""

from __future__ import annotations

import math
from typing import Literal

from detkernel import Run, Span, UserError, hookimpl, option, plugin, state


@plugin
class Schedule:
    """What all schedules share: warmup, and where the factor is applied."""

    key = "schedule"
    priority = "very_high"

    warmup: Span | None = option(default=None, help="how long the rate rises at the beginning, such as '500 iters'")
    warmup_factor: float = option(default=0.001, at_least=0, at_most=1, help="factor that the warmup begins with")
    warmup_kind: Literal["linear", "constant", "exponential"] = option(default="linear", help="how it rises to 1")
    by: Literal["iters", "epochs"] = option(
        default="iters",
        help="change in every iteration, or only where an epoch begins (the warmup always by iteration)",
    )

    _last: float | None = state(default=None)

    def __attrs_post_init__(self) -> None:
        if self.warmup_kind == "exponential" and self.warmup_factor == 0:
            raise ValueError("warmup_factor: an exponential warmup must begin above 0")

    @hookimpl
    def before_run(self, run: Run) -> None:
        others = [name for name, _ in run.bus.find(Schedule)]
        if len(others) > 1:
            raise UserError(f"{len(others)} schedules set the learning rate: {' and '.join(others)}; keep one of them")
        self._last = None
        self._prepare(run)

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        factor = self.factor(run, run.iter)
        if factor == self._last:
            return
        if run.optimizer is None:
            raise UserError(
                "a schedule needs a plugin that makes an optimizer, such as `optimizer: {use: sgd, lr: 0.01}`"
            )
        self._last = factor
        for group in run.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def factor(self, run: Run, iteration: int) -> float:
        """What the learning rate of an iteration, counted from 0, is multiplied by."""
        length = run.epoch_length
        place = iteration - iteration % length if self.by == "epochs" else iteration
        return self._factor(place, run.max_iters, length) * self._warmup_factor(iteration, length)

    def _warmup_factor(self, iteration: int, epoch_length: int) -> float:
        steps = self.warmup.iters(epoch_length) if self.warmup is not None else 0
        if iteration >= steps:
            return 1.0
        if self.warmup_kind == "constant":
            return self.warmup_factor
        if self.warmup_kind == "exponential":
            return float(self.warmup_factor ** (1 - iteration / steps))
        return self.warmup_factor + (1 - self.warmup_factor) * iteration / steps

    def _prepare(self, run: Run) -> None:
        """Check options against the length of the run."""

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        raise NotImplementedError


@plugin
class Constant(Schedule):
    """The same learning rate throughout, after the warmup."""

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        return 1.0


@plugin
class Multistep(Schedule):
    """Multiply the learning rate by `gamma` at each milestone."""

    milestones: list[Span] = option(help="when it drops, such as [8 epochs, 11 epochs]")
    gamma: float = option(default=0.1, above=0, help="factor at each milestone")

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        passed = sum(iteration >= milestone.iters(epoch_length) for milestone in self.milestones)
        return float(self.gamma**passed)

    def _prepare(self, run: Run) -> None:
        for milestone in self.milestones:
            if milestone.iters(run.epoch_length) >= run.max_iters:
                run.log.warning(
                    "schedule: the milestone at %s is not within the run of %s", milestone, run.options.until
                )


@plugin
class Cosine(Schedule):
    """Fall along half a cosine, from the full learning rate to `end` of it."""

    end: float = option(default=0.0, at_least=0, at_most=1, help="factor at the end of the run")

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * iteration / max_iters)) / 2


@plugin
class Poly(Schedule):
    """Fall as a power of what is left of the run."""

    power: float = option(default=1.0, above=0, help="1: a straight line")
    end: float = option(default=0.0, at_least=0, at_most=1, help="factor at the end of the run")

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        return float(self.end + (1 - self.end) * (1 - iteration / max_iters) ** self.power)


@plugin
class Exponential(Schedule):
    """Multiply the learning rate by `gamma` in every epoch, smoothly unless `by: epochs`."""

    gamma: float = option(default=0.9, above=0, at_most=1, help="factor of an epoch")

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        return float(self.gamma ** (iteration / epoch_length))


@plugin
class OneCycle(Schedule):
    """Rise from `start` to the full learning rate, then fall to `end`, both along half a cosine (Smith 2018)."""

    rise: float = option(default=0.3, above=0, below=1, help="share of the run in which it rises")
    start: float = option(default=0.04, above=0, at_most=1, help="factor at the beginning")
    end: float = option(default=1e-4, at_least=0, at_most=1, help="factor at the end")

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        top = self.rise * max_iters
        low, part = (
            (self.start, iteration / top)
            if iteration < top
            else (self.end, (max_iters - iteration) / (max_iters - top))
        )
        return low + (1 - low) * (1 - math.cos(math.pi * part)) / 2
