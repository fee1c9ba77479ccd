"""A mistake gets one clear line: where, what, what was expected; exit status 2; no traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from .conftest import Detkernel

GOOD = """
run: {until: 2 iters, validate: every 2 iters, work_dir: work}
device: {}
data:
  use: loader
  train: {use: voc, root: data, split: train}
  val: {use: voc, root: data, split: train}
  batch_size: 2
  workers: 0
model: {use: fcos, backbone: {use: resnet, depth: 18, norm: frozen}, max_detections: 64}
optimizer: {use: sgd, lr: 0.001, momentum: 0.9}
evaluation: {use: coco_map}
log: {}
checkpoint: {}
"""
XML = """<annotation>
  <size><width>64</width><height>48</height><depth>3</depth></size>
  <object>
    <name>cat</name>
    <bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>
  </object>
</annotation>
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a config and two images in VOC form."""
    (tmp_path / "config.yaml").write_text(GOOD)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (64, 48), (90, 120, 30)).save(tmp_path / f"data/JPEGImages/{name}.jpg")
        (tmp_path / f"data/Annotations/{name}.xml").write_text(XML)
    (tmp_path / "data/ImageSets/Main/train.txt").write_text("a\nb\n")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


MISTAKES = {
    "a misspelt option": (
        lambda p: edit(p / "config.yaml", "momentum", "momentun"),
        "config.yaml:11:34: optimizer.momentun: there is no option 'momentun', did you mean 'momentum'?",
    ),
    "an option of a namesake": (
        lambda p: edit(p / "config.yaml", "max_detections: 64", "neck_channels: 64"),
        "model.neck_channels: there is no option 'neck_channels'; 'torchvision_fcos' has one",
    ),
    "a misspelt plugin": (
        lambda p: edit(p / "config.yaml", "use: fcos", "use: fcoss"),
        "config.yaml:10:14: model.use: there is no plugin 'fcoss', did you mean 'fcos'?",
    ),
    "a wrong type": (
        lambda p: edit(p / "config.yaml", "lr: 0.001", "lr: fast"),
        "config.yaml:11:27: optimizer.lr: expected a number, got the text 'fast'",
    ),
    "two models": (
        lambda p: edit(p / "config.yaml", "log: {}", "log: {}\nother: {use: retinanet}"),
        "2 plugins build the model: 'model' and 'other'",
    ),
    "no model": (
        lambda p: edit(
            p / "config.yaml",
            "model: {use: fcos, backbone: {use: resnet, depth: 18, norm: frozen}, max_detections: 64}",
            "",
        ),
        "no active plugin provides build_model",
    ),
    "a missing folder": (
        lambda p: shutil.rmtree(p / "data"),
        "data: there is no such folder",
    ),
    "a missing list": (
        lambda p: (p / "data/ImageSets/Main/train.txt").unlink(),
        "train.txt",
    ),
    "a broken XML": (
        lambda p: edit(p / "data/Annotations/b.xml", "</object>", "</obj>"),
        "data/Annotations/b.xml:6",
    ),
    "an unknown class": (
        lambda p: edit(p / "config.yaml", "split: train}", "split: train, class_names: [dog]}"),
        "`class_names` names 'dog', which the annotations do not have; they have: cat 2x",
    ),
    "another size": (
        lambda p: edit(p / "data/Annotations/b.xml", "<width>64", "<width>63"),
        "data/Annotations/b.xml: states a size of 63x48, but data/JPEGImages/b.jpg is 64x48",
    ),
    "a truncated image": (
        lambda p: (p / "data/JPEGImages/b.jpg").write_bytes((p / "data/JPEGImages/b.jpg").read_bytes()[:-300]),
        "data/JPEGImages/b.jpg: Truncated File Read",
    ),
    "nothing left": (
        lambda p: edit(p / "config.yaml", "split: train}", "split: train, min_side: 400}"),
        "no object is left of 2, in 2 images:\n  2 images dropped, a side of less than 400 pixels",
    ),
    "a bad box": (
        lambda p: (
            edit(p / "data/Annotations/b.xml", "<xmax>30", "<xmax>5"),
            edit(p / "config.yaml", "split: train}", "split: train, bad_boxes: error}"),
        ),
        "data/Annotations/b.xml:3: object 1 'cat'",
    ),
    "weights that are not there": (
        lambda p: edit(p / "config.yaml", "depth: 18,", "depth: 18, weights: my.pt,"),
        "config.yaml:10:64: model.backbone.weights: there is no file 'my.pt'",
    ),
    "a metric that is not there": (
        lambda p: edit(p / "config.yaml", "checkpoint: {}", "checkpoint: {best: coco/mAP}"),
        "config.yaml:14:20: checkpoint.best: no metric is named 'coco/mAP', did you mean 'coco/bbox_mAP'?",
    ),
    "flips in validation": (
        lambda p: edit(p / "config.yaml", "  workers: 0", "  workers: 0\n  val_transforms: [flip]"),
        "config.yaml:10:19: data.val_transforms: Flip (number 0) moves objects",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name: str, project: Path, detkernel_here: Detkernel) -> None:
    spoil, expected = MISTAKES[name]
    spoil(project)
    result = detkernel_here("run", "config.yaml")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert expected in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(said) <= 1
    assert not list((project / "work").rglob("*.tmp*"))


def test_boxes_that_cannot_be_used_are_counted_and_listed(project: Path, detkernel_here: Detkernel) -> None:
    edit(project / "data/Annotations/b.xml", "<xmax>30", "<xmax>5")
    result = detkernel_here("run", "config.yaml")
    assert result.returncode == 0, result.stderr
    log = (project / "work/log.txt").read_text()
    assert "train data: box without area dropped (1)" in log
    assert "1 of 2 images have no object: not trained on" in log


def test_a_process_says_it_alike(project: Path, detkernel: Detkernel) -> None:
    spoil, expected = MISTAKES["a broken XML"]
    spoil(project)
    result = detkernel("run", "config.yaml")
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_offline_weights_are_one_line(project: Path, detkernel: Detkernel) -> None:
    edit(project / "config.yaml", "depth: 18,", "depth: 18, weights: DEFAULT,")
    environment = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(project / "hub")}
    result = detkernel("run", "config.yaml", env=environment)
    assert result.returncode == 2
    assert "cannot be downloaded from https://download.pytorch.org/models/resnet18" in result.stderr
    assert "Traceback" not in result.stderr
