"""Whatever an annotation file says, the outcome is valid annotations or one `DataError`.

`DETKERNEL_FUZZ` sets the number of files for each form, drawn anew at every run; without it, they are a hundred and
always the same.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detkernel import DataError
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.dataset import FileDataset
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.yolo import Yolo
from detkernel_data.masks import rasterise, without_mask
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

fuzz = settings(
    max_examples=int(os.environ.get("DETKERNEL_FUZZ", "100")),
    derandomize="DETKERNEL_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""pycocotools 2.0.11 in `decode`."""

ODD_NUMBERS = [
    *["-1", "41", "1e3", "1e400", "-1e308", "1e-320", "nan", "-inf", "0x1p3", "1_0", "٣"],
    "9" * 400,
    " 7 ",
    "",
]
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "bad_boxes": st.sampled_from(["clip", "drop", "error"]),
    "check_images": st.booleans(),
    "keep_empty": st.booleans(),
    "duplicates": st.sampled_from(["keep", "drop", "error"]),
    "allow_no_objects": st.booleans(),
}
COCO_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "masks": st.booleans(),
    "bbox_format": st.sampled_from(["xywh", "xyxy", "cxcywh"]),
    "bbox_unit": st.sampled_from(["pixels", "pixels", "fractions"]),
    "evaluate_ignored": st.booleans(),
}


def mostly(good: st.SearchStrategy[Any], odd: st.SearchStrategy[Any], share: int = 8) -> st.SearchStrategy[Any]:
    """One in `share` of them is odd, so that a file of many values can be read now and then."""
    return st.integers(1, share).flatmap(lambda number: odd if number == share else good)


@st.composite
def damaged(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """A text with some of its bytes cut out, doubled or replaced."""
    data = draw(texts).encode("utf-8", "replace")
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 12)))
        middle = draw(st.one_of(st.just(b""), st.just(data[start:end] * 2), st.binary(max_size=8)))
        data = data[:start] + middle + data[end:]
    return data


