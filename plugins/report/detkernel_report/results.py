"""What a detector found beside what there was to find: boxes by image, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Labels = NDArray[np.int64]

MOST = 100
"""Detections of an image and class that count, as in COCO's AP."""


@attrs.frozen(eq=False)
class ImageResult:
    """One image: N annotated objects, D detections by falling score."""

    index: int
    """Position in the data set."""
    image_id: int | str
    path: str
    height: int
    width: int
    boxes: Floats
    """[N, 4] xyxy, absolute pixels of the file."""
    labels: Labels
    area: Floats
    crowd: Bools
    ignore: Bools
    """[N] not counted when missed: crowds, and VOC's difficult objects."""
    found_boxes: Floats
    """[D, 4]"""
    scores: Floats
    found_labels: Labels

    def iou(self) -> Floats:
        """[D, N]; of a crowd, the share of the detection that it covers, as in COCO's evaluation."""
        return iou(self.found_boxes, self.boxes, self.crowd)


@attrs.frozen(eq=False)
class Results:
    """A validation of one set."""

    name: str
    """`val`, `test`, or the name of a further set."""
    iteration: int
    classes: Sequence[str]
    images: Sequence[ImageResult]
    scale: float = 1.0
    """The factor from the files' pixels to those that the network sees, the median of the images."""
    invalid: int = 0
    """Detections that were left out since their boxes or scores were not finite."""


def iou(boxes: Floats, others: Floats, crowd: Bools | None = None) -> Floats:
    """IoU [D, N] of xyxy boxes; where `crowd` [N], the intersection over the area of `boxes`."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(min=0).prod(2)
    area, other = (np.prod((each[:, 2:] - each[:, :2]), axis=1) for each in (boxes, others))
    union = area[:, None] + other[None] - shared
    if crowd is not None:
        union = np.where(crowd[None], area[:, None], union)
    made: Floats = shared / np.where(union > 0, union, 1.0)
    return made


def rows(results: Results) -> Iterator[dict[str, Any]]:
    """Plain values: a head, and then a row an image."""
    yield {
        "set": results.name, "iter": results.iteration, "classes": list(results.classes),
        "scale": results.scale, "invalid": results.invalid,
    }  # fmt: skip
    for image in results.images:
        yield {
            "index": image.index, "id": image.image_id, "file": image.path,
            "height": image.height, "width": image.width,
            "boxes": image.boxes.tolist(), "labels": image.labels.tolist(), "area": image.area.tolist(),
            "crowd": np.flatnonzero(image.crowd).tolist(), "ignore": np.flatnonzero(image.ignore).tolist(),
            "found": _rounded(image.found_boxes, 4), "scores": _rounded(image.scores, 7),
            "found_labels": image.found_labels.tolist(),
        }  # fmt: skip


def results_of(lines: Sequence[Mapping[str, Any]]) -> Results:
    """What `rows` gave, back from a file that may hold anything. Raises ValueError or TypeError with what is wrong."""
    if not lines:
        raise ValueError("it is empty")
    head = lines[0]
    classes = [str(name) for name in _needed(head, "classes", list)]
    images = [_image(line, len(classes)) for line in lines[1:]]
    return Results(
        name=_needed(head, "set", str),
        iteration=_needed(head, "iter", int),
        classes=classes,
        images=images,
        scale=float(_needed(head, "scale", (int, float))),
        invalid=_needed(head, "invalid", int),
    )


def _image(line: Mapping[str, Any], classes: int) -> ImageResult:
    boxes, found = _boxes(line, "boxes"), _boxes(line, "found")
    labels, found_labels = _labels(line, "labels", classes), _labels(line, "found_labels", classes)
    area, scores = np.array(_needed(line, "area", list), float), np.array(_needed(line, "scores", list), float)
    crowd, ignore = np.zeros(len(boxes), bool), np.zeros(len(boxes), bool)
    crowd[np.array(_needed(line, "crowd", list), int)] = True
    ignore[np.array(_needed(line, "ignore", list), int)] = True
    if not len(boxes) == len(labels) == len(area) or not len(found) == len(found_labels) == len(scores):
        raise ValueError(f"image {line.get('index')!r}: boxes, labels and scores differ in number")
    height, width = _needed(line, "height", int), _needed(line, "width", int)
    if min(height, width) < 1:
        raise ValueError(f"image {line.get('index')!r}: it is {width}x{height}")
    return ImageResult(
        _needed(line, "index", int), _needed(line, "id", (int, str)), _needed(line, "file", str), height, width,
        boxes, labels, area, crowd, ignore, found, scores, found_labels,
    )  # fmt: skip


def _boxes(line: Mapping[str, Any], name: str) -> Floats:
    boxes = np.array(_needed(line, name, list), float).reshape(-1, 4)
    if not np.isfinite(boxes).all():
        raise ValueError(f"image {line.get('index')!r}: a box that is not finite")
    return boxes


def _labels(line: Mapping[str, Any], name: str, classes: int) -> Labels:
    labels = np.array(_needed(line, name, list), np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"image {line.get('index')!r}: a label beyond its {classes} classes")
    return labels


def _needed(line: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = line.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"'{name}' is missing or of another kind")
    return value


def _rounded(values: Floats, digits: int) -> Any:
    return np.round(values.astype(np.float64), digits).tolist()
