"""Files that are not where they should be, that nothing belongs to, or that are no files to be read."""

from __future__ import annotations

import json
import os
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.missing_files import Near, walk
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.voc_xml import read_xml
from detkernel_data.formats.yolo import Yolo
from detkernel_detection import Dataset
from detkernel_detection.images import SUFFIXES
from PIL import Image

MakeImage = Callable[..., Path]
Refusal = Callable[[Dataset], str]


def coco(names: list[str], folder: str = "images") -> Coco:
    data = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 9, 9]}],
    }
    Path("a.json").write_text(json.dumps(data))
    return Coco(annotation_file=Path("a.json"), image_folder=Path(folder))


ACCENTED = "caf\u00e9"


@pytest.mark.parametrize(
    ("there", "wanted", "hint"),
    [
        ("images/s/a.bmp", r"s\a.bmp", r"; there is images/s/a.bmp ('/' as the separator, not '\')"),
        ("images/a b.bmp", "a%20b.bmp", "; there is images/a b.bmp (without URL encoding)"),
        ("images/a%20b.bmp", "a b.bmp", "; there is images/a%20b.bmp (with URL encoding)"),
        ("images/a.BMP", "a.bmp", "; there is images/a.BMP (another case)"),
        ("images/Frame.bmp", "frame.bmp", "; there is images/Frame.bmp (another case)"),
        ("images/a.png", "a.jpg", "; there is images/a.png (another suffix)"),
        ("images/a.bmp", "a.bmp ", "; there is images/a.bmp (blanks around the name)"),
        (
            f"images/{unicodedata.normalize('NFD', ACCENTED)}.bmp",
            f"{ACCENTED}.bmp",
            "(another Unicode form of the same",
        ),
        (
            "images/train/a.bmp",
            "a.bmp",
            "; there is images/train/a.bmp (another folder): set `image_folder` to images/train",
        ),
        ("images/a.bmp", "images/a.bmp", "; there is images/a.bmp (another folder): set `image_folder` to "),
        ("photos/a.bmp", "a.bmp", "; there is photos/a.bmp (another folder): set `image_folder` to photos"),
        ("images/b/a.bmp", "c/a.bmp", "; there is images/b/a.bmp (another folder)"),
        ("images/s/A.PNG", r"s\a.jpg", r"images/s/A.PNG ('/' as the separator, not '\', another case, another suffix)"),
        ("images/image.bmp", "imgae.bmp", ", did you mean 'image.bmp'?"),
        ("images/frame0012.bmp", "frame0013.bmp", ""),
    ],
)
def test_a_missing_image_is_told_with_what_is_there(
    here: Path, make_image: MakeImage, refusal: Refusal, there: str, wanted: str, hint: str
) -> None:
    make_image(here / "images/other.bmp")
    make_image(here / there)
    message = refusal(coco([wanted]))
    expected = f"a.json: image 0: the image {Path('images') / wanted} is missing"
    assert message.startswith(expected)
    assert message[len(expected) :].startswith(hint or "; `bad_images: drop`") or hint in message[len(expected) :]


