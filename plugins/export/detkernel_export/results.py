"""What was found in an image: as arrays, as plain values, for supervision, and to look at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from detkernel import UserError
from detkernel.errors import printable
from detkernel.files import write_atomic
from detkernel_detection import Detections
from detkernel_detection.predictor import Image, to_tensor

from detkernel_export.rle import encode

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import NDArray
    from torch import Tensor


class Result:
    """What was found in one image, by falling score, in its own pixels. A notebook shows it as a drawing."""

    def __init__(
        self,
        image: Image,
        pixels: Tensor,
        detections: Detections,
        classes: Sequence[str],
        keypoint_names: Sequence[str] = (),
    ) -> None:
        self.image = image
        """What was given: a path, or pixels."""
        self.detections, self.classes, self.keypoint_names = detections, tuple(classes), tuple(keypoint_names)
        self.height, self.width = int(pixels.shape[1]), int(pixels.shape[2])
        self._pixels: Tensor | None = pixels

    def __len__(self) -> int:
        return len(self.detections)

    def __repr__(self) -> str:
        counts = {name: self.names.count(name) for name in dict.fromkeys(self.names)}
        found = ", ".join(f"{count} {printable(name)}" for name, count in counts.items()) or "nothing"
        return f"<Result of {printable(self.path or 'pixels')}, {self.width}x{self.height}: {found}>"

    @property
    def path(self) -> str | None:
        """The image's file, where it came from one."""
        return fspath(self.image) if isinstance(self.image, (str, PathLike)) else None

    @cached_property
    def boxes(self) -> NDArray[np.float32]:
        """[N, 4] xyxy in pixels."""
        return np.asarray(self.detections.boxes.numpy())

    @cached_property
    def scores(self) -> NDArray[np.float32]:
        """[N] 0..1."""
        return np.asarray(self.detections.scores.numpy())

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """[N] 0-based positions in `classes`."""
        return np.asarray(self.detections.labels.numpy())

    @property
    def names(self) -> list[str]:
        """The class of each."""
        return [self.classes[label] for label in self.labels.tolist()]

    @cached_property
    def masks(self) -> NDArray[np.bool_] | None:
        """[N, H, W], where the model has masks."""
        masks = self.detections.masks
        return None if masks is None else np.asarray(masks.numpy().astype(bool))

    @cached_property
    def keypoints(self) -> NDArray[np.float32] | None:
        """[N, K, 3] x, y, score, where the model has keypoints."""
        points = self.detections.keypoints
        return None if points is None else np.asarray(points.numpy())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them; masks as COCO's compressed RLE."""
        entries = []
        for number, (name, label) in enumerate(zip(self.names, self.labels.tolist(), strict=True)):
            entry: dict[str, Any] = {
                "class": name,
                "label": label,
                "score": float(self.scores[number]),
                "box": [float(side) for side in self.boxes[number]],
            }
            if self.masks is not None:
                entry["mask"] = encode(self.masks[number])
            if self.keypoints is not None:
                entry["keypoints"] = self.keypoints[number].tolist()
            entries.append(entry)
        return {"image": self.path, "width": self.width, "height": self.height, "detections": entries}

    def to_supervision(self) -> Any:
        """supervision's `Detections`, with the names of the classes in `data["class_name"]`."""
        try:
            import supervision
        except ImportError:
            raise UserError("supervision is not installed: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.boxes.reshape(-1, 4),
            confidence=self.scores,
            class_id=self.labels,
            mask=self.masks,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def plain(self) -> PIL.Image.Image:
        """The image without anything on it."""
        from PIL import Image as Images

        pixels = to_tensor(self.image) if self._pixels is None else self._pixels
        return Images.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))

    def draw(self, longest: int | None = None) -> PIL.Image.Image:
        """The image with what was found; `longest`: what its longer side is scaled to."""
        from detkernel_detection.drawing import draw

        pixels = to_tensor(self.image) if self._pixels is None else self._pixels
        return draw(pixels, self.detections, self.classes, longest=longest, keypoint_names=self.keypoint_names)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the drawing: a JPEG where the name says so, else a PNG. Raises `UserError`."""
        from detkernel_detection.drawing import jpeg, png

        file = Path(path)
        drawn = self.draw()
        try:
            write_atomic(file, jpeg(drawn) if file.suffix.lower() in (".jpg", ".jpeg") else png(drawn))
        except OSError as error:
            raise UserError(f"{printable(str(file))}: cannot be written: {error.strerror}") from None

    def _repr_png_(self) -> bytes:
        from detkernel_detection.drawing import png

        return png(self.draw(longest=min(max(self.height, self.width), 1280) if self.width > 320 else None))

    def release(self) -> Result:
        """Let go of the pixels of an image that came from a file: a drawing reads it again."""
        if self.path is not None:
            self._pixels = None
        return self
