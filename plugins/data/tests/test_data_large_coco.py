"""Large files of COCO's form: read in blocks, and kept as arrays, with the same result as entry by entry."""

from __future__ import annotations

import gc
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detkernel import DataError
from detkernel_data.annotations import Masks, Texts
from detkernel_data.aside import Aside
from detkernel_data.formats import coco, coco_entries, kept
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.overview import maskless, overview
from detkernel_data.loading.check_images import cache_folder
from detkernel_data.masks import trainable, without_mask
from detkernel_data.wrappers import Concat, Repeat, Subset
from detkernel_detection.images import Header, read_headers
from PIL import Image

coco_quick = pytest.importorskip(
    "detkernel_data.formats.coco_quick", reason="msgspec is not installed", exc_type=ImportError
)
Make = Callable[..., Path]
SQUARE = [[4.0, 4.0, 24.0, 4.0, 24.5, 20.25, 4.0, 20.0]]
RUNS = {"size": [30, 40], "counts": [100, 50, 1050]}


def content(**changes: Any) -> dict[str, Any]:
    """Three images, five objects of all ordinary kinds, not in the order of their images."""
    rows = [
        {"image_id": 2, "segmentation": SQUARE},
        {"image_id": 1, "segmentation": [SQUARE[0], [30.0, 2.0, 36.0, 2.0, 36.0, 8.0]], "bbox": [4, 2, 32, 18]},
        {"image_id": 2, "segmentation": RUNS, "iscrowd": 1, "area": 50},
        {"image_id": 1, "segmentation": [], "category_id": 9, "area": None},
        {"image_id": 1, "category_id": 9, "difficult": 1, "color": "red", "note": "odd"},
    ]
    objects = [
        {"id": 100 - number, "category_id": 3, "bbox": [4.0, 4.0, 20.5, 16.25], "area": 330.5, "iscrowd": 0, **row}
        for number, row in enumerate(rows)
    ]
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 30, "width": 40, "license": 1} for n in (1, 2, 7)]
    kinds = [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat", "supercategory": "animal"}]
    return {"info": {}, "images": images, "annotations": objects, "categories": kinds, **changes}


@pytest.fixture
def folder(here: Path, make_image: Make) -> Path:
    for number in (1, 2, 7):
        make_image(here / f"images/{number}.jpg")
    write(content())
    return here


def write(value: object) -> None:
    Path("a.json").write_text(json.dumps(value))


def read(**options: Any) -> Coco:
    dataset = Coco(annotation_file=Path("a.json"), image_folder=Path("images"), **options)
    dataset.load()
    return dataset


def read_carefully(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Coco:
    with monkeypatch.context() as patch:
        patch.setattr(coco, "split", lambda _: None)
        return read(cache=False, **options)


def same(one: Coco, other: Coco) -> None:
    assert one.fingerprint() == other.fingerprint()
    assert list(one.notes) == list(other.notes)
    assert (one.classes, dict(one.category_ids)) == (other.classes, dict(other.category_ids))
    for index in range(len(one)):
        ours, theirs = one.annotations(index), other.annotations(index)
        assert list(ours.masks or ()) == list(theirs.masks or ())
        assert ours.path == theirs.path


OPTIONS: list[dict[str, Any]] = [
    {},
    {"masks": False},
    {"bbox_format": "cxcywh"},
    {"bbox_format": "xyxy"},
    {"rename_classes": {"dog": "cat"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_blocks_and_entries_give_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    entries = read_carefully(monkeypatch, **options)
    monkeypatch.setattr(coco_entries, "parse", None)
    monkeypatch.setattr(coco_quick, "_BLOCK", 2)
    same(read(**options), entries)


POINTS = [5, 6, 2, 7.5, 8, 1]


def with_keypoints(it: Any) -> None:
    it["categories"][1].update(keypoints=["nose", "tail"], skeleton=[[1, 2]])
    for row in it["annotations"]:
        if row["category_id"] == 3 and row["id"] != 99:  # of 99 there are none
            row.update(keypoints=POINTS, num_keypoints=2)


def in_fractions(it: Any) -> None:
    for row in it["annotations"]:
        row["bbox"] = [value / 64 for value in row["bbox"]]
        if isinstance(row.get("segmentation"), list):
            row["segmentation"] = [[value / 64 for value in part] for part in row["segmentation"]]


def numbered(it: Any) -> None:
    for number, row in enumerate(it["annotations"]):
        row.update(track_id=number, depth=number / 4 if number > 2 else number)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (with_keypoints, {}),
        (in_fractions, {"bbox_unit": "fractions"}),
        (numbered, {"fields": {"track_id": "value", "depth": "angle"}}),
        (lambda it: it.update(remark="a part of another name"), {}),
        (lambda it: [image.update(id=f"{image['id']}") for image in it["images"]]
         + [row.update(image_id=str(row["image_id"])) for row in it["annotations"]], {}),
    ],
    ids=["keypoints", "fractions", "fields", "part", "ids of text"],
)  # fmt: skip
def test_keypoints_fractions_and_fields_are_read_in_blocks_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], options: dict[str, Any]
):
    changed = content()
    change(changed)
    write(changed)
    entries = read_carefully(monkeypatch, **options)
    monkeypatch.setattr(coco_entries, "parse", None)
    monkeypatch.setattr(coco_quick, "_BLOCK", 2)
    same(read(**options), entries)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it["annotations"][0].update(segmentation=[[], SQUARE[0]]),
        lambda it: it["annotations"][0].update(ignore=1),
        lambda it: it["annotations"][1].update(id=0),
        lambda it: it["annotations"][0].pop("segmentation"),
        lambda it: it["images"][0].update(height=None, width=None),
        lambda it: it["images"][0].update(file_name="./1.jpg"),
        lambda it: it.update(categories=[{"id": 3, "name": "cat"}, {"id": 9, "name": "dog", "isthing": 1}]),
    ],
)
def test_odd_files_give_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]):
    odd = content()
    change(odd)
    write(odd)
    same(read(), read_carefully(monkeypatch))


