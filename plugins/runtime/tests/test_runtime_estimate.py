"""What is said of a run's speed: how long it will take, and threads that starve each other."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detkernel import Span
from detkernel_detection.testing import tiny_kernel
from detkernel_runtime import estimate
from detkernel_runtime.device import Device


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than a second"),
        (40, "40 s"),
        (98.6, "99 s"),
        (150, "2 min"),
        (3600, "1 h"),
        (7830, "2 h 10 min"),
        (90000, "1 day 1 h"),
        (266400, "3 days 2 h"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str):
    assert estimate.spoken(seconds) == text


def test_the_time_of_a_run_counts_the_fastest_iteration_and_the_validations():
    sets = {"val": range(10), "night": range(5)}
    options = SimpleNamespace(validate=Span(1, "epochs"))
    run = SimpleNamespace(max_iters=1200, epoch_length=100, options=options, loaders=sets, val_sets=("night",))
    clock = estimate.Clock(train=[9.0, 0.5], val=[3.0, 2.0])
    assert clock.estimate(run) == (
        "about 16 min: 1200 iterations of 0.5 s, 12 validations of 30 s, if no batch has to be waited for"
    )
    options.validate = None
    assert clock.estimate(run).startswith("about 10 min: 1200 iterations of 0.5 s, if")


def test_check_says_the_time(tmp_path: Path):
    lines = tiny_kernel({"device": Device(device="cpu")}, validate="1 epoch", work_dir=tmp_path).check()
    assert re.match(r"(about )?.*: \d+ iterations of [\d.e-]+ s, \d+ validations? of ", lines["time"])


@pytest.mark.parametrize(
    ("threads", "cores", "busy", "processes", "share"),
    [(2, 2, 1.9, 1, 1), (8, 8, 0.2, 1, None), (8, 8, 4.0, 1, 4), (8, 8, 0.0, 4, 2), (1, 2, 9.0, 1, None)],
)
def test_threads_beyond_the_share_of_the_cores_are_told(
    threads: int,
    cores: int,
    busy: float,
    processes: int,
    share: int | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(estimate, "_cores", lambda: cores)
    monkeypatch.setattr(estimate, "_busy", lambda: busy)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    text = estimate.starving(SimpleNamespace(device=torch.device("cpu")))
    assert (f"OMP_NUM_THREADS={share}," in text) if share else text == ""
    assert estimate.starving(SimpleNamespace(device=torch.device("cuda"))) == ""
    with caplog.at_level(logging.WARNING):
        tiny_kernel({"device": Device(device="cpu")}, until="1 iters", work_dir=tmp_path).run()
    assert any("may take ten times as long" in message for message in caplog.messages) == bool(share)
