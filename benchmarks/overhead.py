"""Microseconds of CPU that a training framework adds to an iteration, over a plain loop that does the same work.

The work: one small step (a torch linear layer, forward, backward, SGD) and ten plugins, each of which counts
something before and after it. The plain loop calls the same twenty functions itself. Beside detkernel stand mmengine
and Lightning where they are installed (`pip install mmengine lightning`); each framework is measured in turn, several
rounds in one process, and the fastest round of each counts, less the fastest of the plain loop.

    python benchmarks/overhead.py [--iterations 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detkernel import Kernel, RunOptions, Span, hookimpl, plugin
from torch import nn

PLUGINS = 10
X = torch.randn(4, 16)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss = model(X).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(16, 4)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


class Counter:
    """The work of one plugin."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def count_before(self) -> None:
        self.before += 1

    def count_after(self) -> None:
        self.after += 1


def plain(iterations: int) -> float:
    model, optimizer = fresh()
    counters = [Counter() for _ in range(PLUGINS)]
    start = time.process_time()
    for _ in range(iterations):
        for counter in counters:
            counter.count_before()
        step(model, optimizer)
        for counter in counters:
            counter.count_after()
    return time.process_time() - start


@plugin
class Counting:
    """Counts its events."""

    def __attrs_post_init__(self) -> None:
        self.counter = Counter()

    @hookimpl
    def before_train_iter(self, run: Any, batch: Any) -> None:
        self.counter.count_before()

    @hookimpl
    def after_train_iter(self, run: Any, batch: Any, losses: Any) -> None:
        self.counter.count_after()


class Batches:
    def __init__(self, iterations: int) -> None:
        self.dataset: Any = None
        self.iterations = iterations

    def __len__(self) -> int:
        return self.iterations

    def batches(self, epoch: int, start: int = 0) -> Iterator[int]:
        return iter(range(start, self.iterations))


@plugin
class Stepping:
    """The same step."""

    @hookimpl
    def build_loader(self, run: Any, mode: str) -> Any:
        return Batches(run.options.until.count)

    @hookimpl
    def build_model(self, run: Any) -> Any:
        model, run.optimizer = fresh()
        return model

    @hookimpl
    def train_step(self, run: Any, batch: Any) -> Any:
        return {"loss": step(run.model, run.optimizer)}

    @hookimpl
    def before_train_epoch(self, run: Any) -> None:
        self.start = time.process_time()

    @hookimpl
    def after_train_epoch(self, run: Any) -> None:
        self.took = time.process_time() - self.start


def detkernel(iterations: int) -> float:
    stepping = Stepping()
    plugins: dict[str, Any] = {f"counting{n}": Counting() for n in range(PLUGINS - 1)}
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(until=Span(iterations, "iters"), work_dir=Path(folder))
        Kernel({"stepping": stepping, "last": Counting(), **plugins}, options).run()
    return float(stepping.took)


def lightning(iterations: int) -> float:
    import lightning as framework

    class Module(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.inner, _ = fresh()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return step(self.inner, self.made)

        def configure_optimizers(self) -> None:
            self.made = torch.optim.SGD(self.inner.parameters(), lr=0.01)

    class Hook(framework.Callback):
        def __init__(self) -> None:
            self.counter = Counter()

        def on_train_batch_start(self, *_: Any) -> None:
            self.counter.count_before()

        def on_train_batch_end(self, *_: Any) -> None:
            self.counter.count_after()

    class Clock(framework.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.start = time.process_time()

        def on_train_epoch_end(self, *_: Any) -> None:
            self.took = time.process_time() - self.start

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock = Clock()
    trainer = framework.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *(Hook() for _ in range(PLUGINS))],
    )
    trainer.fit(Module(), range(iterations))
    return float(clock.took)


def mmengine(iterations: int) -> float:
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.made = fresh()

        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, torch.Tensor]:
            return {"loss": step(self.inner, self.made)}

        def forward(self, *args: Any, **kwargs: Any) -> None: ...

    class Counts(Hook):
        def __init__(self) -> None:
            self.counter = Counter()

        def before_train_iter(self, *args: Any, **kwargs: Any) -> None:
            self.counter.count_before()

        def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
            self.counter.count_after()

    class Clock(Hook):
        def before_train_epoch(self, runner: Any) -> None:
            self.start = time.process_time()

        def after_train_epoch(self, runner: Any) -> None:
            self.took = time.process_time() - self.start

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        runner = Runner(
            Model(),
            work_dir=folder,
            train_dataloader=torch.utils.data.DataLoader(range(iterations), batch_size=1),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
            default_hooks=dict.fromkeys(("timer", "logger", "param_scheduler", "checkpoint", "sampler_seed")),
            custom_hooks=[clock, *(Counts() for _ in range(PLUGINS))],
            log_level="ERROR",
        )
        runner.train()
    return float(clock.took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    best: dict[str, float] = {"plain loop": math.inf}
    frameworks: dict[str, Callable[[int], float]] = {
        "detkernel": detkernel,
        "mmengine": mmengine,
        "lightning": lightning,
    }
    for _ in range(options.rounds):
        best["plain loop"] = min(best["plain loop"], plain(options.iterations))
        for name, measure in list(frameworks.items()):
            try:
                best[name] = min(best.get(name, math.inf), measure(options.iterations))
            except ImportError as error:
                print(f"{name}: not measured ({error})")
                del frameworks[name]
    each = {name: seconds / options.iterations * 1e6 for name, seconds in best.items()}
    base = each.pop("plain loop")
    print(f"plain loop: {base:.1f} us an iteration")
    for name, took in each.items():
        extra = took - base
        print(f"{name}: adds {extra:.1f} us an iteration ({extra / (each['detkernel'] - base):.1f} x detkernel's)")


if __name__ == "__main__":
    main()
