"""Environments of tox take over each other's bytecode."""

from __future__ import annotations

import importlib.util
import py_compile
import runpy
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from .conftest import ROOT


def test_bytecode_of_what_both_have_is_taken_and_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, mine = (tmp_path / name / "lib/python3/site-packages" for name in ("theirs", "mine"))
    for name in ("both/__init__", "both/inner/__init__", "both/inner/own", "both/old", "other/__init__"):
        place = f"{name}.py"
        (theirs / place).parent.mkdir(parents=True, exist_ok=True)
        (theirs / place).write_text(f"place = {place!r}")
        py_compile.compile(str(theirs / place))
        if place.startswith("both"):
            (mine / place).parent.mkdir(parents=True, exist_ok=True)
            (mine / place).hardlink_to(theirs / place)
    cached = [Path(importlib.util.cache_from_source(site / "both/inner/own.py")) for site in (theirs, mine)]
    cached[0].with_suffix(".txt").write_text("none")
    (mine / "both/old.py").unlink()
    (mine / "both/old.py").write_text("another one")
    cached[1].parent.mkdir()
    cached[1].write_text("own")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "mine"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(mine))
    runpy.run_path(str(ROOT / ".ci/bytecode.py"), run_name="__main__")
    found = {str(path.relative_to(mine)).partition(".")[0] for path in mine.rglob("*.pyc")}
    caches = ("both/__pycache__/__init__", "both/__pycache__/old", "both/inner/__pycache__/__init__")
    assert found == {*caches, "both/inner/__pycache__/own"}
    assert cached[1].read_text() == "own"
    assert [path.suffix for path in mine.rglob("__pycache__/*")] == [".pyc"] * 4
    taken, changed = (SourceFileLoader(name, str(mine / "both" / f"{name}.py")) for name in ("__init__", "old"))
    code = taken.get_code("__init__")
    assert code is not None
    assert code.co_filename == str(mine / "both/__init__.py")
    with pytest.raises(SyntaxError):
        changed.get_code("old")  # Python sees that this bytecode is not of its source
