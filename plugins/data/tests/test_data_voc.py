"""Data sets of Pascal VOC form: what they read, and what they say of each mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detkernel import DataError
from detkernel_data.formats.voc import VOC_CLASSES, Voc
from detkernel_detection.testing import DatasetContract
from PIL import Image

Refusal = Callable[[Voc], str]
OBJECT = """\
  <object>
    <name>{name}</name>
    <bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>{more}
  </object>
"""


def thing(name: str, *box: object, more: str = "") -> str:
    return OBJECT.format(*box, name=name, more=more)


CAT, DOG = thing("cat", 1, 1, 21, 11), thing("dog", 11, 6, 41, 31)


class Folder:
    """A folder in VOC form that a test fills; every image is 40 wide and 30 high."""

    suffix = "jpg"

    def __init__(self, root: Path, make_image: Callable[..., Path]) -> None:
        self.root = root
        self._image = make_image
        for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / name).mkdir(parents=True)

    def add(self, name: str, *objects: str, size: str = "<width>40</width><height>30</height>") -> None:
        self._image(self.root / f"JPEGImages/{name}.{self.suffix}")
        self.xml(name, f"<annotation>\n  <size>{size}</size>\n{''.join(objects)}</annotation>\n")

    def xml(self, name: str, text: str) -> None:
        (self.root / f"Annotations/{name}.xml").write_text(text, encoding="utf-8")

    def list(self, name: str, text: str) -> None:
        (self.root / f"ImageSets/Main/{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(here: Path, make_image: Callable[..., Path]) -> Folder:
    """Two images: a cat in one, a cat and a dog in the other; a third, a bird, is in no list."""
    made = Folder(here / "VOC", make_image)
    made.add("a", CAT)
    made.add("b", CAT, DOG)
    made.add("c", thing("bird", 1, 1, 9, 9))
    made.list("train", "a\nb\n")
    return made


def voc(**options: object) -> Voc:
    return Voc(**{"root": Path("VOC"), "split": "train", **options})  # type: ignore[arg-type]


def loaded(**options: object) -> Voc:
    dataset = voc(**options)
    dataset.load()
    return dataset


class TestContract(DatasetContract):
    @pytest.fixture(autouse=True)
    def _files(self, here: Path, make_image: Callable[..., Path]) -> None:
        made = Folder(here, make_image)
        made.suffix = "bmp"  # a fresh process imports torchvision for others, which takes seconds
        made.add("a", CAT)
        made.add("b", CAT, DOG, thing("dog", 0, 0, 99, 99))
        self.root = here

    def dataset(self) -> Voc:
        return Voc(root=self.root, split=None)


def test_reads_boxes_from_origin_one(folder: Folder) -> None:
    dataset = loaded()
    assert dataset.classes == ("bird", "cat", "dog")
    notes = dataset.annotations(1)
    assert (notes.image_id, notes.width, notes.height) == ("b", 40, 30)
    assert notes.boxes.tolist() == [[0, 0, 20, 10], [10, 5, 40, 30]]
    assert notes.labels.tolist() == [1, 2]
    assert notes.area.tolist() == [200, 750]
    assert notes.masks is None
    assert notes.path == "VOC/JPEGImages/b.jpg"
    assert loaded(origin=0, bad_boxes="drop").annotations(0).boxes.tolist() == [[1, 1, 21, 11]]


def test_keeps_fractions_of_pixels(folder: Folder) -> None:
    folder.add("a", thing("cat", 1.5, "2.25", "1e1", 11))
    assert loaded().annotations(0).boxes.tolist() == [[0.5, 1.25, 9, 10]]


def test_flags_what_is_difficult(folder: Folder) -> None:
    folder.add("a", thing("cat", 1, 1, 9, 9, more="<difficult>1</difficult>"), CAT)
    assert loaded().annotations(0).difficult.tolist() == [True, False]


def test_parts_of_an_object_are_not_objects(folder: Folder) -> None:
    part = "<part><name>head</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></part>"
    folder.add("a", thing("cat", 1, 1, 9, 9, more=part))
    dataset = loaded()
    assert len(dataset.annotations(0)) == 1
    assert "head" not in dataset.classes


def test_joins_lists(folder: Folder) -> None:
    folder.list("val", "\ufeffc\r\n\n")
    assert [loaded(split=["train", "val"]).annotations(i).image_id for i in range(3)] == ["a", "b", "c"]
    assert len(loaded(split=None)) == 3


def test_takes_the_size_of_the_image_where_none_is_stated(folder: Folder) -> None:
    folder.add("a", CAT, size="<width>0</width><height>0</height>")
    dataset = loaded()
    assert dataset.annotations(0).width == 40
    assert list(dataset.notes) == [
        "no object here of bird",
        "1 image of no stated size, taken from the file: VOC/Annotations/a.xml",
    ]


def test_the_standard_classes_may_be_absent(folder: Folder) -> None:
    dataset = loaded(class_names="voc")
    assert dataset.classes == tuple(VOC_CLASSES)
    assert dataset.annotations(0).labels.tolist() == [VOC_CLASSES.index("cat")]


def test_classes_follow_the_given_order(folder: Folder) -> None:
    dataset = loaded(class_names=["dog", "cat"])
    assert dataset.annotations(1).labels.tolist() == [1, 0]
    dataset = loaded(class_names=["dog"], ignore_classes="others", keep_empty=False)
    assert len(dataset) == 1
    assert list(dataset.notes) == [
        "2 objects left out by `ignore_classes`: cat 2x",
        "1 image without an object dropped: VOC/JPEGImages/a.jpg (`keep_empty: true` keeps them)",
    ]


# Mistakes: folders and lists


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"annotation_folder": "annotations"},
            "VOC/annotations: there is no such folder of annotations; VOC has Annotations/, ImageSets/, JPEGImages/",
        ),
        (
            {"image_folder": "images/train"},
            "VOC/images/train: there is no such folder of images; VOC has Annotations/, ImageSets/, JPEGImages/",
        ),
        (
            {"split_folder": "ImageSets/Layout"},
            "VOC/ImageSets/Layout: there is no such folder of split lists; VOC/ImageSets has Main/; `split: null` "
            "takes every annotation file",
        ),
        ({"root": Path("VOC/ImageSets/Main"), "annotation_folder": "Annotations"}, "VOC/ImageSets/Main has no folders"),
        (
            {"split": "trian"},
            "VOC/ImageSets/Main/trian.txt: there is no such list, did you mean 'train'?; "
            "VOC/ImageSets/Main has train; `split: null` takes every annotation file",
        ),
    ],
)
def test_names_what_is_there_instead(
    folder: Folder, refusal: Refusal, options: dict[str, object], message: str
) -> None:
    assert refusal(voc(**options)).endswith(message)


def test_a_listed_name_without_files(folder: Folder, refusal: Refusal) -> None:
    folder.list("train", "a\nb\nab\n")
    assert refusal(voc()) == (
        "VOC/ImageSets/Main/train.txt:3: the annotation file of 'ab', VOC/Annotations/ab.xml, is missing"
    )
    folder.list("train", "a.jpg")
    assert refusal(voc()).endswith("VOC/Annotations/a.jpg.xml, is missing, did you mean 'a'?")
    folder.list("train", "a\nb\n")
    (folder.root / "JPEGImages/b.jpg").unlink()
    assert refusal(voc()) == (
        "VOC/ImageSets/Main/train.txt:2: the image of 'b', VOC/JPEGImages/b, is missing; "
        "`orphan_labels: drop` leaves such annotation files out"
    )


def test_a_name_listed_twice(folder: Folder, refusal: Refusal) -> None:
    folder.list("train", "a\nb\n")
    folder.list("val", "b\n")
    assert refusal(voc(split=["train", "val"])) == (
        "VOC/ImageSets/Main/val.txt:1: 'b' is listed already, in VOC/ImageSets/Main/train.txt:2; each image counts once"
    )


def test_two_images_of_one_stem(folder: Folder, make_image: Callable[..., Path], refusal: Refusal) -> None:
    make_image(folder.root / "JPEGImages/a.png")
    assert refusal(voc()) == "VOC/JPEGImages: several images are called 'a': a.jpg, a.png; keep one of them"


def test_a_list_that_is_no_text(folder: Folder, refusal: Refusal) -> None:
    (folder.root / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe\x00")
    assert "train.txt: expected a list of names in UTF-8" in refusal(voc())


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_list(folder: Folder, refusal: Refusal, text: str) -> None:
    folder.list("train", text)
    assert refusal(voc()) == "VOC/ImageSets/Main/train.txt: there is no image in it"


def test_tells_many_problems_at_once(folder: Folder, refusal: Refusal) -> None:
    folder.list("train", "\n".join(f"x{i}" for i in range(12)))
    first, *lines = refusal(voc()).splitlines()
    assert first == "VOC/ImageSets/Main/train.txt: 12 problems"
    assert len(lines) == 11
    assert lines[-1] == "  and 2 more"


# Mistakes: XML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1:1: broken XML: no element found"),
        ("<annotation>\n <object>", ":2:10: broken XML: no element found"),
        ("<annotation>\n</object>", ":2:3: broken XML: mismatched tag"),
        ("no XML", ":1:1: broken XML: syntax error"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', ": broken XML: unknown encoding: klingon"),
        ("<annotation><size><width>x</width></size></annotation>", ": <size>: expected width and height in pixels, "),
        ("<annotation><size><width>40</width><height>0</height></size></annotation>", ", got '40' and '0'; "),
        (f"<annotation>\n{thing('', 1, 1, 2, 2)}</annotation>", ":2: object 1: <name> is missing; expected the class "),
        (f"<annotation>\n{CAT}{thing('dog', 1, 'nan', 2, 2)}</annotation>", ":6: object 2 'dog': <ymin>: expected a "),
        (f"<annotation>\n{thing('dog', 1, 1, 'inf', 2)}</annotation>", "number of pixels, got 'inf'"),
        (f"<annotation>\n{thing('dog', 1, 1, '1e300', 2)}</annotation>", "number of pixels, got '1e300'"),
        (f"<annotation>\n{thing('dog', 1, '', 1, 2)}</annotation>", "<ymin>: expected a number of pixels, got ''"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            ":1: object 1 'cat': <bndbox> has no <xmin>; expected xmin, ymin, xmax and ymax in pixels",
        ),
        (
            f"<annotation>\n{thing('dog', 1, 1, 2, 2, more='<difficult>yes</difficult>')}</annotation>",
            ":2: object 1 'dog': <difficult>: expected 0 or 1, got 'yes'",
        ),
        (
            f"<annotation>\n{thing('dog', 1, 1, 2, 2, more='<name>cat</name>')}</annotation>",
            ":4: <name> is given twice; expected one",
        ),
    ],
)
def test_broken_annotations(folder: Folder, refusal: Refusal, text: str, message: str) -> None:
    folder.xml("a", text)
    told = refusal(voc())
    assert told.startswith("VOC/Annotations/a.xml:")
    assert message in told


@pytest.mark.parametrize(
    "declaration",
    [
        '<!ENTITY a "cat">',
        '<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;">',
        '<!ENTITY a SYSTEM "file:///etc/passwd">',
        '<!ENTITY % a SYSTEM "http://localhost/a.dtd"> %a;',
    ],
)
def test_refuses_entities(folder: Folder, refusal: Refusal, declaration: str) -> None:
    folder.xml("a", f"<!DOCTYPE x [\n{declaration}\n]>\n<annotation>{thing('&a;', 1, 1, 2, 2)}</annotation>")
    assert refusal(voc()) == ("VOC/Annotations/a.xml:2: XML entities are not allowed here; remove the declaration")


# Mistakes: classes


def test_a_class_that_is_not_listed(folder: Folder, refusal: Refusal) -> None:
    assert refusal(voc(class_names=["cats", "dog"], ignore_classes=["cat"])).splitlines()[0] == (
        "VOC/ImageSets/Main/train.txt: `class_names` names 'cats', which the annotations do not have, "
        "did you mean 'cat'?; they have: cat 2x, dog 1x"
    )
    folder.add("a", thing("dogs", 1, 1, 9, 9), thing("dogs", 1, 1, 7, 7))
    assert refusal(voc(class_names=["cat", "dog"])) == (
        "VOC/Annotations/a.xml:3: object 1 'dogs': 2 objects of class 'dogs', which is not in `class_names`, "
        "did you mean 'dog'?; add it there, or to `ignore_classes` to leave it out"
    )


def test_a_class_that_no_annotation_has(folder: Folder, refusal: Refusal) -> None:
    assert refusal(voc(class_names=["cat", "dog", "wolf"])) == (
        "VOC/ImageSets/Main/train.txt: `class_names` names 'wolf', which the annotations do not have; "
        "they have: cat 2x, dog 1x"
    )
    dataset = loaded(class_names=["cat", "dog", "bird"])  # another split of the folder has it
    assert list(dataset.notes) == ["no object here of bird"]
    assert "`ignore_classes` names 'wolf'" in refusal(voc(ignore_classes=["wolf"]))


def test_names_that_contradict() -> None:
    with pytest.raises(ValueError, match="class_names: 'cat' is listed twice"):
        voc(class_names=["cat", "cat"])
    with pytest.raises(ValueError, match="ignore_classes: 'cat' is listed in `class_names` too"):
        voc(class_names=["cat"], ignore_classes=["cat"])
    with pytest.raises(ValueError, match="'others' needs `class_names`"):
        voc(ignore_classes="others")
    with pytest.raises(ValueError, match="expected at least one class"):
        voc(class_names=[])


# Mistakes: boxes, sizes, images


def test_boxes_without_area_are_dropped_and_listed(folder: Folder, refusal: Refusal) -> None:
    folder.add("a", CAT, thing("cat", 5, 5, 5, 9), thing("cat", 9, 5, 8, 9))
    dataset = loaded()
    assert dataset.annotations(0).boxes.tolist() == [[0, 0, 20, 10]]
    assert list(dataset.notes)[-1] == (
        "2 boxes without area dropped: VOC/Annotations/a.xml:7: object 2 'cat' (x 4..4, y 4..8 in 40x30); "
        "VOC/Annotations/a.xml:11: object 3 'cat' (x 8..7, y 4..8 in 40x30)"
        " (`bad_boxes: error` refuses them; evaluation takes them as they are)"
    )
    first, *lines = refusal(voc(bad_boxes="error")).splitlines()
    assert first == "VOC/ImageSets/Main/train.txt: 2 problems"
    assert lines[0] == (
        "  VOC/Annotations/a.xml:7: object 2 'cat' (x 4..4, y 4..8 in 40x30): a box without area; "
        "fix the file, or set `bad_boxes` to clip or drop"
    )


def test_boxes_outside_their_image(folder: Folder, refusal: Refusal) -> None:
    folder.add("a", CAT, thing("cat", 41, 5, 60, 9), thing("cat", 30, 5, 60, 9), thing("cat", 0, 5, 9, 31))
    dataset = loaded()
    assert dataset.annotations(0).boxes.tolist() == [[0, 0, 20, 10], [29, 4, 40, 8], [0, 4, 8, 30]]
    assert [note.partition(":")[0] for note in dataset.notes] == [
        "no object here of bird",
        "1 box outside the image dropped",
        "1 box reaching out of the image clipped",
        "1 box reaching out of the image by a pixel or less clipped",
    ]
    dropping = loaded(bad_boxes="drop")
    assert dropping.annotations(0).boxes.tolist() == [[0, 0, 20, 10], [0, 4, 8, 30]]
    assert "VOC/ImageSets/Main/train.txt" not in refusal(voc(bad_boxes="error"))
    assert "(x 29..59, y 4..8 in 40x30)" in dropping.notes[2]


def test_boxes_of_ignored_classes_are_not_looked_at(folder: Folder) -> None:
    folder.add("a", CAT, thing("blob", 5, 5, 5, 9))
    assert len(loaded(ignore_classes=["blob"], bad_boxes="error").annotations(0)) == 1


def test_a_size_that_is_not_the_images(folder: Folder, make_image: Callable[..., Path], refusal: Refusal) -> None:
    folder.add("a", CAT, size="<width>30</width><height>40</height>")
    assert refusal(voc()) == (
        "VOC/Annotations/a.xml: states a size of 30x40, but VOC/JPEGImages/a.jpg is 40x30; "
        "width and height are swapped; correct the annotation"
    )
    dataset = loaded(check_images=False)
    with pytest.raises(Exception, match=r"VOC/JPEGImages/a.jpg: the image is 40x30, its annotations state 30x40; "):
        dataset.image(0)


def test_nothing_left_says_why(folder: Folder, refusal: Refusal) -> None:
    options = {"class_names": ["bird"], "ignore_classes": "others", "keep_empty": False, "min_side": 31}
    assert refusal(voc(**options)).splitlines() == [
        "VOC/ImageSets/Main/train.txt: no object is left of 3, in 2 images:",
        "  3 objects left out by `ignore_classes`: cat 2x, dog 1x",
        "  no object here of bird",
        "  2 images dropped, a side of less than 31 pixels: VOC/JPEGImages/a.jpg; VOC/JPEGImages/b.jpg (`min_side`)",
    ]
    folder.add("a")
    folder.add("b")
    assert refusal(voc(keep_empty=False)).startswith("VOC/ImageSets/Main/train.txt: no object is left of 0, in 2")


def test_fingerprint(folder: Folder, tmp_path: Path) -> None:
    first = loaded().fingerprint()
    assert loaded().fingerprint() == first
    folder.root.rename(tmp_path / "moved")
    assert loaded(root=tmp_path / "moved").fingerprint() == first
    (tmp_path / "moved").rename(folder.root)
    assert loaded(class_names=["cat", "dog"]).fingerprint() != first
    folder.list("train", "b\na\n")
    assert loaded().fingerprint() != first
    folder.list("train", "a\nb\n")
    folder.add("a", thing("cat", 1, 1, 21, 11, more="<difficult>1</difficult>"))
    assert loaded().fingerprint() != first
    folder.add("a", thing("cat", 1, 1, 21, 12))
    assert loaded().fingerprint() != first
    folder.add("a", CAT)
    assert loaded().fingerprint() == first


def test_indices_count_from_the_end_too(folder: Folder) -> None:
    dataset = loaded()
    assert dataset.annotations(-1).image_id == "b"
    assert np.array_equal(dataset.image(-1), dataset.image(1))
    with pytest.raises(IndexError):
        dataset.annotations(2)
    with pytest.raises(IndexError):
        dataset.image(2)


def test_asks_to_be_loaded() -> None:
    assert len(voc()) == 0
    with pytest.raises(RuntimeError, match=r"Voc.load\(\) has not been called"):
        voc().annotations(0)


def test_images_on_their_side(folder: Folder, make_image: Callable[..., Path], refusal: Refusal) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(folder.root / "JPEGImages/a.jpg", 40, 30, exif=exif)  # 30 wide and 40 high once it is upright
    dataset = loaded()
    assert dataset.image(0).shape == (3, 30, 40)
    assert dataset.notes[-1] == (
        "1 image with an EXIF orientation taken as stored: VOC/JPEGImages/a.jpg (`exif_orientation: apply` turns "
        "them upright, which is how most tools show them when boxes are drawn)"
    )
    folder.xml("a", f"<annotation><size><width>30</width><height>40</height></size>{CAT}</annotation>")
    assert refusal(voc()) == (
        "VOC/Annotations/a.xml: states a size of 30x40, but VOC/JPEGImages/a.jpg is 40x30; it carries EXIF "
        "orientation 6: set `exif_orientation: apply` if its boxes were drawn on the upright image"
    )
    dataset = loaded(exif_orientation="apply")
    assert dataset.image(0).shape == (3, 40, 30)
    assert list(dataset.notes) == [
        "no object here of bird",
        "1 image with an EXIF orientation turned upright: VOC/JPEGImages/a.jpg "
        "(`exif_orientation: ignore` takes them as stored)",
    ]


def test_an_image_that_is_cut_off_is_told_when_it_is_decoded(
    folder: Folder, make_image: Callable[..., Path], refusal: Refusal
) -> None:
    folder.xml("b", f"<annotation>{CAT}</annotation>")
    path = make_image(folder.root / "JPEGImages/b.jpg", 400, 300)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"^VOC/JPEGImages/b.jpg: the image is truncated or broken \(.+\); replace "):
        loaded().image(1)
    path.write_bytes(b"GIF")
    assert refusal(voc()) == (
        "VOC/JPEGImages/b.jpg: no image that can be read; expected a JPEG, PNG or similar; replace the file, or set "
        "`bad_images: drop`"
    )
