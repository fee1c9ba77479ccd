"""Files that are whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from detkernel.files import write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_bytes_in_folders_that_are_made(tmp_path: Path):
    write_atomic(tmp_path / "a" / "b" / "c.txt", "é\n")
    write_atomic(tmp_path / "d.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"\xc3\xa9\n"
    assert (tmp_path / "d.bin").read_bytes() == b"\x00\xff"


def test_the_old_file_is_replaced(tmp_path: Path):
    for text in ("old", "new"):
        write_atomic(tmp_path / "a", text)
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_its_rights_follow_the_umask(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path):
    write_atomic(tmp_path / "a", "old")
    (tmp_path / "folder" / "x").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomic(tmp_path / "folder", "new")
    with pytest.raises(OSError):
        write_atomic(tmp_path / "a" / "b", "new")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a", "\udcff")
    assert names(tmp_path) == ["a", "folder"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_full_disk_leaves_the_old_one_and_nothing_else(tmp_path: Path):
    write_atomic(tmp_path / "a", "old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from detkernel.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]), b'x' * 5000)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27] File too large" in result.stderr
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_reader_never_sees_half_a_file_even_when_the_writer_is_killed(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from detkernel.files import write_atomic\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    write_atomic(Path(sys.argv[1]), f'{n:09}' * 100_000)\n"
    )
    path = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
        begin = time.monotonic()
        seen: set[str] = set()
        while len(seen) < 5 and time.monotonic() - begin < 60:
            if path.exists():
                text = path.read_text()
                assert text == text[:9] * 100_000
                seen.add(text[:9])
        writer.send_signal(signal.SIGKILL)
    assert len(seen) >= 5
    assert path.read_text()[:9] * 100_000 == path.read_text()
