"""The `phases` plugin: what changes in the middle of a run, such as a last phase without strong augmentation."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import attrs
from detkernel import Run, Span, hookimpl, option, plugin, state, wrong
from detkernel.catalog import Catalog
from detkernel.errors import did_you_mean
from detkernel_detection import BatchTransform, Transform


@runtime_checkable
class KeepsBest(Protocol):
    """A plugin that keeps the best weights: `checkpoint`, or one of your own."""

    best: str | None
    """The metric that it goes by; None: it keeps none."""

    def best_weights(self, run: Run) -> tuple[int, Mapping[str, Any]]:
        """The iteration of the best weights so far, and the state dict to detect with. Raises UserError for none."""


@runtime_checkable
class KeepsAverage(Protocol):
    """A plugin that keeps an average of the weights: `ema`, or one of your own."""

    def restart_average(self, decay: float | None = None) -> None:
        """Begin the average anew, with the weights of now; `decay`: another decay from here on."""


@plugin
class Change:
    """What changes from a place in the run on. Give exactly one of `at`, `share` and `last`."""

    at: Span | None = option(default=None, help="where it begins, such as '280 epochs' or '9000 iters'")
    share: float | None = option(default=None, above=0, below=1, help="the same as a share of the run, such as 0.9")
    last: Span | None = option(default=None, help="the same from the end: '20 epochs' for the last 20")
    load_best: bool = option(
        default=False,
        help="go on with the best weights so far, those to detect with; the optimizer keeps its momentum",
    )
    restart_average: bool = option(default=False, help="begin the average (`ema`) anew, with the weights of then")
    average_decay: float | None = option(
        default=None, above=0, below=1, help="with `restart_average`: the decay from here on; null: as before"
    )
    lr_factor: float | None = option(
        default=None, above=0, help="what all learning rates are multiplied by from here on; `chain` changes schedules"
    )
    transforms_off: list[str] = option(
        factory=list, help="training transforms, of images or batches, that are not used any more, such as mosaic"
    )
    transforms_on: list[str] = option(factory=list, help="training transforms that are not used before")

    def __attrs_post_init__(self) -> None:
        places = [name for name in ("at", "share", "last") if getattr(self, name) is not None]
        if len(places) != 1:
            given = " and ".join(places) or "none of them"
            raise ValueError(f"at: expected exactly one of at, share and last, got {given}")
        changes = (self.load_best, self.restart_average, self.lr_factor, self.transforms_off, self.transforms_on)
        if not any(changes):
            raise ValueError(
                "at: nothing changes there; give load_best, restart_average, lr_factor, transforms_off or transforms_on"
            )
        if self.average_decay is not None and not self.restart_average:
            raise ValueError("average_decay: it is that of an average begun anew; set `restart_average: true`")

    @property
    def place(self) -> str:
        """The option that says where it begins."""
        return next(name for name in ("at", "share", "last") if getattr(self, name) is not None)

    def start(self, until: int, epoch_length: int) -> int:
        """The first iteration of it, counted from 0, in a run of `until` iterations."""
        if self.at is not None:
            return self.at.iters(epoch_length)
        if self.last is not None:
            return until - self.last.iters(epoch_length)
        assert self.share is not None
        return math.floor(self.share * until + 1e-6)


@plugin
class Phases:
    """Change weights, average, learning rates and augmentation at places in the run, as D-FINE, DEIM and RTMDet do.

    What a place changes, it changes before its first iteration is trained; a resumed run has had it or will have it.
    """

    changes: list[Change] = option(help="what changes where, in the order of the run")

    _starts: list[int] = state(factory=list)

    def __attrs_post_init__(self) -> None:
        if not self.changes:
            raise ValueError("changes: expected at least one")

    @hookimpl
    def setup(self, run: Run) -> None:
        """Transforms are told before they go to the loader's workers in which epochs they are used."""
        if not run.trains:
            return
        found = list(_transforms(run.bus.plugins.values()))
        for change in self.changes:
            for name in ("transforms_off", "transforms_on"):
                if getattr(change, name):
                    self._switch(change, name, self._epoch(run, change), found)

    def _switch(self, change: Change, option_name: str, epoch: int, found: list[Transform | BatchTransform]) -> None:
        for wanted in getattr(change, option_name):
            matching = [transform for transform in found if wanted in _names(transform)]
            if not matching:
                known = sorted({name for transform in found for name in _names(transform)})
                raise wrong(change, option_name, f"no transform is named '{wanted}'{did_you_mean(wanted, known)}")
            for transform in matching:
                first, end = transform.active or (0, sys.maxsize)
                active = f"active: [{first}, {end}]"
                if not first < epoch <= end and option_name == "transforms_off":
                    raise wrong(change, option_name, f"'{wanted}' is not used before ({active})")
                if not first <= epoch < end and option_name == "transforms_on":
                    raise wrong(change, option_name, f"'{wanted}' cannot be used from then on ({active})")
                transform.active = (first, epoch) if option_name == "transforms_off" else (epoch, end)

    def _epoch(self, run: Run, change: Change) -> int:
        """The epoch that a change begins, before anybody knows how long an epoch is."""
        until = run.options.until
        spans = [change.at] if change.at is not None else [until, change.last or until]
        epoch = change.start(until.count, 1)
        whole = change.share is None or math.isclose(change.share * until.count, epoch)
        if not whole or any(span.unit != "epochs" for span in spans):
            where = "whole epochs" if change.at is not None else "whole epochs here and in run.until"
            raise wrong(
                change,
                change.place,
                f"transforms change where an epoch begins, since batches are loaded ahead: give {where}",
            )
        return epoch

    @hookimpl
    def before_run(self, run: Run) -> None:
        if not run.trains:
            return
        self._starts = [change.start(run.max_iters, run.epoch_length) for change in self.changes]
        for number, (change, start) in enumerate(zip(self.changes, self._starts, strict=True)):
            if not 0 < start < run.max_iters:
                raise wrong(
                    change, change.place, f"it would begin at iteration {start}, but the run has {run.max_iters}"
                )
            if number and start <= self._starts[number - 1]:
                raise wrong(change, change.place, "it begins where the one before it does, or sooner; order them")
            _check_partners(run, change, start)

    @hookimpl(tryfirst=True, specname="before_train_iter")
    def _begin(self, run: Run) -> None:
        """Before all others, so that nobody takes loaded weights for a step."""
        if run.iter not in self._starts:
            return
        number = self._starts.index(run.iter)
        change, said = self.changes[number], []
        if change.load_best:
            [(_, keeper)] = run.bus.find(KeepsBest)
            iteration, weights = run.processes.from_main(lambda: keeper.best_weights(run))
            run.bare_model.load_state_dict(weights)
            said.append(f"on with the best weights, of iteration {iteration}")
        if change.restart_average:
            for _, average in run.bus.find(KeepsAverage):
                average.restart_average(change.average_decay)
            decay = f" with a decay of {change.average_decay}" if change.average_decay is not None else ""
            said.append(f"the average begins anew{decay}")
        if change.lr_factor is not None:
            said.append(f"learning rates times {change.lr_factor:g}")
        said += [f"without {', '.join(change.transforms_off)}"] * bool(change.transforms_off)
        said += [f"with {', '.join(change.transforms_on)}"] * bool(change.transforms_on)
        if run.is_main:
            run.log.info(
                "phase %d of %d, from iteration %d on: %s", number + 2, len(self.changes) + 1, run.iter, "; ".join(said)
            )

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        """Behind the schedule, which goes on from the rates that it finds."""
        factor = self.changes[self._starts.index(run.iter)].lr_factor if run.iter in self._starts else None
        if factor is not None:
            for group in run.optimizer.param_groups:
                group["lr"] *= factor

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        return {"phases": f"{len(self.changes) + 1}, from iterations {', '.join(map(str, [0, *self._starts]))} on"}


