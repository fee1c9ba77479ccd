"""Compilation in the log: a line of its own, and no slow iteration."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detkernel_detection.testing import tiny_run
from detkernel_logging.files import JsonLines, TextLog
from detkernel_logging.log import Log
from detkernel_runtime.device import Compile, Device


def slow(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    time.sleep(1.5)
    made: Callable[..., Any] = graph.forward
    return made


def test_rates_and_the_time_left_are_without_the_compilation(tmp_path: Path):
    torch._dynamo.register_backend(slow)
    try:
        plugins = {
            "device": Device(device="cpu", compile=Compile(backend="slow")),
            "log": Log(interval=1, sinks=[TextLog(), JsonLines()]),
        }
        tiny_run(plugins, until="3 iters", work_dir=tmp_path)
    finally:
        torch._dynamo.reset()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    [place] = [number for number, line in enumerate(lines) if "compiled the model for training on batches of" in line]
    assert float(lines[place].split(" in ")[1].split(" s;")[0]) >= 1.5
    assert "eta: 0:00:00" in lines[place + 1], "the first iteration's line follows, with two more to come"
    metrics = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    times = [line["time"] for line in metrics if "time" in line]
    assert len(times) == 3
    assert max(times) < 1.0
