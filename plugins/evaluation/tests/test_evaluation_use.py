"""What a user sees of the evaluators: tables, files, messages, and figures that do not depend on the way there."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import ConfigError, DataError
from detkernel_evaluation.coco import CocoMap
from detkernel_evaluation.voc import VocMap
from evaluation_cases import (
    Case,
    GivenData,
    annotations,
    detections,
    evaluated,
    from_coco,
    kernel,
    random_coco,
    with_masks,
)

ONE, OTHER = [10.0, 10, 40, 40], [60.0, 60, 90, 90]


@pytest.fixture
def case() -> Case:
    """Two pictures, three classes; of the second nothing is found, of the third there is nothing."""
    notes = [annotations("a", [ONE, OTHER], [0, 1]), annotations("b", [ONE], [0])]
    found = [detections(0, [ONE], [0.75], [0]), detections(1, [ONE, OTHER], [0.5, 0.25], [0, 2])]
    return GivenData(["cat", "long-haired dog", "emu"], notes), found


@pytest.mark.parametrize(
    ("evaluator", "table"),
    [
        (
            CocoMap(per_class=True),
            """
coco/bbox by class
  class            objects     AP   AP50
  cat                    2  1.000  1.000
  long-haired dog        1  0.000  0.000
  emu                    0      -      -""",
        ),
        (
            VocMap(iou=[0.5, 0.75]),
            """