@pytest.mark.parametrize(
    "change",
    [
        lambda it: it["annotations"][1].update(id=100),
        lambda it: it["annotations"][1].update(id=1.0),
        lambda it: it["annotations"][1].update(id=True),
        lambda it: it["annotations"][1].update(image_id=5),
        lambda it: it["annotations"][1].update(image_id="1"),
        lambda it: it["annotations"][1].update(category_id=4),
        lambda it: it["annotations"][1].update(bbox=[1, 2, 3]),
        lambda it: it["annotations"][1].update(bbox=[1, 2, "3", 4]),
        lambda it: it["annotations"][1].update(bbox=[1, 2, 1e300, 4]),
        lambda it: it["annotations"][1].update(area=-1),
        lambda it: it["annotations"][1].update(iscrowd=2),
        lambda it: it["annotations"][1].update(segmentation=[[1, 2, 3, 4]]),
        lambda it: it["annotations"][1].update(segmentation=[[1, 2, 3, 4, 5, 600]]),
        lambda it: it["annotations"][1].update(segmentation=[[1, 2, 3, 4, 5, None]]),
        lambda it: it["annotations"][2].update(segmentation={"size": [30, 40], "counts": [7]}),
        lambda it: it["annotations"].append(7),
        lambda it: (with_keypoints(it), it["annotations"][0].update(keypoints=[5, 6, 3, 7.5, 8, 1])),
        lambda it: (with_keypoints(it), it["annotations"][0].update(keypoints=[5, 6, 2])),
        lambda it: (with_keypoints(it), it["annotations"][3].update(keypoints=POINTS)),
        lambda it: (with_keypoints(it), it["annotations"][0].update(keypoints=None)),
        lambda it: it["annotations"][1].update(bbox=[float("nan"), 2, 3, 4]),
        lambda it: it["images"].append(it["images"][0]),
        lambda it: it["images"][0].update(file_name="8.jpg"),
        lambda it: it["images"][0].update(height=300),
        lambda it: it["images"][0].update(height=0),
        lambda it: it.pop("annotations"),
    ],
)
def test_mistakes_have_the_words_of_the_careful_reader(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], refusal: Callable[[Coco], str]
):
    wrong = content()
    change(wrong)
    write(wrong)
    dataset = Coco(annotation_file=Path("a.json"), image_folder=Path("images"))
    message = refusal(dataset)
    with monkeypatch.context() as patch:
        patch.setattr(coco, "split", lambda _: None)
        assert message == refusal(dataset)


def test_headers_that_another_process_reads_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[[Coco], str]
):
    here = read()
    monkeypatch.setattr(coco, "_MANY", 1)
    same(read(), here)
    wrong = content()
    wrong["images"][1].update(height=31)
    write(wrong)
    assert "states a size of 40x31, but images/2.jpg is 40x30" in refusal(
        Coco(annotation_file=Path("a.json"), image_folder=Path("images"))
    )
    Path("images/7.jpg").write_text("")
    assert "images/7.jpg" in refusal(Coco(annotation_file=Path("a.json"), image_folder=Path("images")))


