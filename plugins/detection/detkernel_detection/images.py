"""Image files: what a folder has, an image's size without decoding it, and the decoding.

JPEG is decoded by torchvision's operator, which takes half of Pillow's time; everything else by Pillow, since
torchvision's PNG decoder ends the process on a damaged file. An EXIF orientation is applied on request only: annotation
files of VOC and COCO form state coordinates of the image as it is stored.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from detkernel import DataError
from detkernel.errors import relative
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SUFFIXES = frozenset({
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".webp", ".avif", ".tif", ".tiff"),
    *(".gif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
})  # fmt: skip
"""Of files that Pillow reads; what it says of them itself has PDFs in it, films and fonts."""
READERS = 8
"""Threads that read headers: on a network disk it is the waiting that costs."""

HUGE = 2**28
"""Pixels of an image that is to be cut into tiles, at most: 805 MB once it is decoded."""

_ROWS = 2048
"""Of an image, that are converted at a time."""
_LOCK = threading.Lock()
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_JPEG = ("JPEG", "MPO")
_RUN_PROGRAMS = ("EPS", "WMF", "EMF")
"""Formats for which Pillow runs a program or the system's renderer."""
_DARK = 4096
"""16-bit values below this are less than 16 of 255 once their upper 8 bits are kept: black, to the eye."""
_DEPTHS = (8, 10, 12, 14, 16)
_SAMPLED = 64


class ImageError(DataError):
    """An image file that cannot be decoded. Its message ends with what to do; a data set may know more of that."""


class Header(NamedTuple):
    """What an image's first bytes say."""

    height: int
    width: int
    """As stored, before any EXIF orientation; TIFFs are always upright."""
    orientation: int = 1
    """EXIF: 1 upright, 3 upside down, 6 and 8 on its side, 2, 4, 5 and 7 mirrored."""
    kind: str = ""
    """Pillow's name of the file format."""
    animated: bool = False
    """Whether there are more frames or pages than the first, which is what is decoded. Known from `read_headers`."""

    def upright(self) -> tuple[int, int]:
        """(height, width) once the EXIF orientation is applied."""
        return (self.width, self.height) if self.orientation in _SIDEWAYS else (self.height, self.width)


def read_headers(paths: Sequence[str]) -> list[Header | DataError]:
    """The headers of many images, in order; for a broken one, its error."""
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    with ThreadPoolExecutor(READERS) as pool:
        return [header for chunk in pool.map(_read_chunk, chunks) for header in chunk]


