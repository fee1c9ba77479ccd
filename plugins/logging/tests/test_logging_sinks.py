"""Sinks: TensorBoard, one of somebody else's, what a config says, and disks that are full."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from detkernel import ConfigError, Run, hookimpl, plugin, state
from detkernel.config import load
from detkernel.testing import tiny_run
from detkernel_logging.console import Console
from detkernel_logging.files import JsonLines, append
from detkernel_logging.log import Log
from detkernel_logging.progress import Progress
from detkernel_logging.sink import Entry, Figures, Sink
from detkernel_logging.tensorboard import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@plugin
class Mine(Sink):
    """Keeps what it is given."""

    entries: list[Entry] = state(factory=list)
    calls: list[str] = state(factory=list)

    def start(self, run: Run, progress: Progress) -> None:
        self.calls.append(f"start at {run.iter}")

    def write(self, run: Run, entry: Entry) -> None:
        self.entries.append(entry)

    def stop(self) -> None:
        self.calls.append("stop")


@plugin
class Metric:
    """What an evaluator publishes."""

    priority = "high"

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        run.metrics["coco/bbox_mAP"] = 0.25 + run.iter / 100


def test_a_sink_of_ones_own_is_given_everything(tmp_path: Path):
    mine = Mine()
    tiny_run({"log": Log(interval=2, sinks=[mine]), "metric": Metric()}, validate="4 iters", work_dir=tmp_path)
    assert mine.calls == ["start at 0", "stop"]
    figures = [entry.figures for entry in mine.entries if entry.figures is not None]
    assert [(f.mode, f.epoch, f.iter, f.step) for f in figures] == [
        ("train", 1, 2, 2), ("train", 1, 4, 4), ("val", 1, 4, 4)
    ]  # fmt: skip
    assert figures[-1] == Figures("val", 1, 4, 4, {"coco/bbox_mAP": 0.29})
    assert mine.entries[0].text.endswith("1143 of them trained")
    assert {entry.level for entry in mine.entries} == {logging.INFO}
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@plugin
class StartAt:
    """A resume, as far as a sink can tell."""

    iter: int = state(default=0)

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        run.iter = run.batch = self.iter


def test_tensorboard_shows_losses_and_metrics(tmp_path: Path):
    plugins = {"log": Log(interval=2, sinks=[TensorBoard()]), "metric": Metric()}
    tiny_run(plugins, until="1 epoch", validate="1 epoch", work_dir=tmp_path)
    shown = scalars(tmp_path)
    assert {"train/loss", "train/loss_cls", "train/lr", "train/time", "val/coco/bbox_mAP"} <= set(shown)
    assert [step for step, _ in shown["train/loss"]] == [2, 4]
    assert shown["val/coco/bbox_mAP"] == [(4, pytest.approx(0.29))]


def test_tensorboard_hides_what_lies_beyond_the_place_of_a_resume(tmp_path: Path):
    for start in (0, 3):
        resumed = StartAt()
        resumed.iter = start
        log = Log(interval=1, sinks=[TensorBoard()])
        tiny_run({"log": log, "start": resumed}, until="4 iters" if start else "5 iters", work_dir=tmp_path)
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 2, 3, 4]


def write_config(folder: Path, log: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"run: {{until: 1 epoch}}\nlog: {log}\n")
    return path


def test_a_config_names_sinks(tmp_path: Path):
    config = load(str(write_config(tmp_path, "{interval: 10, sinks: [console, {use: json_lines}, tensorboard]}")), [])
    log = config.plugins["log"]
    assert isinstance(log, Log)
    assert [type(sink) for sink in log.sinks] == [Console, JsonLines, TensorBoard]
    default = load(str(write_config(tmp_path, "{}")), [])
    assert default.plain["log"] == {
        "use": "log", "interval": 50, "sinks": [{"use": "console"}, {"use": "text_log"}, {"use": "json_lines"}]
    }  # fmt: skip


def test_a_missing_tensorboard_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"log.sinks.0: tensorboard is not installed: `pip install tensorboard`, or"):
        load(str(write_config(tmp_path, "{sinks: [tensorboard]}")), [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    run = tiny_run({"log": Log(interval=1)}, until="4 iters", work_dir=tmp_path)
    assert run.iter == 4
    said = capfd.readouterr().err
    assert said.count("TextLog cannot write: [Errno 28] No space left on device; the run goes on without") == 1
    assert said.count("JsonLines cannot write") == 1
    assert "done after" in said


def test_a_sink_that_can_write_again_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    @plugin
    class Briefly(Mine):
        """Is out of space in the first two iterations."""

        def write(self, run: Run, entry: Entry) -> None:
            if run.iter in (1, 2):
                raise OSError("no room")
            super().write(run, entry)

    sink = Briefly()
    tiny_run({"log": Log(interval=1, sinks=[Console(), sink])}, until="4 iters", work_dir=tmp_path)
    assert [entry.figures.step for entry in sink.entries if entry.figures] == [3, 4]
    assert capfd.readouterr().err.count("Briefly cannot write: no room; the run goes on without") == 1


def test_a_removed_folder_is_made_again_and_a_blocked_one_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"

    @plugin
    class Vandal:
        """Removes the work dir in iteration 2, and puts a file in its place in iteration 4."""

        @hookimpl
        def before_train_iter(self, run: Run) -> None:
            if run.iter in (2, 4):
                shutil.rmtree(folder)
            if run.iter == 3:
                assert len((folder / "log.jsonl").read_text().splitlines()) == 1
            if run.iter == 4:
                folder.write_text("in the way")

    tiny_run({"log": Log(interval=1), "vandal": Vandal()}, until="6 iters", work_dir=folder)
    said = capfd.readouterr().err
    assert said.count("cannot write") == 2
    assert "Iter [6/6]" in said


def test_tensorboard_without_a_place_to_write_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").write_text("in the way")
    run = tiny_run({"log": Log(interval=1, sinks=[Console(), TensorBoard()])}, work_dir=tmp_path)
    assert run.iter == 4
    assert capfd.readouterr().err.count("TensorBoard cannot write") == 1


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "log.txt"
    append(path, "x" * 60)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            append(path, "y" * 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append(path, "z\udce4")
    assert path.read_text() == "x" * 60 + "\nz\\udce4\n"


def test_the_plugins_are_imported_without_torch_or_rich():
    code = (
        "import sys, detkernel_logging.log, detkernel_logging.tensorboard;"
        "print([name for name in ('torch', 'rich', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_forked_worker_leaves_the_sinks_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    @plugin
    class Worker:
        """Forks, as a loader does, and logs from there."""

        @hookimpl
        def before_train_iter(self, run: Run) -> None:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forks beside threads
                child = os.fork()
            if child == 0:
                run.log.info("of no interest")
                run.log.warning("a worker in trouble")
                os._exit(0)
            os.waitpid(child, 0)

    tiny_run({"log": Log(), "worker": Worker()}, until="1 iters", work_dir=tmp_path)
    assert "a worker in trouble" in capfd.readouterr().err
    text = (tmp_path / "log.txt").read_text()
    assert "in trouble" not in text
    assert "no interest" not in text
