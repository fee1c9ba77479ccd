"""Learning rate schedules: each is a factor that follows from the iteration, and for `plateau` from the validations."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from detkernel import Part, Run, Span, UserError, hookimpl, option, plugin, state, wrong


@plugin(key="schedule", priority="very_high")
class Schedule:
    """What all schedules share: warmup, and where the factor is applied.

    The rate of a group is its rate in the config, times the factor of the iteration, times what other plugins have made
    of it: one that halves `group["lr"]` halves all rates from there on.
    """

    warmup: Span | None = option(default=None, help="how long the rate rises at the beginning, such as '500 iters'")
    warmup_factor: float = option(default=0.001, at_least=0, at_most=1, help="factor that the warmup begins with")
    warmup_kind: Literal["linear", "quadratic", "constant", "exponential"] = option(
        default="linear",
        help="how it rises to 1, which its last iteration has (as in MMDetection); quadratic: as YOLOX's",
    )
    by: Literal["iters", "epochs"] = option(
        default="iters",
        help="change in every iteration, or only where an epoch begins (the warmup always by iteration)",
    )

    _run: Any = state(default=None)
    _set: list[float] = state(factory=list)
    """The rates that were set last, by group: another one has been changed by somebody else."""
    _changed: list[float] = state(factory=list)
    """What others have multiplied the rates with, by group."""

    def __attrs_post_init__(self) -> None:
        if self.warmup_kind == "exponential" and self.warmup_factor == 0:
            raise ValueError("warmup_factor: an exponential warmup must begin above 0")

    @hookimpl
    def before_run(self, run: Run) -> None:
        others = [name for name, _ in run.bus.find(Schedule)]
        if len(others) > 1:
            raise UserError(
                f"{len(others)} schedules set the learning rate: {' and '.join(others)}; keep one of them, or join "
                "them in one of `use: chain` (one after the other) or `use: product`"
            )
        self._run, self._set, self._changed = run, [], []
        if run.trains:
            self.check(run, run.max_iters)

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        if run.optimizer is None:
            raise UserError(
                "a schedule needs a plugin that makes an optimizer, such as `optimizer: {use: sgd, lr: 0.01}`"
            )
        groups = run.optimizer.param_groups
        self._changed = self._changes()
        factor = self.factor(run, run.iter)
        for group, change in zip(groups, self._changed, strict=True):
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor * change
        self._set = [group["lr"] for group in groups]

    def factor(self, run: Run, iteration: int) -> float:
        """What the learning rate of an iteration, counted from 0, is multiplied by."""
        return self.factor_at(iteration, run.max_iters, run.epoch_length)

    def factor_at(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        """The same for a run, or a part of one, of a given length."""
        place = iteration - iteration % epoch_length if self.by == "epochs" else iteration
        return self._factor(place, max_iters, epoch_length) * self._warmup_factor(iteration, epoch_length)

    def check(self, run: Run, max_iters: int) -> None:
        """Check options against the length of the run, or of the part of it that is this schedule's."""
        steps = self.warmup.iters(run.epoch_length) if self.warmup is not None else 0
        if steps > max_iters and run.is_main:
            run.log.warning(
                "schedule: the warmup of %s (%d iterations) does not end within %d iterations: the rate gets to %.3g "
                "of the full; shorten schedule.warmup, or train longer",
                *(self.warmup, steps, max_iters, self._warmup_factor(max_iters - 1, run.epoch_length)),
            )
        self._check(run, max_iters)

    def state_dict(self) -> dict[str, Any]:
        """What others have made of the rates."""
        return {"changed": self._changes() if self._run.optimizer is not None else []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        changed = [float(value) for value in state["changed"]]
        groups = self._run.optimizer.param_groups
        if not all(map(math.isfinite, changed)) or len(changed) not in (0, len(groups)):
            raise ValueError(f"its rates of {len(groups)} groups were changed by {changed}")
        self._changed, self._set = changed, []

    def _changes(self) -> list[float]:
        """What others have multiplied the rates with, up to now. A rate of 0 says nothing about it."""
        groups = self._run.optimizer.param_groups
        before = self._changed or [1.0] * len(groups)
        if len(self._set) != len(groups):
            return before + [1.0] * (len(groups) - len(before))
        return [
            change if was in (0.0, group["lr"]) else change * float(group["lr"] / was)
            for group, was, change in zip(groups, self._set, before, strict=True)
        ]

    def _warmup_factor(self, iteration: int, epoch_length: int) -> float:
        steps = self.warmup.iters(epoch_length) if self.warmup is not None else 0
        if iteration >= steps:
            return 1.0
        if self.warmup_kind == "constant":
            return self.warmup_factor
        share = iteration / max(steps - 1, 1)
        if self.warmup_kind == "exponential":
            return float(self.warmup_factor ** (1 - share))
        if self.warmup_kind == "quadratic":
            share = ((iteration + 1) / steps) ** 2
        return self.warmup_factor + (1 - self.warmup_factor) * share

    def _check(self, run: Run, max_iters: int) -> None:
        """The same for the options that a schedule has of its own."""

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        raise NotImplementedError


if TYPE_CHECKING:
    Curve: TypeAlias = Schedule
else:

    class Curve(Part, ABC):
        """What `chain` and `product` are made of: every schedule. The config knows a nested part by its base class."""

    Curve.register(Schedule)


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

    def _check(self, run: Run, max_iters: int) -> None:
        for milestone in self.milestones:
            if milestone.iters(run.epoch_length) >= max_iters and run.is_main:
                run.log.warning("schedule: the milestone at %s is not within %d iterations", milestone, max_iters)


@plugin
class Cosine(Schedule):
    """Fall along half a cosine, from the full learning rate to `end` of it."""

    end: float = option(default=0.0, at_least=0, at_most=1, help="factor at the end of the run")
    length: Span | None = option(
        default=None, help="how long the half cosine is, after which it stays at `end`; null: the run, or its stage"
    )

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        share = iteration / (max_iters if self.length is None else self.length.iters(epoch_length))
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


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


@plugin
class Stage:
    """A part of a run with a schedule of its own."""

    schedule: Curve = option(help="its schedule, which counts iterations and epochs from the beginning of the stage")
    until: Span | None = option(
        default=None, help="where in the run it ends, such as '10 epochs'; null, for the last: with the run"
    )
    factor: float = option(default=1.0, at_least=0, help="what all of its rates are multiplied by")


@plugin
class Chain(Schedule):
    """One schedule after the other (torch's SequentialLR), such as a constant rate and then a cosine."""

    stages: list[Stage] = option(help="the schedules in their order, each with `until` but the last")

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _refuse_plateau("stages", [stage.schedule for stage in self.stages])
        if not self.stages or any(stage.until is None for stage in self.stages[:-1]):
            raise ValueError("stages: expected at least one, and `until` in each but the last")

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        bounds = self._bounds(max_iters, epoch_length)
        number = next((n for n, (_, end) in enumerate(bounds) if iteration < end), len(bounds) - 1)
        start, end = bounds[number]
        stage = self.stages[number]
        return stage.factor * stage.schedule.factor_at(iteration - start, end - start, epoch_length)

    def _bounds(self, max_iters: int, epoch_length: int) -> list[tuple[int, int]]:
        """The iterations of each stage: from, to."""
        ends = [max_iters if stage.until is None else stage.until.iters(epoch_length) for stage in self.stages]
        return list(zip([0, *ends], ends, strict=False))

    def _check(self, run: Run, max_iters: int) -> None:
        for number, (start, end) in enumerate(self._bounds(max_iters, run.epoch_length)):
            until = self.stages[number].until
            if start >= max_iters and run.is_main:
                run.log.warning("schedule: stage %d begins at iteration %d, after the run's end", number + 1, start)
            elif end <= start:
                raise wrong(self, f"stages.{number}", f"ends at {until}, where the stage before it does, or sooner")
            elif number == len(self.stages) - 1 and end < max_iters:
                raise wrong(
                    self, f"stages.{number}", f"ends at {until}, before the end of the run; leave out the last `until`"
                )
            else:
                self.stages[number].schedule.check(run, end - start)


@plugin
class Product(Schedule):
    """Several schedules at once: their factors are multiplied (torch's ChainedScheduler)."""

    schedules: list[Curve] = option(help="the schedules; each sees the whole run")

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _refuse_plateau("schedules", self.schedules)

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        return math.prod(schedule.factor_at(iteration, max_iters, epoch_length) for schedule in self.schedules)

    def _check(self, run: Run, max_iters: int) -> None:
        for schedule in self.schedules:
            schedule.check(run, max_iters)


def _refuse_plateau(name: str, schedules: list[Schedule]) -> None:
    for schedule in schedules:
        if type(schedule).__name__ == "Plateau":
            raise ValueError(f"{name}: plateau goes by validations and not by the iteration; use it on the top level")
