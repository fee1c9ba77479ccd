"""What is kept, what a failing disk does, and what saving costs."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import CheckpointError, ConfigError, Run, Span, UserError, hookimpl, option, plugin, state
from detkernel.metrics import Better
from detkernel_checkpoint import checkpoint_file
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_checkpoint.folder import Entry, Folder
from detkernel_checkpoint.snapshot import Snapshot
from detkernel_detection.testing import tiny_kernel, tiny_run


def names(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").glob("*iter_*"))


def test_the_end_is_saved_whatever_else_is(tmp_path: Path):
    for number, every in enumerate((None, Span(2, "epochs"), Span(5, "iters"))):
        tiny_run({"checkpoint": Checkpoint(every=every)}, until="6 iters", work_dir=tmp_path / str(number))
    assert [names(tmp_path / str(number)) for number in range(3)] == [
        ["iter_6.pt"],
        ["iter_6.pt"],
        ["iter_5.pt", "iter_6.pt"],
    ]


def test_only_the_newest_are_kept(tmp_path: Path):
    tiny_run({"checkpoint": Checkpoint(every=Span(1, "iters"), keep=2)}, until="12 iters", work_dir=tmp_path)
    assert names(tmp_path) == ["iter_11.pt", "iter_12.pt"]


@plugin
class Metrics:
    """An evaluator with metrics made up in advance."""

    values: list[float] = option(help="one a validation")
    name: str = option(default="coco/bbox_mAP", help="of the metric")
    better: Better | None = option(default="higher", help="which")
    _left: list[float] = state(factory=list)

    @hookimpl
    def before_run(self) -> None:
        self._left = list(self.values)

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        run.metrics.publish(self.name, np.float64(self._left.pop(0)), self.better)


@pytest.mark.parametrize(
    ("metric", "better", "rule", "values", "best"),
    [
        ("coco/bbox_AP/missing_hole", "higher", None, [0.1, 0.3, 0.2, 0.3], 2),
        ("val/recall_loss", "lower", None, [0.5, 0.3, 0.2, 0.4], 3),
        ("mine/score", None, "lower", [0.5, 0.6, float("nan"), 0.4], 4),
        ("mine/score", "lower", "higher", [0.5, 0.6, 0.3, 0.4], 2),
        ("coco/bbox_mAP", "higher", None, [float("nan"), 0.0, 0.0, float("nan")], 2),
    ],
)
def test_the_best_is_kept(tmp_path: Path, metric: str, better: Any, rule: Any, values: list[float], best: int):
    plugins = {
        "metrics": Metrics(values=values, name=metric, better=better),
        "checkpoint": Checkpoint(every=None, best=metric, rule=rule),
    }
    tiny_run(plugins, until="4 iters", validate="1 iter", work_dir=tmp_path)
    assert names(tmp_path) == [f"best_iter_{best}.pt", "iter_4.pt"]
    content = checkpoint_file.read(tmp_path / "checkpoints" / f"best_iter_{best}.pt")
    assert content["position"]["validated"] == content["position"]["iter"] == best
    assert content["position"]["metrics"][metric] == values[best - 1]


def test_the_best_before_an_interruption_stays_the_best(tmp_path: Path):
    def plugins(values: list[float]) -> dict[str, object]:
        return {"metrics": Metrics(values=values), "checkpoint": Checkpoint(best="coco/bbox_mAP", accept_changes=True)}

    tiny_run(plugins([0.4]), until="1 epoch", validate="1 epoch", work_dir=tmp_path)
    tiny_run(plugins([0.3]), until="2 epochs", validate="1 epoch", work_dir=tmp_path)
    assert names(tmp_path) == ["best_iter_4.pt", "iter_4.pt", "iter_8.pt"]


def test_a_metric_without_a_direction_needs_a_rule(tmp_path: Path):
    plugins = {"metrics": Metrics(values=[0.1], better=None), "checkpoint": Checkpoint(best="coco/bbox_mAP")}
    message = r"best: 'coco/bbox_mAP' does not say whether higher or lower is better: .* set `rule` to higher or lower"
    with pytest.raises(ConfigError, match=message):
        tiny_run(plugins, validate="1 iter", work_dir=tmp_path)
    assert names(tmp_path) == ["iter_1.pt"]  # what was trained is not lost
    with pytest.raises(ConfigError, match=message):
        tiny_kernel(plugins, validate="1 iter", work_dir=tmp_path / "check").check()


def test_a_metric_that_is_always_nan_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    plugins = {"metrics": Metrics(values=[float("nan")] * 4), "checkpoint": Checkpoint(best="coco/bbox_mAP")}
    tiny_run(plugins, until="4 iters", validate="1 iter", work_dir=tmp_path)
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        "no checkpoint can be the best by coco/bbox_mAP: it is nan, as a metric is where the validation data has "
        "nothing that it measures; see `best`"
    ]
    assert names(tmp_path) == ["iter_4.pt"]


def test_a_metric_that_is_not_there_is_told_with_its_neighbours(tmp_path: Path):
    plugins = {"metrics": Metrics(values=[0.1]), "checkpoint": Checkpoint(best="coco/bbox_map")}
    with pytest.raises(ConfigError, match="no metric is named 'coco/bbox_map', did you mean 'coco/bbox_mAP'"):
        tiny_run(plugins, validate="1 iter", work_dir=tmp_path)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="every: expected at least 1 epoch or iteration, or null, got '0 iters'"):
        Checkpoint(every=Span(0, "iters"))


def test_checking_leaves_nothing_behind(tmp_path: Path):
    kernel = tiny_kernel({"checkpoint": Checkpoint()}, work_dir=tmp_path / "work")
    assert kernel.check()["checkpoints"].startswith("every 1 epoch and at the end, in ")
    assert not (tmp_path / "work").exists()


@plugin
class Averaged:
    """Offers other weights than those in training."""

    @hookimpl
    def before_run(self, run: Run) -> None:
        self._run = run

    def model_state_dict(self) -> dict[str, torch.Tensor]:
        return {name: tensor * 0 for name, tensor in self._run.bare_model.state_dict().items()}


def test_weights_that_a_plugin_offers_are_the_models_and_the_trained_ones_are_resumed(tmp_path: Path):
    run = tiny_run({"checkpoint": Checkpoint(), "averaged": Averaged()}, work_dir=tmp_path)
    content = torch.load(tmp_path / "checkpoints" / "iter_4.pt", weights_only=True)
    assert all(tensor.abs().sum() == 0 for tensor in content["model"].values())
    again = tiny_run({"checkpoint": Checkpoint(), "averaged": Averaged()}, work_dir=tmp_path)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_test_takes_the_newest_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trained = tiny_run({"checkpoint": Checkpoint()}, work_dir=tmp_path)
    with caplog.at_level("INFO", "detkernel"):
        tested = tiny_kernel({"checkpoint": Checkpoint()}, work_dir=tmp_path).test()
    assert torch.equal(tested.model[3].weight, trained.model[3].weight)
    assert "testing 9 of 9 tensors from" in caplog.text


@pytest.mark.parametrize(("made", "what"), [(False, "no such folder"), (True, "holds no checkpoint")])
def test_a_test_without_weights_is_refused(tmp_path: Path, made: bool, what: str):
    if made:
        (tmp_path / "work" / "checkpoints").mkdir(parents=True)
    message = rf"work/checkpoints: {what}, so there are no weights to test. .*checkpoint\.resume=never"
    with pytest.raises(CheckpointError, match=message):
        tiny_kernel({"checkpoint": Checkpoint()}, work_dir=tmp_path / "work").test()
    assert (tmp_path / "work").exists() == made
    run = tiny_kernel({"checkpoint": Checkpoint(resume="never")}, work_dir=tmp_path / "work").test()
    assert run.model[3].weight.isfinite().all()


@plugin
class Odd:
    """Has a state that no checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {"a": {1, 2}}}

    def load_state_dict(self, state: Any) -> None: ...


