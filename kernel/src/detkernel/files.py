"""Files: written whole or not at all, never through a link in a work dir, and read only where reading ends."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from detkernel.errors import UserError, printable, relative

_SAFE = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))  # some are of one system only
_MORE = 2**20
_LEFTOVER = re.compile(r"\..+\.([0-9]+)\.[a-z0-9_]{8}\.tmp")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def write_atomic(path: Path, data: bytes | str, within: Path | None = None) -> None:
    """Write beside, flush to the disk, rename. Raises OSError; the old file is then untouched and nothing is left.

    `within`: a folder, the work dir say, below which links are not followed (`refuse_links`).
    """
    content = data.encode() if isinstance(data, str) else data
    if within is not None:
        refuse_links(path.parent, within)  # the rename replaces a link that is the file itself
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        hidden = os.umask(0)
        os.umask(hidden)
        Path(name).chmod(0o666 & ~hidden)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, depth: int = 2) -> None:
    """Remove what processes that were killed left of `write_atomic`, in a folder and those `depth` below it."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if depth > 0:
                    remove_leftovers(Path(entry.path), depth - 1)
            elif (match := _LEFTOVER.fullmatch(entry.name)) and not _is_alive(int(match[1])):
                with suppress(OSError):
                    Path(entry.path).unlink()


def _is_alive(process: int) -> bool:
    """Whether there is such a process, other than this one: a container gives the same number at every start."""
    if process == os.getpid():
        return False
    if os.name != "posix":
        return True  # elsewhere, signal 0 is one that ends a process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def open_to_write(path: Path, within: Path, flags: int = os.O_WRONLY | os.O_CREAT | os.O_APPEND) -> int:
    """The handle of a file that is written in place, its folder made; `flags` are those of `os.open`.

    Raises UserError for a link on the way below `within` (`refuse_links`), and OSError as `os.open` does, also for
    what is not a regular file.
    """
    refuse_links(path, within)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _regular(path.stat(), path)
    handle = os.open(path, flags | _SAFE | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _regular(os.fstat(handle), path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def refuse_links(path: Path, within: Path) -> None:
    """Raise UserError where `path`, or a folder on the way to it from `within`, is a link.

    A work dir may have come from elsewhere, in an archive say: what a run writes there must stay there. The folder
    `within` may itself be a link, and so may what leads to it: the user named it. Paths outside of it pass.
    """
    try:
        steps = Path(os.path.abspath(path)).relative_to(os.path.abspath(within)).parts  # noqa: PTH100 - follows no link
    except ValueError:
        return
    place = within
    for step in steps:
        place = place / step
        if place.is_symlink():
            raise UserError(
                f"{printable(str(place))} is a link, and nothing is written through a link in "
                f"{relative(within)}; remove it, or make the folder that is meant the run.work_dir"
            )


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading. Raises OSError, also for what is not a regular file: a named pipe makes its reader
    wait for ever, a device may have no end."""
    _regular(path.stat(), path)  # before it is opened: to open a device can have effects
    handle = os.open(path, os.O_RDONLY | _SAFE)
    try:
        _regular(os.fstat(handle), path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """The whole content of a regular file. Raises OSError as `open_regular`, and for more than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        too_long = size > limit  # known before any memory is taken
        content = b"" if too_long else file.read(size + 1)  # as much as `limit` the system may not have
        while size < len(content) <= limit and (more := file.read(min(_MORE, limit + 1 - len(content)))):
            content += more  # the file grows, or is one whose size the system does not say
    if too_long or len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return content


def _regular(status: os.stat_result, path: Path) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, not a regular file", str(path))
