"""One file by HTTP: resumed where it was cut, checked by size and sum, whole or not there."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from detkernel import UserError
from detkernel.errors import printable, relative

_BLOCK = 2**18
TIMEOUT = 30.0
"""Seconds without a byte after which a server is asked again."""
TRIES = 5
"""Attempts in a row that bring nothing; one that brings something is not counted."""
PAUSE = 1.0
"""Seconds before the second attempt; twice as long before each further one."""
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_MOST = 2**40


def fetch(url: str, target: Path, size: int, md5: str, advice: str) -> None:
    """Fetch a file. What is there of it in `target` with `.part` behind its name is gone on with.

    `size`: bytes, or 0 where that is not known. Raises `UserError`; what came is then kept, unless it is wrong.
    """
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    shown, fails = printable(url), 0
    if size and part.exists() and part.stat().st_size > size:
        part.unlink()  # it is of another file
    meter = _Meter(target.name)
    while True:
        before = _length(part)
        try:
            size = _receive(url, part, size, meter)
            break
        except RefusedError as error:
            raise UserError(f"{shown}: {error}; {advice}") from None
        except (OSError, http.client.HTTPException) as error:
            fails = 0 if _length(part) > before else fails + 1
            if fails >= TRIES:
                raise UserError(
                    f"{shown}: {_reason(error)}, {TRIES} times in a row; {_length(part):,} bytes are kept in "
                    f"{relative(part)}: run this again to go on from there, or {advice}"
                ) from None
            time.sleep(PAUSE * 2 ** max(fails - 1, 0))
        finally:
            meter.end()
    _check(part, url, size, md5, advice)
    part.replace(target)


class RefusedError(Exception):
    """An answer that will be the same the next time."""


def _receive(url: str, part: Path, size: int, meter: _Meter) -> int:
    """Ask for what is missing and append it; the whole size. Raises OSError where it ends early."""
    start = _length(part)
    if size and start == size:
        return size
    headers = {"User-Agent": "detkernel", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("it begins neither with http:// nor with https://")
        request = urllib.request.Request(url, headers=headers)
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and not size:  # nothing is missing, or the file is another one by now
                part.unlink(missing_ok=True)
                raise OSError("the server has less of it than is here") from None
            if error.code in _AGAIN:
                raise OSError(f"the server answers {error.code} {error.reason}") from None
            raise RefusedError(f"the server answers {error.code} {error.reason}") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise RefusedError(f"not an address ({error})") from None
    with answer:
        total, start = _announced(answer, start)
        if size and total and total != size:
            raise RefusedError(f"the server has a file of {total:,} bytes; expected {size:,}")
        total = size or total
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            while block := answer.read1(_BLOCK):  # what has come, where the rest stalls
                file.write(block)
                start += len(block)
                if start > (total or _MOST):
                    raise RefusedError(f"the server sends more than the {total:,} bytes that are expected")
                meter.show(start, total)
    if total and start < total:
        raise OSError(f"the connection ended at {start:,} of {total:,} bytes")
    return start


def _announced(answer: Any, start: int) -> tuple[int, int]:
    """(bytes of the whole file, 0 where the server does not say; where this answer begins)."""
    length = int(answer.headers.get("Content-Length") or 0)
    if answer.status != 206:
        return length, 0  # all of it, though a part was asked for
    words = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").replace("-", "/").split("/")
    if not words[0].isdigit() or int(words[0]) != start:
        raise RefusedError("the server sends another part than was asked for")
    return (int(words[2]) if len(words) > 2 and words[2].isdigit() else start + length if length else 0), start


def _check(part: Path, url: str, size: int, md5: str, advice: str) -> None:
    found = _length(part)
    if found != size:
        part.unlink()
        raise UserError(f"{printable(url)}: {found:,} bytes came; expected {size:,}; {advice}")
    if md5:
        digest = hashlib.md5(usedforsecurity=False)
        with part.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
        if digest.hexdigest() != md5:
            part.unlink()
            raise UserError(
                f"{printable(url)}: its MD5 sum is {digest.hexdigest()}; expected {md5}. It was changed on the way, or "
                f"is another file; what came was removed; {advice}"
            )


def _length(path: Path) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except FileNotFoundError:
        return 0


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return f"nothing came for {TIMEOUT:.0f} seconds"
    return printable(str(reason)) or type(error).__name__


class _Meter:
    """A line on a terminal that is written over; elsewhere a line now and then."""

    def __init__(self, name: str) -> None:
        self._name, self._begin, self._first, self._shown = name, time.monotonic(), -1, 0.0
        self._terminal = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first < 0:
            self._first, self._begin = done, now
        if now - self._shown < (0.2 if self._terminal else 30):
            return
        self._shown = now
        speed = (done - self._first) / max(now - self._begin, 1e-3)
        left = f", {_clock((total - done) / speed)} left" if total and speed > 0 else ""
        text = f"{self._name}: {sized(done)}{f' of {sized(total)}' if total else ''}, {sized(int(speed))}/s{left}"
        if self._terminal:
            print(f"\r\x1b[K{text[:79]}", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sized(count: int) -> str:
    """`19.3 GB`, in powers of 1000 as disks are sold."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
