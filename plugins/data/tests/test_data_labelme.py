"""Data sets of LabelMe form: what they read, and what they say of each mistake."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detkernel_data.formats.labelme import Labelme
from detkernel_detection.testing import DatasetContract
from PIL import Image

Make = Callable[..., Path]
Refusal = Callable[[Labelme], str]
POLYGON = {"label": "cat", "points": [[4, 4], [24, 4], [14, 20]], "shape_type": "polygon", "group_id": None}
RECTANGLE = {"label": "dog", "points": [[30, 22], [10, 2]], "shape_type": "rectangle"}


def write(path: Path, shapes: list[Any], **content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"imageHeight": 30, "imageWidth": 40}
    path.write_text(json.dumps({"shapes": shapes, "imagePath": f"{path.stem}.png", **sizes, **content}))


@pytest.fixture
def folder(here: Path, make_image: Make) -> Path:
    """Two images with shapes, the second in a folder below; one image without a file."""
    for name in ("a", "below/b", "c"):
        make_image(here / f"d/{name}.png")
    write(here / "d/a.json", [POLYGON, RECTANGLE])
    write(here / "d/below/b.json", [RECTANGLE], imagePath="..\\elsewhere\\b.png")
    return here


def loaded(**options: object) -> Labelme:
    dataset = Labelme(**{"root": Path("d"), **options})  # type: ignore[arg-type]
    dataset.load()
    return dataset


class TestContract(DatasetContract):
    @pytest.fixture(autouse=True)
    def _files(self, folder: Path) -> None:
        self.root = folder / "d"

    def dataset(self) -> Labelme:
        return Labelme(root=self.root)


def test_polygons_and_rectangles(folder: Path):
    dataset = loaded()
    assert dataset.classes == ("cat", "dog")
    first, second = dataset.annotations(0), dataset.annotations(1)
    assert first.boxes.tolist() == [[4, 4, 24, 20], [10, 2, 30, 22]]
    assert first.labels.tolist() == [0, 1]
    assert list(first.masks or ()) == [[[4, 4, 24, 4, 14, 20]], []]
    assert first.area.tolist() == [160, 400]
    assert (first.image_id, second.image_id) == ("a.png", "below/b.png")
    assert dataset.image(0).shape == (3, 30, 40)
    assert any("1 image without a JSON file left out: d/c.png" in one for one in dataset.notes)
    assert len(loaded(unlabelled="keep")) == 3
    assert loaded(class_names=["dog", "cat"]).annotations(0).labels.tolist() == [1, 0]


def test_a_circle_and_what_has_no_area(folder: Path):
    circle = {"label": "cat", "points": [[20, 15], [20, 5]], "shape_type": "circle"}
    line = {"label": "cat", "points": [[1, 1], [9, 9]], "shape_type": "line"}
    write(folder / "d/a.json", [circle, line])
    dataset = loaded()
    assert dataset.annotations(0).boxes.tolist() == [[10, 5, 30, 25]]
    assert 300 < dataset.annotations(0).area[0] < 314.2
    assert "1 shape without an area left out: line 1x" in dataset.notes


def test_shapes_of_a_group_are_one_object(folder: Path):
    parts = [{**POLYGON, "group_id": 7}, {**POLYGON, "group_id": 7, "points": [[30, 20], [34, 20], [32, 28]]}, POLYGON]
    write(folder / "d/a.json", parts)
    notes = loaded().annotations(0)
    assert notes.boxes.tolist() == [[4, 4, 34, 28], [4, 4, 24, 20]]
    assert [len(mask) for mask in notes.masks or ()] == [2, 1]


def painted(pixels: np.ndarray) -> str:
    file = BytesIO()
    Image.fromarray(pixels.astype(np.uint8) * 255).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_mask_in_pixels(folder: Path, refusal: Refusal):
    pixels = np.zeros((6, 8), dtype=bool)
    pixels[1:4, 2:7] = True
    shape = {"label": "cat", "points": [[10, 5], [18, 11]], "shape_type": "mask", "mask": painted(pixels)}
    write(folder / "d/a.json", [shape])
    dataset = loaded()
    assert dataset.annotations(0).boxes.tolist() == [[12, 6, 17, 9]]
    assert dataset.annotations(0).area.tolist() == [15]
    write(folder / "d/a.json", [{**shape, "points": [[36, 5], [44, 11]]}])
    assert "d/a.json: shape 1: `mask`: 8x6 pixels at 36, 5" in refusal(Labelme(root=Path("d")))
    write(folder / "d/a.json", [{**shape, "mask": "?"}])
    assert "expected a PNG in base64" in refusal(Labelme(root=Path("d")))


def test_further_values_of_objects(folder: Path, refusal: Refusal):
    write(folder / "d/a.json", [{**POLYGON, "score": 0.5, "flags": {"hidden": True}}])
    write(folder / "d/below/b.json", [{**RECTANGLE, "score": 1, "flags": {"hidden": False}}])
    notes = loaded(fields={"score": "value", "hidden": "value"}).annotations(0)
    assert {name: values.tolist() for name, values in notes.fields.items()} == {"score": [0.5], "hidden": [1]}
    write(folder / "d/below/b.json", [RECTANGLE])
    message = refusal(Labelme(root=Path("d"), fields={"score": "value"}))
    assert "d/below/b.json: shape 1: `score`: expected a number or a flag" in message


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({**POLYGON, "points": [[1, 1], [2, 2]]}, "shape 1: `points`: expected at least 3, as a polygon has"),
        ({**POLYGON, "points": [[1, 1], [2], [3, 3]]}, "shape 1: `points[1]`: expected two finite numbers"),
        ({**POLYGON, "points": [[1, 1], [2, 1e300], [3, 3]]}, "shape 1: `points[1]`: expected two finite numbers"),
        ({**POLYGON, "label": None}, "shape 1: `label` is missing"),
        ({**POLYGON, "shape_type": "spiral"}, "shape 1: `shape_type`: expected polygon, rectangle"),
        (7, "shape 1: expected a map, got a whole number 7"),
    ],
)
def test_a_shape_that_is_wrong(folder: Path, refusal: Refusal, shape: Any, message: str):
    write(folder / "d/a.json", [shape])
    assert f"d/a.json: {message}" in refusal(Labelme(root=Path("d")))


def test_files_that_are_wrong(folder: Path, refusal: Refusal):
    dataset = Labelme(root=Path("d"))
    (folder / "d/a.json").write_text('{"shapes": [],\n "imagePath" "x"}')
    assert "d/a.json:2:14: broken JSON" in refusal(dataset)
    write(folder / "d/a.json", [POLYGON], imageHeight=300)
    assert "d/a.json: states a size of 40x300, but d/a.png is 40x30" in refusal(dataset)
    write(folder / "d/a.json", [POLYGON], imageHeight=None)
    assert "`imageHeight` is missing" in refusal(dataset)
    write(folder / "d/a.json", [POLYGON])
    write(folder / "d/second.json", [POLYGON], imagePath="a.png")
    assert "d/second.json: d/a.json has the same image; keep one of them" in refusal(dataset)
    assert "there is no such folder" in refusal(Labelme(root=Path("nowhere")))


def test_an_image_that_is_missing(folder: Path, refusal: Refusal):
    write(folder / "d/z.json", [POLYGON], imagePath="z.jpg", imageData="aGVsbG8=")
    assert "d/z.json: its image 'z.jpg' is missing; `orphan_labels: drop`" in refusal(Labelme(root=Path("d")))
    dataset = loaded(orphan_labels="drop")
    assert len(dataset) == 2
    assert any("1 annotation file without an image left out: d/z.json" in one for one in dataset.notes)
    dropped = loaded(bad_images="drop")
    assert any(one.startswith("1 image that cannot be decoded dropped") for one in dropped.notes)


def test_other_json_files_are_passed_over(folder: Path):
    (folder / "d/settings.json").write_text('{"images": []}')
    assert any("1 JSON file not of LabelMe's form" in one for one in loaded().notes)


def test_a_photo_on_its_side_is_read_upright(here: Path, make_image: Make):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(here / "d/a.png", 30, 40, exif=exif)
    write(here / "d/a.json", [RECTANGLE])
    assert loaded().image(0).shape == (3, 30, 40)
