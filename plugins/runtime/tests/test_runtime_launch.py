"""How a run of several processes ended, from what each of them left. Real processes: `tests/test_launch.py`."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from detkernel import UserError
from detkernel.errors import follow
from detkernel.processes import Launch
from detkernel_runtime import settings
from detkernel_runtime.parallel import launch
from detkernel_runtime.parallel.launch import Report

MISTAKE = Report(0, 2, "error: yours", final=True)
BUG = Report(1, 1, "Traceback: bug")
FOLLOWER = Report(0, 1, "Traceback: connection lost", follows=True)
STOPPED = Report(1, 75, final=True)


@pytest.mark.parametrize(
    ("failures", "reports", "status", "text"),
    [
        ({}, [], 0, ""),
        ({0: 75, 1: 75}, [STOPPED, Report(0, 75, final=True)], 75, ""),
        ({0: -15, 1: 75}, [STOPPED], 75, ""),
        ({0: 2, 1: 2}, [MISTAKE, Report(1, 2, "error: yours", final=True)], 2, "error: yours"),
        ({1: 2}, [MISTAKE, Report(1, 2, "error: theirs", final=True)], 2, "error: yours\nerror: theirs"),
        ({0: 1}, [FOLLOWER, BUG], 1, "rank 1:\nTraceback: bug"),
        ({0: 1, 1: -9}, [FOLLOWER], 137, "rank 1 was killed by SIGKILL; the system does that when memory runs out"),
        ({1: -11}, [Report(0, 1, "Traceback: connection lost")], 139, "rank 1 was killed by SIGSEGV"),
        ({1: -6}, [BUG], 1, "rank 1:\nTraceback: bug"),
        ({1: -15}, [], 143, "rank 1 was killed by SIGTERM"),
        ({0: 1}, [FOLLOWER], 1, "Traceback: connection lost"),
        ({1: 3}, [], 3, "rank 1 ended with exit status 3"),
    ],
)  # fmt: skip
def test_the_first_cause_is_how_it_ended(failures: dict[int, int], reports: list[Report], status: int, text: str):
    end = launch._end(failures, reports)
    assert end.status == status
    assert end.text.startswith(text)


def test_a_process_leaves_word_for_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DETKERNEL_REPORTS", str(tmp_path))
    assert not launch.report(1, OSError("x"), "x"), "not one of several processes"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    error = OSError("x")
    follow(error, "rank 0 failed")
    assert launch.report(1, error, "text")
    assert Report(**json.loads((tmp_path / "1.json").read_text())) == Report(1, 1, "text", follows=True)
    assert launch.report(2, UserError("x"), "text")
    assert Report(**json.loads((tmp_path / "1.json").read_text())).final
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETKERNEL_REPORTS", str(tmp_path / "file"))
    assert not launch.report(1, error, "text"), "it prints its error itself where word cannot be left"


def test_torchrun_gets_the_error_of_the_process_that_failed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    error = OSError("the lights went out")
    assert not launch.report(1, error, "the traceback")
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "OSError: the lights went out"
    assert message["extraInfo"]["py_callstack"] == "the traceback"
    assert int(message["extraInfo"]["timestamp"]) > 0
    follow(error, "rank 0 failed in iteration 3: OSError: no light")
    launch.report(1, error, "the traceback")
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert told == "rank 0 failed in iteration 3: OSError: no light", "whoever ends first is in torchrun's summary"


def test_restarts_are_counted_whoever_made_them(monkeypatch: pytest.MonkeyPatch):
    assert launch.launched() == Launch(0, "")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "theirs")
    assert launch.launched() == Launch(2, "theirs")
    monkeypatch.setenv("DETKERNEL_RESTARTS", "3")
    monkeypatch.setenv("DETKERNEL_RUN", "ours")
    assert launch.launched() == Launch(3, "ours")
    monkeypatch.delenv("DETKERNEL_RUN")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch.launched().identity == f"torchrun {os.getppid()}"


@pytest.mark.parametrize("count", ["0", "-1", "many", "1.5"])
def test_a_number_of_processes_that_is_not_one(count: str):
    wanted = f"--nproc-per-node: expected a number, 'gpu', 'cpu' or 'auto', got '{count}'"
    with pytest.raises(UserError, match=re.escape(wanted)):
        launch.launcher.take_over({"nproc_per_node": count}, [])


def test_restarts_need_a_launcher():
    with pytest.raises(UserError, match="--max-restarts: needs --nproc-per-node"):
        launch.launcher.take_over({"nproc_per_node": None, "max_restarts": 1}, [])


def test_a_process_that_was_started_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch.launcher.take_over({"nproc_per_node": "2"}, []) is None


def test_the_command_line_offers_it_and_imports_no_torch():
    code = "import sys; from detkernel.cli import cli; cli(['run', '--help'], standalone_mode=False); "
    code += "assert not {'torch', 'numpy', 'detkernel_runtime.device'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "--nproc-per-node N" in shown.stdout
    assert "--max-restarts N" in shown.stdout


@pytest.mark.parametrize("told", [True, False])
def test_a_launcher_that_was_told_to_stop_hears_no_signal_on_its_way_out(told: bool):
    before, signals = signal.getsignal(signal.SIGUSR2), launch._Signals()
    try:
        with signals.held():
            if told:
                signal.raise_signal(signal.SIGUSR2)
        assert signal.getsignal(signal.SIGUSR2) == (signal.SIG_IGN if told else before)
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_several_processes_need_a_posix_system(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch.os, "name", "nt")
    with pytest.raises(UserError, match=r"--nproc-per-node, --nnodes: .* need a POSIX system, such as Linux"):
        launch.launch("2", 0, [])


def test_memory_is_not_known_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(settings.peak_memory(cuda=False))