def test_a_state_that_cannot_be_saved_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"plugins\.odd\.seen\.a is set; a state holds only tensors and plain values"):
        tiny_run({"checkpoint": Checkpoint(), "odd": Odd()}, work_dir=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives a thread a priority of its own")
def test_writing_steps_back_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, seen = checkpoint_file.write, []

    def noted(path: Path, payload: object) -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        write(path, payload)

    monkeypatch.setattr(checkpoint_file, "write", noted)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    tiny_run({"checkpoint": Checkpoint()}, until="1 iters", work_dir=tmp_path)
    assert seen == [min(before + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_no_thread_that_writes_outlives_what_it_writes(tmp_path: Path):
    """Its OpenMP threads would live as long, and slow those of training down."""
    seen: list[bool] = []

    @plugin
    class Look:
        """Sees what threads there are behind a save."""

        @hookimpl(trylast=True)
        def after_train_iter(self, run: Run) -> None:
            run.bus["checkpoint"]._writer.collect(wait=True)
            for thread in threading.enumerate():
                if thread.name.startswith("detkernel-checkpoint"):
                    thread.join(timeout=2)
                    seen.append(thread.is_alive())

    tiny_run({"checkpoint": Checkpoint(every="1 iters"), "look": Look()}, until="3 iters", work_dir=tmp_path)
    assert not any(seen)
    assert len(names(tmp_path)) == 3


def test_a_snapshot_does_not_follow_the_state(tmp_path: Path):
    weight, snapshot = torch.ones(3), Snapshot()
    tree = {"a": weight, "b": [weight, (np.float64(0.5), {2: None})], "c": weight[:2]}
    first = snapshot.take(tree)
    weight += 1
    assert first["a"].tolist() == [1, 1, 1]
    assert first["b"][0] is first["a"]
    assert type(first["b"][1][0]) is float
    second = snapshot.take(tree)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second["c"].tolist() == [2, 2]


@plugin
class FullDisk:
    """Between two iterations no file may grow beyond some bytes, as on a disk that is full."""

    begin: int = option(help="iteration")
    end: int = option(default=10**9, help="iteration")

    @hookimpl
    def before_run(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    @hookimpl(tryfirst=True)
    def after_train_iter(self, run: Run) -> None:
        full = self.begin <= run.iter < self.end
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.fixture
def limits() -> Iterator[None]:
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.usefixtures("limits")
def test_a_full_disk_stops_nothing_and_is_reported_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    checkpoint = Checkpoint(every=Span(2, "iters"), asynchronous=False)
    tiny_run({"checkpoint": checkpoint, "disk": FullDisk(begin=3, end=5)}, until="8 iters", work_dir=tmp_path)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "iter_4.pt could not be written: File too large; training goes on. Safe is" in errors[0]
    assert errors[0].endswith("iter_2.pt, of iteration 2")
    assert names(tmp_path) == ["iter_2.pt", "iter_6.pt", "iter_8.pt"]


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_end_that_cannot_be_saved_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, asynchronous: bool):
    checkpoint = Checkpoint(every=Span(6, "iters"), asynchronous=asynchronous)
    with pytest.raises(CheckpointError, match=r"the run ended at iteration 6, but .*iter_6.pt could not be written"):
        tiny_run({"checkpoint": checkpoint, "disk": FullDisk(begin=5)}, until="6 iters", work_dir=tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert names(tmp_path) == []


@pytest.mark.usefixtures("limits")
def test_an_end_that_cannot_be_saved_is_an_error(tmp_path: Path):
    checkpoint = Checkpoint(
        every=Span(2, "iters"), asynchronous=False
    )  # or the disk could be full before iter_4 is out
    with pytest.raises(
        CheckpointError, match=r"the run ended at iteration 6, but .*iter_6.pt could not be written"
    ) as caught:
        tiny_run({"checkpoint": checkpoint, "disk": FullDisk(begin=5)}, until="6 iters", work_dir=tmp_path)
    assert caught.value.__notes__[0].startswith("To go on from ")
    assert caught.value.__notes__[0].endswith(
        "iter_4.pt, of iteration 4, run again; 2 iterations after it will run again"
    )
    assert names(tmp_path) == ["iter_2.pt", "iter_4.pt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB, where this machine lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@plugin
class At:
    """Runs a shell command on the work dir at an iteration."""

    iteration: int = option(help="when")
    command: str = option(help="what, with {} for the work dir")

    @hookimpl(tryfirst=True)
    def after_train_iter(self, run: Run) -> None:
        if run.iter == self.iteration:
            subprocess.run(self.command.format(run.work_dir), shell=True, check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="no mount")
@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("head -c 2m /dev/zero > {}/ballast || true", "No space left on device"),
        (
            "mount --bind {0}/checkpoints {0}/checkpoints && mount -o remount,ro,bind {0}/checkpoints",
            "Read-only file system",
        ),
    ],
)
def test_a_disk_that_fails_in_the_middle_loses_nothing(
    small_disk: Path, command: str, reason: str, caplog: pytest.LogCaptureFixture
):
    checkpoint = Checkpoint(every=Span(2, "iters"), asynchronous=False)  # or iter_2 might not be out yet
    plugins = {"checkpoint": checkpoint, "at": At(iteration=3, command=command)}
    with pytest.raises(CheckpointError, match=f"the run ended at iteration 8, but .*{reason}"):
        tiny_run(plugins, until="8 iters", work_dir=small_disk)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert all(reason in error and "\n" not in error and "iter_2.pt" in error for error in errors)
    assert [int(error.partition("iter_")[2].split(".")[0]) for error in errors] == [4, 6]
    assert checkpoint_file.read(small_disk / "checkpoints" / "iter_2.pt")["position"]["iter"] == 2
    assert not list((small_disk / "checkpoints").glob("*.tmp"))


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be written there: .*; free it, or set run.work_dir"):
        tiny_run({"checkpoint": Checkpoint()}, work_dir=tmp_path)


def test_a_work_dir_whose_name_is_too_long(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be listed: File name too long"):
        tiny_run({"checkpoint": Checkpoint()}, work_dir=tmp_path / ("a" * 300))


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_best_that_cannot_be_saved_is_told_though_the_end_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asynchronous: bool
):
    @plugin
    class Room(FullDisk):
        """Room is made behind the last validation."""

        @hookimpl(tryfirst=True)
        def after_run(self, run: Run) -> None:
            if pending := run.bus["checkpoint"]._writer._pending:
                pending.exception()  # the best is out, or is not
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    checkpoint = Checkpoint(every=None, best="coco/bbox_mAP", asynchronous=asynchronous)
    parts = {"checkpoint": checkpoint, "metrics": Metrics(values=[0.5]), "disk": Room(begin=1)}
    tiny_run(parts, until="4 iters", validate="4 iters", work_dir=tmp_path)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert ["best_iter_4.pt could not be written: File too large" in error for error in errors][-1:] == [True]
    assert names(tmp_path) == ["iter_4.pt"]


@pytest.mark.skipif(not shutil.which("mount"), reason="no mount")
def test_a_disk_that_is_full_from_the_start_is_one_message(small_disk: Path):
    subprocess.run(f"head -c 2m /dev/zero > {small_disk}/ballast || true", shell=True, check=True)
    with pytest.raises(UserError, match=r"cannot be written.*: No space left on device"):
        tiny_run({"checkpoint": Checkpoint()}, until="2 iters", work_dir=small_disk)


class TestNamesThatStay:
    """`last.pt` and `best.pt`, on file systems with and without links."""

    @pytest.fixture(params=["symbolic links", "hard links", "copies"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
        def refuse(*_: object) -> None:
            raise OSError("not on this file system")

        if request.param != "symbolic links":
            monkeypatch.setattr(Path, "symlink_to", refuse)
        if request.param == "copies":
            monkeypatch.setattr(Path, "hardlink_to", refuse)
        return Folder(tmp_path)

    def test_they_follow_the_newest_and_go_with_the_last(self, folder: Folder):
        for number in (1, 2):
            folder.name(number).write_text(f"state {number}")
            folder.name_newest()
            folder.name_newest()
            assert (folder.path / "last.pt").read_text() == f"state {number}"
        assert not (folder.path / "best.pt").exists()
        folder.name(1, best=True).write_text("best of 1")
        folder.name_newest()
        folder.name(2, best=True).write_text("best of 2")
        folder.name_newest()
        folder.prune(Entry(folder.name(2, best=True), 2, best=True), keep=None)
        assert (folder.path / "best.pt").read_text() == "best of 2"
        for entry in folder.entries()[:2]:
            entry.path.unlink()
        assert names(folder.path.parent) == []
        folder.name_newest()
        assert (folder.path / "last.pt").read_text() == "state 1"
        assert sorted(path.name for path in folder.path.glob("*.tmp")) == []

    def test_what_somebody_put_there_is_kept(self, folder: Folder):
        (folder.path / "best.pt").write_text("precious")
        folder.name(3, best=True).write_text("of this run, longer")
        folder.name_newest()
        assert (folder.path / "best.pt").read_text() == "of this run, longer"
        assert (folder.path / "best_1.pt").read_text() == "precious"


def test_a_run_leaves_them_and_goes_on_from_one(tmp_path: Path):
    run = tiny_run({"checkpoint": Checkpoint(every=Span(2, "iters"), keep=1)}, until="5 iters", work_dir=tmp_path)
    last = tmp_path / "checkpoints" / "last.pt"
    assert checkpoint_file.read(last)["position"]["iter"] == 5
    assert run.results["checkpoint"].endswith("checkpoints/last.pt")
    assert run.results["next"].startswith("detkernel ")
    other = Checkpoint(resume=str(last))
    assert tiny_run({"checkpoint": other}, until="7 iters", work_dir=tmp_path / "other").iter == 7
