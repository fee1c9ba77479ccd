"""`detkernel evaluate`: the metrics of saved detections, with no model; what is wrong with a file is said at once."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from detkernel import UserError
from detkernel.cli import cli
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CONFIG = """
run: {until: 1 epochs, work_dir: never-written}
data:
  use: loader
  train: {use: coco, annotation_file: truth.json, image_folder: images}
  val: {use: coco, annotation_file: truth.json, image_folder: images}
model: {use: retinanet, backbone: {use: resnet, depth: 18}}
coco: {use: coco_map, save: found.json}
voc: {use: voc_map}
log: {}
"""
SIDE = 64


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four images with ids 10, 20, 30, 40, categories 3 (cat) and 7 (dog); the last image is empty."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in (10, 20, 30, 40):
        Image.new("RGB", (SIDE, SIDE)).save(f"images/photo_{image_id}.bmp")
        images.append({"id": image_id, "file_name": f"photo_{image_id}.bmp", "width": SIDE, "height": SIDE})
        for number in range(0 if image_id == 40 else 3):
            x, y, w, h = (int(value) for value in [*draw.integers(0, 30, 2), *draw.integers(8, 30, 2)])
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            one = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 3 if number else 7, "iscrowd": 0}
            annotations.append({**one, "bbox": [x, y, w, h], "area": w * h, "segmentation": [corners]})
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    Path("truth.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    Path("c.yaml").write_text(CONFIG)


def detections() -> list[dict[str, Any]]:
    """One near each object, by rising score."""
    truth = json.loads(Path("truth.json").read_text())
    draw, found = np.random.default_rng(1), []
    for one in truth["annotations"]:
        box = [value + float(shift) for value, shift in zip(one["bbox"], draw.normal(0, 1, 4), strict=True)]
        score = round(0.1 + 0.08 * len(found), 3)
        found.append({"image_id": one["image_id"], "category_id": one["category_id"], "bbox": box, "score": score})
    return found


def invoke(*words: str) -> Result:
    """A user's mistake is on standard error, with exit status 2, as `detkernel` ends."""

    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def command(words: tuple[str, ...]) -> None:
        try:
            cli(words, standalone_mode=False)
        except UserError as error:
            click.echo(error, err=True)
            sys.exit(2)

    return CliRunner().invoke(command, words)


def evaluate(found: Any, *words: str) -> Result:
    Path("results.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return invoke("evaluate", "results.json", "c.yaml", *words)


def metrics(found: Any, *words: str) -> dict[str, float]:
    result = evaluate(found, "--json", *words)
    assert result.exit_code == 0, result.output
    values: dict[str, float] = json.loads(result.stdout)
    return values


def by_pycocotools(found: list[dict[str, Any]], kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO("truth.json")
        evaluation = COCOeval(coco, coco.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:3]]


def test_the_metrics_are_those_of_pycocotools_and_nothing_is_left_behind() -> None:
    found = detections()
    result = evaluate(found)
    assert result.exit_code == 0, result.output
    assert "results.json: 9 detections (bbox) in 3 of 4 images" in result.stderr
    assert "pascal_voc by class" in result.stderr
    assert "detkernel-evaluate" not in result.output
    names = [line.split(": ")[0] for line in result.stdout.splitlines()]
    assert names[:3] == ["coco/bbox_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP_75"]
    assert "pascal_voc/mAP" in names
    values = metrics(found)
    assert [values[name] for name in names[:3]] == by_pycocotools(found, "bbox")
    assert 0 < values["coco/bbox_mAP"] < 1
    assert values["coco/bbox_mAP_l"] is None
    assert sorted(path.name for path in Path().iterdir()) == ["c.yaml", "images", "results.json", "truth.json"]


@pytest.mark.parametrize("form", ["text", "counts", "polygons"])
def test_masks_in_every_form(form: str) -> None:
    found, reference = [], []
    for one in detections():
        x, y, w, h = (round(value) for value in one.pop("bbox"))
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        mask = rle.frPyObjects([polygon], SIDE, SIDE)[0]
        text = {"size": [SIDE, SIDE], "counts": mask["counts"].decode()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 with NumPy 2
            flat = rle.decode(mask).reshape(-1, order="F")
        plain = np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=2)), prepend=0).tolist()
        masks = {"text": text, "polygons": [polygon], "counts": {"size": [SIDE, SIDE], "counts": plain}}
        found.append({**one, "segmentation": masks[form]})
        reference.append({**one, "segmentation": text})
    values = metrics(found, "coco.kinds=[segm]")
    expected = by_pycocotools(reference, "segm")
    assert [values[f"coco/segm_{name}"] for name in ("mAP", "mAP_50", "mAP_75")] == expected
    assert 0 < values["coco/segm_mAP"] < 1
    assert values["pascal_voc/mAP"] > 0