def test_work_aside_is_done_in_place_where_its_process_ends_without_an_answer():
    asked = []

    def work(outcome: Callable[[], object] = lambda: 7) -> object:
        asked.append(os.getpid())
        return outcome()

    assert Aside(work).result() == 7
    assert asked == [], "the other process was asked"
    main = os.getpid()
    assert Aside(lambda: os.getpid() == main or os._exit(1)).result() is True
    with pytest.raises(ZeroDivisionError):
        Aside(lambda: work(lambda: 1 / 0)).result()
    assert asked == [main]


def test_broken_json_is_told_with_its_line(folder: Path, refusal: Callable[[Coco], str]):
    text = json.dumps(content(), indent=1)
    Path("a.json").write_text(text.replace('"iscrowd": 1', '"iscrowd" 1'))
    line = text[: text.index('"iscrowd": 1')].count("\n") + 1
    message = refusal(Coco(annotation_file=Path("a.json"), image_folder=Path("images")))
    assert message.startswith(f"a.json:{line}:")


@pytest.fixture
def kept_always(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small files are kept too; the file in the cache."""
    monkeypatch.setattr(kept, "SMALLEST", 1)
    read()
    (path,) = (cache_folder().parent / "annotations").iterdir()
    return path


def was_kept(dataset: Coco) -> bool:
    return dataset.flat.known_digest != ""


def test_what_is_kept_is_the_same(kept_always: Path, monkeypatch: pytest.MonkeyPatch):
    entries = read_carefully(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(coco, "read", None)
        again = read()
    same(again, entries)
    assert [one.places for one in again.notes] == [one.places for one in entries.notes]  # type: ignore[attr-defined]
    assert again.image(0).shape == (3, 30, 40)


@pytest.mark.parametrize("named", [False, True], ids=["numbers", "ids of text"])
def test_what_lvis_says_of_images_is_kept_too(folder: Path, monkeypatch: pytest.MonkeyPatch, named: bool):
    monkeypatch.setattr(kept, "SMALLEST", 1)
    lvis: Any = content()
    for image, absent in zip(lvis["images"], ([9], [], [3, 9]), strict=True):
        image.update(
            neg_category_ids=absent, not_exhaustive_category_ids=[3], **({"id": str(image["id"])} if named else {})
        )
    for row in lvis["annotations"] if named else ():
        row["image_id"] = str(row["image_id"])
    lvis["categories"][0]["frequency"] = "c"
    write(lvis)
    first = read(rename_classes={"cat": "lynx"})
    with monkeypatch.context() as patch:
        patch.setattr(coco, "read", None)
        again = read(rename_classes={"cat": "lynx"})
    same(again, first)
    assert again.federated is not None
    ids = [again.annotations(index).image_id for index in range(3)]
    assert ids == (["1", "2", "7"] if named else [1, 2, 7])
    assert [again.federated.negatives_of(number) for number in ids] == [["dog"], [], ["lynx", "dog"]]
    assert again.federated.not_exhaustive_of(ids[2]) == ["lynx"]
    assert again.federated.frequency == {"dog": "c"}
    assert again.federated.classes == first.federated.classes  # type: ignore[union-attr]


def test_another_process_maps_it(kept_always: Path):
    dataset = read()
    data = pickle.dumps(dataset)
    assert len(data) < 3000
    same(pickle.loads(data), dataset)
    plain = read(cache=False)
    same(pickle.loads(pickle.dumps(plain)), plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda: Path("a.json").write_text(json.dumps(content(), indent=1)),
        lambda: os.utime("images/1.jpg", (1, 1)),
        lambda: Image.new("RGB", (40, 30)).save("images/7.jpg"),
        lambda: Image.new("RGB", (40, 30)).save("images/8.jpg"),
    ],
)
def test_a_change_is_seen(kept_always: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]):
    before = kept_always.stat().st_mtime_ns, kept_always.read_bytes()
    change()
    assert len(read()) == 3
    assert (kept_always.stat().st_mtime_ns, kept_always.read_bytes()) != before


def test_other_options_are_kept_apart(kept_always: Path):
    assert read(class_names=["dog", "cat"]).classes == ("dog", "cat")
    assert read().classes == ("cat", "dog")
    assert len(list(kept_always.parent.iterdir())) == 2
    read(masks=False, cache=False)
    assert len(list(kept_always.parent.iterdir())) == 2


@pytest.mark.parametrize("place", [0, 30, 60, 400, -1])
def test_a_damaged_file_is_as_good_as_none(kept_always: Path, monkeypatch: pytest.MonkeyPatch, place: int):
    data = bytearray(kept_always.read_bytes())
    data[place] ^= 0x15
    kept_always.write_bytes(data)
    same(read(), read_carefully(monkeypatch))
    kept_always.write_bytes(data[: len(data) // 2])
    same(read(), read_carefully(monkeypatch))
    kept_always.write_bytes(b"")
    same(read(), read_carefully(monkeypatch))


def test_a_cache_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(kept, "SMALLEST", 1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not was_kept(read())


def test_small_files_are_not_kept(folder: Path):
    read()
    assert not (cache_folder().parent / "annotations").exists()


def test_what_was_not_used_is_removed(kept_always: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept, "_MOST_FILES", 2)
    os.utime(kept_always, (1, 1))
    read(masks=False)
    read(bad_boxes="drop")
    assert len(list(kept_always.parent.iterdir())) == 2
    assert not kept_always.exists()


def test_texts_and_masks_of_some():
    texts = Texts(["a", "", "bcd", "\ud800"])
    assert [texts.take(np.array([2, 0, 3]))[index] for index in range(3)] == ["bcd", "a", "\ud800"]
    assert [Texts.sparse(3, {1: "x"})[index] for index in range(3)] == ["", "x", ""]
    masks = Masks([SQUARE, [], RUNS, [SQUARE[0], SQUARE[0]]])
    some = Masks.joined([masks, masks]).take(np.array([6, 3, 1]))
    assert [some[index] for index in range(3)] == [RUNS, [SQUARE[0], SQUARE[0]], []]


def test_polygons_of_each_object_are_scaled_by_its_image():
    masks = Masks([[[0.5, 0.5, 1.0, 0.5, 1.0, 1.0], [0.25, 0.5, 0.75]], [], RUNS, [[0.5, 1.0, 0.5, 0.5, 0.0, 0.0]]])
    masks.scale(np.array([[40.0, 20.0], [1, 1], [1, 1], [8.0, 4.0]]))
    assert masks[0] == [[20, 10, 40, 10, 40, 20], [0.25, 0.5, 0.75]]  # the second is refused later
    assert (masks[2], masks[3]) == (RUNS, [[4, 4, 4, 2, 0, 0]])


def test_objects_without_masks_are_counted_at_once(folder: Path):
    dataset = read()
    joined = Subset(dataset=Repeat(dataset=Concat(datasets=[dataset, dataset]), times=2), first=8)
    joined.load()
    assert maskless(joined).tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    one_by_one = [(trainable(one) & without_mask(one)).sum() for one in map(joined.annotations, range(8))]
    assert maskless(joined).tolist() == one_by_one


def test_the_collector_of_cycles_goes_on_after_the_reading(folder: Path):
    assert gc.isenabled()
    read(cache=False)
    Path("a.json").write_text("[")
    with pytest.raises(DataError):
        read()
    assert gc.isenabled()


def test_an_overview_is_that_of_each_image(folder: Path):
    dataset = read()
    seen = overview(dataset)
    assert seen.objects.tolist() == [2, 1, 0]
    assert (seen.heights.tolist(), seen.widths.tolist()) == ([30] * 3, [40] * 3)
    joined = Subset(dataset=Repeat(dataset=Concat(datasets=[dataset, dataset]), times=2), first=8)
    joined.load()
    assert overview(joined).objects.tolist() == [2, 1, 0, 2, 1, 0, 2, 1]


def test_headers_of_plain_jpegs_are_those_of_pillow(here: Path, make_image: Make, monkeypatch: pytest.MonkeyPatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        make_image(here / "a.jpg", 33, 21),
        make_image(here / "b.jpg", 8, 50, "L"),
        make_image(here / "c.jpg", 8, 50, "CMYK", progressive=True),
        make_image(here / "d.jpg", 8, 50, exif=exif),
        make_image(here / "e.jpg", 8, 50, comment="x" * 5000),
        make_image(here / "f.png", 8, 50),
        here / "g.jpg",
    ]
    files[-1].write_bytes(files[0].read_bytes()[:40])
    names = list(map(str, files))
    quick = read_headers(names)
    monkeypatch.setattr("detkernel_detection.images._plain_jpeg", lambda _: None)
    slow = read_headers(names)
    assert quick[:-1] == slow[:-1]
    assert str(quick[-1]) == str(slow[-1])
    assert quick[0] == Header(21, 33, 1, "JPEG")
