"""What coverage-guided fuzzing (`tests/fuzz.py`) starts from is read; atheris itself is for `tox -e torture` alone."""

from __future__ import annotations

import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "fuzz.py"
READERS = ("yaml", "voc", "coco", "yolo", "checkpoint", "weights")


@pytest.mark.parametrize("name", READERS)
def test_what_fuzzing_starts_from_is_read(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    given: list[Any] = []

    def fuzz() -> None:
        (arguments, read) = given
        read((Path(arguments[-1]) / "seed").read_bytes())
        read(b"\xff\x00")

    stand_in = SimpleNamespace(
        instrument_imports=lambda include: nullcontext(), Setup=lambda *some: given.extend(some), Fuzz=fuzz
    )
    monkeypatch.setitem(sys.modules, "atheris", stand_in)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "2", name])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == f"{name}: {{'read': 1, 'refused': 1}}\n"
