"""A whole run, killed at random instants and resumed each time, ends as the undisturbed one, its log included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import long

TORTURE = Path(__file__).with_name("torture.py")
KILLS = int(os.environ.get("DETKERNEL_KILLS", "0"))


@pytest.mark.parametrize(("processes", "few"), [(1, 3), pytest.param(2, 2, marks=long)])
def test_a_killed_run_ends_as_the_undisturbed_one(processes: int, few: int, tmp_path: Path) -> None:
    command = [sys.executable, str(TORTURE), str(tmp_path), str(processes), str(KILLS or few), str(processes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300 + 20 * (KILLS or few), check=False)
    assert result.returncode == 0, result.stderr[-4000:] + (tmp_path / "output.txt").read_text()[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] == (KILLS or few)
    assert report["rounds"] >= 1
    assert report["wrong"] == []
    if KILLS:
        assert report["inside"] >= KILLS // 20  # a share of the kills fell inside of a save
