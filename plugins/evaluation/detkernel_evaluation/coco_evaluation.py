"""pycocotools' evaluation, over images that are already in memory."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import attrs
import numpy as np
from detkernel import DataError
from detkernel_detection import Annotations
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from detkernel_evaluation.coco_backends import Backend, chosen
from detkernel_evaluation.evaluator import Kind
from detkernel_evaluation.found import Found, ImageResult

_FAR = 1e5**2
"""COCO's largest area."""


def percent(threshold: float) -> str:
    """How a metric names a threshold: 0.5 is `50`."""
    return f"{100 * threshold:g}"


@attrs.frozen
class Rules:
    """What is measured; None stands for COCO's own."""

    iou_thresholds: Sequence[float] | None = None
    area_ranges: Mapping[str, tuple[float, float | None]] | None = None
    max_dets: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None


class Evaluation(COCOeval):  # type: ignore[misc]
    """Matches and accumulates for one kind; then `eval` has the precision [T, R, K, A, M] and recall [T, K, A, M].

    Images and classes go by their position, so that ids may be text and data sets may be joined. pycocotools' own
    `_prepare` would overwrite `ignore` by `iscrowd`; VOC's difficult objects are ignored, yet matched once like others.
    """

    eval: dict[str, Any]

    def __init__(
        self,
        kind: Kind,
        images: Sequence[ImageResult],
        labels: Sequence[int],
        rules: Rules,
        backend: Backend = "pycocotools",
        not_exhaustive: Sequence[set[int]] | None = None,
    ) -> None:
        """`labels`: those of all classes, in the order of their categories' ids: a sum of floats depends on it.

        `not_exhaustive`: of each image, the labels of which not all objects are annotated (LVIS): a detection of them
        that matches nothing is ignored. Raises UserError where `backend` is "both" and their arrays are not the same.
        """
        super().__init__(iouType=kind)
        self.kind = kind
        self.images = images
        self.labels = labels
        """The label of each K."""
        self.not_exhaustive = not_exhaustive
        self.params.imgIds = list(range(len(images)))
        self.params.catIds = list(range(len(labels)))
        self.params.areaRngLbl = [name[0] if name != "all" else name for name in self.params.areaRngLbl]
        self.named_thresholds = {"50": 0, "75": 5}
        """Positions in T of the thresholds that have metrics of their own."""
        self._apply(rules)
        backend = chosen(backend)
        if backend in ("pycocotools", "both"):
            with redirect_stdout(io.StringIO()):
                self.evaluate()
                self.accumulate()
        if backend in ("hotcoco", "both"):
            from detkernel_evaluation.hotcoco_arrays import by_hotcoco, compare

            arrays = by_hotcoco(self)
            if backend == "both":
                compare(self.eval, arrays, kind)
            self.eval = arrays

    def _apply(self, rules: Rules) -> None:
        params = self.params
        if rules.iou_thresholds is not None:
            params.iouThrs = np.array(sorted(rules.iou_thresholds))
            self.named_thresholds = {percent(threshold): at for at, threshold in enumerate(params.iouThrs)}
        if rules.area_ranges is not None:
            own = [[low, _FAR if high is None else high] for low, high in rules.area_ranges.values()]
            params.areaRng, params.areaRngLbl = [[0, _FAR], *own], ["all", *rules.area_ranges]
        if rules.max_dets is not None:
            params.maxDets = sorted(rules.max_dets)
        if rules.sigmas is not None and self.kind == "keypoints":
            params.kpt_oks_sigmas = np.array(rules.sigmas)

    def counts(self) -> list[int]:
        """Objects of each class that count when they are missed, by label."""
        labels = [notes.labels[~ignored(notes, self.kind)] for notes, _ in self.images]
        counted = np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=len(self.labels))
        return [int(count) for count in counted]

    def evaluateImg(self, number: int, k: int, area: Any, limit: int) -> Any:  # noqa: N802
        result = super().evaluateImg(number, k, area, limit)
        if result is not None and self.not_exhaustive and self.labels[k] in self.not_exhaustive[number]:
            result["dtIgnore"] = np.logical_or(result["dtIgnore"], result["dtMatches"] == 0)
        return result

    def _prepare(self) -> None:
        self._gts: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        self._dts: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        place = {label: k for k, label in enumerate(self.labels)}
        for number, (notes, found) in enumerate(self.images):
            for entries, into in (truths(notes, self.kind), self._gts), (detected(found, self.kind), self._dts):
                for entry in entries:
                    into[number, place[entry["category_id"]]].append(entry)
        for number, entry in enumerate((one for group in self._gts.values() for one in group), start=1):
            entry["id"] = number  # 0 would read as "not matched"
        for number, entry in enumerate((one for group in self._dts.values() for one in group), start=1):
            entry["id"] = number