pascal_voc by class
  class            objects   AP50   AP75
  cat                    2  1.000  1.000
  long-haired dog        1  0.000  0.000
  emu                    0      -      -""",
        ),
    ],
)
def test_the_table_by_class(case: Case, evaluator: Any, table: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "detkernel"):
        evaluated(evaluator, case)
    assert caplog.messages == [table[1:]]


@pytest.mark.parametrize("evaluator", [CocoMap(), VocMap(per_class=False)])
def test_no_table_unless_asked_for(case: Case, evaluator: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "detkernel"):
        metrics = evaluated(evaluator, case)
    assert not caplog.messages
    assert not any("cat" in name for name in metrics)


@pytest.mark.parametrize("evaluator", [CocoMap(per_class=True), VocMap()])
def test_order_and_batches_do_not_matter(evaluator: Any) -> None:
    case = from_coco(*random_coco(5))
    once = evaluated(evaluator, case)
    other = evaluated(evaluator, case, batch_size=5, order=[*range(11, -1, -1), 11, 3])
    assert str(once) == str(other)


@pytest.mark.parametrize("cls", [CocoMap, VocMap])
def test_a_second_validation_starts_afresh(cls: Any, case: Case) -> None:
    evaluator = cls()
    whole = evaluated(evaluator, case)
    assert str(evaluated(evaluator, case, order=[1])) == str(evaluated(cls(), case, order=[1])) != str(whole)
    assert str(evaluated(evaluator, case)) == str(whole)


@pytest.mark.parametrize(("evaluator", "name"), [(CocoMap(), "coco/bbox_mAP"), (VocMap(), "pascal_voc/mAP")])
def test_a_check_goes_by_the_pictures_that_it_saw(evaluator: Any, name: str, case: Case, tmp_path: Path) -> None:
    checked = kernel(evaluator, case, tmp_path, batch_size=1, order=[1])
    checked.check()
    assert checked.state.metrics[name] == pytest.approx(1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("evaluator", "name"), [(CocoMap(), "coco/bbox_mAP"), (VocMap(), "pascal_voc/mAP")])
def test_pictures_that_were_not_seen_count_as_missed_and_are_told(
    evaluator: Any, name: str, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluated(evaluator, case, order=[1])[name] < evaluated(evaluator, case)[name]
    assert "1 of 2 pictures were not seen: their objects count as missed" in caplog.messages


def test_detections_are_saved_in_cocos_form(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "detkernel"):
        evaluated(CocoMap(save=Path("found/results.json")), case, tmp_path)
    path = tmp_path / "found" / "results.json"
    assert f"wrote the detections to {path}" in caplog.messages
    box = [10.0, 10.0, 30.0, 30.0]
    assert json.loads(path.read_text()) == [
        {"image_id": "a", "category_id": 1, "bbox": box, "score": 0.75},
        {"image_id": "b", "category_id": 1, "bbox": box, "score": 0.5},
        {"image_id": "b", "category_id": 3, "bbox": [60.0, 60.0, 30.0, 30.0], "score": 0.25},
    ]


def test_each_kind_is_saved_in_a_file_that_gives_the_same_detections(tmp_path: Path) -> None:
    truth, results = random_coco(4)
    with_masks(truth, results)
    case = from_coco(truth, results)
    case[0].category_ids = dict(zip(case[0].classes, [3, 7, 20, 21], strict=True))
    evaluated(CocoMap(kinds=["bbox", "segm"], save=tmp_path / "results.json"), case)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.bbox.json", "results.segm.json"]
    saved = json.loads((tmp_path / "results.segm.json").read_text())

    def key(one: dict[str, Any]) -> str:
        return json.dumps(one, sort_keys=True)

    assert sorted(saved, key=key) == sorted(results, key=key)


def test_a_check_saves_nothing(case: Case, tmp_path: Path) -> None:
    kernel(CocoMap(save=Path("results.json")), case, tmp_path).check()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    metrics = evaluated(CocoMap(save=tmp_path / "file" / "results.json"), case)
    assert metrics["coco/bbox_mAP"] == pytest.approx(0.5)
    assert "results.json could not be written: " in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["segm"]}, "kinds: 'segm' needs masks, but the data has none (a.jpg); leave it out of `kinds`"),
        ({"kinds": ["keypoints"]}, "kinds: 'keypoints' needs keypoints, but the data has none (a.jpg)"),
    ],
)
def test_data_that_lacks_what_is_evaluated(case: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluated(CocoMap(**options), case)
    assert message in str(caught.value)


def test_keypoints_without_sigmas() -> None:
    notes = annotations(1, [ONE], [0], keypoints=torch.ones(1, 4, 3).numpy())
    with pytest.raises(ConfigError, match=r"sigmas: the data has 4 keypoints an object, expected 4 sigmas"):
        evaluated(CocoMap(kinds=["keypoints"]), (GivenData(["a"], [notes]), [detections(0, [], [], [])]))


def test_a_model_that_lacks_what_is_evaluated() -> None:
    notes = annotations(1, [ONE], [0], masks=[[[0.0, 0, 5, 5, 0, 5]]])
    with pytest.raises(ConfigError, match="kinds: the model detects no masks; leave it out of `kinds`"):
        evaluated(CocoMap(kinds=["segm"]), (GivenData(["a"], [notes]), [detections(0, [ONE], [0.5], [0])]))


def test_masks_of_another_size_than_the_file() -> None:
    notes = annotations(1, [ONE], [0], masks=[[[0.0, 0, 5, 5, 0, 5]]])
    found = detections(0, [ONE], [0.5], [0], masks=torch.ones(1, 50, 80, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"1.jpg: detected masks are \(50, 80\).*, expected .*\(100, 100\)"):
        evaluated(CocoMap(kinds=["segm"]), (GivenData(["a"], [notes]), [found]))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (CocoMap, {"kinds": []}, "kinds: expected one or more of bbox, segm, keypoints"),
        (CocoMap, {"kinds": ["bbox", "bbox"]}, "kinds: .* each once"),
        (CocoMap, {"max_dets": ()}, "max_dets: expected one or more numbers"),
        (CocoMap, {"max_dets": (0, 10)}, "max_dets: expected at least 1, got 0"),
        (VocMap, {"iou": []}, "iou: expected one or more numbers"),
        (VocMap, {"iou": [0.5, 0.5]}, "iou: .* each once"),
        (VocMap, {"iou": 1.5}, "iou: expected at most 1, got 1.5"),
    ],
)
def test_options_that_make_no_sense(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_both_may_evaluate_one_run(case: Case, tmp_path: Path) -> None:
    metrics = kernel(CocoMap(), case, tmp_path, VocMap()).test().metrics
    assert metrics["coco/bbox_mAP_50"] == metrics["pascal_voc/AP50"] == pytest.approx(0.5)
    assert math.isnan(metrics["pascal_voc/AP/emu"])
