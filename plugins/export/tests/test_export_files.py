"""Sources, results, and what is written of them."""

from __future__ import annotations

import csv
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detkernel import UserError
from detkernel_detection import Detections
from detkernel_export.results import Result
from detkernel_export.rle import encode
from detkernel_export.sources import Source, sources
from detkernel_export.video import opencv
from detkernel_export.writers import Found, keep_image, write_csv, write_voc
from PIL import Image


def result(path=None, **extra):
    boxes = torch.tensor([[10.0, 20, 60, 50], [0, 0, 30, 30]])
    found = Detections(0, 0, boxes, torch.tensor([0.9, 0.6]), torch.tensor([1, 0]), **extra)
    pixels = torch.full((3, 60, 80), 90, dtype=torch.uint8)
    given = str(path) if path else pixels.permute(1, 2, 0).numpy()
    return Result(given, pixels, found, ["cat", "<dog>&\x07"])


class TestSources:
    @pytest.fixture
    def photos(self, tmp_path, monkeypatch):
        for name in ("b.jpg", "a.png", "more/a.jpg", "film.mp4", "notes.txt"):
            (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "photos" / name).touch()
        monkeypatch.chdir(tmp_path)
        return tmp_path / "photos"

    def test_a_folder_is_taken_with_what_is_below_it(self, photos):
        found = sources(["photos"])
        assert [(one.path, one.name, one.video) for one in found] == [
            ("photos/a.png", "a", False),
            ("photos/b.jpg", "b", False),
            ("photos/film.mp4", "film", True),
            ("photos/more/a.jpg", "more/a", False),
        ]

    def test_names_are_unique_and_a_file_is_taken_once(self, photos):
        (photos / "a_2.png").touch()
        found = sources(["photos/a.png", "photos/more/a.jpg", "photos/*.png", "photos/a_2.png", "camera:1"])
        assert [one.name for one in found] == ["a", "a_2", "a_2_2", "camera_1"]
        assert [one.path for one in found][-1] == "camera:1"

    def test_all_that_cannot_be_taken_is_told(self, photos):
        (photos / "empty").mkdir()
        with pytest.raises(UserError) as caught:
            sources(["photos/c.jpg", "photos/bb.jpg", "photos/empty", "photos/notes.txt", "photos/*.gif", "camera:x"])
        told = str(caught.value).splitlines()
        assert told[0] == "photos/c.jpg: there is no such image, folder or video, did you mean 'b.jpg'?"
        assert told[2] == "photos/empty: there is no image or video in this folder or below it"
        assert told[3].startswith("photos/notes.txt: neither an image nor a video by its name; expected one of .apng")
        assert told[4] == "'photos/*.gif': no image or video has a name like this"
        assert told[5] == "'camera:x': expected a camera's number, such as camera:0"

    def test_a_video_without_opencv_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cv2", None)
        with pytest.raises(UserError, match=re.escape("needs OpenCV: pip install 'detkernel-export[video]'")):
            opencv(Source("film.mp4", "film", True))


class TestResult:
    def test_arrays_and_plain_values(self):
        one = result(masks=torch.ones(2, 60, 80, dtype=torch.uint8), keypoints=torch.ones(2, 1, 3))
        assert one.names == ["<dog>&\x07", "cat"]
        assert (one.boxes.shape, one.masks.dtype, one.keypoints.shape) == ((2, 4), np.bool_, (2, 1, 3))
        values = json.loads(json.dumps(one.to_dict()))
        assert (values["image"], values["width"], values["height"]) == (None, 80, 60)
        assert values["detections"][1] == {
            "class": "cat", "label": 0, "score": pytest.approx(0.6), "box": [0, 0, 30, 30],
            "mask": {"size": [60, 80], "counts": encode(np.ones((60, 80)))["counts"]}, "keypoints": [[1, 1, 1]],
        }  # fmt: skip
        assert repr(one) == r"<Result of pixels, 80x60: 1 <dog>&\x07, 1 cat>"

    def test_a_notebook_shows_a_drawing(self):
        data = result()._repr_png_()
        assert data.startswith(b"\x89PNG")

    def test_a_drawing_is_written_in_the_form_of_its_name(self, tmp_path):
        for name, kind in (("a.jpg", "JPEG"), ("b.png", "PNG")):
            result().save(tmp_path / "new" / name)
            with Image.open(tmp_path / "new" / name) as opened:
                assert opened.format == kind
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match=r"file/a\.png: cannot be written"):
            result().save(tmp_path / "file" / "a.png")

    def test_supervision_is_given_its_own_arrays(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
        found = result().to_supervision()
        assert found.class_id.tolist() == [1, 0]
        assert found.confidence.tolist() == pytest.approx([0.9, 0.6])
        assert (found.xyxy.shape, found.mask) == ((2, 4), None)
        assert found.data["class_name"].tolist() == ["<dog>&\x07", "cat"]
        monkeypatch.setitem(sys.modules, "supervision", None)
        with pytest.raises(UserError, match="supervision is not installed: pip install supervision"):
            result().to_supervision()

    def test_pixels_are_let_go_of_and_read_again(self, tmp_path):
        Image.new("RGB", (80, 60), (7, 7, 7)).save(tmp_path / "a.png")
        one = result(tmp_path / "a.png").release()
        assert one._pixels is None
        assert one.plain().getpixel((0, 0)) == (7, 7, 7)
        assert result().release()._pixels is not None


def test_run_lengths_are_cocos():
    masks = [np.zeros((5, 7)), np.ones((5, 7)), np.random.default_rng(0).random((40, 30)) > 0.7, np.eye(100)]
    encoded = [encode(mask.astype(bool)) for mask in masks]
    assert encoded[0] == {"size": [5, 7], "counts": "S1"}
    pycocotools = pytest.importorskip("pycocotools.mask")
    for mask, one in zip(masks, encoded, strict=True):
        theirs = pycocotools.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert one["counts"] == theirs["counts"].decode()


class TestWritten:
    def test_a_table_holds_no_formula(self, tmp_path):
        found = [Found("a.jpg", "=cmd()", result().to_dict())]
        with write_csv(tmp_path, found, ["cat", "x"], ()).open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0] == {
            "image": "'=cmd()", "class": "<dog>&\x07", "score": "0.900000",
            "x1": "10.000", "y1": "20.000", "x2": "60.000", "y2": "50.000",
        }  # fmt: skip

    def test_names_are_escaped_in_xml(self, tmp_path):
        write_voc(tmp_path, [Found("more/a.jpg", "a", result().to_dict())], [], ())
        text = (tmp_path / "Annotations" / "more" / "a.xml").read_text()
        assert "<name>&lt;dog&gt;&amp;\\x07</name>" in text

    def test_an_image_is_linked_and_a_frame_copied(self, tmp_path):
        Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
        folder = tmp_path / "images"
        for _ in range(2):  # a second time it is replaced
            assert keep_image(folder, "x/a", result(tmp_path / "a.png")) == "x/a.png"
        assert (folder / "x" / "a.png").resolve() == (tmp_path / "a.png").resolve()
        assert keep_image(folder, "film/000001", result()) == "film/000001.jpg"
        with Image.open(folder / "film" / "000001.jpg") as opened:
            assert opened.size == (80, 60)
