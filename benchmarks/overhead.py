"""Microseconds of CPU that a training framework adds to an iteration, over a plain loop that does the same work.

The work: one small step (a torch linear layer, forward, backward, SGD) and ten plugins, each of which counts
something before and after it. The plain loop calls the same twenty functions itself. Beside detkernel stand mmengine
and Lightning where they are installed (`pip install mmengine lightning`). The step notes the time, so that an iteration
is what lies between two notes; frameworks take turns, and a round's median iteration less the plain loop's of the same
round is what that round says. The median of the rounds counts: other work on the machine lengthens few iterations.

    python benchmarks/overhead.py [--iterations 500] [--rounds 40]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import statistics
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
NOTES: list[int] = []  # when each step ended, in nanoseconds


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss = model(X).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    NOTES.append(time.perf_counter_ns())
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


def plain(iterations: int) -> None:
    model, optimizer = fresh()
    counters = [Counter() for _ in range(PLUGINS)]
    for _ in range(iterations):
        for counter in counters:
            counter.count_before()
        step(model, optimizer)
        for counter in counters:
            counter.count_after()


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


def detkernel(iterations: int) -> None:
    plugins: dict[str, Any] = {f"counting{n}": Counting() for n in range(PLUGINS - 1)}
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(until=Span(iterations, "iters"), work_dir=Path(folder))
        Kernel({"stepping": Stepping(), "last": Counting(), **plugins}, options).run()


def lightning(iterations: int) -> None:
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

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = framework.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Hook() for _ in range(PLUGINS)],
    )
    trainer.fit(Module(), range(iterations))


def mmengine(iterations: int) -> None:
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

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        runner = Runner(
            Model(),
            work_dir=folder,
            train_dataloader=torch.utils.data.DataLoader(range(iterations), batch_size=1),
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
            default_hooks=dict.fromkeys(("timer", "logger", "param_scheduler", "checkpoint", "sampler_seed")),
            custom_hooks=[Counts() for _ in range(PLUGINS)],
            log_level="ERROR",
        )
        runner.train()


def microseconds(measure: Callable[[int], None], iterations: int) -> float:
    """The median iteration; the first tenth warms up."""
    NOTES.clear()
    measure(iterations)
    return statistics.median(b - a for a, b in itertools.pairwise(NOTES[iterations // 10 :])) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    frameworks: dict[str, Callable[[int], None]] = {
        "detkernel": detkernel,
        "mmengine": mmengine,
        "lightning": lightning,
    }
    bases: list[float] = []
    extras: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        bases.append(microseconds(plain, options.iterations))
        for name, measure in list(frameworks.items()):
            try:
                extras.setdefault(name, []).append(microseconds(measure, options.iterations) - bases[-1])
            except ImportError as error:
                print(f"{name}: not measured ({error})")
                del frameworks[name]
    print(f"plain loop: {statistics.median(bases):.1f} us an iteration")
    ours = statistics.median(extras["detkernel"])
    for name in frameworks:
        extra = statistics.median(extras[name])
        low, _, high = statistics.quantiles(extras[name], n=4)
        times = f"{extra / ours:.1f} x detkernel's"
        print(f"{name}: adds {extra:.1f} us an iteration (half of the rounds {low:.1f} to {high:.1f}; {times})")


if __name__ == "__main__":
    main()
