"""`lvis_map` gives the numbers of LVIS's own package."""

from __future__ import annotations

import importlib.util
import math
import random
from typing import Any

import pytest
from detkernel import ConfigError, DataError
from detkernel_detection.federated import Federated
from detkernel_evaluation.lvis import LvisMap
from evaluation_cases import Case, GivenData, annotations, detections, evaluated, from_coco, random_coco, with_masks

IDS = [3, 7, 20, 21]
WAYS = ["pycocotools", *(["hotcoco", "both"] if importlib.util.find_spec("hotcoco") else [])]
NAMES = [
    "mAP",
    "mAP_50",
    "mAP_75",
    "mAP_s",
    "mAP_m",
    "mAP_l",
    "mAP_r",
    "mAP_c",
    "mAP_f",
    "AR@{}",
    "AR_s",
    "AR_m",
    "AR_l",
]
OFFICIAL: dict[tuple[int, str, int], list[float]] = {
    (0, "bbox", 300): [
        0.3940099530799881,
        0.5227983289602393,
        0.454184361551863,
        0.35159515951595155,
        0.33601279541873597,
        0.4900990099009901,
        0.3402485210382706,
        0.43629284082254377,
        0.4054884973791497,
        0.5361622807017543,
        0.475,
        0.4722222222222222,
        0.5888888888888889,
    ],
    (1, "bbox", 2): [
        0.11584944208706585,
        0.18676724815338674,
        0.1198019801980198,
        0.08778877887788777,
        0.17152915291529153,
        0.5016501650165016,
        0.11982555398396982,
        0.07207920792079207,
        0.15564356435643564,
        0.15526506899055914,
        0.08987179487179488,
        0.17460317460317462,
        0.5,
    ],
    (2, "bbox", 5): [
        0.20388203732653967,
        0.27729667703612465,
        0.23372074049510214,
        0.09999999999999998,
        0.3005225522552255,
        0.3091309130913091,
        0.11964941230965201,
        0.38407590759075905,
        0.10792079207920792,
        0.2721031746031746,
        0.14222222222222222,
        0.35619047619047617,
        0.3333333333333333,
    ],
    (0, "segm", 300): [
        0.32394071048992423,
        0.516480050073527,
        0.37189522572166717,
        0.22886688668866886,
        0.28439010567723444,
        0.5066006600660066,
        0.27799034589948973,
        0.37577412686323575,
        0.31805765870704716,
        0.4552631578947368,
        0.3416666666666667,
        0.4091666666666667,
        0.5888888888888889,
    ],
    (1, "segm", 3): [
        0.13017461269936517,
        0.24072907290729073,
        0.13869636963696366,
        0.07122112211221121,
        0.2161276127612761,
        0.5016501650165016,
        0.11891139113911389,
        0.07514851485148515,
        0.1964639321074965,
        0.18809005083514885,
        0.08506410256410257,
        0.2619047619047619,
        0.5,
    ],
}
"""By seed, kind and limit: what `lvis` 0.5.3 says, with the `np.float` that it uses given back to NumPy, in its order
(AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR, ARs, ARm, ARl); -1 is nan here."""


def lvis_json(seed: int, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Random objects and detections in LVIS's form: no crowds, some detections without an area."""
    truth, results = random_coco(seed, images=15)
    draw = random.Random(seed)
    for one in truth["annotations"]:
        one["iscrowd"] = 0
    for one in results[:10]:
        one["bbox"][2] = 0
    if kind == "segm":
        with_masks(truth, results)
    for category, frequency in zip(truth["categories"], "rcfc", strict=True):
        category["frequency"] = frequency
    for image in truth["images"]:
        there = {one["category_id"] for one in truth["annotations"] if one["image_id"] == image["id"]}
        image["neg_category_ids"] = [number for number in IDS if number not in there and draw.random() < 0.5]
        image["not_exhaustive_category_ids"] = [number for number in IDS if draw.random() < 0.3]
    return truth, results


def case(seed: int, kind: str) -> Case:
    truth, results = lvis_json(seed, kind)
    data, found = from_coco(truth, results)
    data.federated = Federated.of(
        data.classes,
        {category["name"]: category["frequency"] for category in truth["categories"]},
        [image["id"] for image in truth["images"]],
        [[IDS.index(number) for number in image["neg_category_ids"]] for image in truth["images"]],
        [[IDS.index(number) for number in image["not_exhaustive_category_ids"]] for image in truth["images"]],
    )
    return data, found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("seed", "kind", "limit"), OFFICIAL)
def test_the_numbers_are_those_of_the_official_package(seed: int, kind: Any, limit: int, way: Any) -> None:
    metrics = evaluated(LvisMap(kinds=[kind], max_dets=limit, backend=way), case(seed, kind))
    values = [metrics[f"lvis/{kind}_{name.format(limit)}"] for name in NAMES]
    assert [-1 if math.isnan(value) else value for value in values] == OFFICIAL[seed, kind, limit]
    assert next(iter(metrics)) == f"lvis/{kind}_mAP"
    assert len(metrics) == len(NAMES)


ONE, OTHER, THIRD = [10.0, 10, 40, 40], [60.0, 60, 90, 90], [10.0, 60, 40, 90]


def small(negative: list[int], partly: list[int], labels: list[int], scores: list[float]) -> Case:
    """One image with a 'cat' at ONE; what is found lies at ONE, OTHER and THIRD."""
    boxes = [ONE, OTHER, THIRD][: len(labels)]
    data = GivenData(["cat", "dog", "emu"], [annotations(1, [ONE], [0]), annotations(2, [OTHER], [1])])
    frequency = {"cat": "r", "dog": "c", "emu": "f"}
    data.federated = Federated.of(data.classes, frequency, [1, 2], [negative, []], [partly, []])
    return data, [detections(0, boxes, scores, labels), detections(1, [OTHER], [0.5], [1])]


@pytest.mark.parametrize(
    ("negative", "partly", "limit", "dog"),
    [
        ([], [], 300, 1.0),  # dogs were not looked for in image 1: the detection there is left out
        ([1], [], 300, 0.5),  # they were, and there is none: it is wrong
        ([1], [1], 300, 1.0),  # not all are annotated: neither right nor wrong
        ([1], [], 1, 1.0),  # it is the second of its image, and one counts
    ],
)
def test_the_rules(negative: list[int], partly: list[int], limit: int, dog: float) -> None:
    metrics = evaluated(LvisMap(max_dets=limit, per_class=True), small(negative, partly, [0, 1], [0.9, 0.8]))
    assert metrics["lvis/bbox_AP/dog"] == metrics["lvis/bbox_mAP_c"] == pytest.approx(dog)
    assert metrics["lvis/bbox_mAP_r"] == pytest.approx(1.0)
    assert math.isnan(metrics["lvis/bbox_mAP_f"])


def test_data_of_another_form_and_other_kinds_are_told() -> None:
    data, found = small([], [], [0], [0.9])
    data.federated = None
    with pytest.raises(ConfigError, match="this data has none; measure it with coco_map"):
        evaluated(LvisMap(), (data, found))
    data.federated = Federated.of(data.classes, {"cat": "r", "dog": "c"}, [1, 2], [[], []], [[], []])
    with pytest.raises(DataError, match="category 'emu' has neither `frequency` nor `image_count`"):
        evaluated(LvisMap(), (data, found))
    with pytest.raises(ValueError, match="LVIS measures bbox and segm; leave 'keypoints' out"):
        LvisMap(kinds=["keypoints"])
