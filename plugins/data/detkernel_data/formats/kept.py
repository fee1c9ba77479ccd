"""Annotations of large files, cleaned, as arrays in the user's cache folder.

A run maps them into its memory in place of reading the JSON again; its loader workers, and other runs, share those
pages. What is kept belongs to a file's size and time of change, to those of all images, and to the options of the data
set: if any of them is another, the files are read again. A file of the cache that is damaged is as good as none.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import attrs
import numpy as np
from detkernel.config.dump import plain
from detkernel_detection.findings import Finding, Note

from detkernel_data.annotations import FlatAnnotations, Masks, Texts
from detkernel_data.formats.lvis import packed_federated, unpacked_federated
from detkernel_data.loading.check_images import cache_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkernel_data.formats.coco import Coco

SMALLEST = 2**22
"""Bytes of an annotation file from which on it is worth it: smaller ones are read in a moment."""
VERSION = 3
"""To be raised with every change of what is kept, and of what a reader or the cleaning makes of a file."""
_MAGIC = b"detkernel annotations\n"
_ALIGNED = 64
"""Bytes: what comes first in the file takes as many, and each array begins at a multiple of them."""
_LARGEST_HEADER = 2**28
_MOST_BYTES, _MOST_FILES = 2**33, 16
_KINDS = {"|b1", "|u1", "<i4", "<i8", "<f4", "<f8"}


class Kept:
    """The place of a data set in the cache."""

    def __init__(self, path: Path, source: Sequence[Any]) -> None:
        self.path, self._source = path, list(source)
        self._images = ""
        """The signature of the images, where it has just been taken."""
        self._checksum: int | None = None
        """Of what has just been written."""

    @classmethod
    def of(cls, dataset: Coco) -> Kept | None:
        """None where it is too small to be worth it, or cannot be told apart from others."""
        try:
            status = os.stat(dataset.annotation_file)  # noqa: PTH116
        except (OSError, ValueError):
            return None
        if status.st_size < SMALLEST:
            return None
        options = plain(dataset, lambda cls: cls.__name__)
        place = os.path.abspath(dataset.annotation_file)  # noqa: PTH100 - as it is named: no links are followed
        source = [VERSION, place, str(Path.cwd()), status.st_size, status.st_mtime_ns, options]
        name = blake2b(json.dumps([*source[:3], options], sort_keys=True).encode(errors="replace"), digest_size=12)
        folder = cache_folder().parent / "annotations"
        return cls(folder / f"{name.hexdigest()}.kept", json.loads(json.dumps(source)))

    def take(self, dataset: Coco) -> bool:
        """Fill a data set with what is kept of it, if that is so still."""
        try:
            header, arrays = _mapped(self.path, self._checksum)
            if header["source"] != self._source or header["images"] != (self._images or _signature(header["folders"])):
                return False
            flat = _unpacked(header, arrays)
            flat.stored = str(self.path), header["checksum"]
            dataset.fill(flat, header["classes"], [_note(one) for one in header["notes"]], header["bits"])
            dataset.keypoint_names = tuple(header["keypoint_names"])
            dataset.category_ids = dict(header["category_ids"])
            said = header["federated"]
            dataset.federated = None if said is None else unpacked_federated(said[0], said[1], arrays)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return False
        with suppress(OSError):
            os.utime(self.path)  # what was not used for the longest time is removed first
        return True

    def put(self, dataset: Coco) -> None:
        """Keep a data set; it then is that in the cache, and its own memory is free. Where that fails, nothing is
        lost but time."""
        flat = dataset.flat
        folders = sorted({*map(os.path.dirname, flat.files.tolist()), str(dataset.image_folder)})
        try:
            packed = _packed(flat) | packed_federated(dataset.federated)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _replaced(self.path) as file, ThreadPoolExecutor(3) as pool:  # all of them leave Python to others
                signature, digest = pool.submit(_signature, folders), pool.submit(flat.digest, dataset.classes)
                layout = pool.submit(_laid_out, packed)
                _write_arrays(file, packed)
                self._images = signature.result()
                header = {
                    "source": self._source,
                    "folders": folders,
                    "images": self._images,
                    "classes": list(dataset.classes),
                    "notes": [_plain(one) for one in dataset.notes],
                    "bits": dataset.found_bits,
                    "keypoint_names": list(dataset.keypoint_names),
                    "category_ids": dict(dataset.category_ids),
                    "federated": [one.classes, dict(one.frequency)] if (one := dataset.federated) else None,
                    "digest": digest.result(),
                    **layout.result(),
                }
                _write_header(file, header)
            self._checksum = header["checksum"]
        except (OSError, UnicodeError, TypeError):
            return
        _prune(self.path)
        self.take(dataset)


def _plain(one: str) -> list[Any]:
    return [str(one), list(one.places), attrs.asdict(one.finding)] if isinstance(one, Note) else [one]


def _note(one: Sequence[Any]) -> str:
    return Note(one[0], one[1], Finding(**one[2])) if len(one) > 1 else str(one[0])


def _signature(folders: Sequence[str]) -> str:
    """A hash of the names, sizes and times of change of all files in some folders."""
    digest = blake2b(digest_size=16)
    for folder in folders:
        with os.scandir(folder) as entries:
            rows = []
            for entry in entries:
                status = entry.stat()
                rows.append(f"{entry.name}\0{status.st_size}\0{status.st_mtime_ns}")
        digest.update("\n".join([folder, *sorted(rows)]).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _packed(flat: FlatAnnotations) -> dict[str, NDArray[Any]]:
    """All arrays, by name: `masks.numbers`, `fields.track_id`."""
    found: dict[str, NDArray[Any]] = {}
    for field in attrs.fields(FlatAnnotations):
        value = getattr(flat, field.name)
        if isinstance(value, np.ndarray):
            found[field.name] = value
        elif isinstance(value, Texts):
            found[f"{field.name}.data"], found[f"{field.name}.offsets"] = value.arrays()
        elif isinstance(value, Masks):
            names = ("numbers", "parts", "objects", "runs.data", "runs.offsets")
            found |= {f"masks.{name}": array for name, array in zip(names, value.arrays(), strict=True)}
        elif isinstance(value, Mapping):
            found |= {f"fields.{name}": array for name, array in value.items()}
    return found


def _unpacked(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> FlatAnnotations:
    values: dict[str, Any] = {name: array for name, array in arrays.items() if "." not in name}
    for name in ("image_ids", "files"):
        if f"{name}.data" in arrays:
            values[name] = Texts.packed(arrays[f"{name}.data"], arrays[f"{name}.offsets"])
    if "masks.numbers" in arrays:
        runs = Texts.packed(arrays["masks.runs.data"], arrays["masks.runs.offsets"])
        numbers, parts, objects = (arrays[f"masks.{name}"] for name in ("numbers", "parts", "objects"))
        values["masks"] = Masks.packed(numbers, parts, objects, runs)
    values["fields"] = {
        name.removeprefix("fields."): array for name, array in arrays.items() if name.startswith("fields.")
    }
    return FlatAnnotations(**values, known_digest=header["digest"])


def reopened(path: str, checksum: int) -> FlatAnnotations:
    """What is kept at a path, in another process than the one that looked at it."""
    header, arrays = _mapped(Path(path), checksum)
    flat = _unpacked(header, arrays)
    flat.stored = path, checksum
    return flat


def _laid_out(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What a header says of the arrays: each one's kind, shape and place, and the size and checksum of all of them."""
    start, checksum, specs = 0, 0, {}
    for name, array in arrays.items():
        if array.dtype.str not in _KINDS:
            raise TypeError(f"arrays of {array.dtype} are not kept")
        specs[name] = [array.dtype.str, list(array.shape), start]
        for chunk in _chunks(array):
            checksum = zlib.crc32(chunk, checksum)
            start += len(chunk)
    return {"arrays": specs, "size": start, "checksum": checksum}


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes another's place once it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_arrays(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Behind the place of what comes first."""
    file.seek(_ALIGNED)
    for array in arrays.values():
        for chunk in _chunks(array):
            file.write(chunk)