def files(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """Contents of a file: half of them as drawn, others damaged, others with neither rhyme nor reason."""
    as_drawn = texts.map(lambda text: text.encode("utf-8", "replace"))
    return st.one_of(as_drawn, as_drawn, damaged(texts), st.binary())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, in the folders of every form."""
    folder = tmp_path_factory.mktemp("fuzz")
    for part in ("JPEGImages", "Annotations", "ImageSets/Main", "images/train", "labels/train"):
        (folder / part).mkdir(parents=True)
    for part in ("JPEGImages", "images/train"):
        for name in "abc":
            Image.new("RGB", (40, 30)).save(folder / part / f"{name}.bmp")
    return folder


def outcome(make: Callable[[], FileDataset]) -> str:
    """Load it: what is wrong is told in a `DataError` of a few lines, and what is not wrong is valid."""
    try:
        dataset = make()
        dataset.load()
    except DataError as error:
        lines = str(error).splitlines()
        assert lines
        assert len(lines) <= 12
        return "refused"
    assert dataset.classes
    assert dataset.fingerprint()
    for index in range(len(dataset)):
        check(dataset, index)
    return "read"


def check(dataset: FileDataset, index: int) -> None:
    notes = dataset.annotations(index)
    assert len(notes.boxes) == len(notes.labels) == len(notes.area) == len(notes.crowd) == len(notes.difficult)
    assert np.isfinite(notes.boxes).all()
    assert (notes.boxes >= 0).all()
    assert (notes.boxes <= [notes.width, notes.height] * 2).all()
    corners = notes.boxes.astype(np.float32)
    assert (corners[:, 2:] > corners[:, :2]).all()
    assert ((notes.labels >= 0) & (notes.labels < len(dataset.classes))).all()
    assert np.isfinite(notes.area).all()
    assert (notes.area >= 0).all()
    if notes.masks is not None and (notes.width, notes.height) == (40, 30):
        assert rasterise(notes.masks, 30, 40).shape == (len(notes), 30, 40)
    if notes.keypoints is not None:
        assert np.isfinite(notes.keypoints).all()
    truth = dataset.truth(index)
    assert (truth.image_id, truth.height, truth.width) == (notes.image_id, notes.height, notes.width)
    assert len(truth) >= len(notes)
    assert len(without_mask(truth)) == len(truth)
    assert np.isfinite(truth.boxes).all()


# Pascal VOC

HEADS = [
    "<?xml version='1.0' encoding='utf-8'?>",
    "<?xml version='1.0' encoding='utf-16'?>",
    "<?xml version='1.0' encoding='latin-1'?>",
    "<!DOCTYPE annotation>",
    '<!DOCTYPE a SYSTEM "file:///etc/passwd">',
    '<!DOCTYPE a [<!ENTITY b "cat">]>',
    "<!DOCTYPE a [<!ELEMENT a ANY>]>",
]
OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@st.composite
def voc_files(draw: st.DrawFn) -> str:
    odd = st.one_of(st.sampled_from(ODD_NUMBERS), st.floats().map(str))
    low = mostly(st.floats(-1, 35).map(str), odd, 20)
    high = mostly(st.floats(10, 45).map(str), odd, 20)
    name = mostly(st.sampled_from(["cat", "dog"]), st.sampled_from(["", "&lt;", "\u00e9", "cat" * 100]), 20)
    difficult = mostly(st.sampled_from("01"), st.sampled_from(["2", ""]), 20)
    things = draw(st.lists(st.builds(OBJECT.format, name, difficult, low, low, high, high), max_size=4))
    width, height = draw(mostly(st.just(("40", "30")), st.tuples(high, odd)))
    head = draw(mostly(st.just(""), st.sampled_from(HEADS), 4))
    deep = draw(mostly(st.just(0), st.sampled_from([3, 5_000])))
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    return f"{head}<annotation>{size}{''.join(things)}{'<x>' * deep}{'</x>' * deep}</annotation>"


@fuzz
@given(data=files(voc_files()), options=st.fixed_dictionaries(OPTIONS))
def test_voc_xml(root: Path, data: bytes, options: dict[str, Any]) -> None:
    (root / "Annotations/a.xml").write_bytes(data)
    event(outcome(lambda: Voc(root=root, split=None, **options)))


@fuzz
@given(data=files(st.sampled_from(["a\n", "a\r\nb", "a -1\n", "\ufeffa"])))
def test_voc_lists(root: Path, data: bytes) -> None:
    (root / "Annotations/a.xml").write_text(f"<annotation>{OBJECT.format('cat', 0, 1, 1, 9, 9)}</annotation>")
    (root / "ImageSets/Main/train.txt").write_bytes(data)
    event(outcome(lambda: Voc(root=root, split="train")))


# COCO

GOOD: dict[str, Any] = {
    "images": [{"id": n, "file_name": f"{name}.bmp", "width": 40, "height": 30} for n, name in enumerate("abc")],
    "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog", "keypoints": ["nose", "tail"]}],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [9, 9, 9, 9], "segmentation": [[9, 9, 18, 9, 18, 18.5]]},
        {
            "id": 3,
            "image_id": 2,
            "category_id": 5,
            "bbox": [0, 0, 40, 30],
            "area": 1200,
            "iscrowd": 1,
            "segmentation": {"size": [30, 40], "counts": [10, 1190]},
            "keypoints": [1, 2, 2, 0, 0, 0],
        },
    ],
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 45),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(2**63), 2**53 + 1, 1e308, math.inf, math.nan]),
    st.sampled_from(["", "a.bmp", "../a", "a\0/b", "\ud800", "o" * 40]),
    st.text(max_size=5),
    st.lists(st.integers(-50, 90) | st.floats(), max_size=9),
    st.lists(st.lists(st.floats(-60, 100), min_size=6, max_size=12), max_size=3),
    st.fixed_dictionaries({"size": st.just([30, 40]), "counts": st.text(max_size=9) | st.lists(st.integers())}),
    st.recursive(st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5),
)


@st.composite
def coco_files(draw: st.DrawFn) -> str:
    """GOOD with up to four values replaced, left out or doubled."""
    data = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(0, 4))):
        node, key = draw_place(draw, data)
        change = draw(st.sampled_from(["replace", "replace", "replace", "double", "leave out"]))
        if change == "replace":
            node[key] = copy.deepcopy(draw(VALUES))
        elif change == "double" and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif len(node) > 1:
            del node[key]
    return json.dumps(data)


def draw_place(draw: st.DrawFn, node: Any) -> tuple[Any, Any]:
    """A list or map somewhere inside, and one of its keys."""
    while True:
        key = draw(st.sampled_from(list(range(len(node))) if isinstance(node, list) else list(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.integers(0, 5)) == 0:
            return node, key
        node = node[key]


@fuzz
@given(data=files(coco_files()), options=st.fixed_dictionaries({**OPTIONS, **COCO_OPTIONS}))
def test_coco_json(root: Path, data: bytes, options: dict[str, Any]) -> None:
    (root / "labels.json").write_bytes(data)
    event(outcome(lambda: Coco(annotation_file=root / "labels.json", image_folder=root / "images/train", **options)))


@pytest.mark.parametrize("depth", [100, 900, 990, 1_000, 10_000, 1_000_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_coco_json_nested_deeply(root: Path, depth: int, opening: str) -> None:
    deep = f"{opening * depth}0{(']' if opening == '[' else '}') * depth}"
    data = json.dumps(GOOD)
    for text in (deep, data.replace("[10, 1190]", f'[10, 1190], "more": {deep}'), data.replace("18.5", deep)):
        (root / "labels.json").write_text(text)
        outcome(lambda: Coco(annotation_file=root / "labels.json", image_folder=root / "images/train"))


# YOLO


@st.composite
def yolo_labels(draw: st.DrawFn) -> str:
    number = mostly(st.floats(-0.01, 1.01).map(str), st.sampled_from(ODD_NUMBERS), 40)
    kind = mostly(st.sampled_from("01"), st.sampled_from(["2", "-1", "1.0", "x", "9" * 50]), 20)
    counts = mostly(st.sampled_from([4, 4, 6, 8]), st.integers(0, 9), 20)
    line = st.tuples(kind, counts.flatmap(lambda count: st.lists(number, min_size=count, max_size=count)))
    lines = [" ".join([first, *rest]) for first, rest in draw(st.lists(line, max_size=6))]
    return str(draw(st.sampled_from(["\n", "\r\n", " \n\n"]))).join(lines)


@fuzz
@given(data=files(yolo_labels()), options=st.fixed_dictionaries(OPTIONS))
def test_yolo_labels(root: Path, data: bytes, options: dict[str, Any]) -> None:
    (root / "data.yaml").write_text("train: images/train\nnames: [cat, dog]\n")
    (root / "labels/train/a.txt").write_bytes(data)
    event(outcome(lambda: Yolo(data=root, split="train", **options)))


ODD_YAML = [
    *("&a [*a]", "!!int ''", "!!timestamp x", "!!python/name:os.system", "!!binary x", "2001-99-99", "{? []: 1}"),
    *("{0: cat}", "{0: cat, 1: no}", "~", "{<<: 1}", "1e999", "no", '"\\0"', "/proc/self", "..", "[images]", "|\n  x"),
]


@st.composite
def yolo_yaml(draw: st.DrawFn) -> str:
    odd = st.one_of(st.sampled_from(ODD_YAML), st.text(max_size=8), VALUES.map(repr))
    good = {
        "train": ["images/train", "[images/train]", "../images/train", "images"],
        "names": ["[cat, dog]", "{0: cat, 1: dog}", "\n- cat\n- dog"],
        "path": [".", "''", "~"],
        "nc": ["2"],
        "extra": ["0"],
    }
    fields = {key: draw(mostly(st.sampled_from(texts), odd)) for key, texts in good.items()}
    left_out = draw(mostly(st.just("nc"), st.sampled_from(list(good))))
    return "".join(f"{key}: {text}\n" for key, text in fields.items() if key != left_out)


@fuzz
@given(data=files(yolo_yaml()))
def test_yolo_yaml(root: Path, data: bytes) -> None:
    (root / "data.yaml").write_bytes(data)
    (root / "labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    event(outcome(lambda: Yolo(data=root, split="train")))
