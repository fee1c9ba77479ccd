"""The tree of events with their times, and that it is gone when its iterations are over."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detkernel import Kernel, RunOptions, Span, hookimpl, option, plugin
from detkernel.trace import Tracer


class Loader:
    class dataset:  # noqa: N801 - stands for an instance
        classes = ("cat",)

    def __len__(self) -> int:
        return 5

    def batches(self, epoch: int, start: int = 0) -> Iterator[int]:
        yield from range(start, 5)


@plugin
class Everything:
    """Model, loader and step."""

    fail_at: int | None = option(default=None, help="the batch at which it fails")

    @hookimpl
    def build_loader(self) -> Loader:
        return Loader()

    @hookimpl
    def build_model(self) -> object:
        return "model"

    @hookimpl
    def train_step(self, batch: int) -> dict[str, float]:
        assert batch != self.fail_at
        time.sleep(0.002)
        return {"loss": 1.0}


@plugin
class Brackets:
    """Around every step."""

    @hookimpl(wrapper=True)
    def train_step(self) -> Iterator[None]:
        return (yield)


def traced(folder: Path, iterations: int, rank: int = 0, **options: Any) -> tuple[Kernel, Tracer, str]:
    kernel = Kernel(
        {"all": Everything(**options), "brackets": Brackets()}, RunOptions(until=Span(5, "iters"), work_dir=folder)
    )
    kernel.state.rank = rank
    out = io.StringIO()
    tracer = Tracer(kernel.state, iterations, out)
    try:
        kernel.run()
    except AssertionError:
        assert options
    return kernel, tracer, out.getvalue()


def test_events_with_their_plugins_and_times(tmp_path: Path):
    _, _, tree = traced(tmp_path, 2)
    lines = tree.splitlines()
    assert lines[0] == "trace: milliseconds of each event and of each plugin in it"
    rows = [(line[:48].rstrip(), float(line[48:])) for line in lines[1:]]
    names = [name for name, _ in rows if not name.startswith("(between")]
    step = ["before_train_iter", "train_step", "  all", "after_train_iter"]
    assert names == [
        *("setup", "build_loader", "  all", "build_model", "  all", "prepare_model", "before_run"),
        "before_train_epoch",
        *step,
        *step,
    ]
    times = [seconds for name, seconds in rows if name in ("train_step", "  all")][-4:]
    assert all(time >= 2 for time in times)


def test_the_calls_as_json_lines(tmp_path: Path):
    traced(tmp_path, 1)
    calls = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    step, answer = (call for call in calls if call["name"] == "train_step")
    assert (step["depth"], step["plugin"], step["iteration"]) == (0, "", 0)
    assert (answer["depth"], answer["plugin"]) == (1, "all")
    assert 0.002 <= answer["seconds"] <= step["seconds"]
    assert step["start"] <= answer["start"]


def test_it_is_over_when_its_iterations_are(tmp_path: Path):
    kernel, tracer, tree = traced(tmp_path, 2)
    assert kernel.state.iter == 5
    assert tree.count("train_step") == 2
    assert "after_run" not in tree
    count = len(tracer.calls)
    kernel.state.hook.train_step(run=kernel.state, batch=1)
    assert len(tracer.calls) == count


def test_a_run_shorter_than_the_trace_is_shown_to_its_end(tmp_path: Path):
    _, _, tree = traced(tmp_path, 99)
    assert tree.count("train_step") == 5
    assert tree.splitlines()[-1].startswith("after_run")


def test_a_run_that_fails_is_shown_to_its_end(tmp_path: Path):
    kernel, _, tree = traced(tmp_path, 99, fail_at=1)
    assert kernel.state.iter == 1
    names = [line.split()[0] for line in tree.splitlines() if not line.startswith("(between")]
    assert names[-4:] == ["train_step", "all", "on_error", "after_run"]
    assert kernel.state.error.__notes__[0].startswith("raised in plugin 'all' (")


def test_only_the_main_process_prints_it(tmp_path: Path):
    _, _, tree = traced(tmp_path, 2, rank=1)
    assert tree == ""
    assert not (tmp_path / "trace.jsonl").exists()


@pytest.mark.parametrize("iterations", [1, 3])
def test_it_begins_where_the_run_stands(tmp_path: Path, iterations: int):
    kernel = Kernel({"all": Everything()}, RunOptions(until=Span(5, "iters"), work_dir=tmp_path))
    kernel.state.iter = kernel.state.batch = 1
    out = io.StringIO()
    Tracer(kernel.state, iterations, out)
    kernel.run()
    assert out.getvalue().count("train_step") == iterations
