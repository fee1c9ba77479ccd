"""A whole run of plain Python objects, in process, in milliseconds, without any numeric library."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from detkernel.loop import Kernel
from detkernel.plugin import hookimpl, option, plugin, state
from detkernel.run import Mode, Run, RunOptions
from detkernel.span import Span
from detkernel.testing.record import Recorder


class Number(float):
    """A loss: what a hook asks of an array with one number, `item()` and `detach()`, can be asked of it."""

    def item(self) -> float:
        return float(self)

    def detach(self) -> Number:
        return self


@attrs.define(eq=False)
class PlainDataset:
    """Some numbers to learn the mean of."""

    numbers: list[float]
    classes: tuple[str, ...] = ("low", "high")

    def __len__(self) -> int:
        return len(self.numbers)


@attrs.define(eq=False)
class PlainLoader:
    """Batches of numbers; the order depends on (seed, epoch)."""

    dataset: PlainDataset
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[float]]:
        order = list(self.dataset.numbers)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        for number in range(start, len(self)):
            yield order[number * self.batch_size : (number + 1) * self.batch_size]


@plugin
class PlainData:
    """Loaders of plain numbers, for tests."""

    size: int = option(default=8, at_least=1, help="how many numbers")
    batch_size: int = option(default=2, at_least=1, help="numbers a batch")

    @hookimpl
    def build_loader(self, run: Run, mode: Mode) -> PlainLoader:
        return PlainLoader(PlainDataset([float(number) for number in range(self.size)]), self.batch_size, run.seed)


@attrs.define(eq=False)
class PlainWeights:
    """One number that is learned."""

    value: float = 0.0
    training: bool = True

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = state["value"]


@plugin
class PlainModel:
    """A model that learns the mean of its batches, for tests."""

    noise: float = option(default=0.1, at_least=0, help="random share of the loss, so that a test sees random numbers")

    @hookimpl
    def build_model(self, run: Run) -> PlainWeights:
        return PlainWeights()

    @hookimpl
    def train_step(self, run: Run, batch: list[float]) -> dict[str, Number]:
        error = run.model.value - sum(batch) / len(batch)
        return {"loss": Number(error * error + self.noise * random.random())}

    @hookimpl
    def val_step(self, run: Run, batch: list[float]) -> list[float]:
        return [run.model.value for _ in batch]


@plugin(priority="above_normal")
class PlainStepping:
    """A step towards the mean of each batch, with momentum, for tests."""

    lr: float = option(default=0.05, above=0, help="learning rate")
    _speed: float = state(default=0.0)

    @hookimpl
    def after_train_iter(self, run: Run, batch: list[float], losses: Mapping[str, Number]) -> None:
        error = run.model.value - sum(batch) / len(batch)
        run.hook.before_optimizer_step(run=run)
        self._speed = 0.9 * self._speed + 2 * error * (1 + 0.01 * losses["loss"])
        run.model.value -= self.lr * self._speed
        run.hook.after_optimizer_step(run=run)

    def state_dict(self) -> dict[str, Any]:
        return {"speed": self._speed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._speed = float(state["speed"])


def with_defaults(plugins: Mapping[str, object] | None, defaults: Mapping[str, tuple[str, Any]]) -> dict[str, object]:
    """The plugins by name, and for each key and event in `defaults` that none of them provides, one that does.

    Stepping is added unless the key is taken: any hook may answer `after_train_iter`.
    """
    active = dict(plugins or {})
    for name, (event, make) in defaults.items():
        taken = event != "after_train_iter" and any(hasattr(part, event) for part in active.values())
        if name not in active and not taken:
            active[name] = make()
    return active


def kernel_of(
    plugins: Mapping[str, object],
    *,
    until: str = "4 iters",
    validate: str | None = None,
    work_dir: Path | str = "runs/tiny",
    seed: int = 0,
    recorder: Recorder | None = None,
) -> Kernel:
    """A kernel with these plugins and options as a config would write them."""
    every = Span.parse(validate) if validate else None
    options = RunOptions(until=Span.parse(until), validate=every, work_dir=Path(work_dir), seed=seed)
    kernel = Kernel(plugins, options)
    if recorder is not None:
        recorder.attach(kernel.state.bus)
    return kernel


def plain_kernel(plugins: Mapping[str, object] | None = None, **options: Any) -> Kernel:
    """A kernel with the given plugins by name, and plain ones for what a run needs and none of them provides.

    `options` are `until` ("4 iters"), `validate`, `work_dir`, `seed` and `recorder`.
    """
    defaults = {
        "model": ("build_model", PlainModel),
        "data": ("build_loader", PlainData),
        "optimizer": ("after_train_iter", PlainStepping),
    }
    return kernel_of(with_defaults(plugins, defaults), **options)


def plain_run(plugins: Mapping[str, object] | None = None, **options: Any) -> Run:
    """Train a `plain_kernel` (same arguments) and return its run."""
    return plain_kernel(plugins, **options).run()
