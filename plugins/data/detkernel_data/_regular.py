"""Regular files only: a FIFO would be waited for, and a device has no end."""

from __future__ import annotations

import os
import stat
from io import BufferedReader

LARGEST = 2**30
"""Bytes. An image of as many pixels as are allowed, of 16 bits a channel and not compressed, has half of it."""
_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str) -> BufferedReader:
    """The file, opened for reading. Raises OSError for what is not a regular file of at most `LARGEST` bytes."""
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 - Path.open has no opener
    status = os.fstat(file.fileno())
    problem = _problem(status)
    if problem:
        file.close()
        raise OSError(0, problem)
    return file


def read_regular(path: str) -> bytearray:
    """What the file holds. Raises OSError."""
    with open_regular(path) as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        view, start = memoryview(data), 0
        while start < len(data) and (count := file.readinto(view[start:])):
            start += count
        view.release()
    del data[start:]  # it was cut while it was read
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _problem(status: os.stat_result) -> str:
    if stat.S_ISREG(status.st_mode):
        return f"{status.st_size:,} bytes, more than any image has" if status.st_size > LARGEST else ""
    kind = next((name for test, name in _KINDS if test(status.st_mode)), "not a regular file")
    return f"it is {kind}; expected a regular file"
