"""What fields of annotation files mean: flags, duplicates, units, missing masks and boxes, names of classes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import DataError, plugin
from detkernel_data.cleaning.boxes import find_duplicates
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.table import Table
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.yolo import Yolo
from detkernel_data.loading.build import matched
from detkernel_data.loading.loader import Loader
from detkernel_data.masks import mask_box
from detkernel_data.wrappers import Concat, Subset
from detkernel_detection import Batch, Dataset
from detkernel_detection.findings import Note
from detkernel_detection.testing import tiny_kernel, tiny_run
from PIL import Image
from pycocotools import mask as coco_mask

Make = Callable[..., Coco]
Refusal = Callable[[Dataset], str]
SQUARE = [10.0, 5, 20, 5, 20, 15, 10, 15]


@pytest.fixture
def make(here: Path, make_image: Callable[..., Path]) -> Make:
    """Two images of 40 x 30, classes a and b, and the given annotations, which lack what all have in common."""
    for name in "01":
        make_image(here / f"images/{name}.bmp")

    def write(
        *annotations: dict[str, Any], images: Any = None, top: Any = None, names: Any = ("a", "b"), **options: Any
    ) -> Coco:
        common = {"image_id": 0, "category_id": 1, "area": 100, "iscrowd": 0}
        data = {
            "images": [{"id": n, "file_name": f"{n}.bmp", "width": 40, "height": 30, **(images or {})} for n in (0, 1)],
            "categories": [{"id": n, "name": name} for n, name in enumerate(names, start=1)],
            "annotations": [{"id": n, **common, **one} for n, one in enumerate(annotations, start=1)],
            **(top or {}),
        }
        Path("a.json").write_text(json.dumps(data))
        return Coco(**{"annotation_file": Path("a.json"), "image_folder": Path("images"), **options})

    return write


def loaded(dataset: Any) -> Any:
    dataset.load()
    return dataset


def told(dataset: Any, part: str) -> str:
    """The one remark that has these words."""
    found = [str(note) for note in loaded(dataset).notes if part in note]
    assert len(found) == 1, list(dataset.notes)
    return found[0]


BOX: dict[str, Any] = {"bbox": [10, 5, 10, 10]}
OTHER: dict[str, Any] = {"bbox": [1, 1, 9, 9]}


def test_ignored_objects_are_not_trained_on(make: Make) -> None:
    for value in (1, True, 1.0):
        dataset = loaded(make(BOX, {**OTHER, "ignore": value}, {**OTHER, "image_id": 1, "ignore": 0}))
        assert dataset.annotations(0).boxes.tolist() == [[10, 5, 20, 15]]
        assert len(dataset.annotations(1)) == 1
        assert dataset.truth(0).difficult.tolist() == [False, False]
    assert told(dataset, "`ignore`") == (
        "1 object with `ignore` set: not trained on; evaluation counts them, as pycocotools does: a.json: annotation 2 "
        "'a' of 0.bmp (`evaluate_ignored: false` counts them neither as missed nor what is found there as wrong)"
    )
    dataset = loaded(make(BOX, {**OTHER, "ignore": 1}, evaluate_ignored=False))
    assert dataset.truth(0).difficult.tolist() == [False, True]
    assert dataset.annotations(0).difficult.tolist() == [False, True]
    assert "neither trained on nor counted in evaluation" in told(dataset, "`ignore`")


def test_difficult_and_crowd_flags_of_any_type(make: Make) -> None:
    dataset = loaded(make(BOX, {**OTHER, "difficult": True}, {**OTHER, "iscrowd": 1.0, "image_id": 1}))
    assert dataset.truth(0).difficult.tolist() == [False, True]
    assert dataset.truth(1).crowd.tolist() == [True]


def test_fields_that_are_not_used_are_reported(make: Make) -> None:
    dataset = make(
        {**BOX, "attributes": {"occluded": True}, "IsGroupOf": 1, "note": ""},
        {**OTHER, "attributes": {}},
        images={"split": "train", "license": 3},
        top={"info": {"year": 2026}, "videos": [1]},
    )
    assert told(dataset, "fields that are not used") == (
        "fields that are not used: `videos`; `IsGroupOf` of 1 annotations; `attributes` of 1 annotations; and 1 more"
    )
    plain = loaded(make(BOX, images={"coco_url": "http://x", "date_captured": "2013"}, top={"licenses": [{"id": 1}]}))
    assert not any("not used" in note for note in plain.notes)


def test_what_is_taken_of_an_animation_is_said(make: Make) -> None:
    dataset = make(BOX)
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save("images/1.bmp", "gif", save_all=True, append_images=frames[1:])
    assert told(dataset, "frames") == "1 image with several frames or pages: the first of each is taken: images/1.bmp"
    assert dataset.image(1)[2, 0, 0] == 0  # not the blue one


def test_an_annotation_id_that_pycocotools_takes_for_none_is_said(make: Make) -> None:
    assert told(make(BOX, {**OTHER, "id": 0}), "id 0") == (
        "an annotation has the id 0, by which pycocotools marks what was not found: there it counts as missed, "
        "whatever is detected, here as any other: a.json: annotation 0 'a' of 0.bmp (number annotations from 1 to have "
        "pycocotools' metrics agree)"
    )


def test_lvis_lists_of_classes_that_were_not_looked_for(make: Make) -> None:
    dataset = make(BOX, images={"neg_category_ids": [2], "not_exhaustive_category_ids": []})
    assert told(dataset, "LVIS").startswith("`neg_category_ids` and `not_exhaustive_category_ids` of 2 images, as LVIS")
    assert not any("LVIS" in note for note in loaded(make(BOX, images={"neg_category_ids": []})).notes)


def test_lvis_lists_are_handed_on_by_name(make: Make, refusal: Refusal) -> None:
    lists = {"neg_category_ids": [2], "not_exhaustive_category_ids": [1, 2]}
    categories = [{"id": 1, "name": "a", "frequency": "r"}, {"id": 2, "name": "b", "image_count": 50}]

    def dataset(**options: Any) -> Coco:
        return make(BOX, images=lists, top={"categories": categories}, **options)

    part = loaded(Subset(dataset=dataset(rename_classes={"b": "c"}), first=1))
    for known in (part.federated, matched(part, ["c", "a"], "val").federated):
        assert (known.negatives_of(0), known.not_exhaustive_of(0)) == (["c"], ["a", "c"])
        assert known.frequency == {"a": "r", "c": "c"}
    assert loaded(dataset(rename_classes={"b": "a"})).federated.frequency == {"a": "c"}
    assert loaded(make(BOX)).federated is None
    wrong = make(BOX, images={"neg_category_ids": [9]})
    assert "a.json: image 0: `neg_category_ids`: expected a list of category ids, got 9" in refusal(wrong)
    wrong = make(BOX, images=lists, top={"categories": [{"id": 1, "name": "a", "frequency": "often"}, categories[1]]})
    assert "category 1: `frequency`: expected r, c or f (rare, common, frequent), got 'often'" in refusal(wrong)


def test_duplicates_are_counted_dropped_or_refused(make: Make, refusal: Refusal) -> None:
    others = [{**BOX, "category_id": 2}, {**BOX, "image_id": 1}, {**BOX, "iscrowd": 1}, OTHER]
    things = [BOX, *others, BOX, BOX]
    assert told(make(*things), "duplicate") == (
        "2 duplicates (same image, class and box) kept: a.json: annotation 6 'a' of 0.bmp; a.json: annotation 7 'a' of "
        "0.bmp (a perfect detector finds each place once, so duplicates lower its AP; `duplicates: drop` leaves them "
        "out)"
    )
    assert len(loaded(make(*things)).truth(0)) == 6
    dataset = loaded(make(*things, duplicates="drop"))
    assert [len(dataset.truth(0)), len(dataset.annotations(0)), len(dataset.truth(1))] == [4, 4, 1]
    assert refusal(make(*things, duplicates="error")).splitlines()[1] == (
        "  a.json: annotation 6 'a' of 0.bmp: an object before it in the image has the same class and box; remove it, "
        "or set `duplicates` to drop or keep"
    )


def test_duplicates_of_other_forms(here: Path, make_image: Callable[..., Path]) -> None:
    make_image(here / "images/a.bmp")
    (here / "labels").mkdir()
    (here / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.2\n" * 3)
    (here / "data.yaml").write_text("train: images\nnames: [a]\n")
    assert told(Yolo(data=here, split="train"), "duplicate").startswith("2 duplicates")
    assert len(loaded(Yolo(data=here, split="train", duplicates="drop")).annotations(0)) == 1


def test_duplicates_among_many_are_those_of_a_plain_search() -> None:
    draw = np.random.default_rng(0)
    count = 3000
    boxes = draw.integers(0, 6, (count, 4)).astype(float) * draw.choice([1, 0.1, 1 / 3], (count, 1))
    images, labels = draw.integers(0, 3, count), draw.integers(-1, 2, count)
    table = Table(source="x", declared=list, where=str, where_image=str, image=images.tolist())
    seen: set[Any] = set()
    expected = []
    for key in zip(images.tolist(), labels.tolist(), map(tuple, boxes.tolist()), strict=True):
        expected.append(key in seen and key[1] >= 0)
        seen.add(key)
    assert find_duplicates(table, boxes, labels).tolist() == expected


def test_fractions_in_coco_form_are_refused_or_read(make: Make, refusal: Refusal) -> None:
    part = {"bbox": [0.25, 0.5, 0.25, 0.25], "area": 0.0625, "segmentation": [[0.25, 0.5, 0.5, 0.5, 0.5, 0.75]]}
    assert refusal(make(part, {**part, "image_id": 1})) == (
        "a.json: every box (2) lies within 0 to 1, as fractions of the image do: a.json: annotation 1 'a' of 0.bmp "
        "(x 0.25..0.5, y 0.5..0.75); expected pixels. Set `bbox_unit: fractions`"
    )
    notes = loaded(make(part, bbox_unit="fractions")).truth(0)
    assert notes.boxes.tolist() == [[10, 15, 20, 22.5]]
    assert notes.area.tolist() == [75]
    assert notes.masks[0] == [[10, 15, 20, 15, 20, 22.5]]


def test_boxes_smaller_than_a_pixel_are_counted(make: Make) -> None:
    assert told(make(BOX, {"bbox": [3, 3, 0.5, 0.5]}), "smaller than a pixel").startswith(
        "1 box smaller than a pixel kept"
    )


def test_two_corners_in_place_of_corner_and_size(make: Make, refusal: Refusal) -> None:
    corners = [{"bbox": [10 + n % 5, 5, 30 + n % 7, 20 + n % 9], "image_id": n % 2} for n in range(24)]
    assert refusal(make(*corners)).startswith("a.json: ")
    assert refusal(make(*corners)).endswith(
        "they were two corners, [x1, y1, x2, y2]. Set `bbox_format: xyxy` if they are"
    )
    assert "Set `bbox_format: xyxy`" in told(make(*corners[:3]), "two corners")
    assert loaded(make(*corners, bbox_format="xyxy")).truth(0).boxes[0].tolist() == [10, 5, 30, 20]
    beyond = [{"bbox": [30, 20, 20 + n, 5]} for n in range(24)]
    assert loaded(make(*beyond)).truth(0).boxes[0].tolist() == [30, 20, 50, 25]


def test_centre_and_size(make: Make) -> None:
    assert loaded(make({"bbox": [20, 10, 10, 6]}, bbox_format="cxcywh")).truth(0).boxes.tolist() == [[15, 7, 25, 13]]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("bbox", [None, []])
def test_boxes_that_are_missing_are_those_of_the_masks(make: Make, masks: bool, bbox: Any) -> None:
    runs = coco_mask.encode(np.asfortranarray(np.pad(np.ones((7, 3), np.uint8), ((5, 18), (11, 26)))))
    dataset = make(
        {"segmentation": [SQUARE, [30, 1, 39, 1, 39, 9]], "bbox": bbox},
        {"segmentation": {"size": [30, 40], "counts": runs["counts"].decode()}, "bbox": bbox},
        masks=masks,
    )
    assert told(dataset, "not in the file") == (
        "2 boxes not in the file, taken from the mask: a.json: annotation 1; a.json: annotation 2"
    )
    assert dataset.truth(0).boxes.tolist() == [[10, 1, 39, 15], [11, 5, 14, 12]]


def test_the_box_of_run_lengths_is_that_of_pycocotools() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        height, width = draw.integers(1, 12, 2).tolist()
        pixels = np.asfortranarray(draw.random((height, width)) < draw.choice([0.05, 0.3, 0.9]), dtype=np.uint8)
        runs = coco_mask.encode(pixels)
        x, y, w, h = coco_mask.toBbox(runs).tolist()
        found = mask_box({"size": [height, width], "counts": runs["counts"].decode()})
        assert found == ((x, y, x + w, y + h) if pixels.any() else None)


# Classes


def test_classes_are_renamed_and_merged(make: Make, refusal: Refusal) -> None:
    things = [BOX, {**OTHER, "category_id": 2}, {**OTHER, "category_id": 3, "image_id": 1}]
    names = ("hex bolt", "carriage bolt", "nut")
    merge = {"hex bolt": "bolt", "carriage bolt": "bolt"}
    dataset = loaded(make(*things, names=names, rename_classes=merge))
    assert dataset.classes == ("bolt", "nut")
    assert dataset.annotations(0).labels.tolist() == [0, 0]
    assert dataset.category_ids == {"bolt": 1, "nut": 3}
    swapped = loaded(make(*things, names=names, rename_classes={"hex bolt": "nut", "nut": "hex bolt"}))
    assert [swapped.classes[label] for label in swapped.annotations(0).labels] == ["nut", "carriage bolt"]
    into = loaded(make(*things, names=names, rename_classes={"hex bolt": "nut"}, class_names=["nut", "carriage bolt"]))
    assert into.annotations(0).labels.tolist() == [0, 1]
    assert refusal(make(*things, names=names, rename_classes={"hex blot": "bolt"})) == (
        "a.json: `rename_classes` names 'hex blot', which the annotations do not have, did you mean 'hex bolt'?; they "
        "have: hex bolt, carriage bolt, nut"
    )


def test_voc_classes_of_the_whole_folder_can_be_renamed(here: Path, make_image: Callable[..., Path]) -> None:
    for name, thing in (("a", "cat"), ("b", "dog")):
        make_image(here / f"JPEGImages/{name}.bmp")
        (here / "Annotations").mkdir(exist_ok=True)
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        (here / f"Annotations/{name}.xml").write_text(f"<a><object><name>{thing}</name>{box}</object></a>")
    (here / "ImageSets/Main").mkdir(parents=True)
    (here / "ImageSets/Main/train.txt").write_text("a\n")
    renamed = Voc(root=here, split="train", rename_classes={"dog": "animal", "cat": "animal"})
    assert loaded(renamed).classes == ("animal",)
    assert renamed.annotations(0).labels.tolist() == [0]


def test_classes_that_differ_in_case_or_blanks(make: Make) -> None:
    assert told(make(BOX, names=("Bolt", "bolt", "bolt ", "nut")), "differ in case") == (
        "classes that differ in case or blanks alone are taken for different ones: 'Bolt', 'bolt', 'bolt ' "
        "(`rename_classes: {OLD: NEW}` merges them)"
    )


@pytest.mark.parametrize(("name", "what"), [("  ", "consists of blanks"), ("x\ud800", "has half of a surrogate pair")])
def test_class_names_that_cannot_be_shown(make: Make, refusal: Refusal, name: str, what: str) -> None:
    message = refusal(make(BOX, names=(name, "b")))
    assert what in message
    assert message.isprintable()
    assert loaded(make(BOX, names=(name, "b"), rename_classes={name: "a"})).classes == ("a", "b")
    assert loaded(make(BOX, names=("a/b", "c\nd"))).classes == ("a/b", "c\nd")


# Remarks


def test_a_remark_names_three_places_and_keeps_all(make: Make) -> None:
    dataset = loaded(make(BOX, *[{"bbox": [n, 1, 0, 0]} for n in range(7)]))
    note = next(note for note in dataset.notes if "without area" in note)
    assert isinstance(note, Note)
    assert len(note.places) == 7
    assert note.count("annotation") == 3
    assert "; and 4 more (`bad_boxes: error` refuses them" in note
    assert pickle.loads(pickle.dumps(note)).places == note.places
    joined = loaded(Concat(datasets=[make(BOX, *[{"bbox": [n, 1, 0, 0]} for n in range(7)])]))
    assert any(
        len(getattr(note, "places", ())) == 7 and note.startswith("data set 0: 7 boxes") for note in joined.notes
    )


def test_the_whole_list_is_in_the_work_dir(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make(BOX, *[{"bbox": [n, 1, 0, 0]} for n in range(7)])
    tiny_run({"data": Loader(train=dataset, workers=0)}, work_dir=tmp_path / "out")
    lines = (tmp_path / "out/train_data_warnings.txt").read_text().splitlines()
    assert lines[0].startswith("7 boxes without area dropped")
    assert len(lines) == 8
    assert "out/train_data_warnings.txt has every place of these warnings" in caplog.text
    (tmp_path / "more").mkdir()
    kernel = tiny_kernel({"data": Loader(train=make(BOX), workers=0)}, work_dir=tmp_path / "more")
    kernel.run()
    assert not (tmp_path / "more/train_data_warnings.txt").exists()


# Masks


@plugin(needs=("masks",))
class Needy:
    """Needs masks."""


def first_batch(loader: Loader) -> Batch:
    kernel = tiny_kernel({"data": loader, "needy": Needy()})
    try:
        return next(iter(loader.build_loader(kernel.state, "train").batches(0)))
    finally:
        loader.after_run()


SOME_WITHOUT = [
    {**BOX, "segmentation": [SQUARE]},
    {**OTHER, "segmentation": []},
    {"bbox": [25, 5, 5, 5], "segmentation": [[]]},
    {"bbox": [20, 20, 0.2, 0.2], "segmentation": [[20, 20, 20.2, 20, 20.2, 20.2]]},
    {"bbox": [30, 20, 5, 5], "segmentation": {"size": [30, 40], "counts": [1200]}},
    {"bbox": [30, 20, 6, 6], "segmentation": [[30, 20, 36, 20, 33, 20]]},
]


def test_objects_without_a_mask_are_not_trained_on_as_empty_ones(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    target = first_batch(Loader(train=make(*SOME_WITHOUT), workers=0)).target(0)
    assert target.boxes.tolist() == [[10, 5, 20, 15]]
    assert target.masks is not None
    assert int(target.masks.sum()) == 100
    assert (
        "4 of 6 objects have no mask, and the model is trained on masks: not trained on: images/0.bmp: object 2; "
        "images/0.bmp: object 3; images/0.bmp: object 5; and 1 more (data.missing_masks: drop, box or error)"
    ) in caplog.text


def test_boxes_in_place_of_missing_masks(make: Make) -> None:
    target = first_batch(Loader(train=make(*SOME_WITHOUT), workers=0, missing_masks="box")).target(0)
    assert target.masks is not None
    assert target.masks.flatten(1).sum(1).tolist() == [100, 81, 25, 1, 25, 36]
    where = torch.nonzero(target.masks[1])
    assert where.min(0).values.tolist() == [1, 1]
    assert where.max(0).values.tolist() == [9, 9]


def test_missing_masks_can_be_an_error(make: Make) -> None:
    with pytest.raises(
        DataError, match=r"4 of 6 objects have no mask.+`missing_masks` of the loader: drop leaves such"
    ):
        first_batch(Loader(train=make(*SOME_WITHOUT), workers=0, missing_masks="error"))
    with pytest.raises(DataError, match="object 2 has no mask with a pixel in the image"):
        first_batch(Loader(train=make(SOME_WITHOUT[0], SOME_WITHOUT[3]), workers=0, missing_masks="error"))


def test_an_image_whose_objects_have_no_mask_counts_as_empty(make: Make) -> None:
    things = [{**BOX, "segmentation": [SQUARE]}, {**OTHER, "image_id": 1}]
    assert first_batch(Loader(train=make(*things), workers=0, batch_size=2)).indices == [0]
    assert sorted(first_batch(Loader(train=make(*things), workers=0, batch_size=2, missing_masks="box")).indices) == [
        0,
        1,
    ]


def test_data_where_no_object_has_a_mask(make: Make) -> None:
    with pytest.raises(DataError, match="train data: no object has a mask, and the model is trained on masks"):
        first_batch(Loader(train=make(BOX, OTHER), workers=0))
    plain = first_batch_without_masks(Loader(train=make(*SOME_WITHOUT), workers=0))
    assert len(plain.target(0)) == 6


def first_batch_without_masks(loader: Loader) -> Batch:
    kernel = tiny_kernel({"data": loader})
    try:
        return next(iter(loader.build_loader(kernel.state, "train").batches(0)))
    finally:
        loader.after_run()


def test_images_that_are_too_small_are_dropped(make: Make, here: Path, make_image: Callable[..., Path]) -> None:
    make_image(here / "images/1.bmp", 20, 60)
    sizes = {"height": None, "width": None}
    for side, ids in ((20, [0, 1]), (21, [0]), (30, [0])):
        dataset = loaded(make(BOX, {**BOX, "image_id": 1}, images=sizes, min_side=side))
        assert [dataset.annotations(index).image_id for index in range(len(dataset))] == ids
    assert told(dataset, "`min_side`") == ("1 image dropped, a side of less than 30 pixels: images/1.bmp (`min_side`)")


def test_folders_of_voc_form_by_other_names(here: Path, make_image: Callable[..., Path]) -> None:
    make_image(here / "pics/a.bmp")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for folder, name, text in (
        ("xml", "a.xml", f"<a><object><name>cat</name>{box}</object></a>"),
        ("lists", "most.txt", "a\n"),
    ):
        (here / folder).mkdir()
        (here / folder / name).write_text(text)
    dataset = Voc(root=here, split="most", image_folder="pics", annotation_folder="xml", split_folder="lists")
    assert len(loaded(dataset).annotations(0)) == 1


def test_images_without_objects_are_kept_or_dropped_in_every_form(make: Make) -> None:
    for keep, count in ((True, 2), (False, 1)):
        assert len(loaded(make(BOX, keep_empty=keep))) == count
    # an image whose only object cannot be trained on is one without objects; with it goes its truth
    flat = {"bbox": [1, 1, 0, 5], "image_id": 1}
    assert len(loaded(make(BOX, flat, keep_empty=False))) == 1
    assert len(loaded(make(BOX, flat)).truth(1)) == 1


def test_training_on_images_without_objects(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    loader = Loader(train=make(BOX), workers=0, batch_size=2)
    assert first_batch_without_masks(loader).indices == [0]
    assert "1 of 2 images have no object: not trained on (data.skip_empty=false trains on them)" in caplog.text
    loader = Loader(train=make(BOX), workers=0, batch_size=2, skip_empty=False)
    assert sorted(first_batch_without_masks(loader).indices) == [0, 1]
    nothing = Loader(train=make(allow_no_objects=True), workers=0, batch_size=2, skip_empty=False)
    assert sorted(first_batch_without_masks(nothing).indices) == [0, 1]
