"""What a user sees of the evaluators: tables, files, messages, and metrics that do not depend on the way there."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import ConfigError, DataError, UserError
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
    """Two images, three classes; of the second nothing is found, of the third there is nothing."""
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
    assert caplog.messages[0] == table[1:]


@pytest.mark.parametrize("evaluator", [CocoMap(), VocMap(per_class=False)])
def test_no_table_unless_asked_for(case: Case, evaluator: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "detkernel"):
        metrics = evaluated(evaluator, case)
    assert not any("cat" in text for text in [*caplog.messages, *metrics])


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
def test_a_check_goes_by_the_images_that_it_saw(evaluator: Any, name: str, case: Case, tmp_path: Path) -> None:
    checked = kernel(evaluator, case, tmp_path, batch_size=1, order=[1])
    checked.check()
    assert checked.state.metrics[name] == pytest.approx(1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("evaluator", "name"), [(CocoMap(), "coco/bbox_mAP"), (VocMap(), "pascal_voc/mAP")])
def test_images_that_were_not_seen_count_as_missed_and_are_told(
    evaluator: Any, name: str, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    assert evaluated(evaluator, case, order=[1])[name] < evaluated(evaluator, case)[name]
    assert "1 of 2 images were not seen: their objects count as missed" in caplog.messages


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


def test_ids_of_saved_detections_are_the_files_and_no_two_classes_share_one(case: Case, tmp_path: Path) -> None:
    case[0].category_ids = {"long-haired dog": 9, "cat": 3}  # the emu is the training data's
    case[0].given[0].image_id = "\ud800\n\x1b[2J"
    evaluated(CocoMap(save=Path("results.json")), case, tmp_path)
    text = (tmp_path / "results.json").read_text("ascii")
    assert text.isprintable()
    assert [(one["image_id"], one["category_id"]) for one in json.loads(text)] == [
        ("b", 3), ("b", 10), ("\ud800\n\x1b[2J", 3)
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "nothing temporary is left"


def test_detections_are_not_saved_through_a_link(case: Case, tmp_path: Path) -> None:
    work, victim = tmp_path / "run", tmp_path / "victim"
    work.mkdir()
    victim.mkdir()
    (work / "found").symlink_to(victim)
    with pytest.raises(UserError, match="found is a link, and nothing is written through a link"):
        evaluated(CocoMap(save=Path("found/results.json")), case, work)
    (victim / "results.json").write_text("mine")
    (work / "results.json").symlink_to(victim / "results.json")
    with pytest.raises(UserError, match=r"results\.json is a link"):
        evaluated(CocoMap(save=Path("results.json")), case, work)
    assert (victim / "results.json").read_text() == "mine"


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
        (CocoMap, {"max_dets": (10, 10)}, "max_dets: .* each once"),
        (CocoMap, {"iou_thresholds": ()}, "iou_thresholds: expected one or more numbers"),
        (CocoMap, {"iou_thresholds": (0.5, 0.5)}, "iou_thresholds: .* each once"),
        (CocoMap, {"iou_thresholds": (0.5, 50.0)}, "iou_thresholds: expected at most 1, got 50"),
        (CocoMap, {"iou_thresholds": (0.0,)}, "iou_thresholds: expected more than 0"),
        (CocoMap, {"area_ranges": {"all": (0, 5)}}, "area_ranges: expected names .* not 'all', got 'all'"),
        (CocoMap, {"area_ranges": {"50": (0, 5)}}, "area_ranges: expected names .* got '50'"),
        (CocoMap, {"area_ranges": {"tiny": (9, 9)}}, r"area_ranges: 'tiny' is \[9, 9\], expected .* from < to"),
        (CocoMap, {"area_ranges": {"tiny": (-1, None)}}, "area_ranges: 'tiny' .* 0 <= from"),
        (VocMap, {"iou": []}, "iou: expected one or more numbers"),
        (VocMap, {"iou": [0.5, 0.5]}, "iou: .* each once"),
        (VocMap, {"iou": 1.5}, "iou: expected at most 1, got 1.5"),
    ],
)
def test_options_that_make_no_sense(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize("command", ["test", "check"])
def test_limits_beyond_what_the_model_gives(
    command: str, case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limited = kernel(CocoMap(max_dets=(1, 300, 7)), case, tmp_path, max_detections=100)
    getattr(limited, command)()
    assert [message for message in caplog.messages if "max_dets" in message] == [
        "evaluator.max_dets: the model gives at most 100 detections an image: its metrics at 300 are those at 100; "
        "raise that limit of the model (`detections_per_img` or the like), or leave it out of `max_dets`"
    ]


@pytest.mark.parametrize(("limits", "most"), [((1, 100), 100), ((1, 300), None), (None, 5)])
def test_limits_that_the_model_may_reach(
    limits: Any, most: int | None, case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernel(CocoMap(max_dets=limits), case, tmp_path, max_detections=most).test()
    assert "max_dets" not in caplog.text


def test_both_may_evaluate_one_run(case: Case, tmp_path: Path) -> None:
    metrics = kernel(CocoMap(), case, tmp_path, VocMap()).test().metrics
    assert metrics["coco/bbox_mAP_50"] == metrics["pascal_voc/AP50"] == pytest.approx(0.5)
    assert math.isnan(metrics["pascal_voc/AP/emu"])


ODD = [
    "evil\nclass",
    "evil\\nclass",
    "\x1b]0;PWN\x07\x1b[2J",
    "\ud800x",
    "../../x/y",
    " ",
    "",
    "\u6f22\u5b57",
    "e\u0301a",
    "x" * 900,
]


@pytest.mark.parametrize(
    ("evaluator", "head"), [(CocoMap(per_class=True), "coco/bbox_AP/"), (VocMap(), "pascal_voc/AP/")]
)
def test_odd_names_of_classes(evaluator: Any, head: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each has a metric of its own that can be shown, and a row of the table that is in line with the others."""
    case = GivenData(ODD, [annotations(1, [ONE] * 10, range(10))]), [detections(0, [], [], [])]
    with caplog.at_level(logging.INFO, "detkernel"):
        metrics = evaluated(evaluator, case)
    names = [name.removeprefix(head) for name in metrics if name.startswith(head)]
    assert names == [
        "evil\\nclass", "evil\\nclass (2)", "\\x1b]0;PWN\\x07\\x1b[2J", "\\ud800x", "../../x/y", "' '", "''",
        "\u6f22\u5b57", "e\u0301a", "x" * 900,
    ]  # fmt: skip
    assert all(name.isprintable() for name in metrics)
    rows = caplog.messages[0].splitlines()[1:]
    assert len(rows) == 11
    for number, columns in ((8, 4), (9, 2), (10, 60)):
        name = "x" * 57 + "..." if number == 10 else ODD[number - 1]
        assert rows[number] == "  " + name + " " * (60 - columns) + rows[1][62:], "in columns of a terminal"


