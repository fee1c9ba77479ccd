"""hotcoco in the place of pycocotools: the same arrays, bit for bit, in a fraction of the time."""

from __future__ import annotations

import importlib.util
import random
import runpy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detkernel import UserError
from detkernel_evaluation.coco import CocoMap
from detkernel_evaluation.coco_evaluation import Evaluation, Rules
from detkernel_evaluation.found import Found, ImageResult, compact
from evaluation_cases import (
    GivenData,
    annotations,
    detections,
    evaluated,
    from_coco,
    random_coco,
    with_keypoints,
    with_masks,
)

needs_hotcoco = pytest.mark.skipif(importlib.util.find_spec("hotcoco") is None, reason="hotcoco is not installed")
OWN: dict[str, tuple[float, float | None]] = {"tiny": (0, 300), "rest": (300, None), "overlapping": (200, 900)}
RULES = [
    Rules(),
    Rules(iou_thresholds=(0.5, 0.2, 0.625, 1.0, 1 / 3), area_ranges=OWN, max_dets=(300, 1, 2)),
    Rules(max_dets=(3,)),
]


def drawn(seed: int, kind: Any) -> list[ImageResult]:
    """Crowds, difficult objects, equal scores, all sizes; objects without a mask or a labelled keypoint."""
    truth, results = random_coco(seed)
    if kind == "segm":
        with_masks(truth, results)
    if kind == "keypoints":
        with_keypoints(truth, results)
    data, found = from_coco(truth, results)
    draw = random.Random(seed)
    for notes in data.given:
        notes.difficult = np.array([draw.random() < 0.2 for _ in notes.labels], bool)
        if notes.masks is not None:
            notes.masks = [mask if draw.random() < 0.9 else [] for mask in notes.masks]
    options = {"masks": kind == "segm", "keypoints": kind == "keypoints"}
    return [(notes, compact(one, **options)) for notes, one in zip(data.given, found, strict=True)]


def equal(kind: Any, images: Sequence[ImageResult], rules: Rules, order: Sequence[int] = (2, 0, 3, 1)) -> bool:
    one, other = (Evaluation(kind, images, order, rules, way) for way in ("pycocotools", "hotcoco"))
    assert one.counts() == other.counts()
    names = ("precision", "recall", "scores")
    return all(np.array_equal(one.eval[name], other.eval[name]) for name in names)


@needs_hotcoco
@pytest.mark.parametrize("rules", RULES, ids=["coco", "own", "one limit"])
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_the_arrays_are_equal_bit_for_bit(kind: Any, rules: Rules) -> None:
    for seed in range(3):
        assert equal(kind, drawn(seed, kind), rules)
    nothing_found = [(notes, Found()) for notes, _ in drawn(4, kind)]
    nothing_there = [(notes, found) for notes, found in drawn(5, kind) if not len(notes)]
    for images in (nothing_found, nothing_there, []):
        assert equal(kind, images, rules)


@needs_hotcoco
def test_boxes_without_an_area_beyond_the_image_and_infinite_ones_are_equal() -> None:
    images = drawn(5, "bbox")
    for number, (notes, found) in enumerate(images):
        if len(found.boxes):
            found.boxes[0, 2:] = found.boxes[0, :2]
            found.boxes[-1, 2] = [found.boxes[-1, 0] - 3, np.inf, 1e9][number % 3]
            found.scores[0] = [np.inf, -np.inf, 0.0][number % 3]
        if len(notes):
            notes.boxes[0, 2:], notes.area[0] = notes.boxes[0, :2], 0
            notes.boxes[-1, 3], notes.area[-1] = notes.boxes[-1, 1] - 3, -5
    assert equal("bbox", images, Rules())


@needs_hotcoco
def test_more_than_255_masks() -> None:
    """pycocotools' `area` fails at so many at once."""
    truth, results = random_coco(2, images=80)
    with_masks(truth, results)
    assert len(results) > 255
    metrics = evaluated(CocoMap(kinds=["segm"], backend="both"), from_coco(truth, results))
    assert 0 < metrics["coco/segm_mAP"] < 1


@needs_hotcoco
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_both_is_silent_where_they_agree_and_auto_is_hotcoco(kind: Any) -> None:
    truth, results = random_coco(3)
    if kind == "segm":
        with_masks(truth, results)
    if kind == "keypoints":
        with_keypoints(truth, results)
    case = from_coco(truth, results)
    ways = ("auto", "both", "pycocotools", "hotcoco")
    metrics = {way: evaluated(CocoMap(kinds=[kind], backend=way, per_class=True), case) for way in ways}
    assert all(repr(metrics[way]) == repr(metrics["auto"]) for way in ways)


@needs_hotcoco
def test_both_is_an_error_where_a_bit_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    from detkernel_evaluation import hotcoco_arrays

    whole = hotcoco_arrays.by_hotcoco

    def changed(evaluation: Evaluation) -> Any:
        arrays = whole(evaluation)
        recall = arrays["recall"].copy()
        recall[0, 0, 0, 0] = np.nextafter(recall[0, 0, 0, 0], 2)
        return {**arrays, "recall": recall}

    monkeypatch.setattr(hotcoco_arrays, "by_hotcoco", changed)
    message = r"differ: bbox, `recall` at 1 of 480 places, by up to .*; go by `backend: pycocotools`"
    with pytest.raises(UserError, match=message):
        evaluated(CocoMap(backend="both"), from_coco(*random_coco(3)))
    assert evaluated(CocoMap(backend="pycocotools"), from_coco(*random_coco(3)))


@needs_hotcoco
def test_nan_is_left_to_pycocotools_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    truth, boxes = annotations(1, [[10, 10, 40, 40]], [0]), [[10, 10, 40, 40], [10, 10, 40, float("nan")]]
    case = GivenData(["a"], [truth]), [detections(0, boxes, [0.9, 0.8], [0, 0])]
    with caplog.at_level("WARNING", "detkernel"):
        metrics = evaluated(CocoMap(backend="hotcoco"), case)
    assert metrics["coco/bbox_mAP"] == pytest.approx(1)
    assert caplog.messages == [
        "evaluator: boxes or scores are nan, which hotcoco does not take: pycocotools computes alone, and takes longer"
    ]


@pytest.mark.parametrize("way", ["hotcoco", "both"])
def test_a_back_end_that_is_not_installed_is_said_before_the_run(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hotcoco" else found(name))
    with pytest.raises(ValueError, match=rf"backend: '{way}' needs hotcoco, which is not installed: `pip install"):
        CocoMap(backend=way)
    assert evaluated(CocoMap(backend="auto"), from_coco(*random_coco(0)))["coco/bbox_mAP"] > 0


@needs_hotcoco
def test_the_benchmark_short() -> None:
    """5,000 images with 500,000 detections take under 3 s: of a hundredth of them, a part of that; arrays are equal."""
    path = Path(__file__).parents[3] / "benchmarks" / "evaluation.py"
    if not path.is_file():
        pytest.skip("no benchmarks here")
    images = runpy.run_path(str(path))["made"](50, 360, 5_000, 20, "bbox")
    labels = list(range(20))
    Evaluation("bbox", images[:1], labels, Rules(), "hotcoco")  # what is imported only once
    start = time.process_time()
    fast = Evaluation("bbox", images, labels, Rules(), "hotcoco")
    taken = time.process_time() - start
    start = time.process_time()
    slow = Evaluation("bbox", images, labels, Rules(), "pycocotools")
    assert taken < 0.2 * (time.process_time() - start)
    for name in ("precision", "recall", "scores"):
        assert np.array_equal(fast.eval[name], slow.eval[name])
