"""Files that are whole or not there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from detkernel.errors import UserError
from detkernel.files import open_regular, open_to_write, read_regular, refuse_links, remove_leftovers, write_atomic


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


@pytest.mark.parametrize("link", ["log.txt", "logs", "logs/deep"])
def test_nothing_is_written_through_a_link_below_the_work_dir(tmp_path: Path, link: str):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "victim").write_text("mine")
    work_dir = tmp_path / "w"
    (work_dir / link).parent.mkdir(parents=True)
    (work_dir / link).symlink_to(tmp_path / ("victim" if link == "log.txt" else "elsewhere"))
    target = work_dir / link if link == "log.txt" else work_dir / link / "x" / "y.txt"
    with pytest.raises(UserError, match=rf"{link} is a link, and nothing is written through a link in .*w; remove it"):
        open_to_write(target, work_dir)
    with pytest.raises(UserError, match="is a link"):
        refuse_links(target, work_dir)
    if link != "log.txt":
        with pytest.raises(UserError, match="is a link"):
            write_atomic(target, "x", work_dir)
    assert names(tmp_path / "elsewhere") == []
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_dangling_link_is_a_link(tmp_path: Path):
    (tmp_path / "log.txt").symlink_to(tmp_path / "new")
    with pytest.raises(UserError, match="is a link"):
        open_to_write(tmp_path / "log.txt", tmp_path)
    assert names(tmp_path) == ["log.txt"]


def test_an_atomic_write_replaces_a_link_and_leaves_what_it_leads_to(tmp_path: Path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "victim")
    write_atomic(tmp_path / "config.yaml", "new", tmp_path)
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "config.yaml").is_symlink()


def test_the_work_dir_itself_may_be_a_link_and_other_folders_are_not_looked_at(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "w").symlink_to(tmp_path / "disk")
    for path in (tmp_path / "w" / "logs" / "a.txt", tmp_path / "w" / ".." / "beside.txt"):
        for text in (b"one\n", b"two\n"):
            handle = open_to_write(path, tmp_path / "w")
            os.write(handle, text)
            os.close(handle)
    assert (tmp_path / "disk" / "logs" / "a.txt").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "disk" / "logs" / "a.txt").stat().st_mode & 0o111 == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "a named pipe"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(path.name), "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (Path.mkdir, "Is a directory"),
    ],
    ids=["fifo", "socket", "device", "folder"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_not_a_regular_file_is_neither_read_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], said: str
):
    monkeypatch.chdir(tmp_path)  # a socket's name has at most 107 bytes
    make(tmp_path / "odd")
    with pytest.raises(OSError, match=said):
        open_regular(tmp_path / "odd")
    with pytest.raises(OSError, match=said):
        read_regular(tmp_path / "odd", 10)
    with pytest.raises((OSError, UserError), match="is a link" if said == "a device" else said):
        open_to_write(tmp_path / "odd", tmp_path)


def test_a_file_is_read_up_to_a_limit(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    assert read_regular(tmp_path / "link", 2**60) == b"12345"  # the memory for the limit is not asked for
    with suppress(FileNotFoundError):  # of a file whose size the system does not say
        assert read_regular(Path("/proc/version"), 10_000).startswith(b"Linux")
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "a", 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "b", 4)


def test_a_file_that_is_too_large_is_refused_by_its_size(tmp_path: Path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)  # takes no room
    tracemalloc.start()
    with pytest.raises(OSError, match="more than 16,777,216 bytes"):
        read_regular(tmp_path / "sparse", 2**24)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20


DIES = """
import os, sys
from pathlib import Path
from detkernel.files import write_atomic
os.fsync = lambda handle: os._exit(9)
write_atomic(Path(sys.argv[1]), "half")
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path):
    assert subprocess.run([sys.executable, "-c", DIES, tmp_path / "a" / "b" / "x.json"]).returncode == 9
    left = names(tmp_path / "a" / "b")
    assert len(left) == 1
    mine = f".x.json.{os.getpid()}.abcdefgh.tmp"
    alive = f".x.json.{os.getppid()}.abcdefgh.tmp"
    kept = [alive, ".hidden", ".x.tmp", "x.json", left[0].lstrip(".")]
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder, files in ((tmp_path / "a" / "b", [mine, *kept]), (tmp_path / "a", [left[0]]), (outside, [left[0]])):
        for name in files:
            (folder / name).write_text("x")
    (tmp_path / "a" / "link").symlink_to(outside)
    remove_leftovers(tmp_path / "a")
    assert names(tmp_path / "a" / "b") == sorted(kept)
    assert names(tmp_path / "a") == ["b", "link"]
    assert names(outside) == left
    remove_leftovers(tmp_path / "nothing here")
