"""Precision and recall by hotcoco, whose arrays are those of pycocotools."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from detkernel import UserError
from numpy.typing import NDArray

if TYPE_CHECKING:
    from detkernel_evaluation.coco_evaluation import Evaluation
    from detkernel_evaluation.found import ImageResult

Arrays = dict[str, NDArray[np.float64]]
"""`precision` and `scores` [T, R, K, A, M], `recall` [T, K, A, M]."""

NAMES = ("precision", "recall", "scores")

NOWHERE = -1.0
"""An area outside of every range: objects of it are ignored, and matched once."""


def has_nan(images: Sequence[ImageResult]) -> bool:
    """Whether a box, score or keypoint is nan: pycocotools sorts it somewhere, hotcoco refuses it."""
    parts = ((found.boxes, found.scores, found.keypoints) for _, found in images)
    return any(bool(np.isnan(part).any()) for three in parts for part in three if part is not None)


def by_hotcoco(evaluation: Evaluation) -> Arrays:
    """The arrays of an evaluation whose parameters are set.

    Its IoUs of boxes and masks, its order of equal scores and its sums are pycocotools', so the arrays are the same to
    the last bit. Image and category ids are positions here, as in `Evaluation`.
    """
    from hotcoco import COCOeval

    federated = evaluation.not_exhaustive is not None
    truth, found = _data(evaluation)
    other = COCOeval(truth, found, evaluation.kind, lvis_style=federated)
    ours, theirs = evaluation.params, other.params
    theirs.img_ids, theirs.cat_ids = list(range(len(evaluation.images))), list(range(len(evaluation.labels)))
    theirs.iou_thrs, theirs.rec_thrs = ours.iouThrs.tolist(), ours.recThrs.tolist()
    theirs.max_dets = [int(limit) for limit in ours.maxDets]
    theirs.area_rng = [[float(low), float(high)] for low, high in ours.areaRng]
    theirs.area_rng_lbl = list(ours.areaRngLbl)
    if evaluation.kind == "keypoints":
        theirs.kpt_oks_sigmas = ours.kpt_oks_sigmas.tolist()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # that own thresholds are not those of COCO's leaderboard
        other.evaluate()
        other.accumulate()
    assert other.eval is not None
    shape = (len(ours.iouThrs), len(ours.recThrs), len(evaluation.labels), len(ours.areaRng), len(ours.maxDets))
    shapes = {"precision": shape, "recall": shape[:1] + shape[2:], "scores": shape}
    return {name: np.asarray(other.eval[name]).reshape(shapes[name]) for name in NAMES}


def _data(evaluation: Evaluation) -> tuple[Any, Any]:
    """hotcoco's data sets of what there is and of what was found."""
    from hotcoco import COCO

    kind, images, labels = evaluation.kind, evaluation.images, evaluation.labels
    sizes: list[dict[str, Any]]
    sizes = [{"id": at, "height": notes.height, "width": notes.width} for at, (notes, _) in enumerate(images)]
    categories = [{"id": k, "name": str(k), "frequency": "f"} for k in range(len(labels))]
    place = np.zeros(len(labels), np.int64)
    place[list(labels)] = range(len(labels))
    for size, partly in zip(sizes, evaluation.not_exhaustive or (), strict=False):
        # what was not looked for was left out before, so that all classes can pass for looked for
        size["neg_category_ids"] = list(range(len(labels)))
        size["not_exhaustive_category_ids"] = [int(place[label]) for label in partly]
    if kind == "keypoints":
        truths, results = _keypoints(images, place)
        dataset = COCO({"images": sizes, "categories": categories, "annotations": truths})
        return dataset, dataset.load_res(results)
    from detkernel_evaluation.coco_evaluation import ignored, region, xywh

    numbers = np.repeat(np.arange(len(images)), [len(notes) for notes, _ in images])
    boxes = xywh(_joined([notes.boxes for notes, _ in images], (0, 4)))
    crowd = _joined([notes.crowd for notes, _ in images], (0,)).astype(bool)
    skipped = _joined([ignored(notes, kind) for notes, _ in images], (0,)).astype(bool)
    area = np.where(skipped & ~crowd, NOWHERE, _joined([notes.area for notes, _ in images], (0,)))
    masks = kind == "segm"
    dataset = COCO.from_arrays(
        sizes,
        categories,
        numbers,
        place[_joined([notes.labels for notes, _ in images], (0,)).astype(np.int64)],
        boxes,
        ids=np.arange(1, len(numbers) + 1),
        area=area,
        iscrowd=crowd,
        segmentation=[region(notes, at) for notes, _ in images for at in range(len(notes))] if masks else None,
    )
    return dataset, _results(dataset, images, place, masks)


def _results(dataset: Any, images: Sequence[ImageResult], place: NDArray[np.int64], masks: bool) -> Any:
    from detkernel_evaluation.coco_evaluation import xywh

    numbers = np.repeat(np.arange(len(images)), [len(found.scores) for _, found in images])
    boxes = xywh(_joined([found.boxes for _, found in images], (0, 4)))
    scores = _joined([found.scores for _, found in images], (0,)).astype(np.float64)
    labels = place[_joined([found.labels for _, found in images], (0,)).astype(np.int64)]
    rows = np.column_stack([numbers, boxes, scores, labels]).astype(np.float64)
    if not masks:
        return dataset.load_res(rows)
    from pycocotools import mask as rle

    regions = [mask for _, found in images for mask in found.masks]
    results = dataset.load_res(rows, segmentation=regions)
    if regions:  # an area is that of the mask, not that of the box
        areas = [float(rle.area(mask)) for mask in regions]  # pycocotools 2.0.11 takes no more than 255 at once
        results.update_anns(ids=np.arange(1, len(regions) + 1), area=areas)
    return results


def _keypoints(images: Sequence[ImageResult], place: NDArray[np.int64]) -> tuple[list[Any], list[Any]]:
    """What there is and what was found, as dicts: OKS needs the area, so objects are ignored by `num_keypoints`."""
    from detkernel_evaluation.coco_evaluation import detected, truths

    there: list[Any] = []
    results: list[Any] = []
    for number, (notes, found) in enumerate(images):
        for entry in truths(notes, "keypoints"):
            more = {"id": len(there) + 1, "image_id": number, "category_id": int(place[entry["category_id"]])}
            more |= {"keypoints": entry["keypoints"].tolist(), "num_keypoints": int(not entry["ignore"])}
            there.append({**entry, **more, "iscrowd": int(entry["iscrowd"])})
        for entry in detected(found, "keypoints"):
            one = {"image_id": number, "category_id": int(place[entry["category_id"]]), "score": entry["score"]}
            results.append({**one, "keypoints": entry["keypoints"].tolist()})
    return there, results


def _joined(parts: Sequence[NDArray[Any]], empty: tuple[int, ...]) -> NDArray[Any]:
    return np.concatenate([np.zeros(empty), *parts]) if parts else np.zeros(empty)


def compare(reference: Arrays, other: Arrays, kind: str) -> None:
    """Raise UserError where an array of hotcoco's is not, bit for bit, that of pycocotools."""
    for name in NAMES:
        differs = reference[name] != other[name]
        if differs.any():
            most = np.abs(reference[name] - other[name]).max()
            raise UserError(
                f"coco_map: hotcoco {version('hotcoco')} and pycocotools {version('pycocotools')} differ: {kind}, "
                f"`{name}` at {np.count_nonzero(differs)} of {differs.size} places, by up to {most:.3g}; go by "
                "`backend: pycocotools`, which is the reference, and report it"
            )
