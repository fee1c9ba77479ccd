"""Data sets of COCO form: what they read, and what they say of each mistake."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detkernel_data.formats.coco import Coco
from detkernel_data.masks import decode_counts
from detkernel_detection.testing import DatasetContract
from pycocotools import mask as coco_mask

Refusal = Callable[[Coco], str]
Write = Callable[..., Coco]

SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]
RUNS = {"size": [30, 40], "counts": [10 * 30 + 5, 10, 20, 10, 1200 - 345]}
"""Two columns of 10 pixels."""
EMPTY_KEPT = "1 image without an object kept: images/c.bmp (`keep_empty: false` drops them)"
GOOD: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.bmp", "width": 40, "height": 30},
        {"id": 3, "file_name": "more/b.bmp", "width": 40, "height": 30},
        {"id": 5, "file_name": "c.bmp", "width": 40, "height": 30},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"id": 11, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 10},
        {
            "id": 10,
            "image_id": 7,
            "category_id": 18,
            "bbox": [10, 5, 10, 10],
            "area": 99.5,
            "iscrowd": 0,
            "segmentation": [SQUARE, [30, 1, 39, 1, 39, 9]],
        },
        {
            "id": 12,
            "image_id": 3,
            "category_id": 1,
            "bbox": [10, 5, 2, 10],
            "area": 20,
            "iscrowd": 1,
            "segmentation": RUNS,
        },
    ],
}


@pytest.fixture
def write(here: Path, make_image: Callable[..., Path]) -> Write:
    """Write GOOD to a file, changed by a function or replaced by a text, and make a data set of it."""
    for name in ("a", "more/b", "c"):
        make_image(here / f"images/{name}.bmp")

    def make(change: Callable[[Any], object] | str = lambda _: None, **options: Any) -> Coco:
        data = copy.deepcopy(GOOD)
        if not isinstance(change, str):
            change(data)
        text = change if isinstance(change, str) else json.dumps(data)
        (here / "labels.json").write_text(text, encoding="utf-8")
        return Coco(**{"annotation_file": Path("labels.json"), "image_folder": Path("images"), **options})

    return make


@pytest.fixture
def load(write: Write) -> Write:
    """The same, loaded."""

    def make(change: Callable[[Any], object] | str = lambda _: None, **options: Any) -> Coco:
        dataset = write(change, **options)
        dataset.load()
        return dataset

    return make


def person(data: Any, **fields: object) -> Any:
    """Change the fields of one annotation, for `write(lambda data: person(data, bbox=[...]))`."""
    return data["annotations"][2].update(fields)


class TestContract(DatasetContract):
    @pytest.fixture(autouse=True)
    def _files(self, write: Write) -> None:
        self.write = write

    def dataset(self) -> Coco:
        return self.write()


def test_classes_go_by_id_and_ids_may_have_gaps(load: Write) -> None:
    dataset = load()
    assert dataset.classes == ("person", "dog", "toothbrush")
    assert dataset.category_ids == {"person": 1, "dog": 18, "toothbrush": 90}
    assert [dataset.annotations(index).image_id for index in range(3)] == [7, 3, 5]
    notes = dataset.annotations(1)
    assert notes.path == "images/more/b.bmp"
    assert notes.labels.tolist() == [2, 0]
    assert notes.boxes.tolist() == [[1, 2, 4, 6], [10, 5, 12, 15]]
    assert notes.area.tolist() == [10, 20]
    assert notes.ids is not None
    assert notes.ids.tolist() == [11, 12]
    assert notes.crowd.tolist() == [False, True]
    assert list(dataset.notes) == [EMPTY_KEPT]


def test_classes_follow_the_given_order(load: Write) -> None:
    dataset = load(class_names=["toothbrush", "person"], ignore_classes=["dog"], keep_empty=False)
    assert len(dataset) == 1
    assert dataset.annotations(0).labels.tolist() == [0, 1]
    assert dataset.notes[0] == "1 object left out by `ignore_classes`: dog 1x"


def test_masks_are_polygons_or_run_lengths(load: Write) -> None:
    dataset = load()
    masks = dataset.annotations(0).masks
    assert masks is not None
    assert masks[0] == [SQUARE, [30, 1, 39, 1, 39, 9]]
    masks = dataset.annotations(1).masks
    assert masks is not None
    assert list(masks) == [[], RUNS]
    assert masks[-1:] == [RUNS]
    assert load(masks=False).annotations(0).masks is None


def test_run_lengths_in_text_form(load: Write) -> None:
    pixels = np.zeros((30, 40), dtype=np.uint8, order="F")
    pixels[5:15, 10:12] = 1
    counts = coco_mask.encode(pixels)["counts"].decode()
    dataset = load(lambda data: person(data, segmentation={"size": [30, 40], "counts": counts, "note": [None]}))
    masks = dataset.annotations(1).masks
    assert masks is not None
    assert masks[1] == {"size": [30, 40], "counts": counts}
    assert decode_counts(counts) == RUNS["counts"]


def test_text_form_of_run_lengths_as_pycocotools_writes_it() -> None:
    draw = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.3, 1.0):
        pixels = np.asfortranarray(draw.random((200, 300)) < share, dtype=np.uint8)
        runs = decode_counts(coco_mask.encode(pixels)["counts"].decode())
        assert runs is not None
        assert np.array_equal(np.arange(len(runs)).repeat(runs) % 2, pixels.ravel(order="F"))


def test_area_that_is_not_stated_is_the_masks_else_the_boxs(load: Write) -> None:
    def forget(data: Any) -> None:
        for annotation in data["annotations"]:
            del annotation["area"]

    dataset = load(forget)
    assert dataset.annotations(0).area.tolist() == [100 + 36]
    assert dataset.annotations(1).area.tolist() == [12, 20]
    assert load(forget, masks=False).annotations(0).area.tolist() == [100]


def test_keypoints(load: Write) -> None:
    def add(data: Any) -> None:
        data["categories"][1]["keypoints"] = ["nose", "tail"]
        person(data, keypoints=[1, 2, 2, 3.5, 4, 1])

    dataset = load(add)
    assert dataset.keypoint_names == ("nose", "tail")
    points = dataset.annotations(1).keypoints
    assert points is not None
    assert points.tolist() == [[[0, 0, 0], [0, 0, 0]], [[1, 2, 2], [3.5, 4, 1]]]


def test_ids_may_be_text(load: Write) -> None:
    def rename(data: Any) -> None:
        data["images"][0]["id"] = data["annotations"][1]["image_id"] = "sieben\ud800"

    dataset = load(rename)
    assert [dataset.annotations(index).image_id for index in range(3)] == ["sieben\ud800", "3", "5"]


def test_takes_the_size_of_the_image_where_none_is_stated(load: Write) -> None:
    dataset = load(lambda data: [data["images"][1].pop(side) for side in ("width", "height")])
    assert dataset.annotations(1).width == 40
    assert dataset.notes[0] == "1 image of no stated size, taken from the file: labels.json: image 3"


# Mistakes: the file


def test_a_file_or_folder_that_is_missing(write: Write, here: Path, refusal: Refusal) -> None:
    assert refusal(write(annotation_file=Path("annotations/train.json"))) == (
        "annotations/train.json: there is no such file; . has images, labels.json"
    )
    assert refusal(write(annotation_file=here / "images")) == (
        "images: the annotations cannot be read (Is a directory)"
    )
    assert refusal(write(image_folder=Path("train"))) == ("train: there is no such folder of images; . has images/")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1:1: broken JSON: Expecting value"),
        ('{"images": [\n  1 2]', ":2:5: broken JSON: Expecting ',' delimiter"),
        ("[" * 100_000, ": broken JSON: nested too deeply for annotations"),
        ('{"a":' * 100_000, ": broken JSON: nested too deeply for annotations"),
        ("1" * 5000, ": broken JSON: Exceeds the limit"),
        ("[]", ": expected a map, got a list of 0"),
        ("NaN", ": expected a map, got a number nan"),
        ("{}", ": `categories` is missing"),
        ('{"categories": {}}', ": `categories`: expected a list, got a map of 0"),
        ('{"categories": [], "images": null}', ": `images` is missing"),
        ('{"categories": [], "images": [], "annotations": []}', ": there is no image in it"),
    ],
)
def test_broken_files(write: Write, refusal: Refusal, text: str, message: str) -> None:
    told = refusal(write(text))
    assert told.startswith(f"labels.json{message}")
    assert "\n" not in told


def test_a_file_that_no_memory_holds_is_not_read(write: Write, here: Path, refusal: Refusal) -> None:
    dataset = write()
    with (here / "labels.json").open("wb") as file:
        file.truncate(2**40)  # takes no room
    assert refusal(dataset) == "labels.json: the annotations cannot be read (it has more than 17,179,869,184 bytes)"


def test_a_file_that_is_no_text(write: Write, here: Path, refusal: Refusal) -> None:
    dataset = write()
    (here / "labels.json").write_bytes(b'{"images": "\xff"}')
    assert refusal(dataset).startswith("labels.json: broken JSON: 'utf-8' codec can't decode byte 0xff")


# Mistakes: categories and images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data["categories"].append({"id": 18, "name": "cat"}),
            "category id 18 is given to 'dog' and to 'cat'",
        ),
        (
            lambda data: data["categories"].append({"id": 19, "name": "dog"}),
            "two categories are called 'dog'; classes are matched by name, so rename one",
        ),
        (lambda data: data["categories"].append(3), "categories[3]: expected a map, got a whole number 3"),
        (
            lambda data: data["categories"].append({"id": True, "name": "x"}),
            "categories[3]: `id`: expected a whole number, got true or false True",
        ),
        (lambda data: data["categories"].append({"id": 4}), "categories[3]: `name` is missing"),
        (
            lambda data: [data["categories"][i].update(keypoints=[str(i)]) for i in (0, 1)],
            "'toothbrush', 'person' have different keypoints; expected one set of them in a data set",
        ),
        (
            lambda data: data["images"][2].update(id=7),
            "image 7: two images have this id; expected each once",
        ),
        (
            lambda data: data["images"][2].update(id="7"),
            "image 7: two images have this id; expected each once",
        ),
        (
            lambda data: data["images"][1].update(file_name="a.bmp"),
            "image 3: 'a.bmp' is image 7 already; merge the two",
        ),
        (
            lambda data: data["images"][1].update(file_name="more/d.bmp"),
            "image 3: the image images/more/d.bmp is missing; `bad_images: drop` leaves out such images",
        ),
        (
            lambda data: data["images"][1].update(file_name=7),
            "images[1]: `file_name`: expected text, got a whole number 7",
        ),
        (
            lambda data: data["images"][1].update(height=0),
            "image 3: `height`: expected a whole number of at least 1, got ",
        ),
        (lambda data: data["images"][1].pop("height"), "image 3: `height` is missing"),
        (lambda data: data["images"][1].pop("id"), "images[1]: `id` is missing"),
        (
            lambda data: data["images"][1].update(width=30, height=40),
            "image 3: states a size of 30x40, but images/more/b.bmp is 40x30; "
            "width and height are swapped; correct the annotation",
        ),
    ],
)
def test_wrong_categories_and_images(
    write: Write, refusal: Refusal, change: Callable[[Any], object], message: str
) -> None:
    told = refusal(write(change))
    assert told.startswith("labels.json: " + message)
    assert "\n" not in told


def test_a_file_name_that_no_system_allows(write: Write, refusal: Refusal) -> None:
    assert "is missing" in refusal(write(lambda data: data["images"][1].update(file_name="a\0/b.bmp")))


def test_sizes_that_are_not_checked_may_be_anything(load: Write) -> None:
    dataset = load(lambda data: data["images"][0].update(width=2**40), check_images=False, masks=False)
    assert dataset.annotations(0).width == 2**40
    with pytest.raises(Exception, match=r"a.bmp: the image is 40x30, its annotations state 1099511627776x30"):
        dataset.image(0)


# Mistakes: annotations


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 10}, "annotation 10: two annotations have this id; expected each once"),
        ({"id": None}, "annotations[2]: `id` is missing"),
        ({"id": 2**60}, "annotation 1152921504606846976: `id`: expected a whole number of at most 9007199254740992"),
        ({"image_id": 4}, "annotation 12: `image_id`: there is no image 4 in the file"),
        ({"image_id": "3"}, "annotation 12: `image_id`: there is no image '3' in the file"),
        ({"category_id": 2}, "annotation 12: `category_id`: there is no category 2 (there are 1, 18, 90)"),
        ({"category_id": [1]}, "annotation 12: `category_id`: expected a whole number, got a list of 1"),
        ({"bbox": None, "segmentation": None}, "annotation 12: `bbox` is missing"),
        ({"bbox": None, "segmentation": {"size": [1]}}, "annotation 12: `bbox` is missing, and its segmentation gives"),
        ({"ignore": 2}, "annotation 12: `ignore`: expected 0 or 1, got a whole number 2"),
        ({"bbox": [1, 2, 3]}, "annotation 12: `bbox`: expected 4 numbers, got a list of 3"),
        ({"bbox": [1, 2, "3", 4]}, "annotation 12: `bbox[2]`: expected a finite number, got text '3'"),
        ({"bbox": [1, 2, float("nan"), 4]}, "annotation 12: `bbox[2]`: expected a finite number, got a number nan"),
        ({"bbox": [1, float("-inf"), 3, 4]}, "annotation 12: `bbox[1]`: expected a finite number, got a number -inf"),
        ({"bbox": [1, 2, 1e200, 4]}, "annotation 12: `bbox[2]`: expected a finite number, got a number 1e+200"),
        (
            {"bbox": [1, 2, 10**400, 4]},
            "annotation 12: `bbox[2]`: expected a finite number, got a whole number 1000",
        ),
        ({"bbox": {"x": 1}}, "annotation 12: `bbox`: expected 4 numbers, got a map of 1"),
        ({"area": -1}, "annotation 12: `area`: expected a number of at least 0, got a whole number -1"),
        ({"area": float("nan")}, "annotation 12: `area`: expected a number of at least 0, got a number nan"),
        ({"iscrowd": 2}, "annotation 12: `iscrowd`: expected 0 or 1, got a whole number 2"),
        ({"iscrowd": []}, "annotation 12: `iscrowd`: expected 0 or 1, got a list of 0"),
    ],
)
def test_wrong_annotations(write: Write, refusal: Refusal, fields: dict[str, object], message: str) -> None:
    told = refusal(write(lambda data: person(data, **fields)))
    assert told.startswith("labels.json: " + message)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([1, 2, 2, 1, 2, 2], "`keypoints`: expected 3 numbers, got a list of 6"),
        ([1, 2, 3], "`keypoints`: expected a visibility of 0, 1 or 2 in every third place"),
        ([1, None, 2], "`keypoints[1]`: expected a finite number, got null"),
    ],
)
def test_wrong_keypoints(write: Write, refusal: Refusal, points: list[Any], message: str) -> None:
    def add(data: Any) -> None:
        data["categories"][1]["keypoints"] = ["nose"]
        person(data, keypoints=points)

    assert refusal(write(add)) == f"labels.json: annotation 12: {message}"


def test_keypoints_of_a_category_without_any(write: Write, refusal: Refusal) -> None:
    def add(data: Any) -> None:
        data["categories"][0]["keypoints"] = ["nose"]
        person(data, keypoints=[1, 2, 2])

    assert refusal(write(add)) == ("labels.json: annotation 12: `keypoints`: its category 'person' names no keypoints")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("RLE", "expected polygons or run lengths, got str"),
        ([1, 2, 3, 4, 5, 6], "polygon 1: expected a list of numbers x, y, ..."),
        ([SQUARE, ["1"] * 6], "polygon 1: expected a list of numbers x, y, ..."),
        ([SQUARE, [1, 2, 3, 4]], "polygon 2: expected x, y of at least 3 points, got 4 numbers"),
        ([SQUARE[:-1]], "polygon 1: expected x, y of at least 3 points, got 7 numbers"),
        ([[float("nan"), *SQUARE[1:]]], "polygon 1: a coordinate that is not a finite number"),
        ([[1e9, *SQUARE[1:]]], "polygon 1: a coordinate of 1e+09, far outside an image of 40x30"),
        ([[10**400, *SQUARE[1:]]], "polygon 1: expected a list of numbers x, y, ..."),
        ({"size": [40, 30], "counts": [1200]}, "run lengths: a size of [40, 30], but the image's is [30, 40]"),
        ({"size": [30], "counts": [1200]}, "run lengths: expected a size of [height, width], got [30]"),
        ({"counts": [1200]}, "run lengths: expected a size of [height, width], got None"),
        ({"size": [30, 40], "counts": [1199]}, "run lengths: 1199 pixels in all, but the image has 1200"),
        ({"size": [30, 40], "counts": [1201, -1]}, "run lengths: expected `counts` of whole numbers, or COCO's text "),
        ({"size": [30, 40], "counts": [600.0] * 2}, "run lengths: expected `counts` of whole numbers, or COCO's text "),
        ({"size": [30, 40], "counts": "\u00e9\u00e9"}, "run lengths: expected `counts` of whole numbers, or COCO's"),
        ({"size": [30, 40], "counts": "oooooooo"}, "run lengths: expected `counts` of whole numbers, or COCO's text "),
        ({"size": [30, 40], "counts": ""}, "run lengths: 0 pixels in all, but the image has 1200"),
        ({"size": [30, 40]}, "run lengths: expected `counts` of whole numbers, or COCO's text form of them"),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_wrong_masks(write: Write, refusal: Refusal, mask: object, message: str, stated: bool) -> None:
    def change(data: Any) -> None:
        person(data, segmentation=mask)
        if not stated:
            data["images"][1].update(width=None, height=None)

    told = refusal(write(change))
    assert told.startswith(f"labels.json: annotation 12 'person' of b.bmp: its segmentation: {message}")
    assert told.endswith("; where only boxes are trained, `masks: false` reads none")
    assert "\n" not in told
    write(change, masks=False).load()


def test_boxes_that_cannot_be_used(load: Write, write: Write, refusal: Refusal) -> None:
    def spoil(data: Any) -> None:
        del data["annotations"][0]["area"]
        data["annotations"][0]["bbox"] = [1, 2, -3, 4]
        data["annotations"][1]["bbox"] = [10, 5, 30.005, 10]

    dataset = load(spoil)
    assert dataset.annotations(0).boxes.tolist() == [[10, 5, 40, 15]]
    assert list(dataset.notes) == [
        "1 box without area dropped: labels.json: annotation 11 'toothbrush' of b.bmp (x 1..-2, y 2..6 in 40x30) "
        "(`bad_boxes: error` refuses them; evaluation takes them as they are)",
        EMPTY_KEPT,
    ]
    assert refusal(write(spoil, bad_boxes="error")) == (
        "labels.json: annotation 11 'toothbrush' of b.bmp (x 1..-2, y 2..6 in 40x30): a box without area; "
        "fix the file, or set `bad_boxes` to clip or drop"
    )


def test_a_box_too_thin_for_single_precision(load: Write) -> None:
    dataset = load(lambda data: person(data, bbox=[20, 5, 1e-7, 9]))
    assert "without area dropped" in dataset.notes[0]
    dataset = load(lambda data: person(data, bbox=[39.9999999, 5, 9, 9]))
    assert "outside the image dropped" in dataset.notes[0]


def test_classes_that_do_not_fit(write: Write, refusal: Refusal) -> None:
    assert refusal(write(class_names=["persons", "dog", "toothbrush"], ignore_classes=["person"])) == (
        "labels.json: `class_names` names 'persons', which the annotations do not have, did you mean 'person'?; "
        "they have: dog 1x, person 1x, toothbrush 1x"
    )
    told = refusal(write(class_names=["person"])).splitlines()
    assert told[0] == "labels.json: 2 problems"
    assert told[1] == (
        "  labels.json: annotation 10 'dog' of a.bmp: 1 object of class 'dog', which is not in `class_names` "
        "(expected one of: person); add it there, or to `ignore_classes` to leave it out"
    )


def test_a_category_without_an_object_is_noted(load: Write) -> None:
    dataset = load(lambda data: data["categories"].append({"id": 2, "name": "cat"}))
    assert dataset.classes == ("person", "cat", "dog", "toothbrush")
    assert dataset.notes[0] == "no object here of cat"
    more = [{"id": number, "name": str(number)} for number in range(30, 36)]
    assert load(lambda data: data["categories"].extend(more)).notes[0] == "no object here of 30, 31, 32 and 3 more"


def test_fingerprint(load: Write, here: Path) -> None:
    first = load().fingerprint()
    assert load().fingerprint() == first
    (here / "images").rename(here / "moved")
    assert load(image_folder=Path("moved")).fingerprint() == first
    (here / "moved").rename(here / "images")
    changes: list[Callable[[Any], object]] = [
        lambda data: person(data, bbox=[10, 5, 2, 11]),
        lambda data: person(data, iscrowd=0),
        lambda data: person(data, area=21),
        lambda data: person(data, category_id=18),
        lambda data: person(data, segmentation=[SQUARE]),
        lambda data: data["annotations"][1]["segmentation"][0].__setitem__(0, 11),
        lambda data: data["images"].reverse(),
        lambda data: data["images"].pop(),
    ]
    found = [load(change).fingerprint() for change in changes]
    (here / "images/c.bmp").rename(here / "images/d.bmp")
    found.append(load(lambda data: data["images"][2].update(file_name="d.bmp")).fingerprint())
    assert len({first, *found}) == 1 + len(changes) + 1


def test_annotations_are_held_in_a_few_arrays(load: Write) -> None:
    """A worker process that walks over objects in Python copies them all: their number must not grow with the data."""

    def objects(copies: int) -> int:
        def multiply(data: Any) -> None:
            square = data["annotations"][1]
            data["annotations"] = [{**square, "id": number} for number in range(copies)]

        dataset = load(multiply)
        assert len(dataset.annotations(0)) == copies
        gc.collect()
        return len(gc.get_objects())

    objects(1)
    assert objects(3000) - objects(1000) < 100