def _write_header(file: BinaryIO, header: Mapping[str, Any]) -> None:
    """Behind the arrays, since it has their checksum in it, and what comes first: where it is."""
    text = json.dumps(header).encode()
    file.write(text)
    file.seek(0)
    file.write(_start(header["size"], len(text), zlib.crc32(text)))


def _start(size: int, length: int, checksum: int) -> bytes:
    """What a file begins with: the bytes of the arrays, those of the header, and the header's checksum."""
    return (_MAGIC + b"%16d%12d%12d" % (size, length, checksum)).ljust(_ALIGNED, b"\n")


def _chunks(array: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of an array, and zeros up to the next multiple."""
    data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    for start in range(0, len(data), 2**24):
        yield data[start : start + 2**24]
    yield memoryview(bytes(-len(data) % _ALIGNED))


def _mapped(path: Path, checksum: int | None = None) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The header and the arrays, which are read from the file when they are looked at. Raises ValueError for a file
    that is not whole. With a `checksum` it was seen to be whole before, and only has to be the same."""
    with path.open("rb") as file:
        start = file.read(_ALIGNED)
        size, length, header_sum = (int(word) for word in start[len(_MAGIC) :].split())
        if start != _start(size, length, header_sum) or not 0 < length < _LARGEST_HEADER:
            raise ValueError("another file")
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(view) != _ALIGNED + size + length:
        raise ValueError("not all of it is there")
    text = view[_ALIGNED + size :]
    if zlib.crc32(text) != header_sum:
        raise ValueError("a damaged header")
    header, data = json.loads(text), memoryview(view)[_ALIGNED : _ALIGNED + size]
    if (zlib.crc32(data) if checksum is None else checksum) != header["checksum"]:
        raise ValueError("it is damaged")
    arrays = {}
    for name, (kind, shape, offset) in header["arrays"].items():
        if kind not in _KINDS:
            raise ValueError(f"arrays of {kind}")
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype=kind, count=count, offset=offset).reshape(shape)
    return header, arrays


def _prune(newest: Path) -> None:
    """Remove what was not used for the longest time, where there is more than is worth it."""
    with suppress(OSError):
        files = [(path.stat(), path) for path in newest.parent.glob("*.kept") if path != newest]
        files.sort(key=lambda pair: pair[0].st_mtime, reverse=True)
        room, count = _MOST_BYTES - newest.stat().st_size, 1
        for status, path in files:
            room, count = room - status.st_size, count + 1
            if room < 0 or count > _MOST_FILES:
                path.unlink(missing_ok=True)
