"""`detkernel doctor`: what it finds, and how it tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from detkernel import DataError
from detkernel_data.doctor import images
from detkernel_data.doctor.command import doctor
from detkernel_data.formats.voc import Voc
from detkernel_data.loading.check_images import cache_folder
from detkernel_data.loading.loader import Loader
from detkernel_data.report import note
from detkernel_detection.findings import Finding, Note
from detkernel_detection.testing import tiny_kernel
from PIL import Image

Box = tuple[int, int, int, int]


def noise_image(seed: int) -> Image.Image:
    """A smooth pattern of its own."""
    draw = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(draw).resize((160, 120), Image.Resampling.BICUBIC)


class Data:
    """A data set of VOC's form that a test fills, and its config."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lists: dict[str, list[str]] = {"train": [], "val": []}

    def add(self, split: str, name: str, image: Image.Image, *objects: tuple[str, Box], **save: Any) -> None:
        suffix = save.pop("suffix", ".png")
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        image.save(self.root / f"JPEGImages/{name}{suffix}", **save)
        rows = "".join(
            f"<object><name>{kind}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            "</bndbox></object>"
            for kind, (x1, y1, x2, y2) in objects
        )
        (self.root / f"Annotations/{name}.xml").write_text(f"<annotation>{rows}</annotation>")
        self.lists[split].append(name)

    def write_lists(self) -> None:
        for split, names in self.lists.items():
            (self.root / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))

    def run(self, *words: str, code: int = 0) -> Result:
        self.write_lists()
        sets = "".join(f"  {split}: {{use: voc, root: d, split: {split}}}\n" for split in self.lists)
        Path("c.yaml").write_text(
            f"run: {{until: 1 epoch, work_dir: w}}\ndata:\n  use: loader\n{sets}"
            "  val_transforms: [{use: resize, size: [60, 80]}]\n"
        )
        result = CliRunner().invoke(doctor, ["c.yaml", *words], env={"COLUMNS": "80"})
        assert result.exit_code == code, result.output or result.exception
        return result

    def findings(self) -> dict[str, dict[str, Any]]:
        found = json.loads(self.run("--json").output)["findings"]
        return {f"{one['split']}: {one['what']}": one for one in found}


@pytest.fixture
def data(here: Path) -> Data:
    made = Data(here / "d")
    for number in range(4):
        made.add("train" if number < 3 else "val", f"n{number}", noise_image(number), ("cat", (10, 10, 90, 90)))
    return made


def test_nothing_odd(data: Data):
    assert data.run().output == "nothing odd was found\n"
    assert data.run("--strict").exit_code == 0
    Path("w").mkdir()
    Path("c.yaml").rename("w/config.yaml")
    assert CliRunner().invoke(doctor, ["w"]).output == "nothing odd was found\n", "the folder of a run is a config"


def test_copies_across_the_splits(data: Data):
    data.add("val", "copy", noise_image(0), ("cat", (10, 10, 90, 90)))
    data.add("val", "smaller", noise_image(1).resize((120, 90)), ("cat", (10, 10, 60, 60)), suffix=".jpg", quality=60)
    found = data.findings()
    same, near = (found[f"train and val: {kind} images in train and val"] for kind in ("identical", "near-identical"))
    assert same["count"] == near["count"] == 1
    assert "copy.png is " in same["places"][0]
    assert "n0.png" in same["places"][0]
    assert "smaller.jpg is " in near["places"][0]
    assert same["option"] == "subset"
    assert "its metrics say too much" in same["advice"]


def test_copies_within_a_split(data: Data):
    data.add("train", "copy", noise_image(2), ("cat", (10, 10, 90, 90)))
    assert data.findings()["train: identical images within train"]["count"] == 1


def test_classes_in_one_split(data: Data):
    data.add("train", "t", noise_image(10), ("ant", (10, 10, 90, 90)))
    data.add("val", "v", noise_image(11), ("bee", (10, 10, 90, 90)))
    found = data.findings()
    assert found["train: classes with objects in train alone"]["places"] == ["ant"]
    assert found["val: classes with objects in val alone"]["places"] == ["bee"]
    assert "nothing is trained for them" in found["val: classes with objects in val alone"]["advice"]


