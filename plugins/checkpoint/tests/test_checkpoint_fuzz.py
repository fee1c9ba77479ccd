"""Damaged and hostile checkpoints: every outcome is a run that goes on, or one clear error."""

from __future__ import annotations

import copy
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import CheckpointError, Span
from detkernel_checkpoint import checkpoint_file
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_detection.testing import tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = settings(
    max_examples=int(os.environ.get("DETKERNEL_FUZZ", "60")),
    deadline=None,
    derandomize="DETKERNEL_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    | st.builds(torch.zeros, st.integers(0, 3)) | st.just(torch.tensor(float("nan"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    tiny_run({"checkpoint": Checkpoint(every=Span(2, "iters"))}, until="4 iters", validate="2 iters", work_dir=folder)
    return folder / "checkpoints" / "iter_2.pt"


@EXAMPLES
@given(data=st.data())
def test_damaged_bytes(valid: Path, data: st.DataObject) -> None:
    content = bytearray(valid.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        piece = data.draw(st.binary(max_size=20))
        content[place : place + data.draw(st.integers(0, 200))] = piece
    path = valid.with_name("damaged.pt")
    path.write_bytes(content)
    for read in (checkpoint_file.read, checkpoint_file.load):
        with suppress(CheckpointError):
            assert isinstance(read(path), dict)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree, but for what is inside of a plugin's own state, which it checks itself."""
    if path[:1] == ("plugins",) and len(path) == 2:
        return []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


@EXAMPLES
@given(data=st.data())
def test_a_valid_file_with_other_content(
    valid: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = copy.deepcopy(checkpoint_file.load(valid))
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(places(content)))
        holder = content
        for key in path:
            holder = holder[key]
        if not isinstance(holder, (dict, list)):
            continue
        if data.draw(st.booleans()) and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = data.draw(VALUES)
    path = valid.with_name("other.pt")
    checkpoint_file.write(path, content)
    folder = tmp_path_factory.mktemp("run")
    plugin = Checkpoint(every=None, resume=str(path), accept_changes=data.draw(st.booleans()))
    with suppress(CheckpointError):
        run = tiny_run({"checkpoint": plugin}, until="4 iters", validate="2 iters", work_dir=folder)
        assert run.iter >= 4


@pytest.mark.parametrize("classes", [None, True, [1, 2, 3]])
def test_changes_are_not_accepted_of_a_run_of_no_classes(valid: Path, classes: Any, tmp_path: Path) -> None:
    content = copy.deepcopy(checkpoint_file.load(valid))
    content["classes"] = classes
    content["provenance"]["config"]["model"] = True
    path = valid.with_name("classless.pt")
    checkpoint_file.write(path, content)
    plugin = Checkpoint(every=None, resume=str(path), accept_changes=True)
    with pytest.raises(CheckpointError, match=r"classless\.pt: does not say which classes its run had"):
        tiny_run({"checkpoint": plugin}, until="4 iters", work_dir=tmp_path)
