"""Decoding every image once, in parallel, with a memory of those that were valid."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from detkernel import DataError
from detkernel.errors import relative
from detkernel.files import write_atomic
from detkernel_detection import Dataset

if TYPE_CHECKING:
    from detkernel_data.annotations import Texts

_CHUNK = 16
_FEW = 64
"""Images that are decoded before a process would have started."""
_SHOWN = 10
_DIGEST = 12
_LARGEST_MEMORY = 2**26
_REPORT_EVERY = 30.0

Problem = tuple[int, str]
"""The position of an image, and what is wrong with it."""


def check_images(dataset: Dataset, name: str, workers: int) -> None:
    """Decode what has not been decoded before. Raises `DataError` with a count and the first images that are broken."""
    first_with: dict[str, int] = {}
    notes = [dataset.annotations(index) for index in range(len(dataset))]
    for index, note in enumerate(notes):
        first_with.setdefault(note.path, index)
    salts = [f"{note.height}x{note.width}" for note in notes]
    problems = find_invalid(
        _Trials(lambda index: notes[index].path, dataset.image), list(first_with.values()), salts, name, workers
    )
    if problems:
        examples = "".join(f"\n  {message}" for _, message in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{name} data: {len(problems)} of {len(first_with)} images cannot be used; `bad_images: drop` leaves out "
            f"those that cannot be decoded{examples}{more}"
        )


def find_undecodable(files: Sequence[str] | Texts, workers: int) -> list[Problem]:
    """The files that cannot be decoded, whatever their annotations say."""
    from detkernel_detection.images import decode

    trials = _Trials(lambda index: files[index], lambda index: decode(files[index], apply_exif=False, bits=16))
    return find_invalid(trials, range(len(files)), ["decoded"] * len(files), "images", workers)


def find_invalid(
    trials: _Trials, indices: Sequence[int], salts: Sequence[str], name: str, workers: int
) -> list[Problem]:
    """What is wrong with the images at some positions; the memory of valid ones is brought up to date."""
    from detkernel_data.loading.batches import Batches

    memory = Memory([trials.path(index) for index in indices])
    keys = {index: memory.key(trials.path(index), salts[index]) for index in indices}
    untried = [index for index in indices if keys[index] not in memory]
    chunks = _Chunks([untried[start : start + _CHUNK] for start in range(0, len(untried), _CHUNK)])
    workers = 0 if len(untried) < _FEW else workers
    loader: Any = Batches(
        trials,
        chunks,
        training=False,
        workers=workers,
        prefetch=2,
        pin_memory=False,
        purpose="while images were checked",
    )
    problems: list[Problem] = []
    progress = _Progress(name, len(untried))
    for tried in loader.batches(0):
        problems += tried.problems
        progress.add(len(tried.indices))
    progress.end()
    invalid = {index for index, _ in problems}
    memory.add(keys[index] for index in untried if index not in invalid)
    return problems


@attrs.define(eq=False)
class _Tried:
    """What a worker found of a chunk."""

    indices: list[int]
    problems: list[Problem]

    def unpack(self) -> _Tried:
        return self


class _Trials:
    """What the loader's workers ask for chunks (in the place of `Samples`)."""

    reading: Any = None

    def __init__(self, path: Callable[[int], str], decode: Callable[[int], object]) -> None:
        self.path, self._decode = path, decode
        self.dataset = self

    def annotations(self, index: int) -> _Trials._Named:
        return self._Named(self.path(index))

    def __getitem__(self, item: tuple[int, list[int]]) -> _Tried:
        _, indices = item
        problems = []
        for index in indices:
            if self.reading is not None:
                array, worker = self.reading
                array[worker] = index + 1
            try:
                self._decode(index)
            except DataError as error:
                problems.append((index, str(error)))
            except Exception as error:
                problems.append((index, f"{relative(self.path(index))}: {type(error).__name__}: {error}"))
        return _Tried(indices, problems)

    @attrs.define
    class _Named:
        path: str


class _Chunks:
    """The order of the chunks (in the place of `BatchSampler`)."""

    world_size = 1

    def __init__(self, chunks: list[list[int]]) -> None:
        self._chunks = chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def draws(self, _epoch: int) -> list[list[int]]:
        return self._chunks


class Memory:
    """Which files were valid: hashes of path, size and time of change, in the user's cache folder.

    One file for each folder of images. Where it cannot be read or written, everything is decoded again.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        folder = os.path.dirname(os.path.abspath(paths[0])) if paths else ""  # noqa: PTH100, PTH120 - no links resolved
        self._file = cache_folder() / f"{blake2b(folder.encode(errors='replace'), digest_size=8).hexdigest()}.valid"
        try:
            data = self._file.read_bytes() if self._file.stat().st_size <= _LARGEST_MEMORY else b""
        except OSError:
            data = b""
        self._known = {data[start : start + _DIGEST] for start in range(0, len(data) - _DIGEST + 1, _DIGEST)}

    def __contains__(self, key: bytes | None) -> bool:
        return key in self._known

    @staticmethod
    def key(path: str, salt: str) -> bytes | None:
        """None for what is not a file: a generated image, say."""
        try:
            status = os.stat(path)  # noqa: PTH116 - called for many files
        except (OSError, ValueError):
            return None
        text = f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{salt}"  # noqa: PTH100
        return blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST).digest()

    def add(self, keys: Iterator[bytes | None]) -> None:
        found = {key for key in keys if key is not None} - self._known
        if found:
            self._known |= found
            try:
                write_atomic(self._file, b"".join(sorted(self._known)))
            except OSError:
                return  # it only saves time


def cache_folder() -> Path:
    """Below the user's cache folder, by the rules of freedesktop.org."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detkernel" / "images"


class _Progress:
    """A line on the terminal that is written over; elsewhere a line now and then."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else _REPORT_EVERY):
            self._shown = now
            text = f"decoding {self._name}: {self._done:,} of {self._total:,} images"
            print(
                f"\r{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr, flush=True
            )

    def end(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