def test_odd_boxes(data: Data):
    data.add("val", "tiny", noise_image(10), ("cat", (10, 10, 16, 17)))
    data.add("train", "tiny2", noise_image(12), ("cat", (10, 10, 16, 17)))
    data.add("train", "huge", noise_image(11), ("cat", (1, 1, 160, 120)))
    data.add("train", "two", noise_image(13), ("cat", (10, 10, 50, 50)), ("dog", (10, 10, 50, 50)))
    data.add("val", "dog", noise_image(14), ("dog", (10, 10, 50, 50)))
    found = data.findings()
    tiny = found["val: boxes with a side below 4 pixels once the image is resized"]
    assert "tiny.png: x 9..15, y 9..16" in tiny["places"][0]
    assert tiny["option"] == "val_transforms"
    assert "train: boxes with a side below 4 pixels once the image is resized" not in found, "it is not resized there"
    assert found["train: boxes that cover more than 95% of their image"]["count"] == 1
    assert found["train: boxes that are there with two classes"]["option"] == "rename_classes"


def test_odd_files(data: Data):
    data.add("train", "alpha", noise_image(20).convert("RGBA"), ("cat", (10, 10, 90, 90)))
    data.add("train", "wrong", noise_image(21), ("cat", (10, 10, 90, 90)), suffix=".jpg", format="PNG")
    data.add("train", "long", noise_image(22).resize((300, 40)), ("cat", (10, 10, 90, 30)))
    data.add("val", "jpeg", noise_image(23), ("cat", (10, 10, 90, 90)), suffix=".jpg")
    found = data.findings()
    assert found["train: images of other colour modes than the rest (RGB 5x, RGBA 1x)"]["count"] == 1
    assert "wrong.jpg is PNG" in found["train: images that are not what their suffix says"]["places"][0]
    assert found["train: images more than 5 times as long as wide"]["count"] == 1
    assert found["val: images of several formats (JPEG 1x, PNG 1x)"]["count"] == 1


def test_what_the_readers_report_is_told_in_parts(data: Data):
    square = ("cat", (10, 10, 60, 60))
    data.add("train", "flat", noise_image(30), ("cat", (10, 10, 10, 40)), square, square)
    data.add("train", "none", noise_image(31))
    found = data.findings()
    flat = found["train: box without area dropped"]
    assert (flat["count"], flat["option"]) == (1, "bad_boxes")
    assert "flat.xml:" in flat["places"][0]
    assert found["train: image without an object kept"]["option"] == "keep_empty"
    assert found["train: duplicate (same image, class and box) kept"]["option"] == "duplicates"


def test_the_table_and_the_status(data: Data):
    for number in range(5):
        data.add("val", f"copy{number}", noise_image(0), ("cat", (10, 10, 90, 90)))
    output = data.run().output
    assert max(map(len, output.splitlines())) <= 80
    assert output.startswith("count  split          finding\n    5  train and val  identical images in train and val\n")
    assert "- and 2 more" in output
    assert "(`subset`)" in output
    assert data.run("--strict", code=1).output == output


def test_data_that_cannot_be_read_is_an_error(data: Data):
    data.lists["val"].append("nowhere")
    result = data.run("--json", code=1)
    assert isinstance(result.exception, DataError)
    assert "val data: " in str(result.exception)
    assert json.loads(result.output)["errors"][0].startswith("val data: d/ImageSets/Main/val.txt:2")


def test_images_are_opened_once(data: Data, monkeypatch: pytest.MonkeyPatch):
    data.add("val", "copy", noise_image(0), ("cat", (10, 10, 90, 90)))
    before = data.run("--json").output
    opened: list[str] = []
    look = images._look
    monkeypatch.setattr(images, "_look", lambda path: opened.append(path) or look(path))
    assert data.run("--json").output == before
    assert opened == []
    noise_image(50).save("d/JPEGImages/copy.png")
    data.run("--json")
    assert [Path(path).name for path in opened] == ["copy.png"]


