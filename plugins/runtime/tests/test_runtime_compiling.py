"""Compilation: which modules, how often, and how it is given up. Graphs are taken by torch's own tracer; the compilers
behind it are plain functions."""

from __future__ import annotations

import os
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


def take_a_while(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """A compiler that takes 0.2 s."""
    time.sleep(0.2)
    compiled.append(shapes_of(inputs))
    made: Callable[..., Any] = graph.forward
    return made


@pytest.fixture(scope="module", autouse=True)
def _compilers() -> None:
    for compiler in (count, dawdle, take_a_while):
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


# whether it pays off, how long it takes, and where its results are


def test_auto_leaves_a_run_on_a_cpu_uncompiled_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "detkernel")
    run = tiny_run({"device": Device(device="cpu", compile="auto"), "data": SizedData()}, work_dir=tmp_path)
    assert run.model._compiled_call_impl is None
    [said] = [message for message in caplog.messages if "device.compile" in message]
    assert said == (
        "device.compile: auto leaves the model uncompiled: a CPU compiles for minutes, and is hardly faster then"
    )


@pytest.mark.parametrize(
    ("iterations", "shapes", "expected"),
    [
        (
            1999,
            1,
            "the run has 1,999 iterations, and the compilation for one shape of batches pays off after about 2,0",
        ),
        (2000, 1, None),
        (
            7000,
            4,
            "the run has 7,000 iterations, and the compilation for 4 shapes of batches pays off after about 8,000",
        ),
        (8000, 4, None),
        (10**6, None, "uncompiled: each batch may have a shape of its own"),
    ],
)
def test_auto_goes_by_the_length_of_the_run_and_the_shapes_of_its_batches(
    iterations: int, shapes: int | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    found = compiling.why_not("cuda", iterations, shapes)
    assert found is expected is None or str(expected) in str(found)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "Triton" in str(compiling.why_not("cuda", iterations, shapes))


def test_auto_compiles_where_it_pays_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The loader tells how many shapes there are."""
    asked = []
    monkeypatch.setattr(compiling, "why_not", lambda *given: asked.append(given))
    monkeypatch.setattr(Sized, "shape_count", 3, raising=False)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: count)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level("INFO", "detkernel")
    tiny_run(
        {"device": Device(device="cpu", compile="auto"), "data": SizedData()},
        until="6 iters",
        work_dir=tmp_path / "run",
    )
    assert asked == [("cpu", 6, 3)]
    assert len(compiled) == 3
    assert "device.compile: auto compiles the model, for 3 shapes of batches at most" in caplog.messages


def test_the_time_of_a_compilation_is_told_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "detkernel")
    run = run_with(tmp_path, Compile(backend="take_a_while"))
    said = [message for message in caplog.messages if message.startswith("compiled the model")]
    assert [message.split(" in ")[0] for message in said] == [
        f"compiled the model for training on batches of [{count}, 3, 32, 32]" for count in (1, 2, 3)
    ]
    seconds = [float(message.split(" in ")[1].split(" s;")[0]) for message in said]
    assert min(seconds) >= 0.2
    assert run.aside == pytest.approx(sum(seconds), abs=0.2)
    assert run_with(tmp_path, None).aside == 0.0


def test_what_inductor_compiles_is_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def inductor(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(os.environ[compiling.CACHE])
        made: Callable[..., Any] = graph.forward
        return made

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: inductor)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(compiling.CACHE, raising=False)
    run_with(tmp_path, Compile(modules=["0"]))
    assert os.environ.get(compiling.CACHE) not in seen, "as before the run"
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "elsewhere"))
    run_with(tmp_path, Compile(modules=["0"]))
    assert set(seen[:3]) == {str(tmp_path / "cache/detkernel/torchinductor")}
    assert set(seen[3:]) == {str(tmp_path / "elsewhere")}
