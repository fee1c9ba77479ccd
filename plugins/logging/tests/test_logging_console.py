"""What a person sees: plain lines in a file or pipe, a bar on a terminal."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from detkernel import DataError, Run, RunOptions, Span, hookimpl, plugin
from detkernel.bus import Bus
from detkernel_detection.testing import tiny_kernel, tiny_run
from detkernel_logging.console import Console
from detkernel_logging.log import Log
from detkernel_logging.progress import Progress
from detkernel_logging.progress_bar import Bar
from detkernel_logging.rows import short_names, shown, speed
from detkernel_logging.sink import Entry, Metrics


@plugin(priority="highest")
class Talker:
    """Says something at the first event, before everybody else."""

    @hookimpl
    def setup(self, run: Run) -> None:
        run.log.info("the first message")
        run.log.debug("what nobody wants to read")

    @hookimpl
    def after_run(self, run: Run) -> None:
        run.log.warning("the last message")


def test_without_a_terminal_every_line_is_plain(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    tiny_run({"log": Log(interval=2), "talker": Talker()}, until="2 iters", work_dir=tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err
    said = [line.split(" - ", 2)[2] for line in err.splitlines()]
    assert said[0] == "INFO - the first message"
    assert said[1].startswith("INFO - work dir ")
    assert said[2].startswith("INFO - Iter [2/2]\tlr: ")
    assert said[3] == "WARNING - the last message"
    assert said[4].startswith("INFO - done after ")
    assert err == (tmp_path / "log.txt").read_text()


def test_nothing_stays_on_the_logger(tmp_path: Path):
    logger = logging.getLogger("detkernel")
    before = (list(logger.handlers), logger.level)
    tiny_run({"log": Log()}, work_dir=tmp_path)
    assert (logger.handlers, logger.level) == before

    @plugin(priority="highest")
    class Broken:
        """Fails before anything is set up."""

        @hookimpl
        def setup(self) -> None:
            raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        tiny_run({"log": Log(), "broken": Broken()}, work_dir=tmp_path)
    assert (logger.handlers, logger.level) == before


def test_a_level_that_was_asked_for_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    logger = logging.getLogger("detkernel")
    logger.setLevel(logging.DEBUG)
    try:
        tiny_run({"log": Log(sinks=[Console()]), "talker": Talker()}, work_dir=tmp_path)
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)
    assert "DEBUG - what nobody wants to read" in capfd.readouterr().err


def test_a_failure_is_the_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    @plugin
    class Broken:
        """Fails in iteration 3."""

        @hookimpl
        def before_train_iter(self, run: Run) -> None:
            if run.iter == 3:
                raise OSError("the lights went out\nand more")

    with pytest.raises(OSError, match="the lights went out"):
        tiny_run({"log": Log(), "broken": Broken()}, work_dir=tmp_path)
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r" - ERROR - failed at iteration 3, after 0:00:0\d: OSError: the lights went out$", last)


def test_a_mistake_of_the_users_is_left_to_who_prints_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """`detkernel run` ends with `error: ...`; the log file has it, since it outlives the terminal."""

    @plugin
    class Broken:
        """Finds something wrong in iteration 3."""

        @hookimpl
        def before_train_iter(self, run: Run) -> None:
            if run.iter == 3:
                raise DataError("a.jpg: it is: no image\nand more")

    with pytest.raises(DataError):
        tiny_run({"log": Log(), "broken": Broken()}, work_dir=tmp_path)
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r" - ERROR - failed at iteration 3, after 0:00:0\d$", last)
    assert (
        (tmp_path / "log.txt").read_text().endswith(f"{last.split(' - ', 1)[1]}: DataError: a.jpg: it is: no image\n")
    )


def test_check_talks_but_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    tiny_kernel({"log": Log(interval=1), "talker": Talker()}, validate="1 epoch", work_dir=tmp_path / "run").check()
    said = [line.split(" - ", 2)[2] for line in capfd.readouterr().err.splitlines()]
    assert said == ["INFO - the first message", "WARNING - the last message"]
    assert not (tmp_path / "run").exists()


TERMINAL = """
import os, sys, time
from detkernel import hookimpl, plugin
from detkernel_detection.testing import tiny_run
from detkernel_logging.log import Log

