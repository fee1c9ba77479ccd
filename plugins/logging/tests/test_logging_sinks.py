"""Sinks: TensorBoard, one of somebody else's, what a config says, and disks that are full."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from detkernel import ConfigError, Run, UserError, hookimpl, plugin, state
from detkernel.config import load
from detkernel_detection.testing import tiny_run
from detkernel_logging.console import Console
from detkernel_logging.files import JsonLines, TextLog, append
from detkernel_logging.log import Log
from detkernel_logging.progress import Progress
from detkernel_logging.sink import Entry, Metrics, Sink
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


@plugin(priority="high")
class Metric:
    """What an evaluator publishes."""

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        run.metrics["coco/bbox_mAP"] = 0.25 + run.iter / 100


def test_a_sink_of_ones_own_is_given_everything(tmp_path: Path):
    mine = Mine()
    tiny_run({"log": Log(interval=2, sinks=[mine]), "metric": Metric()}, validate="4 iters", work_dir=tmp_path)
    assert mine.calls == ["start at 0", "stop"]
    metrics = [entry.metrics for entry in mine.entries if entry.metrics is not None]
    assert [(f.mode, f.epoch, f.iter, f.step) for f in metrics] == [
        ("train", 1, 2, 2), ("train", 1, 4, 4), ("val", 1, 4, 4)
    ]  # fmt: skip
    assert metrics[-1] == Metrics("val", 1, 4, 4, {"coco/bbox_mAP": 0.29})
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
    log = load(str(write_config(tmp_path, "{sinks: [tensorboard]}")), []).plugins["log"]
    with pytest.raises(ConfigError, match=r"log.sinks.0: tensorboard is not installed: `pip install tensorboard`, or"):
        tiny_run({"log": log}, work_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process may get longer than this many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_said_once_for_each_sink_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sinks = [TextLog(), JsonLines(), TensorBoard()]  # no console: what pytest captures goes to files as well
    with full_disk(600):
        run = tiny_run({"log": Log(interval=1, sinks=sinks)}, until="20 iters", work_dir=tmp_path)
    assert run.iter == 20
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 3
    for name, file in ("text_log", "log.txt"), ("json_lines", "log.jsonl"):
        why = f"{tmp_path}/{file}: No space left on device"
        assert f"log.sinks ({name}) cannot write: {why}; the run goes on without" in said
        assert (tmp_path / file).read_text().endswith("\n"), "a line is written whole or not at all"
    assert (
        sum(message.startswith(f"log.sinks (tensorboard) cannot write: {tmp_path}/tensorboard/") for message in said)
        == 1
    )
    assert len(scalars(tmp_path)["train/loss"]) >= 1


def test_a_config_says_which_sink_cannot_write(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = load(str(write_config(tmp_path, "{interval: 1, sinks: [console, json_lines]}")), [])
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    tiny_run({"mine": config.plugins["log"]}, until="3 iters", work_dir=tmp_path / "run")
    said = capfd.readouterr().err
    assert said.count("log.sinks.1 (json_lines) cannot write: ") == said.count("cannot write") == 1
    assert f"{tmp_path}/run/log.jsonl: Is a directory; the run goes on without" in said


@pytest.mark.parametrize("name", ["log.txt", "log.jsonl", "tensorboard"])
def test_a_link_in_the_work_dir_is_not_written_through(tmp_path: Path, name: str):
    """Whether its aim is there or not; the run ends before it began."""
    victim, work = tmp_path / "victim", tmp_path / "run"
    work.mkdir()
    for make in (victim.mkdir if name == "tensorboard" else lambda: victim.write_text("mine"), lambda: None):
        make()
        (work / name).symlink_to(victim)
        before = victim.read_bytes() if victim.is_file() else victim.exists()
        with pytest.raises(UserError, match=f"{name} is a link, and nothing is written through a link in "):
            tiny_run({"log": Log(sinks=[TextLog(), JsonLines(), TensorBoard()])}, work_dir=work)
        assert (victim.read_bytes() if victim.is_file() else victim.exists()) == before
        assert not victim.is_dir() or not list(victim.iterdir())
        (work / name).unlink()
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink(missing_ok=True)


def test_a_link_put_there_in_mid_run_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    work = tmp_path / "run"

    @plugin
    class Attacker:
        """Replaces the log in iteration 2."""

        @hookimpl
        def before_train_iter(self, run: Run) -> None:
            if run.iter == 2:
                (work / "log.txt").unlink()
                (work / "log.txt").symlink_to(tmp_path / "victim")

    run = tiny_run({"log": Log(interval=1), "attacker": Attacker()}, until="4 iters", work_dir=work)
    assert run.iter == 4
    assert not (tmp_path / "victim").exists()
    assert capfd.readouterr().err.count("log.sinks (text_log) cannot write: ") == 1
    assert len((work / "log.jsonl").read_text().splitlines()) == 4


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
    assert [entry.metrics.step for entry in sink.entries if entry.metrics] == [3, 4]
    assert capfd.readouterr().err.count("log.sinks (Briefly) cannot write: no room; the run goes on without") == 1


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
    assert said.count(f"run.work_dir: {folder} was removed; the log goes on in a new one") == 1
    assert "Iter [6/6]" in said


def test_tensorboard_goes_on_in_a_folder_made_again(tmp_path: Path):
    @plugin
    class Vandal:
        """Removes the work dir in iteration 2."""

        @hookimpl
        def before_train_iter(self, run: Run) -> None:
            if run.iter == 2:
                shutil.rmtree(tmp_path / "run")

    plugins = {"log": Log(interval=1, sinks=[TensorBoard()]), "vandal": Vandal()}
    tiny_run(plugins, until="4 iters", work_dir=tmp_path / "run")
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == [3, 4]


def test_tensorboard_without_a_place_to_write_stops_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "tensorboard").write_text("in the way")
    run = tiny_run({"log": Log(interval=1, sinks=[Console(), TensorBoard()])}, work_dir=tmp_path)
    assert run.iter == 4
    assert capfd.readouterr().err.count("log.sinks (tensorboard) cannot write") == 1


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "log.txt"
    append(path, b"x" * 60, tmp_path, head=b"head ")
    with full_disk(100), pytest.raises(OSError, match="No space left"):
        append(path, b"y" * 60, tmp_path)
    append(path, b"z", tmp_path, head=b"head ")
    assert path.read_text() == "head " + "x" * 60 + "z"


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


HOSTILE = ["evil\nclass", "\x1b]0;PWN\x07\x1b[2J", "\ud800x", "../../x/y", " ", "\u202ecba", "\u6f22"]


@plugin(priority="high")
class Hostile:
    """Publishes and says what came from a file."""

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        for at, name in enumerate(HOSTILE):
            run.metrics.publish(f"coco/bbox_AP/{name}", at / 8)
        run.log.info("a class is named %s", HOSTILE[1])
        try:
            raise RuntimeError(HOSTILE[1] + HOSTILE[2])
        except RuntimeError:
            run.log.exception("and a traceback has it too")


def test_names_from_files_are_escaped_in_every_sink(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    sinks = [Console(), TextLog(), JsonLines(), TensorBoard()]
    tiny_run({"log": Log(sinks=sinks), "hostile": Hostile()}, until="1 epoch", validate="1 epoch", work_dir=tmp_path)
    shown = ["evil\\nclass", r"\x1b]0;PWN\x07\x1b[2J", r"\ud800x", "../../x/y", " ", r"\u202ecba", "\u6f22"]
    for text in capfd.readouterr().err, (tmp_path / "log.txt").read_text():
        (line,) = (line for line in text.splitlines() if "(val)" in line)
        assert line.endswith("  ".join(f"coco/bbox_AP/{name}: {at / 8:.4f}" for at, name in enumerate(shown)))
        assert rf"a class is named {shown[1]}" in text
        assert all(char.isprintable() or char in "\n\t" for char in text)
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert [entry[f"coco/bbox_AP/{name}"] for name in HOSTILE] == [at / 8 for at in range(7)]
    assert {f"val/coco/bbox_AP/{name}" for name in shown} <= set(scalars(tmp_path))
