"""Data sets of YOLO form: what they read, and what they say of each mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detkernel_data.formats.yolo import Yolo
from detkernel_detection.testing import DatasetContract

Refusal = Callable[[Yolo], str]
GOOD = """\
path: .
train: images/train
val: [images/val]
names: {0: cat, 1: dog}
"""


class Folder:
    """A folder in YOLO form that a test fills; every image is 40 wide and 30 high."""

    def __init__(self, root: Path, make_image: Callable[..., Path]) -> None:
        self.root = root
        self._image = make_image
        self.yaml(GOOD)

    def yaml(self, text: str) -> None:
        (self.root / "data.yaml").write_text(text, encoding="utf-8")

    def add(self, name: str, labels: str | None, suffix: str = "bmp") -> None:
        """An image of a split: `train/a`."""
        self._image(self.root / f"images/{name}.{suffix}")
        if labels is not None:
            self.write(f"labels/{name}.txt", labels)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def folder(here: Path, make_image: Callable[..., Path]) -> Folder:
    made = Folder(here, make_image)
    made.add("train/a", "0 0.5 0.5 0.5 0.2 \n1 0.25 0.5 0.5 1\n")
    made.add("train/b", "")
    made.add("train/c", None)
    made.add("val/a", "1 0.1 0.1 0.1 0.1")
    return made


def yolo(**options: object) -> Yolo:
    return Yolo(**{"data": Path("data.yaml"), "split": "train", **options})  # type: ignore[arg-type]


def loaded(**options: object) -> Yolo:
    dataset = yolo(**options)
    dataset.load()
    return dataset


class TestContract(DatasetContract):
    @pytest.fixture(autouse=True)
    def _files(self, folder: Folder) -> None:
        folder.add("train/e", "0 0.05 0.1 0.1 0.2\n1 0.7 0.7 0.6 0.6\n0 0.33333 0.9 0.66666 0.2\n")
        self.root = folder.root

    def dataset(self) -> Yolo:
        return Yolo(data=self.root, split="train")


def test_reads_boxes_as_fractions(folder: Folder) -> None:
    dataset = loaded()
    assert dataset.classes == ("cat", "dog")
    notes = dataset.annotations(0)
    assert (notes.image_id, notes.width, notes.height) == ("a", 40, 30)
    assert notes.path == "images/train/a.bmp"
    assert notes.boxes.tolist() == [[10, 12, 30, 18], [0, 0, 20, 30]]
    assert notes.labels.tolist() == [0, 1]
    assert notes.area.tolist() == [120, 600]
    assert notes.masks is None
    assert [len(dataset.annotations(index)) for index in range(3)] == [2, 0, 0]
    assert list(dataset.notes) == [
        "1 image without a label file taken as images without objects: images/train/c.bmp "
        "(`unlabelled: drop` leaves them out)",
        "2 images without an object kept: images/train/b.bmp; images/train/c.bmp (`keep_empty: false` drops them)",
    ]


def test_reads_polygons_as_masks(folder: Folder) -> None:
    folder.add("train/a", "0 0.25 0.2 0.75 0.2 0.75 0.6 0.25 0.6\n1 0.25 0.5 0.5 1\n")
    notes = loaded().annotations(0)
    assert notes.boxes.tolist() == [[10, 6, 30, 18], [0, 0, 20, 30]]
    assert notes.masks is not None
    assert np.allclose(notes.masks[0], [[10, 6, 30, 6, 30, 18, 10, 18]])
    assert notes.masks[1] == []
    assert notes.area.tolist() == [240, 600]
    folder.add("train/a", "0 0.25 0.2 0.75 0.2 0.75 0.6\n")
    assert loaded().annotations(0).area.tolist() == [120]


def test_boxes_end_at_the_image(folder: Folder) -> None:
    folder.add("train/a", "0 0.05 0.5 0.1 0.2\n0 0.95 0.35 0.10000001 0.7\n1 0.9 0.5 0.4 0.5\n")
    dataset = loaded()
    boxes = dataset.annotations(0).boxes
    assert (boxes >= 0).all()
    assert (boxes <= [40, 30, 40, 30]).all()
    assert [note for note in dataset.notes if "clipped" in note] == [
        "1 box reaching out of the image clipped: labels/train/a.txt:3 (x 28..44, y 7.5..22.5 in 40x30) "
        "(`bad_boxes: drop` or `error`; evaluation takes them as they are)"
    ]


@pytest.mark.parametrize(
    "names",
    ["names: [cat, dog]", "names:\n- cat\n- dog", "nc: 2\nnames:\n  0: cat\n  1: dog", "names: {1: dog, 0: cat}"],
)
def test_names_in_every_form(folder: Folder, names: str) -> None:
    folder.yaml(f"train: images/train\n{names}\n")
    assert loaded().classes == ("cat", "dog")


def test_finds_images_in_every_form(folder: Folder, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids() -> list[str]:
        dataset = loaded()
        return [str(dataset.annotations(index).image_id) for index in range(len(dataset))]

    folder.write("list.txt", "./images/val/a.bmp\n\nimages/train/b.bmp\n")
    for train in ("list.txt", f"{here}/list.txt"):
        folder.yaml(f"train: {train}\nnames: [cat, dog]\n")
        assert ids() == ["a", "b"]
    folder.yaml("train: ../images/train\nnames: [cat, dog]\n")  # Roboflow's
    assert ids() == ["a", "b", "c"]
    folder.yaml(f"path: {here}/images\ntrain: train\nnames: [cat, dog]\n")
    assert ids() == ["a", "b", "c"]
    folder.yaml("train: [images/train, images/val]\nnames: [cat, dog]\n")
    assert ids() == ["images/train/a.bmp", "images/train/b.bmp", "images/train/c.bmp", "images/val/a.bmp"]


def test_labels_beside_the_images(here: Path, make_image: Callable[..., Path]) -> None:
    make_image(here / "both/a.bmp")
    (here / "both/a.txt").write_text("0 0.5 0.5 0.5 0.2")
    (here / "data.yaml").write_text("train: both\nnames: [cat]\n")
    assert len(loaded().annotations(0)) == 1


# Mistakes: data.yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat\n", "data.yaml:2:1: broken YAML: expected ',' or ']', but got '<stream end>'"),
        ("names: *x\n", "data.yaml:1:8: broken YAML: found undefined alias 'x'"),
        ("names: !!python/object:os.system {}\n", "data.yaml:1:8: broken YAML: could not determine a constructor"),
        ("names: !!bool perhaps\n", "data.yaml: broken YAML: 'perhaps'"),
        ("names: !!timestamp never\n", "data.yaml: broken YAML: "),
        ("a: 2001-99-99\n", "data.yaml: broken YAML: month must be in 1..12"),
        ("a: \x00\n", "data.yaml: broken YAML: unacceptable character"),
        ("a: " + "[" * 2000, "data.yaml: broken YAML: maximum recursion depth exceeded"),
        ("", "data.yaml: expected a map, got null"),
        ("- cat", "data.yaml: expected a map, got a list of 1"),
        ("train: x", "data.yaml: `names`: expected a list of class names, or a map from numbers to names, got null"),
        (
            "names: 80",
            "data.yaml: `names`: expected a list of class names, or a map from numbers to names, got a whole ",
        ),
        ("names: {1: cat, 2: dog}", "data.yaml: `names`: expected the numbers 0 to 1 as keys"),
        ("names: {a: cat}", "data.yaml: `names`: expected the numbers 0 to 0 as keys"),
        (
            "names: [cat, no]",
            "data.yaml: `names.1`: expected text (in quotes where YAML reads something else), got true ",
        ),
        (
            "names: &a [*a]",
            "data.yaml: `names.0`: expected text (in quotes where YAML reads something else), got a list",
        ),
        ("names: [cat, cat]", "data.yaml: `names`: 'cat' is listed twice; classes are matched by name"),
        ("nc: 3\nnames: [cat, dog]", "data.yaml: `nc`: expected 2, as `names` lists, got a whole number 3"),
        (
            "kpt_shape: [17, 3]\nnames: [cat]",
            "data.yaml: `kpt_shape`: labels with keypoints are not read; convert them",
        ),
        ("val: x\nnames: [cat]", "data.yaml: there is no split 'train' (expected one of: val)"),
        ("train: {a: b}\nnames: [cat]", "data.yaml: `train`: expected a folder, a list of folders, or a .txt file of "),
        (
            "train: images/trian\nnames: [cat]",
            "images/trian: there is no such folder of images; images has train/, val/",
        ),
        ('train: "a\\0"\nnames: [cat]', "a\\x00: there is no such folder of images; . has images/, labels/"),
        ("path: 5\ntrain: x\nnames: [cat]", "data.yaml: `path`: expected text, got a whole number 5"),
        ("train: list.txt\nnames: [cat]", "list.txt: there is no such folder of images; . has images/, labels/"),
    ],
)
def test_wrong_yaml(folder: Folder, refusal: Refusal, text: str, message: str) -> None:
    folder.yaml(text)
    told = refusal(yolo())
    assert told.startswith(message)
    assert "\n" not in told


def test_a_data_file_that_is_missing(folder: Folder, refusal: Refusal) -> None:
    assert refusal(yolo(data=Path("date.yaml"))) == (
        "date.yaml: the file of names and splits cannot be read (No such file or directory), did you mean 'data.yaml'?"
    )
    assert refusal(yolo(split="trian")) == "data.yaml: there is no split 'trian', did you mean 'train'?"


def test_an_image_listed_twice(folder: Folder, refusal: Refusal) -> None:
    folder.write("list.txt", "images/val/a.bmp\nimages/val/a.bmp\n")
    folder.yaml("train: list.txt\nnames: [cat, dog]\n")
    assert refusal(yolo()) == "images/val/a.bmp: listed twice in data.yaml"


def test_two_images_with_one_label_file(folder: Folder, refusal: Refusal) -> None:
    folder.add("train/a", None, suffix="png")
    assert refusal(yolo()) == (
        "images/train/a.png and images/train/a.bmp have one label file, labels/train/a.txt; rename one"
    )


def test_a_listed_image_that_is_missing(folder: Folder, refusal: Refusal) -> None:
    folder.write("list.txt", "images/val/a.bmp\nimages/val/b.bmp\n")
    folder.yaml("train: list.txt\nnames: [cat, dog]\n")
    assert refusal(yolo()) == (
        "list.txt:2: the image images/val/b.bmp is missing; there is images/train/b.bmp (another folder)"
    )


def test_folders_without_images_or_labels(folder: Folder, here: Path, refusal: Refusal) -> None:
    (here / "empty").mkdir()
    folder.yaml("train: empty\nnames: [cat]\n")
    assert refusal(yolo()) == "data.yaml: train: there is no image in it"
    folder.yaml(GOOD)
    (here / "labels").rename(here / "label")
    assert refusal(yolo()) == (
        "data.yaml: train: none of 3 images has labels; expected labels/train/a.txt and so on; "
        "there is label/train/a.txt; "
        "training and evaluation need them"
    )


# Mistakes: labels


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0", "expected 'class x y width height', or a class and the points of a polygon; got 1 value"),
        ("0 0.5 0.5 0.5", "expected 'class x y width height', or a class and the points of a polygon; got 4 values"),
        ("0 .5 .5 .5 .5 .9", "expected 'class x y width height', or a class and the points of a polygon; got 6 values"),
        ("0 .5 .5 .5 .5 .9 .9 .9", "expected 'class x y width height', or a class and the points of a polygon; got 8"),
        ("2 .5 .5 .5 .5", "expected a class of 0 to 1 (data.yaml's names), got '2'"),
        ("-1 .5 .5 .5 .5", "expected a class of 0 to 1 (data.yaml's names), got '-1'"),
        ("0.0 .5 .5 .5 .5", "expected a class of 0 to 1 (data.yaml's names), got '0.0'"),
        ("cat .5 .5 .5 .5", "expected a class of 0 to 1 (data.yaml's names), got 'cat'"),
        (f"{'9' * 5000} .5 .5 .5 .5", "expected a class of 0 to 1 (data.yaml's names), got '99999999999999999999'"),
        ("0 .5 .5 .5 2.5", "expected fractions of the image's width and height, 0 to 1; got '2.5'"),
        ("0 .5 .5 .5 .5 1.5 .5", "expected fractions of the image's width and height, 0 to 1; got '1.5'"),
        ("0 200 100 30 20", "expected fractions of the image's width and height, 0 to 1; got '200'"),
        ("0 -1.5 .5 .5 .5", "expected fractions of the image's width and height, 0 to 1; got '-1.5'"),
        ("0 .5 nan .5 .5", "expected fractions of the image's width and height, 0 to 1; got 'nan'"),
        ("0 .5 .5 inf .5", "expected fractions of the image's width and height, 0 to 1; got 'inf'"),
        ("0 .5 .5 x .5", "expected fractions of the image's width and height, 0 to 1; got 'x'"),
        ("0,.5,.5,.5,.5", "expected 'class x y width height', or a class and the points of a polygon; got 1 value"),
    ],
)
def test_wrong_labels(folder: Folder, refusal: Refusal, line: str, message: str) -> None:
    folder.add("train/a", f"0 0.5 0.5 0.5 0.2\n\n{line}  \n")
    told = refusal(yolo())
    assert told.startswith(f"labels/train/a.txt:3: {message}")
    assert "\n" not in told


def test_labels_that_are_no_text(folder: Folder, here: Path, refusal: Refusal) -> None:
    (here / "labels/train/a.txt").write_bytes(b"0 \xff")
    assert refusal(yolo()).startswith("labels/train/a.txt: the labels cannot be read ('utf-8' codec can't decode")


def test_boxes_without_area(folder: Folder, refusal: Refusal) -> None:
    folder.add("train/a", "0 0.5 0.5 0.5 0.2\n0 0.5 0.5 0 0.2\n")
    assert (
        loaded().notes[2].startswith("1 box without area dropped: labels/train/a.txt:2 (x 20..20, y 12..18 in 40x30)")
    )
    assert refusal(yolo(bad_boxes="error")).startswith("labels/train/a.txt:2 (x 20..20, y 12..18 in 40x30): a box ")


def test_classes_by_name(folder: Folder, refusal: Refusal) -> None:
    assert loaded(class_names=["dog", "cat"]).annotations(0).labels.tolist() == [1, 0]
    assert loaded(class_names=["dog"], ignore_classes="others").annotations(0).labels.tolist() == [0]
    assert refusal(yolo(class_names=["dog", "cats"], ignore_classes=["cat"])) == (
        "data.yaml: train: `class_names` names 'cats', which the annotations do not have, did you mean 'cat'?; "
        "they have: cat 1x, dog 1x"
    )
    assert refusal(yolo(class_names=["dog"])).startswith(
        "labels/train/a.txt:1: 1 object of class 'cat', which is not in `class_names`"
    )


def test_nothing_left(folder: Folder, refusal: Refusal) -> None:
    folder.add("train/a", "")
    assert refusal(yolo(keep_empty=False)).splitlines() == [
        "data.yaml: train: no object is left of 0, in 3 images:",
        "  1 image without a label file taken as images without objects: images/train/c.bmp "
        "(`unlabelled: drop` leaves them out)",
        "  no object here of cat, dog",
        "  3 images without an object dropped: images/train/a.bmp; images/train/b.bmp; images/train/c.bmp "
        "(`keep_empty: true` keeps them)",
    ]
    kept = refusal(yolo()).splitlines()[-1]
    assert kept == (
        "  `allow_no_objects: true` takes images without one object, as a part of a `concat` say; the loader trains on "
        "such images with `skip_empty: false`"
    )
    empty = loaded(allow_no_objects=True)
    assert [len(empty.annotations(index)) for index in range(len(empty))] == [0, 0, 0]


def test_fingerprint(folder: Folder, here: Path) -> None:
    first = loaded().fingerprint()
    (here / "moved").mkdir()
    for name in ("data.yaml", "images", "labels"):
        (here / name).rename(here / "moved" / name)
    assert loaded(data=here / "moved").fingerprint() == first
    for name in ("data.yaml", "images", "labels"):
        (here / "moved" / name).rename(here / name)
    folder.add("train/a", "0 0.5 0.5 0.5 0.2\n1 0.25 0.5 0.5 0.9\n")
    assert loaded().fingerprint() != first
    folder.add("train/a", "0 0.5 0.5 0.5 0.2 \n1 0.25 0.5 0.5 1\n")
    (here / "images/train/b.bmp").rename(here / "images/train/d.bmp")
    assert loaded().fingerprint() != first
