import json
import re

import numpy as np
import pytest
import torch
from browser import chromium
from click.testing import CliRunner
from detkernel import UserError, hookimpl, option, plugin
from detkernel.cli import cli
from detkernel_detection import Annotations
from detkernel_detection.testing import TinyData, TinyDataset, tiny_kernel
from detkernel_report.browse import Shown, browse, contact_sheet
from detkernel_report.browse_page import gallery
from PIL import Image
from test_report_page import HOSTILE, Parsed


@plugin
class Odd(TinyDataset):
    """Small images with something odd in each: nothing, a tiny box, a huge one, one twice, a crowd, a mask."""

    hostile: bool = option(default=False, help="whether its names are")

    def load(self):
        super().load()
        self.notes = [Note("2 boxes repaired: odd-1.txt:3", ["/labels/odd-1.txt:3: object 1", "/labels/odd-2.txt:4"])]
        if self.hostile:
            self.classes = (HOSTILE, "green", "blue")

    def annotations(self, index):
        boxes = [[], [(1, 1, 3, 20)], [(0, 0, 32, 32)], [(4, 4, 20, 20)] * 2, [(2, 2, 9, 9), (8, 8, 30, 30)]][index % 5]
        boxes = np.array(boxes, float).reshape(-1, 4)
        crowd = np.arange(len(boxes)) == (0 if index % 5 == 4 else -1)
        polygon = [[0, 0, 31, 0, 31, 31, 0, 31]]
        runs = {"size": [32, 32], "counts": "`P1"}
        return Annotations(
            index, f"/images/{HOSTILE if self.hostile else 'odd'}-{index}.png", 32, 32, boxes,
            np.zeros(len(boxes), int),
            np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), crowd, np.zeros(len(boxes), bool),
            masks=[[polygon[0]] if number % 2 else runs for number in range(len(boxes))],
        )  # fmt: skip


class Note(str):
    def __new__(cls, text, places):
        made = super().__new__(cls, text)
        made.places = places
        return made


def kernel(tmp_path, **options):
    return tiny_kernel({"data": TinyData(dataset=Odd(size=10, **options))}, validate="every 4 iters", work_dir=tmp_path)


def test_the_samples_are_those_of_the_first_epoch_and_nothing_is_trained_or_written(tmp_path):
    made = kernel(tmp_path)
    train, val = browse(made, (), 4, 100, raw=False)
    assert (train.name, val.name, train.total, len(train.images)) == ("train", "val", 10, 4)
    seen = tiny_kernel({"data": TinyData(dataset=Odd(size=10))}, work_dir=tmp_path / "other")
    with seen.loading() as run:
        from detkernel.loop import load

        batch = next(iter(load(run, "train").batches(0)))
    assert [one.name for one in train.images[:2]] == [f"/images/odd-{index}.png" for index in batch.indices]
    assert made.state.model is None
    assert not [path for path in tmp_path.iterdir() if path.name != "other"]


def test_transforms_of_batches_are_seen(tmp_path):
    @plugin
    class Red(TinyData):
        """Paints every training batch."""

        @hookimpl
        def before_train_iter(self, run, batch):
            batch.images[:] = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]

    made = tiny_kernel({"data": Red(dataset=Odd(size=5))}, validate="every 4 iters", work_dir=tmp_path)
    train, val = browse(made, (), 5, 100, raw=False)
    empty = next(one for one in train.images if not one.objects)
    assert np.asarray(empty.drawn)[10, 10].tolist() == [200, 0, 0]
    assert np.asarray(next(one for one in val.images if not one.objects).drawn)[10, 10].tolist() == [20, 20, 20]


def by_name(split):
    return {re.sub(r".*odd-(\d+).*", r"\1", one.name): one for one in split.images}


def test_what_is_odd_about_an_image_is_said(tmp_path):
    (split,) = browse(kernel(tmp_path), ("val",), 10, 100, raw=True)
    found = {name: one.findings for name, one in by_name(split).items()}
    assert found["0"] == ("no object",)
    assert found["1"] == ("2 boxes repaired", "an object narrower than 4 pixels")
    assert found["2"] == ("2 boxes repaired", "an object that covers more than 90% of the image")
    assert found["3"] == ("an object annotated twice",)
    assert found["4"] == ("crowds or difficult objects",)
    assert found["5"] == ("no object",)
    assert [one.name for one in split.images[:2]] == ["/images/odd-1.png", "/images/odd-2.png"]
    assert by_name(split)["2"].sizes == {"medium"}
    assert by_name(split)["2"].classes == {"red"}


