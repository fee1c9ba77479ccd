"""Picture files: what a folder has, a picture's size without decoding it, and the decoding.

JPEG and PNG are decoded by torchvision's operators, which take half of Pillow's time; everything else by Pillow. An
EXIF orientation is applied on request only: annotation files of VOC and COCO form state coordinates of the picture as
it is stored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from detkernel import DataError
from detkernel.errors import relative
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
READERS = 8
"""Threads that read headers: on a network disk it is the waiting that costs."""

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_OPERATORS = {"JPEG": "decode_jpeg", "MPO": "decode_jpeg", "PNG": "decode_png"}


class Header(NamedTuple):
    """What a picture's first bytes say."""

    height: int
    width: int
    """As stored, before any EXIF orientation; TIFFs are always upright."""
    orientation: int = 1
    """EXIF: 1 upright, 3 upside down, 6 and 8 on its side, 2, 4, 5 and 7 mirrored."""
    kind: str = ""
    """Pillow's name of the file format."""

    def upright(self) -> tuple[int, int]:
        """(height, width) once the EXIF orientation is applied."""
        return (self.width, self.height) if self.orientation in _SIDEWAYS else (self.height, self.width)


def read_headers(paths: Sequence[str]) -> list[Header | DataError]:
    """The headers of many pictures, in order; for a broken one, its error."""
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    with ThreadPoolExecutor(READERS) as pool:
        return [header for chunk in pool.map(_read_chunk, chunks) for header in chunk]


def decode(path: str, apply_exif: bool) -> Tensor:
    """A picture as uint8 [3, H, W] RGB, channels-last in memory. Raises `DataError` naming the file.

    Greyscale, palette and CMYK pictures become RGB; an alpha channel is left out; 16-bit PNGs keep their upper 8 bits.
    """
    try:
        data = bytearray(Path(path).read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from None
    with _opened(path, BytesIO(data)) as picture:
        header = _header(picture)
        operator = _OPERATORS.get(header.kind)
        image = _decode_with_torchvision(path, data, operator) if operator else _decode_with_pillow(path, picture)
    return turn_upright(image, header.orientation) if apply_exif else image


def turn_upright(image: Tensor, orientation: int) -> Tensor:
    """[3, H, W] as it is meant to be seen, by its EXIF orientation."""
    pixels = image.permute(1, 2, 0)
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(0, 1)
    axes = [axis for axis, mirrored in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if orientation in mirrored]
    return pixels.flip(axes).contiguous().permute(2, 0, 1) if orientation != 1 else image


def picture_files(folder: Path) -> list[str]:
    """The names of a folder's picture files. Raises `DataError` if there is no such folder."""
    with scan(folder, "pictures") as entries:
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
            with _opened(path, Path(path)) as picture:
                found.append(_header(picture))
        except DataError as error:
            found.append(error)
    return found


@contextmanager
def _opened(path: str | Path, file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Pillow's lazy picture. Only its header is read; one that would need gigabytes is refused here.

    No warning filters are set: they belong to the whole process, and this runs in threads.
    """
    try:
        picture = Image.open(file)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(path) from None
    except FileNotFoundError as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # Pillow's plugins raise all sorts of errors for hostile bytes
        reason = "no picture that can be read" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{relative(path)}: {reason}; expected a JPEG, PNG or similar; replace the file") from None
    with picture:
        if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise _too_large(path)
        yield picture


def _too_large(path: str | Path) -> DataError:
    limit = f"{Image.MAX_IMAGE_PIXELS or 0:,}"
    return DataError(f"{relative(path)}: the picture has more than {limit} pixels; cut it into tiles")


def _header(picture: Image.Image) -> Header:
    kind, orientation = picture.format or "", 1
    # a TIFF's is part of the format, and Pillow has applied it; a PNG Pillow decodes to look for one behind the pixels
    if kind != "TIFF" and (kind != "PNG" or "exif" in picture.info):
        with suppress(Exception):  # a broken EXIF block says nothing about the picture
            orientation = int(picture.getexif().get(_ORIENTATION, 1))
    return Header(picture.height, picture.width, orientation if 1 <= orientation <= 8 else 1, kind)


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{relative(path)}: the picture cannot be read ({error.strerror or error})")


def _decode_with_torchvision(path: str, data: bytearray, operator: str) -> Tensor:
    import torch
    import torchvision.io  # registers the operators; its own functions, deprecated in 0.29, warn at every call

    rgb = torchvision.io.ImageReadMode.RGB.value
    try:
        image: Tensor = getattr(torch.ops.image, operator)(torch.frombuffer(data, dtype=torch.uint8), rgb, False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(", ")[2]
        raise DataError(f"{relative(path)}: the picture is truncated or broken ({reason}); replace the file") from None
    return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image


def _decode_with_pillow(path: str, picture: Image.Image) -> Tensor:
    import numpy as np
    import torch

    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{relative(path)}: {picture.mode} pixels; expected 8 bits a channel; convert the picture")
    try:
        pixels = np.array(picture.convert("RGB"))
    except Exception as error:
        raise DataError(f"{relative(path)}: the picture is truncated or broken ({error}); replace the file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
