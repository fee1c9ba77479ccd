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

    @hookimpl(wrapper=True, specname="train_step")
    def _around(self) -> Iterator[None]:
        time.sleep(0.002)
        losses = yield
        time.sleep(0.004)
        return {**losses, "more": 1.0}


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
    rows = [(line[:48].rstrip(), float(line[48:] or 0)) for line in lines[1:]]
    names = [name for name, _ in rows if not name.startswith("(between")]
    brackets = ["  brackets (before)", "  all", "  brackets (after)"]
    step = ["before_train_iter", "train_step", *brackets, "after_train_iter"]
    assert names == [
        *("setup", "build_loader (train)", "  all", "build_model", "  all", "prepare_model", "before_run"),
        "before_train_epoch",
        "iteration 1",
        *step,
        "iteration 2",
        *step,
    ]
    times = dict(rows)
    assert [times[name] >= least for name, least in zip(brackets, (2, 2, 4), strict=True)] == [True] * 3
    assert times["train_step"] > sum(times[name] for name in brackets) - 0.1  # they are rounded


def test_the_calls_as_json_lines(tmp_path: Path):
    traced(tmp_path, 1)
    calls = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    step, before, answer, after = (call for call in calls if call["name"] == "train_step")
    assert (step["depth"], step["plugin"], step["iteration"]) == (0, "", 1)
    assert (answer["depth"], answer["plugin"]) == (1, "all")
    assert 0.002 <= answer["seconds"] <= step["seconds"]
    assert step["start"] <= before["start"] <= answer["start"] <= after["start"]
    assert [(call["plugin"], call["detail"]) for call in (before, after)] == [
        ("brackets", "before"),
        ("brackets", "after"),
    ]
    assert after["seconds"] >= 0.004


def test_an_iterations_number_is_the_same_for_all_its_calls(tmp_path: Path):
    traced(tmp_path, 2)
    calls = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    numbers = [(call["name"], call["iteration"]) for call in calls if call["depth"] == 0]
    step = ["before_train_iter", "train_step", "after_train_iter"]
    assert numbers[-6:] == [(name, number) for number in (1, 2) for name in step]
    assert {number for _, number in numbers[:-6]} == {0}


@pytest.mark.parametrize("handles", [False, True])
def test_a_wrapper_sees_what_others_raise(tmp_path: Path, handles: bool):
    @plugin
    class Guards:
        """Around every step."""

        @hookimpl(wrapper=True)
        def train_step(self) -> Iterator[None]:
            try:
                return (yield)
            except AssertionError:
                if handles:
                    return {"loss": 0.0}
                raise

    kernel = Kernel(
        {"all": Everything(fail_at=1), "guards": Guards()}, RunOptions(until=Span(5, "iters"), work_dir=tmp_path)
    )
    out = io.StringIO()
    Tracer(kernel.state, 99, out)
    if handles:
        assert kernel.run().iter == 5
    else:
        with pytest.raises(AssertionError) as caught:
            kernel.run()
        assert caught.value.__notes__[0].startswith("raised in plugin 'all' (")
    assert out.getvalue().count("guards (after)") == (5 if handles else 2)


def test_a_wrapper_that_does_not_yield_is_told_as_ever(tmp_path: Path):
    @plugin
    class Empty:
        """It should yield."""

        @hookimpl(wrapper=True)
        def setup(self) -> Iterator[None]:
            yield from ()

    kernel = Kernel({"all": Everything(), "empty": Empty()}, RunOptions(until=Span(5, "iters"), work_dir=tmp_path))
    Tracer(kernel.state, 1, io.StringIO())
    with pytest.raises(RuntimeError, match="did not yield"):
        kernel.run()


def test_it_is_over_when_its_iterations_are(tmp_path: Path):
    kernel, tracer, tree = traced(tmp_path, 2)
    assert kernel.state.iter == 5
    assert tree.count("train_step") == 2
    assert "after_run" not in tree
    count = len(tracer.calls)
    kernel.state.hook.train_step(run=kernel.state, model=None, batch=1)
    assert len(tracer.calls) == count


def test_a_run_shorter_than_the_trace_is_shown_to_its_end(tmp_path: Path):
    _, _, tree = traced(tmp_path, 99)
    assert tree.count("train_step") == 5
    assert tree.splitlines()[-1].startswith("after_run")


def test_a_run_that_fails_is_shown_to_its_end(tmp_path: Path):
    kernel, _, tree = traced(tmp_path, 99, fail_at=1)
    assert kernel.state.iter == 1
    names = [line.split()[0] for line in tree.splitlines() if not line.startswith("(between")]
    assert names[-6:] == ["train_step", "brackets", "all", "brackets", "on_error", "after_run"]
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
    assert "\niteration 2\n" in out.getvalue()


def test_a_resume_does_not_use_it_up(tmp_path: Path):
    @plugin
    class Resumes:
        """It goes on from a third iteration."""

        @hookimpl
        def before_run(self, run: Any) -> None:
            run.iter = run.batch = 3

    kernel = Kernel({"all": Everything(), "resumes": Resumes()}, RunOptions(until=Span(5, "iters"), work_dir=tmp_path))
    out = io.StringIO()
    Tracer(kernel.state, 1, out)
    kernel.run()
    assert [line for line in out.getvalue().splitlines() if line.startswith("iteration")] == ["iteration 4"]
