"""Reads what `torch.save` wrote, in both of its formats, without running code and within the size of the file.

The archive is opened by this module alone: a check by one reader before another one loads is worth what they agree on.
Its parts must be stored (torch packs nothing), must not overlap, and must lie within the file; a tensor's memory is a
part of its own, and no longer than that. Older files (before torch 1.6) are five pickles and then the numbers.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from detkernel import CheckpointError
from detkernel.errors import printable, relative
from detkernel.files import open_regular

from detkernel_detection import safe_pickle
from detkernel_detection.safe_pickle import HarmfulError, UnsafeError, find_foreign

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MOST_DIRECTORY = 1 << 24
"""Bytes of a zip archive's directory, which is twenty times larger in memory."""
_HEADER = 30
"""Bytes of a part's own header, before its name."""


def read(path: Path, *, foreign: bool = False) -> Any:
    """The content of a file of `torch.save`, its tensors on the CPU.

    Raises `CheckpointError` for a file that is not one, that is damaged, that would fill the memory or hang, and that
    holds more than tensors and plain values; with `foreign`, such objects are there as `Foreign`.
    """
    shown = relative(path)
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            content = _from_zip(file, size) if file.read(4) == b"PK\x03\x04" else _from_older(file, size)
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be read: {error.strerror or error}") from None
    except HarmfulError as error:
        raise _refused(path, f"it calls {error}") from None
    except UnsafeError as error:
        raise CheckpointError(f"{shown}: cannot be read as weights or a checkpoint: {printable(str(error))}") from None
    found = None if foreign else next(find_foreign(content), None)
    if found is not None:
        raise _refused(path, found)
    return content


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{relative(path)}: holds more than tensors and plain values; it is not loaded, since that could run code that "
        f"somebody put there ({printable(what)}). Save it again as a dict of tensors"
    )


def _from_zip(file: IO[bytes], size: int) -> Any:
    parts = _parts(file, size)
    roots = [name.removesuffix("data.pkl") for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UnsafeError("it is a zip archive, but not one of torch.save")
    order = parts.get(f"{roots[0]}byteorder")
    if order is not None and _bytes(file, *order) != sys.byteorder.encode():
        raise UnsafeError("it was written on a machine of the other byte order; load and save it there once")
    memories: dict[str, torch.UntypedStorage] = {}

    def open_storage(key: str, count: int) -> torch.UntypedStorage:
        start, length = parts.get(f"{roots[0]}data/{key}", (0, -1))
        if count != length:
            raise UnsafeError(f"a tensor's memory has {max(length, 0)} bytes in the file, and should have {count}")
        if key not in memories:
            memories[key] = _memory(count)
            file.seek(start)
            _fill(memories[key], file)
        return memories[key]

    return safe_pickle.load(io.BytesIO(_bytes(file, *parts[f"{roots[0]}data.pkl"])), open_storage, size)


class _Bounded:
    """A file for `ZipFile`, which reads an archive's directory at once, however large it says that it is."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, count: int = -1) -> bytes:
        if count > _MOST_DIRECTORY:
            raise UnsafeError("it is a zip archive of far too many parts")
        return self._file.read(count if count >= 0 else _MOST_DIRECTORY)


def _parts(file: IO[bytes], size: int) -> dict[str, tuple[int, int]]:
    """Of every part of an archive: where its bytes start, and how many there are."""
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            items = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RecursionError, UnicodeError) as error:
        raise UnsafeError(f"a damaged zip archive ({error})") from None
    parts: dict[str, tuple[int, int]] = {}
    free = 0
    for item in sorted(items, key=lambda item: item.header_offset):
        start, end = _place(file, item)
        stored = item.compress_type == zipfile.ZIP_STORED and item.compress_size == item.file_size
        if not stored or item.flag_bits & 1 or item.header_offset < free or end > size or item.filename in parts:
            raise UnsafeError("its parts are compressed, or overlap: torch writes no such file")
        parts[item.filename], free = (start, item.file_size), end
    return parts


def _place(file: IO[bytes], item: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a part start and end."""
    if item.header_offset < 0:
        raise UnsafeError("a part of it lies outside")
    file.seek(item.header_offset)
    header = file.read(_HEADER)
    if len(header) != _HEADER or not header.startswith(b"PK\x03\x04"):
        raise UnsafeError("a damaged zip archive (a part is not where it should be)")
    name, extra = struct.unpack("<HH", header[26:])
    start = item.header_offset + _HEADER + int(name) + int(extra)
    return start, start + item.file_size


def _bytes(file: IO[bytes], start: int, count: int) -> bytes:
    if count > safe_pickle.MOST_BYTES:
        raise UnsafeError(f"its values beside the tensors have more than {safe_pickle.MOST_BYTES >> 20} MB")
    file.seek(start)
    return file.read(count)


def _from_older(file: IO[bytes], size: int) -> Any:
    """Five pickles (a number, a version, the system, the content, the keys of the memories), then the memories."""
    file.seek(0)
    memories: dict[str, torch.UntypedStorage] = {}
    sizes: dict[str, int] = {}
    claimed = 0

    def open_storage(key: str, count: int) -> torch.UntypedStorage:
        nonlocal claimed
        if key not in memories:
            claimed += count
            if claimed > size:
                raise UnsafeError("its tensors have more bytes than the file")
            memories[key], sizes[key] = _memory(count), count
        if sizes[key] != count:
            raise UnsafeError("the memory of a tensor has two sizes")
        return memories[key]

    def part() -> Any:
        return safe_pickle.load(file, open_storage, size)

    if part() != _MAGIC or part() != _PROTOCOL:
        raise UnsafeError("it is not a file of torch.save")
    part()
    content, keys = part(), part()
    if not isinstance(keys, list) or {str(key) for key in keys} != set(memories) or len(keys) != len(memories):
        raise UnsafeError("the memories of its tensors are not those that it names")
    for key in map(str, keys):
        file.read(8)  # the count of elements, which the content has told
        _fill(memories[key], file)
    return content


def _memory(count: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(count)  # type: ignore[no-untyped-call]


def _fill(memory: torch.UntypedStorage, file: IO[bytes]) -> None:
    if memory.nbytes():
        view: Any = torch.empty(0, dtype=torch.uint8).set_(memory).numpy()
        if file.readinto(memoryview(view)) != len(view):  # type: ignore[attr-defined]
            raise UnsafeError("it ends too early")