def test_masks_of_polygons_and_run_lengths_are_drawn_in_raw_images(tmp_path):
    (split,) = browse(kernel(tmp_path), ("val",), 10, 32, raw=True)
    inside = np.asarray(by_name(split)["3"].drawn.resize((32, 32))).astype(int)
    assert (inside[28, 28] != [20, 20, 20]).any()  # the second of the two has a polygon over the whole image


def test_a_contact_sheet_has_every_image(tmp_path):
    (split,) = browse(kernel(tmp_path), ("train",), 6, 64, raw=False)
    from io import BytesIO

    with Image.open(BytesIO(contact_sheet(split, raw=False, columns=3))) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 3 * 64
        assert sheet.height > 2 * 64


@pytest.mark.parametrize(
    ("split", "said"),
    [("tran", "no split is named 'tran', did you mean 'train'"), ("night", "no split is named 'night'")],
)
def test_a_split_that_there_is_not_is_one_message(tmp_path, split, said):
    with pytest.raises(UserError, match=said):
        browse(kernel(tmp_path), (split,), 4, 64, raw=False)


def test_names_are_escaped_in_the_gallery(tmp_path):
    splits = browse(kernel(tmp_path, hostile=True), (), 5, 64, raw=True)
    text = gallery(HOSTILE, splits, raw=True)
    page = Parsed(text)
    assert "onerror" not in {name for _, attributes in page.elements for name in attributes}
    assert len(page.all("script")) == 1
    assert all("alt" in one for one in page.all("img"))
    assert "\u202e" not in text


CONFIG = """
run: {until: 4 iters, work_dir: runs/odd}
data: {use: loader, workers: 0, batch_size: 2, train: {use: shapes, size: 6}, val: {use: shapes, size: 6, split: val},
       train_transforms: [{use: resize, size: [48, 64]}, normalize]}
model: {use: fcos, backbone: {use: resnet, depth: 18}}
"""


def test_the_command_writes_sheets_and_a_page(tmp_path, monkeypatch):
    pytest.importorskip("detkernel_data")
    pytest.importorskip("detkernel_detectors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = ["browse", "config.yaml", "data.train.size=5", "--count", "3", "--side", "64"]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert done.exception is None, done.exception
    assert done.output.split() == [
        word for name in ("train.png", "val.png", "browse.html") for word in ("wrote", f"runs/odd/browse/{name}")
    ]
    page = Parsed((tmp_path / "runs" / "odd" / "browse" / "browse.html").read_text())
    assert "3 of 5 of train, 3 of 6 of val" in page.text
    assert "64x48" in page.text
    assert "128x128" in page.text
    done = CliRunner().invoke(cli, [*arguments, "--raw", "--split", "val", "-o", "raw"], standalone_mode=False)
    assert done.exception is None, done.exception
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["browse.html", "val.png"]


def test_filters_show_what_they_let_through(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("gallery")
    path = tmp_path / "browse.html"
    path.write_text(gallery("odd", browse(kernel(tmp_path), (), 10, 64, raw=True), raw=True))
    with chromium(tmp_path / "profile") as browser:
        browser.open(path.as_uri())
        assert browser.run("document.querySelector('.filters').hidden") is False
        shown = "[...document.querySelectorAll('.gallery figure')].filter((one) => one.getClientRects().length).length"
        assert browser.run(shown) == 20
        choose = """((name, text) => {
          const select = document.querySelector(`select[name=${name}]`);
          select.value = [...select.options].find((one) => one.textContent.startsWith(text)).value;
          select.dispatchEvent(new Event("change", {bubbles: true}));
        })"""
        browser.run(f"{choose}('split', 'val')")
        assert browser.run(shown) == 10
        browser.run(f"{choose}('finding', 'no object')")
        assert browser.run(shown) == 2
        assert browser.run("document.querySelector('[role=status]').textContent") == "2 of 20 images"
        browser.run(f"{choose}('class', 'red')")
        assert browser.run(shown) == 0
        browser.run(
            "new Promise((done) => { document.querySelector('button[type=reset]').click(); setTimeout(done, 20); })"
        )
        assert browser.run(shown) == 20
        assert browser.problems == []
        browser.open(path.as_uri(), width=390, height=844, dark=True)
        assert browser.run("document.documentElement.scrollWidth") <= 390


def test_shown_is_what_a_page_is_made_of():
    image = Shown("train", "x.png", Image.new("RGB", (4, 4)), (4, 4), frozenset(), frozenset(), (), 0)
    assert json.dumps(image.findings) == "[]"
