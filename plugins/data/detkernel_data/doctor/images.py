"""Each image file looked at once: what it is, and a perceptual hash, remembered by path, size and time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from detkernel.files import write_atomic
from numpy.typing import NDArray

from detkernel_data.loading.check_images import cache_folder

VERSION = 1
_SIDE = 32
_BANDS = 4
NEAR_BITS = 3
"""Bits of 64 in which the hashes of near-identical images differ at most: with four bands, one is equal then."""
NEAR_GREY = 6.0
"""Grey levels of 255 by which their thumbnails differ on average at most."""
_THREADS = 8
_LARGEST_CACHE = 2**30
_MOST_IN_BAND = 2_000


@attrs.frozen
class Seen:
    """What an image file is."""

    kind: str
    """Pillow's name of the format; empty where it cannot be read."""
    mode: str
    """Pillow's colour mode, such as RGB, L or CMYK."""
    orientation: int
    digest: str
    """Of the file's bytes."""
    hash: int
    """64 bits: the signs of the lowest frequencies of the grey image, less their median."""
    thumb: str
    """8x8 grey levels, in hexadecimal digits."""


def look(paths: Sequence[str], progress: Callable[[int], None] = lambda _: None) -> dict[str, Seen]:
    """What each file is; only those that are new or changed are opened."""
    memory = _Memory(paths)
    keys = {path: memory.key(path) for path in dict.fromkeys(paths)}
    found = {path: memory.known[key] for path, key in keys.items() if key in memory.known}
    new = [path for path in keys if path not in found]
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, (path, seen) in enumerate(zip(new, pool.map(_look, new), strict=True), start=1):
            found[path] = seen
            progress(number)
    memory.keep({keys[path]: seen for path, seen in found.items()}, changed=bool(new))
    return found


def remembered(paths: Sequence[str]) -> dict[str, Seen]:
    """What `look` saw of them before, unless they have changed; no image is opened. `paths`: those of one `look`."""
    memory = _Memory(paths)
    keys = ((path, memory.key(path)) for path in dict.fromkeys(paths)) if memory.known else ()
    return {path: memory.known[key] for path, key in keys if key in memory.known}


def _look(path: str) -> Seen:
    from detkernel_detection.images import read_regular
    from PIL import Image

    try:
        data = read_regular(path)
        digest = blake2b(data, digest_size=12).hexdigest()
    except (OSError, ValueError):
        return Seen("", "", 1, "", 0, "")
    try:
        with Image.open(BytesIO(data)) as image:
            kind, mode = image.format or "", image.mode
            orientation = int(image.getexif().get(0x0112, 1)) if kind != "TIFF" else 1
            image.draft("L", (_SIDE * 4, _SIDE * 4))
            grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
    except Exception:  # reported by the readers, with their words
        return Seen("", "", 1, digest, 0, "")
    thumb = grey.reshape(8, _SIDE // 8, 8, _SIDE // 8).mean((1, 3)).round().astype(np.uint8).tobytes().hex()
    return Seen(kind, mode, orientation, digest, perceptual_hash(grey), thumb)


def perceptual_hash(grey: NDArray[np.float64]) -> int:
    """pHash (Zauner 2010): whether each of the 64 lowest frequencies of the discrete cosine transform is above their
    median. `grey` is [32, 32]."""
    low = (_cosines() @ grey @ _cosines().T).reshape(-1)
    bits = low > np.median(low)
    return int("".join("01"[bit] for bit in bits.astype(int)), 2)


@cache
def _cosines() -> NDArray[np.float64]:
    """[8, 32] the first rows of the transform."""
    rows, columns = np.arange(8)[:, None], np.arange(_SIDE)[None]
    made: NDArray[np.float64] = np.cos(np.pi / _SIDE * (columns + 0.5) * rows)
    return made


def pairs(seen: Sequence[Seen]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(identical, near-identical) images, as pairs of positions: each image with the first one that is like it."""
    identical: list[tuple[int, int]] = []
    first: dict[str, int] = {}
    for number, one in enumerate(seen):
        if not one.digest:
            continue
        before = first.setdefault(one.digest, number)
        if before != number:
            identical.append((before, number))
    chosen = [number for number in sorted(first.values()) if seen[number].thumb]
    return identical, _near(seen, chosen)


def _near(seen: Sequence[Seen], chosen: Sequence[int]) -> list[tuple[int, int]]:
    thumbs = {number: np.frombuffer(bytes.fromhex(seen[number].thumb), dtype=np.uint8).astype(int) for number in chosen}
    found: dict[int, int] = {}
    for band in range(_BANDS):
        buckets: dict[int, list[int]] = {}
        for number in chosen:
            buckets.setdefault(seen[number].hash >> 16 * band & 0xFFFF, []).append(number)
        for bucket in buckets.values():
            for place, number in enumerate(bucket[:_MOST_IN_BAND]):
                for other in bucket[:place]:
                    if number not in found and _alike(seen[number], seen[other], thumbs[number], thumbs[other]):
                        found[number] = other
    return sorted((other, number) for number, other in found.items())


def _alike(one: Seen, other: Seen, thumb: NDArray[Any], other_thumb: NDArray[Any]) -> bool:
    bits = (one.hash ^ other.hash).bit_count()
    return bits <= NEAR_BITS and bool(np.abs(thumb - other_thumb).mean() <= NEAR_GREY)


class _Memory:
    """What was seen before, a file for each set of folders."""

    def __init__(self, paths: Iterable[str]) -> None:
        folders = sorted({os.path.dirname(os.path.abspath(path)) for path in paths})  # noqa: PTH100, PTH120
        name = blake2b("\n".join(folders).encode(errors="replace"), digest_size=8).hexdigest()
        self._file = cache_folder().parent / "doctor" / f"{name}.json"
        self.known: dict[str, Seen] = {}
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            if self._file.stat().st_size <= _LARGEST_CACHE:
                content = json.loads(self._file.read_bytes())
                if content["version"] == VERSION:
                    self.known = {key: Seen(*row) for key, row in content["seen"].items()}

    @staticmethod
    def key(path: str) -> str:
        try:
            status = os.stat(path)  # noqa: PTH116 - called for many files
        except (OSError, ValueError):
            return f"{path}\0"
        return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"  # noqa: PTH100

    def keep(self, seen: dict[str, Seen], *, changed: bool) -> None:
        if not changed:
            return
        again = {key.partition("\0")[0] for key in seen}  # the splits of VOC's form share a folder
        others = {key: one for key, one in self.known.items() if key.partition("\0")[0] not in again}
        rows = {key: attrs.astuple(one) for key, one in {**others, **seen}.items()}
        content = {"version": VERSION, "seen": rows}
        with suppress(OSError):  # it only saves time
            write_atomic(self._file, json.dumps(content).encode(errors="backslashreplace"))


def counts(values: Iterable[str]) -> dict[str, int]:
    """How often each is there, the most frequent first."""
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def matches_suffix(path: str, kind: str) -> bool:
    """Whether a file's name is that of its format."""
    suffix = Path(path).suffix.lower()
    names = {
        "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
        "MPO": (".jpg", ".jpeg", ".mpo"),
        "PNG": (".png", ".apng"),
        "BMP": (".bmp", ".dib"),
        "WEBP": (".webp",),
        "GIF": (".gif",),
        "TIFF": (".tif", ".tiff"),
    }
    return kind not in names or suffix in names[kind]