def test_other_names_of_images_and_labels_from_0() -> None:
    """Other tools write an id as text, or the file's name with or without its ending; labels in the place of ids."""
    found, labels = detections(), {3: 0, 7: 1}
    expected = metrics(found)
    for name in (str, "photo_{}.bmp".format, "photo_{}".format):
        assert metrics([{**one, "image_id": name(one["image_id"])} for one in found]) == expected
    as_labels = [{**one, "category_id": labels[one["category_id"]]} for one in found]
    assert metrics(as_labels, "--categories", "labels") == expected
    assert "`--categories labels` takes them as positions" in evaluate(as_labels).stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 11}, "detections of images that the data does not have: [0] image_id 11; expected one of its 4 "),
        ({"image_id": None}, "of images that the data does not have: [0] image_id null"),
        ({"category_id": 4}, "categories that the data does not have: [0] category_id 4; expected 3 (cat), 7 (dog)"),
        ({"category_id": "cat"}, "categories that the data does not have: [0] category_id 'cat'"),
        ({"category_id": True}, "categories that the data does not have: [0] category_id true"),
        ({"score": float("nan")}, "a score that is not a finite number: [0] NaN"),
        ({"score": "0.5"}, "a score that is not a finite number: [0] '0.5'"),
        ({"bbox": [1, 2, 3]}, "`bbox` is not [x, y, width, height], four finite numbers, with sizes of at least 0"),
        ({"bbox": [1, 2, float("inf"), 4]}, "[0] [1, 2, Infinity, 4]"),
        ({"bbox": [30, 30, -10, 4]}, "[0] [30, 30, -10, 4]"),
        (
            {"segmentation": {"size": [SIDE, SIDE], "counts": [5, 5]}},
            "`segmentation` is not a mask of its image: [0] run lengths: 10 pixels in all, but the image has 4096",
        ),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, "[0] run lengths: a size of [9, 9], but the image's is"),
        ({"segmentation": [[0, 0, 1e9, 0, 5, 5]]}, "[0] polygon 1: a coordinate of 1e+09, far outside an image of"),
        ({"segmentation": "\x1b[31m"}, "[0] expected polygons or run lengths, got str"),
        ({"keypoints": [1, 2]}, "`keypoints` is not a list of x, y, visibility for each keypoint, finite numbers: [0]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message(change: dict[str, Any], message: str) -> None:
    found = detections()
    found[0] |= change
    result = evaluate(found)
    assert result.exit_code == 2
    assert message in result.stderr, result.stderr
    assert result.stderr.count("results.json: ") == 1 or "segmentation" in change or "keypoints" in change
    assert result.stdout == ""


def test_each_kind_of_mistake_is_counted() -> None:
    found: list[Any] = detections()
    for number in range(5):
        found[number]["image_id"] = 1000 + number
    found[8] = "\x1b[31m"
    result = evaluate(found)
    assert result.exit_code == 2
    assert "[0] image_id 1000, [1] image_id 1001, [2] image_id 1002 and 2 more" in result.stderr
    assert "found [8]: '\\x1b[31m'" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "results.json:1:3: broken JSON"),
        ("{}", "results.json: this is not a file of results (); expected a list of detections"),
        ('{"images": [], "annotations": []}', "this is an annotation file (images, annotations); expected a list of"),
        ("[" * 100_000, "results.json: broken JSON"),
        ("7", "this is not a file of results (7)"),
    ],
)
def test_a_file_of_another_kind(content: str, message: str) -> None:
    result = evaluate(content)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_that_is_not_there_and_a_config_without_evaluators() -> None:
    result = invoke("evaluate", "nothing.json", "c.yaml")
    assert (result.exit_code, "nothing.json: the detections cannot be read: No such file" in result.stderr) == (2, True)
    result = evaluate(detections(), "coco=null", "voc=null")
    assert (result.exit_code, "the config has no evaluator, such as" in result.stderr) == (2, True)


def test_kinds_that_the_file_does_not_have() -> None:
    result = evaluate(detections(), "coco.kinds=[segm]")
    assert result.exit_code == 2
    assert "coco.kinds: the file of detections has no masks; leave it out of `kinds`" in result.stderr


def test_no_detections_at_all_are_zero() -> None:
    assert metrics([])["coco/bbox_mAP"] == 0
