"""Compilation: which modules, how often, and how it is given up. Graphs are taken by torch's own tracer; the compilers
behind it are plain functions."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import ConfigError, Run, hookimpl, plugin, state
from detkernel_detection.testing import TinyDataset, TinyLoader, make_batch, tiny_run
from detkernel_runtime import compiling
from detkernel_runtime.device import Compile, Device

compiled: list[list[int]] = []
"""The image shapes that the compiler was called for, one for each graph."""


def shapes_of(inputs: list[Any]) -> list[int]:
    return next(list(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.shape[1:] == (3, 32, 32))


def count(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    compiled.append(shapes_of(inputs))
    made: Callable[..., Any] = graph.forward
    return made


def dawdle(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """A compiler that takes a minute, and is interrupted at once."""
    compiled.append(shapes_of(inputs))
    signal.raise_signal(signal.SIGUSR2)
    time.sleep(60)
    raise AssertionError("nobody interrupted it")


@pytest.fixture(scope="module", autouse=True)
def _compilers() -> None:
    for compiler in (count, dawdle):
        torch._dynamo.register_backend(compiler)


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    compiled.clear()
    yield
    torch._dynamo.reset()


class Sized(TinyLoader):
    """Batches of one, two, ... images: another shape in each iteration, and again in the next epoch."""

    def __len__(self) -> int:
        return 3

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        for number in range(start, 3):
            yield make_batch(self.dataset, list(range(number + 1)))


@plugin
class SizedData:
    """Three shapes."""

    @hookimpl
    def build_loader(self, run: Run, mode: str) -> Any:
        dataset = TinyDataset(size=4)
        dataset.load()
        return Sized(dataset, batch_size=2, seed=0, shuffle=False)


def run_with(folder: Path, options: Compile | None, **more: Any) -> Run:
    device = Device(device="cpu", compile=options)
    return tiny_run({"device": device, "data": SizedData(), **more}, until="6 iters", work_dir=folder)


def test_a_model_is_compiled_for_each_shape_up_to_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    limit = torch._dynamo.config.recompile_limit
    plain = run_with(tmp_path, None)
    assert compiled == []
    runs = [run_with(tmp_path, Compile(limit=limit, backend="count")) for limit in (3, 2)]
    assert compiled == [[1, 3, 32, 32], [2, 3, 32, 32], [3, 3, 32, 32], [1, 3, 32, 32], [2, 3, 32, 32]]
    [said] = [record.getMessage() for record in caplog.records if record.name == "detkernel"]
    assert said.startswith(
        "device.compile: the model was compiled 2 times, which is `limit`; what would need another compilation runs "
        "uncompiled, as now that it is given a tensor of [3, 3, 32, 32]. Make batches of few shapes"
    )
    for run in runs:
        weights = run.model.state_dict()
        assert all(weights[name].equal(value) for name, value in plain.model.state_dict().items())
    assert torch._dynamo.config.recompile_limit == limit


def test_modules_are_compiled_each_for_itself(tmp_path: Path):
    run = run_with(tmp_path, Compile(modules=["0", "0.*"], backend="count", dynamic=True))
    assert isinstance(run.model[0]._compiled_call_impl, compiling.Compiled)
    assert (
        run.model._compiled_call_impl is run.model[0][0]._compiled_call_impl is run.model[3]._compiled_call_impl is None
    )
    assert 1 <= len(compiled) < 3, "for any shape"


def test_a_module_or_a_compiler_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="modules: no module is called 'backbone'"):
        run_with(tmp_path, Compile(modules=["backbone"], backend="count"))
    with pytest.raises(ConfigError, match="backend: torch has no 'cuont', did you mean 'count'"):
        run_with(tmp_path, Compile(backend="cuont"))


def test_a_run_that_is_told_to_stop_gives_its_compilation_up(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    @plugin
    class Stop:
        """Ends the run at a signal, as `signals` does."""

        before: Any = state(default=None)

        @hookimpl
        def setup(self, run: Run) -> None:
            self.before = signal.signal(signal.SIGUSR2, lambda *_: run.stop("SIGUSR2 was received", 75))

        @hookimpl
        def after_run(self) -> None:
            signal.signal(signal.SIGUSR2, self.before)

    plain = tiny_run({"device": Device(device="cpu"), "data": SizedData()}, until="1 iters", work_dir=tmp_path)
    began = time.monotonic()
    run = run_with(tmp_path, Compile(backend="dawdle"), stop=Stop())
    assert time.monotonic() - began < 50
    assert (run.iter, run.exit_status) == (1, 75)
    assert len(compiled) == 1
    assert "the compilation of the model is given up, and the iteration runs uncompiled" in caplog.messages
    weights = run.model.state_dict()
    assert all(weights[name].equal(value) for name, value in plain.model.state_dict().items()), "the iteration is whole"
