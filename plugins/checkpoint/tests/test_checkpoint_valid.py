"""A valid state is never lost to a broken one: NaN and infinities, and validations that fail."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from detkernel import CheckpointError, Run, Span, UserError, hookimpl, option, plugin
from detkernel_checkpoint import checkpoint_file, finite
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_detection import Losses
from detkernel_detection.testing import TinySgd, tiny_kernel, tiny_run


def names(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").glob("*iter_*.pt"))


@plugin
class Break:
    """Makes something NaN or infinite after an iteration, and only there."""

    at: int = option(default=5, help="iteration")
    what: Literal["weight", "buffer", "moment", "loss", "nothing"] = option(default="weight", help="what")
    value: float = option(default=float("nan"), help="to what")

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        if run.iter != self.at:
            return
        with torch.no_grad():
            if self.what == "weight":
                run.model[3].weight[0, 0] = self.value
            elif self.what == "buffer":
                run.model[0][1].running_var[0] = self.value
            elif self.what == "moment":
                next(iter(run.optimizer.state.values()))["exp_avg_sq"][0] = self.value

    @hookimpl(wrapper=True)
    def train_step(self, run: Run) -> Generator[None, Losses, Losses]:
        losses = yield
        if self.what == "loss" and run.iter + 1 == self.at:
            return {name: loss * self.value for name, loss in losses.items()}
        return losses


@plugin
class TinyAdam(TinySgd):
    """An optimizer that keeps moments."""

    @hookimpl
    def before_run(self, run: Run) -> None:
        super().before_run(run)
        run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=self.lr)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("weight", r"model\.3\.weight"),
        ("buffer", r"model\.0\.1\.running_var"),
        ("moment", r"optimizer\.state\.0\.exp_avg_sq"),
    ],
)
def test_a_broken_state_is_never_written(tmp_path: Path, what: Any, value: float, named: str, asynchronous: bool):
    checkpoint = Checkpoint(every=Span(2, "iters"), keep=1, asynchronous=asynchronous)
    plugins = {"optimizer": TinyAdam(lr=1e-3), "break": Break(at=6, what=what, value=value), "checkpoint": checkpoint}
    with pytest.raises(CheckpointError, match=rf"the state at iteration 6 cannot be trained on: .*{named}") as caught:
        tiny_run(plugins, until="20 iters", work_dir=tmp_path)
    assert "iter_6.pt was not written" in str(caught.value)
    assert names(tmp_path) == ["iter_4.pt"]
    assert "To go on from " in caught.value.__notes__[-1]
    assert "iter_4.pt, of iteration 4, run again" in caught.value.__notes__[-1]


def test_a_state_that_breaks_in_the_last_iteration_does_not_become_the_end(tmp_path: Path):
    plugins = {"break": Break(at=8), "checkpoint": Checkpoint(every=Span(3, "iters"))}
    with pytest.raises(CheckpointError, match="the state at iteration 8 cannot be trained on") as caught:
        tiny_run(plugins, until="8 iters", work_dir=tmp_path)
    assert names(tmp_path) == ["iter_3.pt", "iter_6.pt"]
    assert caught.value.__notes__[-1].endswith(
        "iter_6.pt, of iteration 6, run again; 2 iterations after it will run again"
    )


def test_a_broken_state_is_not_the_best(tmp_path: Path):
    @plugin
    class Score:
        """Gets better and better."""

        @hookimpl
        def after_val_epoch(self, run: Run) -> None:
            run.metrics.publish("mAP", run.iter, better="higher")

    plugins = {"score": Score(), "break": Break(at=3), "checkpoint": Checkpoint(every=None, best="mAP")}
    with pytest.raises(CheckpointError, match=r"best_iter_4.pt was not written"):
        tiny_run(plugins, until="20 iters", validate="2 iters", work_dir=tmp_path)
    assert names(tmp_path) == ["best_iter_2.pt"]


def _write_as_an_older_version(monkeypatch: pytest.MonkeyPatch, work_dir: Path, at: int, until: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(finite, "check", lambda *_: None)
        tiny_run({"break": Break(at=at), "checkpoint": Checkpoint()}, until=until, work_dir=work_dir)


def test_a_resume_goes_behind_checkpoints_that_are_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    _write_as_an_older_version(monkeypatch, tmp_path, at=6, until="3 epochs")
    assert names(tmp_path) == ["iter_12.pt", "iter_4.pt", "iter_8.pt"]
    resume = Checkpoint(resume=str(tmp_path / "checkpoints" / "iter_8.pt"), accept_changes=True)
    with pytest.raises(CheckpointError, match=r"iter_8.pt: .* not finite \(NaN or infinite\): nothing can go on from"):
        tiny_run({"break": Break(what="nothing"), "checkpoint": resume}, until="3 epochs", work_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"iter_12.pt: .*not finite"):
        tiny_kernel(
            {"checkpoint": Checkpoint(resume=str(tmp_path / "checkpoints" / "iter_12.pt"))}, work_dir=tmp_path
        ).test()
    caplog.clear()
    checkpoint = Checkpoint(accept_changes=True)
    with caplog.at_level(logging.INFO, "detkernel"):
        run = tiny_run({"break": Break(what="nothing"), "checkpoint": checkpoint}, until="3 epochs", work_dir=tmp_path)
    told = [record.getMessage() for record in caplog.records]
    assert sum("not finite (NaN or infinite): nothing can go on from it; an older one is taken" in t for t in told) == 2
    assert any("going on from" in text and "iter_4.pt" in text for text in told)
    assert run.model[3].weight.isfinite().all()
    assert checkpoint_file.read(tmp_path / "checkpoints" / "iter_12.pt")["model"]["3.weight"].isfinite().all()
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "aside_1").iterdir()) == ["iter_12.pt", "iter_8.pt"]


def test_where_all_checkpoints_are_broken_nothing_starts_afresh_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _write_as_an_older_version(monkeypatch, tmp_path, at=2, until="1 epoch")
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints can be used; .* not finite"):
        tiny_run({"break": Break(at=2), "checkpoint": Checkpoint()}, until="2 epochs", work_dir=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path, value: float):
    weights = tiny_run({}, until="1 iter", work_dir=tmp_path / "first").model.state_dict()
    weights["0.1.running_mean"][2] = value
    torch.save(weights, tmp_path / "weights.pt")
    for folder in "second", "third":
        checkpoint = Checkpoint(load_from=tmp_path / "weights.pt", load_from_classes="same_order")
        kernel = tiny_kernel({"checkpoint": checkpoint}, work_dir=tmp_path / folder)
        with pytest.raises(
            CheckpointError, match=r"weights.pt: it has .* not finite: 0\.1\.running_mean is NaN or inf"
        ):
            kernel.run() if folder == "second" else kernel.test()


def test_load_from_is_not_passed_over_where_there_is_something_to_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def again(load_from: str | None, resume: str = "auto") -> Run:
        path = tmp_path / load_from if load_from else None
        checkpoint = Checkpoint(load_from=path, load_from_classes="same_order", resume=resume)
        return tiny_run({"checkpoint": checkpoint}, until="1 epoch", work_dir=tmp_path / "run")

    torch.save(tiny_run({}, until="1 iter", work_dir=tmp_path / "other").model.state_dict(), tmp_path / "a.pt")
    again(None)
    message = r"load_from is .*a\.pt, but .*iter_4.pt is there to go on from, of a run that began with other weights"
    with pytest.raises(CheckpointError, match=message) as caught:
        again("a.pt")
    assert "  checkpoint.resume=never     start with it here" in str(caught.value)
    with pytest.raises(UserError, match=r"load_from: '.*nothere.pt': no such file"):
        again("nothere.pt")
    newest = str(tmp_path / "run" / "checkpoints" / "iter_4.pt")
    with pytest.raises(CheckpointError, match=r"iter_4.pt is there to go on from"):
        again("a.pt", resume=newest)
    again("a.pt", resume="never")
    (tmp_path / "a.pt").unlink()  # a run that began with these weights goes on without them
    with caplog.at_level("INFO", "detkernel"):
        again("a.pt")
    assert "a.pt: its weights were loaded when this run began" in caplog.text
    with pytest.raises(UserError, match=r"b.pt': no such file"):
        again("b.pt")
    again(None)


@pytest.mark.parametrize("gone", ["checkpoints", "."])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_work_dir_that_is_removed_in_mid_run_is_made_again(
    tmp_path: Path, gone: str, asynchronous: bool, caplog: pytest.LogCaptureFixture
):
    @plugin
    class Remove:
        """Removes the folder, and fails later."""

        at: int = option(default=5, help="iteration")
        fails: int = option(default=0, help="iteration")

        @hookimpl(tryfirst=True)
        def after_train_iter(self, run: Run) -> None:
            if run.iter == self.at:
                run.bus["checkpoint"]._writer.collect(wait=True)  # type: ignore[attr-defined]
                shutil.rmtree(run.work_dir / gone)
            if run.iter == self.fails:
                raise UserError("failed")

    checkpoint = Checkpoint(every=Span(2, "iters"), asynchronous=asynchronous)
    tiny_run({"remove": Remove(), "checkpoint": checkpoint}, until="8 iters", work_dir=tmp_path / "a")
    assert names(tmp_path / "a") == ["iter_6.pt", "iter_8.pt"]
    assert (tmp_path / "a" / "config.yaml").exists()
    assert "checkpoints is gone, with what was saved there: it is made again" in caplog.text
    other = Checkpoint(every=Span(4, "iters"), asynchronous=asynchronous)
    with pytest.raises(UserError, match="failed") as caught:
        tiny_run({"remove": Remove(fails=6), "checkpoint": other}, until="8 iters", work_dir=tmp_path / "b")
    assert "No checkpoint of this run is in" in caught.value.__notes__[-1]


def test_a_buffer_that_is_built_infinite_may_be(tmp_path: Path):
    @plugin
    class Mask:
        """Gives the model a mask as attention has it."""

        @hookimpl
        def prepare_model(self, run: Run) -> None:
            run.model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    plugins = {"mask": Mask(), "checkpoint": Checkpoint()}
    tiny_run(plugins, until="1 epoch", work_dir=tmp_path)
    run = tiny_run(plugins, until="2 epochs", work_dir=tmp_path)
    assert run.iter == 8
    assert names(tmp_path) == ["iter_4.pt", "iter_8.pt"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_numbers_that_are_finite(dtype: torch.dtype):
    value = torch.ones(70_001, dtype=dtype) * 60_000
    assert finite.is_finite(value)
    for bad in (float("nan"), float("inf"), float("-inf")):
        value[50_000] = bad
        assert not finite.is_finite(value)


def test_other_numbers_are_finite_too():
    assert finite.is_finite(torch.tensor([2**62]))
    assert finite.is_finite(torch.empty(0))
    assert finite.is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not finite.is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


def test_a_copy_from_before_a_validation_is_not_written_where_it_goes_well(tmp_path: Path):
    plugins = {"checkpoint": Checkpoint(every=None)}
    tiny_run(plugins, until="3 epochs", validate="2 iters", work_dir=tmp_path)
    assert names(tmp_path) == ["iter_12.pt"]