def test_images_that_are_missing_can_be_dropped(here: Path, make_image: MakeImage, refusal: Refusal) -> None:
    make_image(here / "images/a.bmp")
    dataset = coco(["a.bmp", "zzz.bmp"])
    assert refusal(dataset).endswith("images/zzz.bmp is missing; `bad_images: drop` leaves out such images")
    dataset.bad_images = "drop"
    dataset.load()
    assert len(dataset) == 1
    assert any(note.startswith("1 image that cannot be decoded dropped: images/zzz.bmp") for note in dataset.notes)
    (here / "list.txt").write_text("images/a.bmp\nimages/zzz.bmp\n")
    (here / "data.yaml").write_text("train: list.txt\nnames: [a]\n")
    (here / "labels").mkdir()
    (here / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.2\n")
    listed = Yolo(data=here, split="train")
    assert "list.txt:2: the image images/zzz.bmp is missing" in refusal(listed)
    listed.bad_images = "drop"
    listed.load()
    assert len(listed) == 1


def test_the_option_that_is_advised_helps(here: Path, make_image: MakeImage, refusal: Refusal) -> None:
    make_image(here / "images/train/a.bmp")
    folder = refusal(coco(["a.bmp"])).rpartition(" to ")[2]
    coco(["a.bmp"], folder).load()
    folder = refusal(coco(["train/a.bmp"], "images/train")).rpartition(" to ")[2]
    coco(["train/a.bmp"], folder).load()


def test_many_missing_images_take_no_time_for_each(here: Path, refusal: Refusal) -> None:
    """20,000 files of another suffix, all missing: a search for each among all of them would take minutes."""
    (here / "images").mkdir()
    names = [f"frame_{number:06}" for number in range(20_000)]
    for name in names:
        os.close(os.open(f"images/{name}.png", os.O_CREAT | os.O_WRONLY))
    started = time.process_time()
    lines = refusal(coco([f"{name}.jpg" for name in names])).splitlines()
    assert time.process_time() - started < 4
    assert lines[0] == "a.json: 20000 problems"
    assert lines[1].endswith("images/frame_000000.jpg is missing; there is images/frame_000000.png (another suffix)")
    assert lines[-1] == "  and 19990 more"


def test_folders_that_link_to_each_other_are_visited_once(here: Path) -> None:
    (here / "a/b").mkdir(parents=True)
    (here / "a/b/x.txt").touch()
    for name in ("loop", "loop2"):
        (here / "a/b" / name).symlink_to("..")
    skipped: list[str] = []
    found = dict(walk("a", skipped))
    assert found == {"a": [], "a/b": ["x.txt"]}
    assert sorted(skipped) == ["a/b/loop", "a/b/loop2"]
    assert Near("a").hint("X.txt") == "; there is a/b/x.txt (another case, another folder)"


def test_an_annotation_file_that_is_missing_is_looked_for(here: Path, make_image: MakeImage, refusal: Refusal) -> None:
    dataset = coco([])
    Path("Train.JSON").write_text("{}")
    dataset.annotation_file = Path("train.json")
    assert refusal(dataset) == "train.json: there is no such file; there is Train.JSON (another case)"
    dataset.annotation_file = Path("more/train.json")
    assert "there is no such file" in refusal(dataset)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_not_a_regular_file_is_not_read(here: Path, make_image: MakeImage, refusal: Refusal, kind: str) -> None:
    def make(path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        else:
            Path(path).symlink_to("/dev/zero")

    what = "not a regular file"
    make_image(here / "images/a.bmp")
    dataset = coco(["a.bmp"])
    make("a.json")
    assert what in refusal(dataset)
    Path("a.json").unlink()
    make("images/b.bmp")
    assert "regular file" in refusal(coco(["b.bmp", "a.bmp"]))
    Path("images/b.bmp").unlink()
    Path("data.yaml").write_text("train: images\nval: list.txt\nnames: [a]\n")
    make("labels/a.txt")
    assert what in refusal(Yolo(data=here, split="train"))
    make("list.txt")
    assert what in refusal(Yolo(data=here, split="val"))
    make("data.yaml")
    assert what in refusal(Yolo(data=here, split="train"))
    make_image(here / "JPEGImages/a.bmp")
    make("Annotations/a.xml")
    make("ImageSets/Main/train.txt")
    assert what in refusal(Voc(root=here, split=None))
    assert what in refusal(Voc(root=here, split="train"))


def test_xml_nested_deeply_takes_no_time(here: Path, make_image: MakeImage, refusal: Refusal) -> None:
    make_image(here / "JPEGImages/a.bmp")
    (here / "Annotations").mkdir()
    deep = f"<annotation>{'<a>' * 1_000_000}{'</a>' * 1_000_000}</annotation>"
    (here / "Annotations/a.xml").write_text(deep)
    started = time.process_time()
    assert refusal(Voc(root=here, split=None)) == "Annotations/a.xml: broken XML: nested more than 50 elements deep"
    assert time.process_time() - started < 2


def test_label_files_are_read_within_a_budget(here: Path, make_image: MakeImage, refusal: Refusal) -> None:
    make_image(here / "images/a.bmp")
    (here / "labels").mkdir()
    with Path("labels/a.txt").open("wb") as file:
        file.truncate(2**40)  # a hole: no disk is filled
    (here / "data.yaml").write_text("train: images\nnames: [a]\n")
    assert "it has more than 67,108,864 bytes" in refusal(Yolo(data=here, split="train"))


# YOLO


@pytest.fixture
def yolo(here: Path, make_image: MakeImage) -> Callable[..., Yolo]:
    """Images by name, and labels by name without suffix."""

    def make(images: list[str], labels: list[str], **options: Any) -> Yolo:
        for name in images:
            make_image(here / f"images/{name}")
        for name in labels:
            path = here / f"labels/{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("0 0.5 0.5 0.5 0.2\n")
        (here / "data.yaml").write_text("train: images\nnames: [a]\n")
        return Yolo(data=here, split="train", **options)

    return make


def test_every_suffix_of_images_is_read(yolo: Callable[..., Yolo]) -> None:
    names = ["a.jpg", "b.jfif", "c.avif", "d.jp2", "e.JPEG", "f.webp", "g.tga", "h.pnm"]
    dataset = yolo(names, list("abcdefgh"))
    dataset.load()
    assert [dataset.annotations(index).image_id for index in range(len(dataset))] == list("abcdefgh")
    assert all(dataset.image(index).shape == (3, 30, 40) for index in range(8))
    assert not dataset.notes


def test_suffixes_are_those_that_pillow_reads() -> None:
    Image.init()
    assert set(Image.EXTENSION) >= SUFFIXES


def test_files_that_are_no_images_and_labels_without_an_image_are_counted(
    yolo: Callable[..., Yolo], here: Path, refusal: Refusal
) -> None:
    for name in ("b.heic", "c.dng", "d.heic", "notes.txt", ".hidden.x"):
        (here / "images").mkdir(exist_ok=True)
        (here / f"images/{name}").touch()
    dataset = yolo(["a.bmp"], ["a", "b", "c", "d", "e", "classes"])
    dataset.load()
    assert list(dataset.notes) == [
        "3 files in images left out, not of a suffix that is read as images: .dng 1x, .heic 2x",
        "4 label files without an image left out: labels/b.txt; labels/c.txt; labels/d.txt; and 1 more "
        "(`orphan_labels: error` refuses them)",
    ]
    assert refusal(yolo([], [], orphan_labels="error")) == (
        "data.yaml: train: 4 label files without an image: labels/b.txt; labels/c.txt; labels/d.txt; "
        "`orphan_labels: drop` leaves them out"
    )


def test_a_list_of_images_chooses_among_labels(yolo: Callable[..., Yolo], here: Path) -> None:
    dataset = yolo(["a.bmp", "b.bmp"], ["a", "b"])
    (here / "list.txt").write_text("images/a.bmp\n")
    (here / "data.yaml").write_text("train: list.txt\nnames: [a]\n")
    dataset.load()
    assert not dataset.notes


@pytest.mark.parametrize(("unlabelled", "count"), [("keep", 2), ("drop", 1)])
def test_images_without_labels(yolo: Callable[..., Yolo], refusal: Refusal, unlabelled: str, count: int) -> None:
    dataset = yolo(["a.bmp", "b.bmp"], ["a"], unlabelled=unlabelled)
    dataset.load()
    assert len(dataset) == count
    assert dataset.notes[0].startswith("1 image without a label file ")
    assert "images/b.bmp" in dataset.notes[0]
    assert refusal(yolo([], [], unlabelled="error")) == (
        "images/b.bmp: its labels/b.txt is missing; `unlabelled: keep` takes it as an image without objects, "
        "`unlabelled: drop` leaves it out"
    )


def test_a_folder_that_links_to_itself(yolo: Callable[..., Yolo], here: Path) -> None:
    dataset = yolo(["s/a.bmp"], ["s/a"])
    for name in ("loop", "loop2"):
        (here / "images/s" / name).symlink_to("..")
    dataset.load()
    assert len(dataset) == 1
    assert dataset.notes[0].startswith("2 folders reached a second time through a link, and read once: images/s/loop")


def test_images_alone_are_refused_with_what_is_missing(yolo: Callable[..., Yolo], refusal: Refusal, here: Path) -> None:
    dataset = yolo(["a.bmp", "b.bmp"], [])
    assert refusal(dataset) == (
        "data.yaml: train: none of 2 images has labels; expected labels/a.txt and so on; training and evaluation "
        "need them"
    )
    (here / "label").mkdir()
    (here / "label/a.txt").touch()
    assert "; there is label/a.txt; training and evaluation need them" in refusal(dataset)
    (here / "labels/other").mkdir(parents=True)
    (here / "label/a.txt").rename(here / "labels/other/a.txt")
    assert "there is" not in refusal(dataset)
    (here / "labels").rename(here / "Labels")
    assert "; there is Labels/other/a.txt; training" in refusal(dataset)


def test_boxes_are_those_of_the_upright_image(yolo: Callable[..., Yolo], make_image: MakeImage, here: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    dataset = yolo([], ["a"])
    make_image(here / "images/a.jpg", 40, 30, exif=exif)
    dataset.load()
    assert dataset.annotations(0).boxes.tolist() == [[7.5, 16, 22.5, 24]]
    assert dataset.image(0).shape == (3, 40, 30)
    assert list(dataset.notes) == [
        "1 image with an EXIF orientation turned upright: images/a.jpg "
        "(`exif_orientation: ignore` takes them as stored)"
    ]


def test_a_box_beyond_its_image_goes_by_bad_boxes(yolo: Callable[..., Yolo], here: Path, refusal: Refusal) -> None:
    def beyond(policy: str) -> Yolo:
        dataset = yolo(["a.bmp"], ["a"], bad_boxes=policy)
        (here / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.2\n0 1.05 0.5 0.3 0.2\n")
        return dataset

    for policy, count in (("clip", 2), ("drop", 1)):
        dataset = beyond(policy)
        dataset.load()
        assert len(dataset.annotations(0)) == count
        assert len(dataset.truth(0)) == 2
    assert "`bad_boxes` to clip or drop" in refusal(beyond("error"))


def test_polygons_of_four_points_may_be_oriented_boxes(yolo: Callable[..., Yolo], here: Path) -> None:
    dataset = yolo(["a.bmp"], ["a"])
    (here / "labels/a.txt").write_text("0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5\n")
    dataset.load()
    assert dataset.notes[0].startswith("all 1 polygons have four points, as oriented boxes have")


# VOC

XML = (
    "<annotation><object><name>a</name>{}<bndbox><xmin>{}</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
    "</object></annotation>"
)


@pytest.fixture
def voc(here: Path, make_image: MakeImage) -> Callable[..., Voc]:
    """Images and XML files by name; a list `train` of all names that are given."""

    def make(images: list[str], xml: list[str], **options: Any) -> Voc:
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (here / folder).mkdir(parents=True, exist_ok=True)
        for name in images:
            make_image(here / f"JPEGImages/{name}.bmp")
        for name in xml:
            (here / f"Annotations/{name}.xml").write_text(XML.format("", 3))
        names = sorted({*images, *xml})
        (here / "ImageSets/Main/train.txt").write_text("\n".join(names))
        return Voc(**{"root": here, "split": "train", **options})

    return make


def test_images_without_xml(voc: Callable[..., Voc], refusal: Refusal) -> None:
    given = ["a", "b", "c"], ["a"]
    assert refusal(voc(*given)).splitlines()[1] == (
        "  ImageSets/Main/train.txt:2: the annotation file of 'b', Annotations/b.xml, is missing; `unlabelled: keep` "
        "takes it as an image without objects, `unlabelled: drop` leaves it out"
    )
    for split in ("train", None):
        kept = voc(*given, unlabelled="keep", split=split)
        kept.load()
        assert [len(kept.annotations(index)) for index in range(len(kept))] == [1, 0, 0]
        assert kept.notes[0] == (
            "2 images without an annotation file taken as images without objects: JPEGImages/b.bmp; JPEGImages/c.bmp "
            "(`unlabelled: drop` leaves them out)"
        )
        dropped = voc(*given, unlabelled="drop", split=split)
        dropped.load()
        assert len(dropped) == 1
        assert "left out" in dropped.notes[0]
    whole = voc(*given, split=None)
    whole.load()
    assert len(whole) == 1
    assert whole.notes[0].endswith("(`unlabelled: keep` takes them as without objects)")


def test_images_of_nothing_but_background(voc: Callable[..., Voc], refusal: Refusal) -> None:
    only = {"unlabelled": "keep", "allow_no_objects": True}
    assert refusal(voc(["a", "b"], [], **only)) == (
        "ImageSets/Main/train.txt: there is no class: no object has a name; `class_names` gives some"
    )
    dataset = voc(["a", "b"], [], **only, class_names=["cat"])
    dataset.load()
    assert (len(dataset), dataset.classes) == (2, ("cat",))


def test_xml_without_an_image(voc: Callable[..., Voc], refusal: Refusal) -> None:
    for split in ("train", None):
        assert "`orphan_labels: drop` leaves such annotation files out" in refusal(voc(["a"], ["a", "b"], split=split))
        dataset = voc(["a"], ["a", "b"], split=split, orphan_labels="drop")
        dataset.load()
        assert len(dataset) == 1
        assert dataset.notes[0] == (
            "1 annotation file without an image left out: Annotations/b.xml (`orphan_labels: error` refuses them)"
        )


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("a.jpg", ", did you mean 'a'?"),
        ("train/a", ", did you mean 'a'?"),
        ("A", ", did you mean 'a'?"),
        ("a -1", "; lists of one class have a flag behind each name: take the list of the whole split"),
    ],
)
def test_names_in_a_list(voc: Callable[..., Voc], here: Path, refusal: Refusal, line: str, hint: str) -> None:
    dataset = voc(["a"], ["a"])
    (here / "ImageSets/Main/train.txt").write_text(line)
    assert refusal(dataset).endswith(f"is missing{hint}")


def test_boxes_that_begin_at_zero_are_told_with_the_option(voc: Callable[..., Voc], here: Path) -> None:
    dataset = voc(["a"], ["a"])
    (here / "Annotations/a.xml").write_text(XML.format("", 0))
    dataset.load()
    assert any("some begin at 0: set `origin: 0` if these files count pixels from 0" in note for note in dataset.notes)
    other = voc(["a"], [], origin=0)
    other.load()
    assert other.annotations(0).boxes.tolist() == [[0, 5, 20, 20]]
    assert not other.notes


def test_fractions_in_voc_form_are_refused(voc: Callable[..., Voc], here: Path, refusal: Refusal) -> None:
    dataset = voc(["a"], ["a"])
    text = XML.format("", 0.1).replace(">5<", ">0.25<").replace(">20<", ">0.5<")
    (here / "Annotations/a.xml").write_text(text)
    assert "lies within 0 to 1, as fractions of the image do" in refusal(dataset)


def test_flags_of_objects(voc: Callable[..., Voc], here: Path) -> None:
    path = here / "Annotations/a.xml"
    dataset = voc(["a"], ["a"], allow_no_objects=True, class_names=["a"])
    for flag, difficult in (("difficult", [True]), ("ignore", [True]), ("truncated", [False]), ("deleted", [])):
        for value in ("1", "true"):
            path.write_text(XML.format(f"<{flag}>{value}</{flag}>", 3))
            dataset.load()
            assert dataset.truth(0).difficult.tolist() == difficult
    assert dataset.notes[0] == "1 object marked as <deleted> left out: Annotations/a.xml:1"
    path.write_text(XML.format("<difficult>0</difficult><deleted>false</deleted>", 3))
    assert read_xml(path).objects[0][2:4] == (False, False)
