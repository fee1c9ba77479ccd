"""The file: whole or refused, readable by plain torch, and never code."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from detkernel import CheckpointError
from detkernel_checkpoint import checkpoint_file
from detkernel_checkpoint.folder import Folder

CONTENT = {
    "format": 1,
    "position": {"epoch": 0, "iter": 3, "batch": 3, "validated": 0, "epoch_length": 4, "metrics": {}},
    "model": {"weight": torch.arange(600.0)},
    "plugins": {},
    "modules": {},
    "ranks": [{}],
    "provenance": {},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint_file.write(tmp_path / "iter_3.pt", CONTENT)
    return tmp_path / "iter_3.pt"


def test_what_is_written_is_read_and_nothing_else_is_left(path: Path):
    assert torch.equal(checkpoint_file.read(path)["model"]["weight"], CONTENT["model"]["weight"])
    assert [left.name for left in path.parent.iterdir()] == ["iter_3.pt"]


def test_plain_torch_and_any_zip_tool_open_it(path: Path):
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(loaded["model"]["weight"], CONTENT["model"]["weight"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_file_cut_at_any_length_is_refused(path: Path):
    whole = path.read_bytes()
    lengths = {0, 1, len(whole) - 1, len(whole) - 92, len(whole) - 93, *random.Random(0).sample(range(len(whole)), 60)}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"iter_3.pt: (torn|damaged)"):
            checkpoint_file.read(path)


def test_any_flipped_bit_is_refused(path: Path):
    whole = path.read_bytes()
    for position in random.Random(1).sample(range(len(whole)), 120):
        hurt = bytearray(whole)
        hurt[position] ^= 1 << (position % 8)
        path.write_bytes(hurt)
        with pytest.raises(CheckpointError, match=r"iter_3\.pt"):
            checkpoint_file.read(path)


def test_bytes_behind_the_end_are_refused(path: Path):
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="does not end with a checksum"):
        checkpoint_file.read(path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, sealed: bool):
    path, target = tmp_path / "evil.pt", tmp_path / "harm"
    if sealed:
        checkpoint_file.write(path, {**CONTENT, "plugins": Bomb(target)})
        checkpoint_file.verify(path)
    else:
        path.write_bytes(pickle.dumps(Bomb(target), protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pt: holds more than tensors and plain values; it is not loaded"):
        checkpoint_file.load(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this detkernel reads 1"),
        ({"format": "x"}, "no checkpoint of a run"),
        ({"model": None}, "'model' is missing or is not a dict"),
        ({"position": {"epoch": -1}}, "its position is none"),
        ({"ranks": [3]}, "its processes have no states"),
        ({"modules": {"teacher": None}}, "its modules are not weights by name"),
        ({"modules": {1: {}}}, "its modules are not weights by name"),
    ],
)
def test_a_valid_file_of_another_form_is_refused(tmp_path: Path, change: dict, message: str):
    checkpoint_file.write(tmp_path / "a.pt", {**CONTENT, **change})
    with pytest.raises(CheckpointError, match=message):
        checkpoint_file.read(tmp_path / "a.pt")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"none.pt: cannot be read: No such file"):
        checkpoint_file.read(tmp_path / "none.pt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        checkpoint_file.write(path, {**CONTENT, "format": 5})
    assert path.read_bytes() == before
    assert [left.name for left in path.parent.iterdir()] == ["iter_3.pt"]


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "iter_9.pt")
    for read in (checkpoint_file.read, checkpoint_file.load):
        with pytest.raises(CheckpointError, match=r"iter_9.pt: .*not a regular file"):
            read(tmp_path / "iter_9.pt")
    with pytest.raises(CheckpointError, match=r"null: .*not a regular file"):
        checkpoint_file.load(Path("/dev/null"))


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path: Path):
    torch.save({"weight": torch.zeros(100_000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for item in plain.infolist():
            bomb.writestr(item.filename, plain.read(item), zipfile.ZIP_DEFLATED)
    assert checkpoint_file.load(tmp_path / "plain.pt")["weight"].numel() == 100_000
    with pytest.raises(CheckpointError, match=r"bomb.pt: .*its parts are compressed, or overlap"):
        checkpoint_file.load(tmp_path / "bomb.pt")


def test_shared_lists_that_nobody_could_visit_are_refused_at_once(tmp_path: Path):
    """A file of a few kilobytes: forty lists, each twice in the next, are a million million values."""
    shared = [1]
    for _ in range(40):
        shared = [shared, shared]
    for place in ("plugins", "provenance", "more"):
        checkpoint_file.write(tmp_path / "iter_3.pt", {**CONTENT, place: {"x": shared}})
        with pytest.raises(CheckpointError, match=r"iter_3\.pt: .*its values refer to each other so often"):
            checkpoint_file.read(tmp_path / "iter_3.pt")


def test_only_what_a_killed_run_left_is_cleared_away(tmp_path: Path):
    (tmp_path / "x.tmp").mkdir()
    (tmp_path / "notes.tmp").touch()
    (tmp_path / "iter_3.pt.123.tmp").touch()
    Folder(tmp_path).prepare()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.tmp", "x.tmp"]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_checksum_is_of_every_byte_whatever_it_is_read_by(path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_file, "_CHUNK", chunk)
    checkpoint_file.verify(path)
    content = bytearray(path.read_bytes())
    for place in (0, len(content) - checkpoint_file._SEAL - 1):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged: its checksum does not fit"):
            checkpoint_file.verify(path)
        content[place] ^= 1
