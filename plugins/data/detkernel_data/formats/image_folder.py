"""The `image_folder` plugin: images without annotations, to predict on or to train with unlabelled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from detkernel import DataError, option, plugin, state
from detkernel.errors import relative
from detkernel_detection import Annotations, Dataset

if TYPE_CHECKING:
    from detkernel_detection.images import Header
    from torch import Tensor


@plugin
class ImageFolder(Dataset):
    """The images of a folder, in the order of their names; they have no annotations and no classes.

    Images are decoded upright, as their EXIF orientation says; an image's id is its path below the folder.
    """

    root: Path = option(help="the folder")
    recursive: bool = option(default=False, help="also images in folders below it")
    bad_images: Literal["error", "drop"] = option(
        default="error", help="a file that does not begin as an image does is an error, or is left out and counted"
    )
    bit_depth: int | None = option(
        default=None,
        at_least=8,
        at_most=16,
        help="significant bits of images with 16 bits a channel; null: as many as the values of a sample of them need",
    )
    _files: list[str] = state(factory=list)
    """Paths below the folder."""
    _headers: list[Header] = state(factory=list)
    _bits: int | None = state()

    def load(self) -> None:
        from detkernel_detection.images import find_depth, image_files, read_headers

        from detkernel_data.report import Problems, note, with_advice

        folders = [self.root]
        if self.recursive:
            folders += sorted(path for path in self.root.rglob("*") if path.is_dir())
        names = sorted(
            (folder / name).relative_to(self.root).as_posix() for folder in folders for name in image_files(folder)
        )
        if not names:
            raise DataError(f"{relative(self.root)}: there is no image in this folder; recursive=true looks below it")
        headers = read_headers([str(self.root / name) for name in names])
        problems, broken = Problems(relative(self.root)), []
        for header in headers:
            if isinstance(header, DataError):
                broken.append(str(header))
                problems.add(with_advice(header))
        if self.bad_images == "error":
            problems.stop()
        self.notes = [note(f"{len(broken)} of {len(names)} images cannot be read: left out", broken)] if broken else []
        good = [(name, one) for name, one in zip(names, headers, strict=True) if not isinstance(one, DataError)]
        self._files, self._headers = [name for name, _ in good], [header for _, header in good]
        self._bits = self.bit_depth or find_depth([str(self.root / name) for name in self._files])[0]

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> Tensor:
        from detkernel_detection.images import decode

        return decode(str(self.root / self._files[index]), apply_exif=True, bits=self._bits)

    def annotations(self, index: int) -> Annotations:
        height, width = self._headers[index].upright()
        nothing, none = np.zeros(0), np.zeros(0, dtype=bool)
        return Annotations(
            image_id=self._files[index],
            path=str(self.root / self._files[index]),
            height=height,
            width=width,
            boxes=np.zeros((0, 4)),
            labels=np.zeros(0, dtype=np.int64),
            area=nothing,
            crowd=none,
            difficult=none,
        )
