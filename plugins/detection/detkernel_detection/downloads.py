"""Published files by their address, kept where torch keeps what it downloads."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch
from detkernel import UserError
from detkernel.errors import printable

TIMEOUT = 60.0
"""Seconds for which a server may send nothing."""
_DIGEST = re.compile(r"(?:-|_(?!\d+\.))([0-9a-f]{8,64})\.\w+$")  # `_20210419.pth` ends with a date


def digest_in(file: str) -> str | None:
    """The beginning of the SHA-256 that a file's name ends with, as in `resnet18-f37072fd.pth`; None: it has none."""
    found = _DIGEST.search(file)
    return found[1] if found else None


def downloaded(url: str, what: str) -> Path:
    """Where the file of an address of http is kept; it is fetched the first time, and is there whole or not at all.

    Its content is checked against the digest in its name, where that has one. `what` is for the message of the
    `UserError` that is raised where it cannot be fetched, or is another file than its name says.
    """
    file = url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.is_file():
        return path
    shown = printable(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _patience():
            torch.hub.download_url_to_file(url, str(path), digest_in(file), progress=sys.stderr.isatty())
    except RuntimeError:
        raise UserError(
            f"{what} from {shown} is not the file that its name says: its SHA-256 does not begin with "
            f"{digest_in(file)}. It was cut off on the way, or changed there; try again, or get it from elsewhere and "
            f"put it at {path}"
        ) from None
    except (URLError, OSError, HTTPException) as error:
        raise UserError(
            f"{what} cannot be downloaded from {shown} ({printable(str(getattr(error, 'reason', error)))}); "
            f"where there is no network, put the file at {path}, or give its path as `weights`"
        ) from None
    return path


@contextmanager
def _patience() -> Iterator[None]:
    """torch waits for ever: its only limit is that of new connections of the process."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
