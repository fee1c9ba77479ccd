"""`coco_map` gives pycocotools' metrics, to the last bit."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel_evaluation.coco import CocoMap
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
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ["mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "AR@1", "AR@10", "AR@100", "AR_s", "AR_m", "AR_l"]
POINTS = ["mAP", "mAP_50", "mAP_75", "mAP_m", "mAP_l", "AR@20", "AR_50", "AR_75", "AR_m", "AR_l"]


def pycoco(truth: Mapping[str, Any], results: Sequence[Any], kind: str, **params: Any) -> COCOeval:
    """pycocotools, used as its documentation shows, with some of its parameters changed."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(dict(truth))
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(list(results))), kind)
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def reference(truth: Mapping[str, Any], results: Sequence[Any], kind: str) -> dict[str, float]:
    """What pycocotools says."""
    evaluation = pycoco(truth, results, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    names = POINTS if kind == "keypoints" else NAMES
    stats = [math.nan if value == -1 else float(value) for value in evaluation.stats]
    return {f"coco/{kind}_{name}": value for name, value in zip(names, stats, strict=True)}


def mean(values: Any) -> float:
    """As pycocotools summarises: the mean of what is not -1."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else math.nan


def same(metrics: Mapping[str, float], expected: Mapping[str, float]) -> bool:
    """Equal to the last bit; nan equals nan."""
    return {key: repr(value) for key, value in metrics.items()} == {key: repr(value) for key, value in expected.items()}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_cocos_own_example_gives_the_published_metrics(evaluator_data: Path, kind: Any) -> None:
    expected = json.loads((evaluator_data / "expected_pycocotools.json").read_text())["cases"][f"cocoapi_{kind}"]
    truth, results = (json.loads((evaluator_data / expected[name]).read_text()) for name in ("gt", "dt"))
    metrics = evaluated(CocoMap(kinds=[kind], per_class=True), from_coco(truth, results), batch_size=16)
    assert [metrics[f"coco/{kind}_{name}"] for name in NAMES] == list(expected["stats"].values())
    for name, (ap, _) in expected["per_class_AP_AP50"].items():
        assert metrics[f"coco/{kind}_AP/{name}"] == ap


@pytest.mark.parametrize("seed", range(8))
def test_boxes_as_pycocotools(seed: int) -> None:
    truth, results = random_coco(seed)
    assert same(evaluated(CocoMap(), from_coco(truth, results)), reference(truth, results, "bbox"))


@pytest.mark.parametrize("seed", range(4))
def test_masks_as_pycocotools(seed: int) -> None:
    truth, results = random_coco(seed)
    with_masks(truth, results)
    assert same(evaluated(CocoMap(kinds=["segm"]), from_coco(truth, results)), reference(truth, results, "segm"))


@pytest.mark.parametrize("seed", range(4))
def test_keypoints_as_pycocotools(seed: int) -> None:
    truth, results = random_coco(seed)
    with_keypoints(truth, results)
    metrics = evaluated(CocoMap(kinds=["keypoints"]), from_coco(truth, results))
    assert same(metrics, reference(truth, results, "keypoints"))
    assert 0 < metrics["coco/keypoints_mAP"] < 1


def test_several_kinds_have_their_own_metrics() -> None:
    truth, results = random_coco(1)
    with_masks(truth, results)
    metrics = evaluated(CocoMap(kinds=["bbox", "segm"]), from_coco(truth, results))
    assert list(metrics) == [f"coco/{kind}_{name}" for kind in ("bbox", "segm") for name in NAMES]
    assert metrics["coco/segm_mAP"] == evaluated(CocoMap(kinds=["segm"]), from_coco(truth, results))["coco/segm_mAP"]


def test_other_sigmas_for_other_keypoints() -> None:
    truth, results = random_coco(2)
    with_keypoints(truth, results, many=5)
    sigmas = (0.3, 0.01, 0.1, 0.05, 0.2)
    metrics = evaluated(CocoMap(kinds=["keypoints"], sigmas=sigmas), from_coco(truth, results))
    theirs = pycoco(truth, results, "keypoints", kpt_oks_sigmas=np.array(sigmas)).eval["precision"]
    assert metrics["coco/keypoints_mAP"] == mean(theirs[..., 0, 0])


def test_the_limits_of_detections_name_the_recalls_and_the_largest_counts() -> None:
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]
    case = GivenData(["a"], [annotations(1, boxes, [0, 0, 0])]), [detections(0, boxes, [0.9, 0.8, 0.7], [0, 0, 0])]
    metrics = evaluated(CocoMap(max_dets=(2, 1)), case)
    assert metrics["coco/bbox_AR@1"] == pytest.approx(1 / 3)
    assert metrics["coco/bbox_AR@2"] == metrics["coco/bbox_AR_s"] == pytest.approx(2 / 3)
    assert metrics["coco/bbox_mAP"] == pytest.approx(67 / 101)


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_own_thresholds_ranges_and_limits_as_pycocotools(kind: Any) -> None:
    truth, results = random_coco(6)
    if kind == "segm":
        with_masks(truth, results)
    if kind == "keypoints":
        with_keypoints(truth, results)
    ranges: dict[str, tuple[float, float | None]] = {"tiny": (0, 300), "rest": (300, None)}
    options = {"iou_thresholds": (0.5, 0.2, 0.625), "area_ranges": ranges, "max_dets": (300, 1, 2)}
    got = evaluated(CocoMap(kinds=[kind], per_class=True, **options), from_coco(truth, results))
    theirs = pycoco(
        truth, results, kind,
        iouThrs=np.array([0.2, 0.5, 0.625]), maxDets=[1, 2, 300],
        areaRng=[[0, 1e10], [0, 300], [300, 1e10]], areaRngLbl=["all", "tiny", "rest"],
    ).eval  # fmt: skip
    precision, recall = theirs["precision"], theirs["recall"]
    ap = {"": precision[..., 0, 2], "_20": precision[0, ..., 0, 2], "_50": precision[1, ..., 0, 2]}
    ap |= {"_62.5": precision[2, ..., 0, 2], "_tiny": precision[..., 1, 2], "_rest": precision[..., 2, 2]}
    ar = {"@1": recall[..., 0, 0], "@2": recall[..., 0, 1], "@300": recall[..., 0, 2]}
    if kind == "keypoints":
        ar |= {"_20": recall[0, ..., 0, 2], "_50": recall[1, ..., 0, 2], "_62.5": recall[2, ..., 0, 2]}
    ar |= {"_tiny": recall[..., 1, 2], "_rest": recall[..., 2, 2]}
    expected = {f"mAP{key}": mean(value) for key, value in ap.items()} | {
        f"AR{key}": mean(value) for key, value in ar.items()
    }
    expected |= {f"AP/class {c}": mean(precision[:, :, k, 0, 2]) for k, c in enumerate((3, 7, 20, 21))}
    assert same(got, {f"coco/{kind}_{key}": value for key, value in expected.items()})
    assert got[f"coco/{kind}_mAP_20"] > got[f"coco/{kind}_mAP_62.5"]
    assert got[f"coco/{kind}_mAP_tiny"] != got[f"coco/{kind}_mAP_rest"]


def test_the_table_has_the_lowest_of_own_thresholds(caplog: pytest.LogCaptureFixture) -> None:
    case = GivenData(["a"], [annotations(1, [ONE], [0])]), [detections(0, [[10, 10, 40, 25]], [0.9], [0])]
    with caplog.at_level("INFO", "detkernel"):
        evaluated(CocoMap(per_class=True, iou_thresholds=(0.7, 0.4)), case)
    assert caplog.messages[0].splitlines()[1:] == [
        "  class  objects     AP   AP40",
        "  a            1  0.500  1.000",
    ]


def test_the_order_of_the_labels_does_not_matter() -> None:
    """A data set orders its classes as the training data does; sums of floats go by the category ids."""
    truth, results = random_coco(6)
    data, found = from_coco(truth, results)
    ids = dict(zip(data.classes, (3, 7, 20, 21), strict=True))
    order = [2, 0, 3, 1]
    turned = GivenData([data.classes[label] for label in order], copy.deepcopy(data.given))
    turned.category_ids = ids
    moved = copy.deepcopy(found)
    for part in (*turned.given, *moved):
        labels = np.argsort(order)[np.asarray(part.labels)]
        part.labels = torch.from_numpy(labels) if isinstance(part.labels, torch.Tensor) else labels
    metrics = evaluated(CocoMap(per_class=True), (turned, moved))
    theirs = pycoco(truth, results, "bbox").eval["precision"]
    expected = {f"coco/bbox_AP/class {c}": mean(theirs[:, :, k, 0, 2]) for k, c in enumerate((3, 7, 20, 21))}
    assert same(metrics, reference(truth, results, "bbox") | expected)


ONE = [10.0, 10, 40, 40]
OTHER = [60.0, 60, 90, 90]


@pytest.mark.parametrize(
    ("found", "ap"),
    [
        ([OTHER], 1.0),  # missing what is difficult costs nothing
        ([ONE, OTHER], 1.0),  # nor does finding it
        ([ONE, ONE, OTHER], 0.5),  # but only once: a crowd could be found by any number
    ],
)
def test_a_difficult_object_is_ignored_and_matched_once(found: list[list[float]], ap: float) -> None:
    truth = annotations("000005", [ONE, OTHER], [0, 0], difficult=[True, False])
    scores = [0.9, 0.8, 0.7][: len(found)]
    case = GivenData(["a"], [truth]), [detections(0, found, scores, [0] * len(found))]
    assert evaluated(CocoMap(), case)["coco/bbox_mAP"] == pytest.approx(ap)


def test_a_crowd_is_matched_by_any_number() -> None:
    truth = annotations(1, [ONE, OTHER], [0, 0], crowd=[True, False])
    case = GivenData(["a"], [truth]), [detections(0, [ONE, ONE, ONE, OTHER], [0.9, 0.8, 0.7, 0.6], [0] * 4)]
    assert evaluated(CocoMap(), case)["coco/bbox_mAP"] == pytest.approx(1.0)


def test_a_class_without_objects_is_nan_and_left_out_of_the_mean() -> None:
    truth = annotations(1, [ONE], [0])
    case = GivenData(["a", "b"], [truth]), [detections(0, [ONE, OTHER], [0.9, 0.8], [0, 1])]
    metrics = evaluated(CocoMap(per_class=True), case)
    assert metrics["coco/bbox_mAP"] == metrics["coco/bbox_AP/a"] == pytest.approx(1.0)
    assert math.isnan(metrics["coco/bbox_AP/b"])
    assert math.isnan(metrics["coco/bbox_mAP_l"])


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_no_detection_at_all_is_zero(kind: Any) -> None:
    truth, results = random_coco(3)
    with_masks(truth, results)
    with_keypoints(truth, [])
    metrics = evaluated(CocoMap(kinds=[kind]), from_coco(truth, []))
    assert metrics[f"coco/{kind}_mAP"] == 0
    assert metrics[f"coco/{kind}_AR_l"] == 0


def test_no_object_at_all_is_nan() -> None:
    case = GivenData(["a"], [annotations(1, [], [])]), [detections(0, [ONE], [0.9], [0])]
    assert all(math.isnan(value) for value in evaluated(CocoMap(), case).values())


def test_an_object_without_a_mask_is_ignored_among_masks() -> None:
    square = [10.0, 10, 40, 10, 40, 40, 10, 40]
    truth = annotations(1, [ONE, OTHER], [0, 0], masks=[[square], []])
    masks = torch.zeros(2, 100, 100, dtype=torch.uint8)
    masks[0, 60:90, 60:90] = masks[1, 10:40, 10:40] = 1
    case = GivenData(["a"], [truth]), [detections(0, [OTHER, ONE], [0.9, 0.8], [0, 0], masks=masks)]
    assert evaluated(CocoMap(kinds=["segm"]), case)["coco/segm_mAP"] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_detections_may_be_of_half_precision_and_attached(dtype: torch.dtype) -> None:
    found = detections(0, [ONE], [0.5], [0], dtype=dtype)
    found.scores.requires_grad_()
    case = GivenData(["a"], [annotations(1, [ONE], [0])]), [found]
    assert evaluated(CocoMap(), case)["coco/bbox_mAP"] == pytest.approx(1.0)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    evaluated(CocoMap(per_class=True), from_coco(*random_coco(0)))
    assert capfd.readouterr() == ("", "")
