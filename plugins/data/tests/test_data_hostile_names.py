"""Names of classes and files that hold line breaks and escape sequences reach no warning and no error as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from detkernel import DataError
from detkernel_data.formats.coco import Coco
from PIL import Image

CLASS, FILE = "evil\nclass", "a\n\x1b[31mx.png"


def dataset(folder: Path, **annotation: Any) -> Coco:
    (folder / "images").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "images" / FILE)
    boxes = [{"id": at, "image_id": 1, "category_id": 1, "bbox": [5, 5, 70, 30], **annotation} for at in (1, 2)]
    images = [{"id": 1, "file_name": FILE, "width": 64, "height": 64}]
    content = {"images": images, "categories": [{"id": 1, "name": CLASS}], "annotations": boxes}
    (folder / "a.json").write_text(json.dumps(content))
    return Coco(annotation_file=folder / "a.json", image_folder=folder / "images")


def test_warnings_are_one_line_each(tmp_path: Path):
    data = dataset(tmp_path)
    data.load()
    assert data.classes == (CLASS,), "the name itself stays"
    assert len(data.notes) >= 1
    for text in (*data.notes, *(place for note in data.notes for place in note.places)):
        assert text.isprintable()
        assert r"a\n\x1b[31mx.png" in text


def test_errors_escape_them_and_keep_their_own_lines(tmp_path: Path):
    data = dataset(tmp_path, bbox=[5, 5, "wide", 30])
    with pytest.raises(DataError) as caught:
        data.load()
    assert all(line.isprintable() for line in str(caught.value).splitlines())
    assert "\x1b" not in str(caught.value)
