"""What every data set promises, whoever wrote it: checked before anything is trained on it."""

from __future__ import annotations

import numpy as np
from detkernel_detection import Annotations, Dataset

from detkernel_data._boxes import ROUNDING
from detkernel_data._files import FileDataset
from detkernel_data._report import Problems


def check(dataset: Dataset, mode: str) -> None:
    """Raise `DataError`, with the first pictures, for boxes or labels that cannot be trained on; decodes nothing."""
    if isinstance(dataset, FileDataset):
        return  # settled while it was read, with the lines of its files
    problems = Problems(f"{mode} data")
    for index in range(len(dataset)):
        notes = dataset.annotations(index)
        problem = _problem(notes, len(dataset.classes))
        if problem:
            problems.add(f"{mode} data: picture {index} ('{notes.image_id}'): {problem}")
    problems.stop()


def _problem(notes: Annotations, classes: int) -> str:
    boxes, labels = np.asarray(notes.boxes), np.asarray(notes.labels)
    if boxes.dtype.kind != "f" or boxes.ndim != 2 or boxes.shape[1] != 4:
        return f"its boxes are {boxes.dtype} {list(boxes.shape)}, expected float32 [N, 4]: x1, y1, x2, y2 in pixels"
    if labels.dtype.kind not in "iu" or labels.shape != boxes.shape[:1]:
        return f"its labels are {labels.dtype} {list(labels.shape)}, expected int64 [{len(boxes)}], one a box"
    inside = (boxes >= -ROUNDING).all(1) & (boxes <= np.array([notes.width, notes.height] * 2) + ROUNDING).all(1)
    sound = inside & (boxes[:, 2:] > boxes[:, :2]).all(1)  # what is no number is neither
    if not sound.all():
        number = int(np.argmin(sound))
        box = ", ".join(f"{value:g}" for value in boxes[number])
        return (
            f"box {number} [{box}] has no area, or lies outside of the picture of {notes.width}x{notes.height}; "
            "boxes are x1, y1, x2, y2 in pixels"
        )
    known = (labels >= 0) & (labels < classes)
    if not known.all():
        number = int(np.argmin(known))
        return f"label {labels[number]} of box {number} is none of 0..{classes - 1}, the {classes} classes"
    return ""