@pytest.mark.parametrize(
    ("evaluator", "advice"),
    [
        (CocoMap(), "in the loader's `test`, or set `save` to a file to have the detections written"),
        (CocoMap(save=Path("found.json")), "in the loader's `test`"),
        (VocMap(), "in the loader's `test`"),
    ],
)
def test_data_without_annotations_is_said_in_one_line(
    evaluator: Any, advice: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    case = (
        GivenData(["a"], [annotations(at, [], []) for at in range(2)]),
        [detections(at, [ONE], [0.9], [0]) for at in (0, 1)],
    )
    metrics = evaluated(evaluator, case, tmp_path)
    assert all(math.isnan(value) for value in metrics.values())
    (message,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert message.startswith("evaluator: none of the 2 images of the test data has an annotation: ")
    assert message.endswith(advice)
    assert (tmp_path / "found.json").exists() is (getattr(evaluator, "save", None) is not None)


def test_why_metrics_are_nan_is_said_once(case: Case, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, "detkernel"):
        evaluator = VocMap()
        kernel(evaluator, case, tmp_path).test()
        kernel(evaluator, case, tmp_path).test()
        kernel(CocoMap(), case, tmp_path).test()
    assert [message for message in caplog.messages if "nan" in message] == [
        "evaluator: 1 of 5 metrics are nan: the test data has no object of their class or size (pascal_voc/AP/emu)",
        "evaluator: 4 of 12 metrics are nan: the test data has no object of their class or size "
        "(coco/bbox_mAP_m, coco/bbox_mAP_l, coco/bbox_AR_m, ...)",
    ]


@pytest.mark.parametrize("evaluator", [CocoMap(per_class=True), VocMap()])
def test_every_metric_says_that_higher_is_better(evaluator: Any, case: Case, tmp_path: Path) -> None:
    metrics = kernel(evaluator, case, tmp_path).test().metrics
    assert metrics
    assert {metrics.better(name) for name in metrics} == {"higher"}