@plugin
class Scene:
    '''Prints, waits for the bar, and ends as told; in place of an optimizer, which takes torch seconds to import.'''
    @hookimpl
    def before_run(self, run):
        run.scalars["lr_backbone"] = lambda: 0.005
        run.scalars["lr"] = lambda: 0.05

    @hookimpl
    def before_train_iter(self, run):
        if run.iter == 3:
            print("somebody prints")
            sys.stderr.write("somebody writes\\n")
            run.log.warning("something is odd: [red]\\x1b[2J")
            time.sleep(0.6)
        if run.iter == 6 and ending is not None:
            raise ending

    @hookimpl
    def before_val_iter(self, run, batch):
        if batch.indices[0] == 2:
            time.sleep(0.6)

for ending in (None, KeyboardInterrupt(), OSError("the lights went out"), "dumb"):
    if ending == "dumb":
        ending, os.environ["TERM"] = None, "dumb"
    streams = sys.stdout, sys.stderr
    try:
        plugins = {"log": Log(interval=2), "optimizer": Scene()}
        tiny_run(plugins, until="2 epochs", validate="1 epoch", work_dir=sys.argv[1])
    except BaseException as error:
        print("ended by", type(error).__name__)
    assert (sys.stdout, sys.stderr) == streams
    print("=" * 20)
