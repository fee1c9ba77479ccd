"""`detkernel new-plugin` for the kinds of detection. The tests of the whole system install each and run its tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from detkernel import UserError
from detkernel.scaffold import kinds, new_plugin

KINDS = ["dataset", "evaluator", "model", "transform"]


def test_the_kinds_are_offered():
    assert set(kinds()) >= {*KINDS, "hook", "command"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_whole_project(kind: str, tmp_path: Path):
    written = new_plugin("box-counter", kind, tmp_path)
    assert [path.name for path in written] == ["pyproject.toml", "README.md", "box_counter.py", "test_box_counter.py"]
    for path in written:
        text = path.read_text()
        assert not any(mark in text.lower() for mark in ("my_plugin", "my-plugin", "myplugin"))
        assert "@" not in text or path.suffix == ".py"
    assert '"detkernel-detection>=0.1,<0.2", "torch>=2.9"' in written[0].read_text()
    assert "box_counter" in written[1].read_text().partition("```yaml")[2]


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_in_the_manual_works(kind: str, tmp_path: Path):
    assert new_plugin("my-plugin", kind, tmp_path)


def test_a_name_that_the_project_needs_itself(tmp_path: Path):
    with pytest.raises(UserError, match="the project would use this name for something else"):
        new_plugin("sample", "transform", tmp_path)