def decode(path: str, apply_exif: bool, bits: int | None = None, huge: bool = False) -> Tensor:
    """An image as uint8 [3, H, W] RGB, channels-last in memory. Raises `DataError` naming the file.

    Greyscale, palette and CMYK images become RGB; an alpha channel is left out; of an animation the first frame is
    taken. Of files with 16 bits a channel, `bits` are significant: their upper 8 are kept. Where `bits` is None they
    are all 16, and an image that would become black is an error. `huge`: up to `HUGE` pixels, for one that is to be
    cut into tiles.
    """
    try:
        data = read_regular(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    with _opened(path, BytesIO(data), huge) as opened:
        header = _header(opened)
        if header.kind in _JPEG:
            image = _decode_with_torchvision(path, data)
        elif _is_deep(opened):
            image = _to_8_bits(path, _deep_pixels(path, opened, data), bits)
        else:
            image = _decode_with_pillow(path, opened, data)
    return turn_upright(image, header.orientation) if apply_exif else image


def find_depth(paths: Sequence[str]) -> tuple[int | None, int]:
    """(significant bits, largest value) of files with 16 bits a channel, from a sample of them; (None, 0) for none."""
    largest = 0
    candidates = [path for path in paths if path.lower().endswith((".png", ".tif", ".tiff"))]
    for path in candidates[:: max(1, len(candidates) // _SAMPLED)]:
        with suppress(DataError, OSError):  # reported where images are checked
            data = read_regular(path)
            with _opened(path, BytesIO(data)) as opened:
                if _is_deep(opened):
                    largest = max(largest, int(_deep_pixels(path, opened, data).max()))
    if largest == 0:
        return None, 0
    return next((bits for bits in _DEPTHS if largest < 2**bits), _DEPTHS[-1]), largest


def turn_upright(image: Tensor, orientation: int) -> Tensor:
    """[3, H, W] as it is meant to be seen, by its EXIF orientation."""
    pixels = image.permute(1, 2, 0)
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(0, 1)
    axes = [axis for axis, mirrored in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in mirrored]
    return pixels.flip(axes).contiguous().permute(2, 0, 1) if orientation != 1 else image


def image_files(folder: Path) -> list[str]:
    """The names of a folder's image files. Raises `DataError` if there is no such folder."""
    with scan(folder, "images") as entries:
        return [entry.name for entry in entries if Path(entry.name).suffix.lower() in SUFFIXES]


class Listing:
    """Answers which files are there, listing every folder once."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def __call__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder or "."))  # noqa: PTH208 - names alone are wanted
            except (OSError, ValueError):  # no such folder, or no name for one
                self._names[folder] = frozenset()
        return name in self._names[folder]


@contextmanager
def scan(folder: Path, what: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    """A folder's entries. Raises `DataError` that says what the nearest folder above has instead."""
    try:
        entries = os.scandir(folder)
    except OSError as error:
        raise DataError(missing_folder(folder, what, error)) from None
    with entries:
        yield entries


def missing_folder(folder: Path, what: str, error: OSError | None = None) -> str:
    """The message for a folder that cannot be listed."""
    if isinstance(error, PermissionError):
        return f"{relative(folder)}: the folder of the {what} cannot be read ({error.strerror}); check its permissions"
    above = next((parent for parent in folder.parents if parent.is_dir()), Path())
    names = sorted(f"{entry.name}/" for entry in above.glob("[!.]*") if entry.is_dir())[:12]
    there = f"has {', '.join(names)}" if names else "has no folders"
    return f"{relative(folder)}: there is no such folder of {what}; {relative(above)} {there}"


def size_text(height: int, width: int) -> str:
    """Width first, as everybody writes it."""
    return f"{width}x{height}"


def _read_chunk(paths: Sequence[str]) -> list[Header | DataError]:
    found: list[Header | DataError] = []
    for path in paths:
        try:
            if (plain := _plain_jpeg(_head(path))) is not None:
                found.append(plain)
                continue
            with _file(path) as file, _opened(path, file) as image:
                found.append(_header(image)._replace(animated=_is_animated(image)))
        except DataError as error:
            found.append(error)
    return found


_HEAD = 4096
"""Bytes in which most JPEGs have all that comes before the pixels."""
_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive, which Pillow and torchvision decode."""
_PASSED = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE3, 0xF0)})
"""Tables, comments, and data of applications; APP1 may have an orientation, APP2 further images."""


def _plain_jpeg(head: bytes) -> Header | None:
    """The header of a JPEG of which nothing is special, in a fifth of the time that Pillow takes; None: ask Pillow."""
    if head[:2] != b"\xff\xd8":
        return None
    size, start = None, 2
    while start + 4 <= len(head) and head[start] == 0xFF:
        marker, length = head[start + 1], int.from_bytes(head[start + 2 : start + 4], "big")
        if marker == 0xDA:
            return None if size is None else Header(size[0], size[1], kind="JPEG")
        if marker in _FRAMES and size is None and start + 10 <= len(head):
            size = struct.unpack(">HH", head[start + 5 : start + 9])
            if head[start + 4] != 8 or head[start + 9] not in (1, 3, 4) or 0 in size:
                return None
            if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
                return None
        elif marker == 0xE2:
            if head[start + 4 : start + 16] != b"ICC_PROFILE\0":
                return None
        elif marker not in _PASSED:
            return None
        if length < 2:
            return None
        start += 2 + length
    return None


def _head(path: str) -> bytes:
    """The first bytes of a file, without the file object that takes longer to make than they take to read."""
    try:
        handle = _open_without_waiting(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            _check(os.fstat(handle))
            return os.read(handle, _HEAD)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise _unreadable(path, error) from None


@contextmanager
def _file(path: str) -> Iterator[BinaryIO]:
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise _unreadable(path, error) from None
    with file:
        yield file


@contextmanager
def _opened(path: str, file: BinaryIO, huge: bool = False) -> Iterator[Image.Image]:
    """Pillow's lazy image. Only its header is read; one that would need gigabytes is refused here.

    No warning filters are set: they belong to the whole process, and this runs in threads.
    """
    try:
        with _unlimited() if huge else nullcontext():
            image = Image.open(file, formats=_formats())
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(path) from None
    except Exception as error:  # Pillow's plugins raise all sorts of errors for hostile bytes
        reason = "no image that can be read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageError(f"{relative(path)}: {reason}; expected a JPEG, PNG or similar; replace the file") from None
    with image:
        if image.width * image.height > (HUGE if huge else Image.MAX_IMAGE_PIXELS or math.inf):
            raise _too_large(path, HUGE if huge else None)
        yield image


@contextmanager
def _unlimited() -> Iterator[None]:
    """Pillow's own limit off, for all threads: those that open an image meanwhile look at its size themselves."""
    with _LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


@cache
def _formats() -> tuple[str, ...]:
    """What Pillow reads without running a program."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _RUN_PROGRAMS)


def _too_large(path: str, most: int | None = None) -> DataError:
    limit = f"{most or Image.MAX_IMAGE_PIXELS or 0:,}"
    return DataError(f"{relative(path)}: the image has more than {limit} pixels; cut it into tiles")


def _header(image: Image.Image) -> Header:
    kind, orientation = image.format or "", 1
    # a TIFF's is part of the format, and Pillow has applied it; a PNG Pillow decodes to look for one behind the pixels
    if kind != "TIFF" and (kind != "PNG" or "exif" in image.info):
        with suppress(Exception):  # a broken EXIF block says nothing about the image
            orientation = int(image.getexif().get(_ORIENTATION, 1))
    return Header(image.height, image.width, orientation if 1 <= orientation <= 8 else 1, kind)


def _is_animated(image: Image.Image) -> bool:
    """Not for a JPEG, whose further images are previews."""
    with suppress(Exception):  # a broken second frame says nothing about the first
        return image.format not in _JPEG and bool(getattr(image, "is_animated", False))
    return False


def _unreadable(path: str, error: Exception) -> DataError:
    return DataError(f"{relative(path)}: the image cannot be read ({getattr(error, 'strerror', None) or error})")


def _broken(path: str, reason: object) -> DataError:
    return ImageError(f"{relative(path)}: the image is truncated or broken ({reason}); replace the file")


def _decode_with_torchvision(path: str, data: bytearray) -> Tensor:
    import torch
    import torchvision.io  # registers the operator; its own functions, deprecated in 0.29, warn at every call

    rgb = torchvision.io.ImageReadMode.RGB.value
    try:
        image: Tensor = torch.ops.image.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), rgb, False)
    except RuntimeError as error:
        raise _broken(path, str(error).splitlines()[0].rpartition(", ")[2]) from None
    return image


def _decode_with_pillow(path: str, image: Image.Image, data: bytearray) -> Tensor:
    import numpy as np
    import torch

    if image.mode.startswith(("I", "F")):
        raise DataError(f"{relative(path)}: {image.mode} pixels; expected 8 or 16 bits a channel; convert the image")
    _check_png(path, image, data)
    try:
        pixels = np.array(image.convert("RGB")) if image.height <= _ROWS else _in_strips(image)
    except Exception as error:
        raise _broken(path, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _in_strips(image: Image.Image) -> NDArray[Any]:
    """uint8 [H, W, 3]: at once, Pillow would hold three copies of a huge image."""
    import numpy as np

    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _ROWS):
        box = (0, top, image.width, min(top + _ROWS, image.height))
        pixels[top : box[3]] = np.asarray(image.crop(box).convert("RGB"))
    return pixels


def _check_png(path: str, image: Image.Image, data: bytearray) -> None:
    """Compare the checksums of a PNG's critical chunks; Pillow passes over those of the pixels."""
    if image.format != "PNG":
        return
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        kind, end = data[start + 4 : start + 8], start + 8 + int.from_bytes(data[start : start + 4], "big")
        critical = kind[:1].isupper()
        if critical and zlib.crc32(view[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise _broken(path, f"the checksum of its {kind.decode('ascii', 'replace')} chunk is wrong")
        if kind == b"IEND":
            return
        start = end + 4


def _raw_mode(tile: Any) -> str:
    args = tile[3]
    return str(args[0] if isinstance(args, tuple) and args else args)


def _is_deep(image: Image.Image) -> bool:
    """Whether it has 16 bits a channel."""
    return image.mode.startswith("I;16") or any(";16" in _raw_mode(tile) for tile in getattr(image, "tile", ()))


def _deep_pixels(path: str, image: Image.Image, data: bytearray) -> NDArray[Any]:
    """uint16 [H, W, 3]. Pillow keeps one byte of each colour value, and is asked for both in turn."""
    import numpy as np

    _check_png(path, image, data)
    try:
        if image.mode.startswith("I;16"):
            return np.repeat(np.asarray(image).astype(np.uint16)[..., None], 3, axis=2)
        with _opened(path, BytesIO(data)) as again:
            has_lower = _read_lower_bytes(again)
            high, low = (np.asarray(part.convert("RGB")).astype(np.uint16) for part in (image, again))
        return high << 8 | (low if has_lower else 0)
    except DataError:
        raise
    except Exception as error:
        raise _broken(path, error) from None


def _read_lower_bytes(image: Any) -> bool:
    """Make Pillow read the lower byte of each 16-bit value; false where it cannot (greyscale with alpha)."""
    swapped = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
    tiles = []
    for tile in image.tile:
        mode = _raw_mode(tile)
        colours, _, order = mode.partition(";")
        if colours not in ("RGB", "RGBA", "RGBX") or order not in swapped:
            return False
        lower, args = f"{colours};{swapped[order]}", tile[3]
        tiles.append(tile._replace(args=(lower, *args[1:]) if isinstance(args, tuple) else lower))
    image.tile = tiles
    return True


def _to_8_bits(path: str, pixels: NDArray[Any], bits: int | None) -> Tensor:
    import numpy as np
    import torch

    largest = int(pixels.max())
    if bits is None and 0 < largest < _DARK:
        raise DataError(
            f"{relative(path)}: 16 bits a channel, but its values reach {largest} of 65535, so it would become black; "
            f"set `bit_depth` to the bits that are used, such as {next(b for b in _DEPTHS if largest < 2**b)}, or to 16"
        )
    bits = bits or 16
    if largest >= 2**bits:
        raise DataError(
            f"{relative(path)}: a value of {largest}, where `bit_depth` is {bits} and the largest is {2**bits - 1}; "
            f"set `bit_depth` to {next(b for b in _DEPTHS if largest < 2**b)}"
        )
    return torch.from_numpy((pixels >> (bits - 8)).astype(np.uint8)).permute(2, 0, 1)


LARGEST = 2**30
"""Bytes. An image of as many pixels as are allowed, of 16 bits a channel and not compressed, has half of it."""
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str) -> BufferedReader:
    """The file, opened for reading. Raises OSError for what is not a regular file of at most `LARGEST` bytes."""
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 - Path.open has no opener
    try:
        _check(os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
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


def _check(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "not a regular file")
        raise OSError(0, f"it is {kind}; expected a regular file")
    if status.st_size > LARGEST:
        raise OSError(0, f"{status.st_size:,} bytes, more than any image has")
