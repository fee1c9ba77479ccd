"""torch.export's files behind the interface of a detector: those that were written here.

torch's reader of such a file evaluates text in it, so a stranger's could run code. `detkernel export` keeps the digest
of what it wrote in the user's cache folder, and nothing else is loaded.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from detkernel import CheckpointError
from detkernel.errors import relative
from detkernel.files import read_regular, write_atomic
from torch import Tensor

from detkernel_export.session import FileDetector

SUFFIX = ".pt2"
_LARGEST = 2**34
_LARGEST_TEXT = 2**26
_MOST_DIGESTS = 1_000


def remember(path: Path) -> None:
    """The file was written here. Where that cannot be kept, it will not be tested."""
    folder = _folder()
    with suppress(OSError):
        write_atomic(folder / _digest(read_regular(path, _LARGEST)), b"")
        known = sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime)
        for one in known[: max(0, len(known) - _MOST_DIGESTS)]:
            one.unlink(missing_ok=True)


def read(path: Path) -> bytes:
    """The content of a file that was written here. Raises `CheckpointError` for any other."""
    try:
        content = read_regular(path, _LARGEST)
    except OSError as error:
        raise CheckpointError(f"{relative(path)}: it cannot be read ({error.strerror or error})") from None
    if not (_folder() / _digest(content)).is_file():
        raise CheckpointError(
            f"{relative(path)}: not a file that `detkernel export` wrote for you here, and any other torch.export file "
            "can run code when torch loads it; export the checkpoint again (--to torch-export), or give an ONNX file"
        )
    return content


def text_in(path: Path) -> str | None:
    """What the file says of itself: JSON. Raises `CheckpointError` as `read`."""
    with suppress(KeyError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(BytesIO(read(path))) as archive:
        name = next((one for one in archive.namelist() if one.endswith("/extra/detkernel.json")), "")
        if archive.getinfo(name).file_size <= _LARGEST_TEXT:
            return archive.read(name).decode()
    return None


class TorchExportDetector(FileDetector):
    """What the program in the file finds. It runs on the CPU, for which it was exported."""

    def __init__(self, path: Path, held: Mapping[str, Any], classes: Sequence[str]) -> None:
        super().__init__(path, held, classes)
        program = torch.export.load(BytesIO(read(path))).module()
        self._program = [program]  # in a list, so that its weights are not the detector's own

    def found(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(zip(self.outputs, self._program[0](images.cpu(), sizes.cpu()), strict=True))


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detkernel" / "exported"