def ignored(notes: Annotations, kind: Kind) -> NDArray[np.bool_]:
    """[N] which objects cost nothing when they are missed: crowds, difficult ones, those without what is measured."""
    ignore = notes.crowd | notes.difficult
    if not len(notes):
        return ignore
    if kind == "segm":
        assert notes.masks is not None
        ignore = ignore | np.array([not mask for mask in notes.masks], dtype=bool)
    elif kind == "keypoints":
        assert notes.keypoints is not None
        ignore = ignore | ~(notes.keypoints[:, :, 2] > 0).any(axis=1)
    return ignore


def truths(notes: Annotations, kind: Kind) -> Iterator[dict[str, Any]]:
    """The objects of an image as pycocotools takes them."""
    crowd, ignore = notes.crowd.tolist(), ignored(notes, kind).tolist()
    boxes, areas, labels = xywh(notes.boxes).tolist(), notes.area.tolist(), notes.labels.tolist()
    for at in range(len(notes)):
        entry = {"category_id": labels[at], "bbox": boxes[at], "area": areas[at], "iscrowd": crowd[at]}
        entry["ignore"] = ignore[at]
        if kind == "segm":
            entry["segmentation"] = region(notes, at)
        elif kind == "keypoints":
            assert notes.keypoints is not None
            entry["keypoints"] = notes.keypoints[at].reshape(-1).astype(np.float64)
        yield entry


def region(notes: Annotations, at: int) -> Any:
    """An object's run lengths; where it has no mask, those of its box."""
    assert notes.masks is not None
    given = notes.masks[at]
    if isinstance(given, dict):
        packed = isinstance(given["counts"], (str, bytes))
        return given if packed else rle.frPyObjects(given, notes.height, notes.width)
    if not given:
        x, y, w, h = xywh(notes.boxes[at : at + 1])[0].tolist()
        given = [[x, y, x, y + h, x + w, y + h, x + w, y]]
    return rle.merge(rle.frPyObjects(given, notes.height, notes.width))


def detected(found: Found, kind: Kind) -> Iterator[dict[str, Any]]:
    """The detections of an image as pycocotools takes them; the area is that of the kind's own form."""
    boxes, scores, labels = xywh(found.boxes).tolist(), found.scores.tolist(), found.labels.tolist()
    for at, (x, y, w, h) in enumerate(boxes):
        entry = {"category_id": labels[at], "bbox": [x, y, w, h], "area": w * h, "score": scores[at]}
        if kind == "segm":
            entry["segmentation"] = found.masks[at]
            entry["area"] = float(rle.area(found.masks[at]))
        elif kind == "keypoints":
            assert found.keypoints is not None
            points = found.keypoints[at].astype(np.float64)
            entry["keypoints"] = points.reshape(-1)
            entry["area"] = float(np.ptp(points[:, 0]) * np.ptp(points[:, 1]))
        yield entry


def xywh(boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Boxes [N, 4] of corners as COCO writes them: corner and size."""
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def check_sizes(images: Sequence[ImageResult]) -> None:
    """Raises `DataError` for masks that are not of their image's size: pycocotools would find no overlap."""
    for notes, found in images:
        sizes = {tuple(mask["size"]) for mask in found.masks} - {(notes.height, notes.width)}
        if sizes:
            raise DataError(
                f"{notes.path}: detected masks are {sizes.pop()} (height, width), expected the size of the file, "
                f"{(notes.height, notes.width)}; a model gives masks in the coordinates of the file"
            )