def _check_partners(run: Run, change: Change, start: int) -> None:
    """Raise ConfigError where what a change needs is not there, or not there in time."""
    if change.restart_average and not any(run.bus.find(KeepsAverage)):
        raise wrong(change, "restart_average", "no active plugin keeps an average; add `ema: {}`")
    if not change.load_best:
        return
    keepers = [part for _, part in run.bus.find(KeepsBest) if part.best is not None]
    if len(keepers) != 1:
        raise wrong(
            change,
            "load_best",
            "no active plugin keeps the best weights; add `checkpoint: {best: METRIC}`"
            if not keepers
            else "several plugins keep the best weights; keep one of them",
        )
    every = run.options.validate
    if every is None or (every.iters(run.epoch_length) > start and not run.options.validate_at_start):
        raise wrong(change, "load_best", f"no validation ends before iteration {start}, so none can be the best then")


def _names(transform: Transform | BatchTransform) -> set[str]:
    """What a config or a Python run may call a transform."""
    entry, origin = Catalog().entry_of(type(transform)), getattr(transform, "__detkernel_origin__", None)
    return {type(transform).__name__, *([entry.name] if entry else []), *([origin.use] if origin else [])}


def _transforms(parts: Iterable[Any]) -> Iterator[Transform | BatchTransform]:
    """All transforms among the options of plugins, of images and of batches, at any depth."""
    for part in parts:
        if isinstance(part, (Transform, BatchTransform)):
            yield part
        if attrs.has(type(part)):
            for field in attrs.fields(type(part)):
                value = getattr(part, field.name, None) if field.init else None
                yield from _transforms(value if isinstance(value, (list, tuple)) else [value])
