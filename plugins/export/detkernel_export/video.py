"""Videos and cameras, by OpenCV: frames in, frames with drawings out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detkernel import DataError, UserError
from detkernel.errors import relative
from torch import Tensor, from_numpy

from detkernel_export.sources import CAMERA, Source


def opencv(source: Source) -> Any:
    """The module. Raises `UserError` where it is not installed."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "8")
    try:
        import cv2
    except ImportError:
        what = "a camera" if source.path.startswith(f"{CAMERA}:") else relative(source.path)
        raise UserError(f"{what}: reading videos needs OpenCV: pip install 'detkernel-export[video]'") from None
    return cv2


class Frames:
    """The frames of a video or a camera, as uint8 RGB [3, H, W]. Raises `DataError` where it cannot be read."""

    def __init__(self, source: Source) -> None:
        self._cv2 = opencv(source)
        self._source = source
        camera = source.path.startswith(f"{CAMERA}:")
        self._capture = self._cv2.VideoCapture(int(source.path.partition(":")[2]) if camera else source.path)
        if not self._capture.isOpened():
            wanted = "is it connected, and may this user read it?" if camera else "it is broken, or of an unknown codec"
            raise DataError(f"{source.path if camera else relative(source.path)}: cannot be opened: {wanted}")
        rate = float(self._capture.get(self._cv2.CAP_PROP_FPS))
        self.rate = rate if 1 <= rate <= 1000 else 25.0
        count = int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 and not camera else None
        """How many there are, where that is known."""

    def __iter__(self) -> Iterator[Tensor]:
        seen = 0
        try:
            while True:
                read, frame = self._capture.read()
                if not read:
                    break
                seen += 1
                yield from_numpy(np.ascontiguousarray(frame[:, :, ::-1])).permute(2, 0, 1)
        finally:
            self._capture.release()
        if not seen:
            raise DataError(f"{relative(self._source.path)}: the video has no frame that can be decoded")


class Writer:
    """Writes an MP4 beside its place; `close` puts it there, `discard` removes it."""

    def __init__(self, path: Path, source: Source, rate: float, size: tuple[int, int]) -> None:
        cv2 = opencv(source)
        self._cv2, self.path = cv2, path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._beside = path.with_name(f".{path.name}.{os.getpid()}.mp4")
        self._beside.unlink(missing_ok=True)
        self._size = size
        self._file = cv2.VideoWriter(str(self._beside), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
        if not self._file.isOpened():
            raise UserError(f"{relative(path)}: OpenCV cannot write this video ({size[0]}x{size[1]})")

    def write(self, image: Any) -> None:
        """One of Pillow's images; a frame of another size than the first is scaled to it."""
        image = image if image.size == self._size else image.resize(self._size)
        self._file.write(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))

    def close(self) -> None:
        self._file.release()
        self._beside.replace(self.path)

    def discard(self) -> None:
        self._file.release()
        self._beside.unlink(missing_ok=True)
