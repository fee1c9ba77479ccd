"""Archives unpacked as if they came from an enemy: nothing outside of the folder, no links, no bombs."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from detkernel import UserError
from detkernel.errors import printable, relative

_MOST_FILES = 2_000_000
_MOST_RATIO = 200
"""Times an archive's size that its content may have: COCO's annotations have 8."""
_LEAST = 2**24
_DRIVE = re.compile(r"^[A-Za-z]:")


class _Member(NamedTuple):
    name: str
    size: int
    content: Callable[[], IO[bytes]] | None
    """Opens it; None for a folder."""


def unpack(archive: Path, folder: Path) -> int:
    """Unpack a zip or tar file into a folder, and give the number of files.

    It happens beside, and is then moved: whoever sees the last file sees all. Raises `UserError`; nothing is left then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpacking-") as place:
        try:
            count = _extract(archive, Path(place))
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(f"{relative(archive)}: it cannot be unpacked ({printable(str(error))})") from None
        except OSError as error:
            raise UserError(f"{relative(archive)}: it cannot be unpacked ({error.strerror or error})") from None
        _merge(Path(place), folder)
    return count


def _extract(archive: Path, place: Path) -> int:
    limit = max(archive.stat().st_size * _MOST_RATIO, _LEAST)
    total, count, names = 0, 0, set()
    for member in _members(archive, limit):
        target = _inside(archive, place, member.name)
        if member.content is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        count += 1
        if count > _MOST_FILES:
            raise UserError(f"{relative(archive)}: more than {_MOST_FILES:,} files in it")
        if target in names:
            raise UserError(f"{relative(archive)}: '{printable(member.name)}' is in it twice")
        names.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.content() as source, target.open("xb") as file:
            while block := source.read(2**20):
                total += len(block)
                if total > limit:
                    raise UserError(
                        f"{relative(archive)}: it unpacks to more than {limit:,} bytes, {_MOST_RATIO} times its own "
                        "size: no data set does"
                    )
                file.write(block)
    return count


def _members(archive: Path, limit: int) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            _check_room(archive, sum(info.file_size for info in file.infolist()), limit)
            for info in file.infolist():
                mode = info.external_attr >> 16
                if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(archive, info.filename)
                yield _Member(info.filename, info.file_size, None if info.is_dir() else partial(file.open, info))
        return
    with tarfile.open(archive) as file:
        for member in file:
            if not (member.isreg() or member.isdir()):
                raise _refused(archive, member.name)
            yield _Member(member.name, member.size, partial(_extracted, file, member) if member.isreg() else None)


def _extracted(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None
    return content


def _check_room(archive: Path, total: int, limit: int) -> None:
    if total > limit:
        what = f"it says that it unpacks to {total:,} bytes, more than {_MOST_RATIO} times its own size"
        raise UserError(f"{relative(archive)}: {what}")
    free = shutil.disk_usage(archive.parent).free
    if total > free:
        raise UserError(f"{relative(archive)}: it unpacks to {total:,} bytes, and the disk has {free:,} left")


def _refused(archive: Path, name: str) -> UserError:
    return UserError(
        f"{relative(archive)}: '{printable(name)}' is a link or a device; expected files and folders alone"
    )


def _inside(archive: Path, place: Path, name: str) -> Path:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or _DRIVE.match(name) or ".." in parts or "\0" in name:
        raise UserError(f"{relative(archive)}: '{printable(name)}' would be written outside of the folder")
    return place.joinpath(*(part for part in parts if part not in ("", ".")))


def _merge(source: Path, folder: Path) -> None:
    """Move all files to where they belong; those of the same name are replaced."""
    for top, _, names in os.walk(source):
        place = folder / Path(top).relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            (Path(top) / name).replace(place / name)