"""


def on_terminal(script: Path, *arguments: str) -> str:
    """Everything that a script writes to a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(script), *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # how Linux says that the other side has closed
                chunk = b""
            if not chunk:
                break
            written += chunk
    os.close(master)
    assert process.returncode == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def unstyled(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What four runs wrote to a terminal: one that ended well, one interrupted, one that failed, one on a dumb one."""
    folder = tmp_path_factory.mktemp("terminal")
    script = folder / "script.py"
    script.write_text(textwrap.dedent(TERMINAL))
    return unstyled(on_terminal(script, str(folder / "run"))).split("=" * 20)


def test_a_terminal_has_a_bar_with_what_matters(terminal: list[str]):
    assert re.search(
        r"Epoch 1/2  [━╸╺]+  3/4  loss \d\.\d{4}  lr 5\.00e-02  [\d.]+ (it/s|s/it)  eta 0:00:\d\d", terminal[0]
    )
    assert re.search(r"Val  [━╸╺]+  1/4  [\d.]+ (it/s|s/it)  eta 0:00:\d\d", terminal[0])


def test_lines_and_prints_appear_whole_above_the_bar(terminal: list[str]):
    shown = re.sub(r"(\r|\x1b\[2K|\x1b\[1A|\x1b\[\?25[lh])+", "\n", terminal[0]).splitlines()
    assert "somebody prints" in shown
    assert "somebody writes" in shown
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d  warning: something is odd: \[red\]\\x1b\[2J", line) for line in shown)
    lines = [line for line in shown if re.match(r"\d\d:\d\d:\d\d  epoch \d/2 ", line)]
    assert len(lines) == 4
    row = r"\S+  epoch \d/2 \d/4  loss \d\.\d{4}  lr 5\.00e-02  [\d.]+ (it/s|s/it)  eta \d:\d\d:\d\d"
    assert all(re.fullmatch(row, line) for line in lines)


@pytest.mark.parametrize(("scene", "word"), [(0, "done"), (1, "interrupted"), (2, "failed")])
def test_however_it_ends_the_bar_is_wiped_away_and_the_cursor_is_back(terminal: list[str], scene: int, word: str):
    last = terminal[scene].rindex(f"{word} at iteration 6" if scene else "  done after ")
    assert "\x1b[?25h" in terminal[scene][last:]
    assert terminal[scene].count("\x1b[?25l") == terminal[scene].count("\x1b[?25h") == 1
    after = terminal[scene][terminal[scene].rindex("\x1b[?25h") :]
    assert "━" not in after
    assert "\x1b[2K" in after  # rich erases the line once the cursor is back


def test_a_terminal_that_can_do_nothing_gets_plain_lines(terminal: list[str]):
    assert "\x1b" not in terminal[3]
    assert "done after" in terminal[3]


@pytest.mark.parametrize(("rate", "said"), [(12.34, "12.3 it/s"), (1.0, "1.0 it/s"), (0.25, "4.0 s/it")])
def test_the_speed_is_said_by_what_is_more_than_one(rate: float, said: str):
    assert speed(rate) == said


def test_the_bar_says_iterations_a_second_and_the_time_left():
    run = SimpleNamespace(
        options=SimpleNamespace(until=SimpleNamespace(unit="iters")), iter=3, max_iters=10, mode="train"
    )
    bar = Bar.__new__(Bar)  # without a terminal to draw on
    bar._run, bar._values = run, {"loss": 0.5, "lr": 0.001}
    bar._progress = SimpleNamespace(mean=0.25, left=lambda run: 90.0)
    assert bar._train() == ("Iter", 3, 10, ["loss 0.5000", "lr 1.00e-03", "4.0 it/s", "eta 0:01:30"])


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["coco/bbox_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP_s"], ["mAP", "AP50", "APs"]),
        (["coco/bbox_mAP", "coco/segm_mAP_75"], ["box mAP", "mask AP75"]),
        (["coco/bbox_mAP", "night/coco/bbox_mAP"], ["mAP", "night mAP"]),
        (["coco/bbox_mAP", "coco/bbox_AP/red cell", "coco/bbox_AP/a/b"], ["mAP", "AP red cell", "AP a/b"]),
        (["voc/mAP", "night/voc/AP/dog"], ["mAP", "night AP dog"]),
        (["coco/mAP", "mine/mAP"], ["coco mAP", "mine mAP"]),
        (["mine/found", "alone"], ["found", "alone"]),
        (
            ["coco/bbox_mAP", "score_threshold", "night/coco/bbox_mAP", "night/score_threshold"],
            ["mAP", "score_threshold", "night mAP", "night score_threshold"],
        ),
        (["a/bbox_mAP_50", "a/AP50"], ["a/bbox_mAP_50", "a/AP50"]),
    ],
)
def test_metrics_have_the_names_that_people_call_them_by(names: list[str], short: list[str]):
    assert list(short_names(names).values()) == short


def test_a_validation_has_two_rows_with_the_standing_and_a_message_is_wrapped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    run = Run(options=RunOptions(until=Span(9, "iters")), bus=Bus({}))
    values = {f"coco/bbox_mAP{end}": 0.5 for end in ("", "_50", "_75", "_s", "_m", "_l")}
    values |= {f"coco/bbox_AR_{number}": 0.25 for number in range(6)}
    seen = []
    for step, best in ((3, 0.5), (6, 0.75), (9, 0.25)):
        run.iter = step
        run.metrics.publish("coco/bbox_mAP", best, better="higher")
        metrics = Metrics("val", 1, 2, step, values | {"coco/bbox_mAP": best})
        seen.append(shown(run, Progress(), Entry("", logging.INFO, metrics)).splitlines())
    assert [rows[0][10:] for rows in seen] == [
        "val @3  mAP 0.500  AP50 0.500  best so far",
        "val @6  mAP 0.750  AP50 0.500  best so far",
        "val @9  mAP 0.250  AP50 0.500  best 0.750 @6",
    ]
    assert {len(rows) for rows in seen} == {2}
    assert seen[0][1] == "          AP75 0.500  APs 0.500  APm 0.500  APl 0.500  AR_0 0.250  +5 in log.txt"
    lines = shown(run, Progress(), Entry("", logging.WARNING, None, "word " * 30)).splitlines()
    assert len(lines) == 3
    assert lines[0][8:].startswith("  warning: word word")
    assert all(line.startswith(" " * 10 + "word") and len(line) <= 80 for line in lines[1:])