def test_a_note_is_a_text_and_a_finding():
    one = note("2 boxes without area dropped", ["a", "b"], "`bad_boxes: error` refuses them")
    assert one == "2 boxes without area dropped: a; b (`bad_boxes: error` refuses them)"
    assert one.finding == Finding(
        "boxes without area dropped", 2, ["a", "b"], "`bad_boxes: error` refuses them", "bad_boxes"
    )
    assert one.inside("data set 1").finding.what == "boxes without area dropped (data set 1)"
    assert Note("3 of 4 images").finding == Finding("3 of 4 images", 0, [])


def flat_box(data: Data, name: str) -> None:
    """An image with a box that is left out."""
    image = noise_image(20 + len(data.lists["train"]))
    data.add("train", name, image, ("cat", (10, 10, 90, 90)), ("cat", (5, 5, 5, 5)))


def told(caplog: pytest.LogCaptureFixture, *, config: str = "w", check: bool = False) -> list[str]:
    """What a run says of the training data; `config`: the work dir that its config names."""
    caplog.clear()
    reading = Voc(root=Path("d"), split="train")
    kernel = tiny_kernel({"data": Loader(train=reading, workers=0)}, work_dir="w", until="1 iter")
    kernel.state.config = {"run": {"work_dir": config}} if config else {}
    _ = kernel.check() if check else kernel.run()
    return [record.getMessage() for record in caplog.records if record.module == "build"]


def test_a_run_says_once_what_is_new(data: Data, caplog: pytest.LogCaptureFixture):
    flat_box(data, "one")
    data.run()
    flat_box(data, "two")
    data.write_lists()
    assert told(caplog) == [
        "train data: boxes without area dropped (2, 1 of them new)",
        "`detkernel doctor w` says where, and what to do about it",
    ], "what `doctor` said is known"
    assert told(caplog) == []
    for name in ("three", "four", "five"):
        flat_box(data, name)
    data.write_lists()
    assert told(caplog, config="") == [
        "train data: boxes without area dropped (5, 3 of them new)",
        "train data: w/train_data_warnings.txt has every place of these warnings",
    ], "without a config there is nothing that `doctor` could be given"
    flat_box(data, "six")
    data.write_lists()
    assert not any("doctor" in line for line in told(caplog, config="elsewhere")), "this folder will be removed"
    assert len(told(caplog, check=True)) == len(told(caplog, check=True)) == 1, "a check says all, each time"
    (cache_folder().parent / "findings").rename("elsewhere")
    assert told(caplog)[0] == "train data: boxes without area dropped (6)"


def test_what_was_said_of_data_that_is_not_known_is_said_again(data: Data, caplog: pytest.LogCaptureFixture):
    flat_box(data, "one")
    data.write_lists()
    assert told(caplog) != []
    (path,) = (cache_folder().parent / "findings").iterdir()
    path.write_text("{")
    assert told(caplog) != []
    assert told(caplog) == []


def test_a_loader_examines_what_it_has_loaded_and_opens_no_image(data: Data, monkeypatch: pytest.MonkeyPatch):
    data.add("val", "copy", noise_image(0), ("dog", (1, 1, 159, 119)))
    data.write_lists()
    sets = {split: Voc(root=Path("d"), split=split, class_names=["cat", "dog"]) for split in ("train", "val")}
    loader = Loader(**sets, workers=0)
    tiny_kernel({"data": loader}, work_dir="w", until="1 iter", validate="every 1 iter").run()
    look = images._look
    monkeypatch.setattr(images, "_look", None)
    assert {one.what for one in loader.examine_data()} == {
        "no object here of dog", "boxes that cover more than 95% of their image", "classes with objects in val alone",
    }  # fmt: skip
    monkeypatch.setattr(images, "_look", look)
    for dataset in sets.values():
        images.look([dataset.annotations(index).path for index in range(len(dataset))])
    assert "identical images in train and val" in {one.what for one in loader.examine_data()}
    monkeypatch.setattr("detkernel_data.loading.loader._MOST_EXAMINED", 3)
    assert [(one.what, one.split) for one in loader.examine_data()] == [("no object here of dog", "train")]
