"""`voc_map` against a plain reading of the rules, written as loops, and against cases worked out by hand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from detkernel_detection import Annotations, Detections
from detkernel_evaluation.voc import VocMap
from evaluation_cases import Case, GivenData, annotations, detections, evaluated

Box = Sequence[float]


def reference(case: Case, label: int, threshold: float, metric: str, legacy: bool) -> float:
    """The shape of Girshick's `voc_eval.py`, with the development kit's `>=` where that has `>`."""
    objects = {index: [_record(note, at) for at in range(len(note))] for index, note in enumerate(case[0].given)}
    objects = {index: [one for one in group if one["label"] == label] for index, group in objects.items()}
    positives = sum(not one["difficult"] for group in objects.values() for one in group)
    lines = [line for found in case[1] for line in _lines(found, label)]
    lines.sort(key=lambda line: -line[1])  # stable
    true, false = [], []
    for index, _, box in lines:
        best, which = -math.inf, None
        for one in objects[index]:
            overlap = _iou(box, one["box"], 1 if legacy else 0)
            if overlap > best:
                best, which = overlap, one
        hit = which is not None and best >= threshold
        if hit and which is not None and which["difficult"]:
            true, false = [*true, 0], [*false, 0]
        elif hit and which is not None and not which["taken"]:
            which["taken"] = True
            true, false = [*true, 1], [*false, 0]
        else:
            true, false = [*true, 0], [*false, 1]
    if positives == 0:
        return math.nan
    tp, fp = np.cumsum(true), np.cumsum(false)
    recall = tp / positives
    precision = tp / np.maximum(tp + fp, np.finfo(np.float64).eps)
    return _voc_ap(recall, precision, metric == "11points")


def _record(note: Annotations, at: int) -> dict[str, Any]:
    box, label, difficult = note.boxes[at].tolist(), int(note.labels[at]), bool(note.difficult[at])
    return {"box": box, "label": label, "difficult": difficult, "taken": False}


def _lines(found: Detections, label: int) -> list[tuple[int, float, Box]]:
    everything = zip(found.scores.tolist(), found.boxes.tolist(), found.labels.tolist(), strict=True)
    return [(found.index, score, box) for score, box, own in everything if own == label]


def _iou(one: Box, other: Box, extra: float) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0]) + extra
    height = min(one[3], other[3]) - max(one[1], other[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def _voc_ap(rec: Any, prec: Any, use_07_metric: bool) -> float:
    if use_07_metric:
        ap = 0.0
        for t in np.arange(0.0, 1.1, 0.1):
            p = 0 if np.sum(rec >= t) == 0 else np.max(prec[rec >= t])
            ap = ap + p / 11.0
        return ap
    mrec = np.concatenate(([0.0], rec, [1.0]))
    mpre = np.concatenate(([0.0], prec, [0.0]))
    for i in range(mpre.size - 1, 0, -1):
        mpre[i - 1] = np.maximum(mpre[i - 1], mpre[i])
    i = np.where(mrec[1:] != mrec[:-1])[0]
    return float(np.sum((mrec[i + 1] - mrec[i]) * mpre[i + 1]))


def random_case(seed: int) -> Case:
    """Crowded images of whole-numbered boxes: equal scores, equal overlaps, and a class that nothing is of."""
    draw = random.Random(seed)
    notes, found = [], []
    for index in range(draw.randint(1, 8)):
        boxes = [_box(draw) for _ in range(draw.randint(0, 8))]
        labels = [draw.randrange(2) for _ in boxes]
        notes.append(annotations(f"{index:06}", boxes, labels, difficult=[draw.random() < 0.2 for _ in boxes]))
        near = [
            [side + draw.randint(-2, 2) for side in draw.choice(boxes)] for _ in range(draw.randint(0, 12)) if boxes
        ]
        seen = near + [_box(draw) for _ in range(draw.randint(0, 3))]
        scores = sorted((draw.randint(1, 15) / 16 for _ in seen), reverse=True)
        found.append(detections(index, seen, scores, [draw.choice([0, 0, 1, 2]) for _ in seen]))
    return GivenData(["a", "b", "c"], notes), found


def _box(draw: random.Random) -> list[int]:
    x, y = draw.randint(0, 30), draw.randint(0, 30)
    return [x, y, x + draw.randint(4, 12), y + draw.randint(4, 12)]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("metric", ["11points", "area"])
def test_as_the_plain_reading(metric: Any, legacy: bool) -> None:
    for seed in range(80):
        case = random_case(seed)
        for iou in (0.5, 0.3):
            metrics = evaluated(VocMap(metric=metric, iou=iou, legacy_widths=legacy), case)
            expected = [reference(case, label, iou, metric, legacy) for label in range(3)]
            got = [metrics[f"pascal_voc/AP/{name}"] for name in "abc"]
            assert got == pytest.approx(expected, abs=1e-12, nan_ok=True), f"seed {seed}"
            there = [ap for ap in expected if not math.isnan(ap)] or [math.nan]
            assert metrics["pascal_voc/mAP"] == pytest.approx(sum(there) / len(there), abs=1e-12, nan_ok=True)


A, B = [10.0, 10, 29, 29], [50.0, 50, 69, 69]


def ap(truths: list[Box], found: list[Box], difficult: list[bool] | None = None, **options: Any) -> float:
    """Of one image and class; the scores fall."""
    scores = [0.9 - 0.1 * at for at in range(len(found))]
    note = annotations("000001", truths, [0] * len(truths), difficult=difficult)
    case = GivenData(["a"], [note]), [detections(0, found, scores, [0] * len(found))]
    return evaluated(VocMap(**{"metric": "area", **options}), case)["pascal_voc/mAP"]


def test_half_found_without_a_mistake() -> None:
    assert ap([A, B], [A]) == 0.5
    assert ap([A, B], [A], metric="11points") == pytest.approx(6 / 11)


def test_a_second_detection_of_an_object_is_a_mistake() -> None:
    assert ap([A, B], [A, A, B]) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_a_detection_looks_at_its_best_object_only() -> None:
    twins = [A, [13.0, 10, 32, 29]]
    assert ap(twins, [A, A]) == 0.5, "the second would overlap the twin enough, had its best not been taken"


@pytest.mark.parametrize("metric", ["area", "11points"])
def test_a_difficult_object_neither_helps_nor_harms(metric: str) -> None:
    assert ap([A, B], [A, A, A, B], difficult=[True, False], metric=metric) == 1.0
    assert ap([A, B], [B], difficult=[True, False], metric=metric) == 1.0


def test_a_crowd_is_as_a_difficult_object() -> None:
    case = (
        GivenData(["a"], [annotations(1, [A, B], [0, 0], crowd=[True, False])]),
        [detections(0, [A, A, B], [0.9, 0.8, 0.7], [0, 0, 0])],
    )
    assert evaluated(VocMap(), case)["pascal_voc/mAP"] == 1.0


def test_old_widths_count_the_last_pixel() -> None:
    truth, found = [[0.0, 0, 9, 9]], [[0.0, 0, 9, 4]]
    assert ap(truth, found) == 1.0, "50 of 100 pixels, and just enough is enough"
    assert ap(truth, found, legacy_widths=False) == 0.0, "36 of 81"


def test_a_box_without_an_area_is_found_by_none() -> None:
    assert ap([[5.0, 5, 5, 9], A], [[5.0, 5, 5, 9], A], legacy_widths=False) == pytest.approx(0.25)


def test_the_mean_over_thresholds() -> None:
    note = annotations(1, [A, B], [0, 1])
    case = GivenData(["a", "b"], [note]), [detections(0, [A, [50.0, 50, 69, 62]], [0.9, 0.8], [0, 1])]
    metrics = evaluated(VocMap(iou=[0.5, 0.75]), case)
    assert metrics == {
        "pascal_voc/mAP": 0.75, "pascal_voc/AP50": 1.0, "pascal_voc/AP75": 0.5,
        "pascal_voc/AP/a": 1.0, "pascal_voc/AP/b": 0.5,
    }  # fmt: skip


def test_nothing_to_find_is_nan_and_nothing_found_is_zero() -> None:
    case = GivenData(["a", "b"], [annotations(1, [A, B], [0, 1], difficult=[False, True])]), [detections(0, [], [], [])]
    metrics = evaluated(VocMap(), case)
    assert metrics["pascal_voc/mAP"] == metrics["pascal_voc/AP/a"] == 0.0
    assert math.isnan(metrics["pascal_voc/AP/b"])
    empty = GivenData(["a"], [annotations(1, [], [])]), [detections(0, [A], [0.5], [0])]
    assert math.isnan(evaluated(VocMap(), empty)["pascal_voc/mAP"])
