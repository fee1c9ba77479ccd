"""`detkernel export`, and an exported file in the place of a checkpoint: the same detections, the same metrics."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from detkernel import CheckpointError, ConfigError, UserError
from detkernel.cli import cli
from detkernel_detection.predictions import Predictions
from detkernel_export import load
from detkernel_export.export import differences
from PIL import Image

from .conftest import long
from .pages import block

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONFIG = """
run: {until: 2 iters, work_dir: work}
device: {threads: 1}
data:
  use: loader
  train: {use: shapes, size: 4, side: 64, sizes: [12, 40]}
  val: {use: shapes, size: 3, side: 64, sizes: [12, 40], split: val}
  val_transforms: [{use: resize, size: [64, 96]}]
  batch_size: 2
  workers: 0
model:
  use: retinanet
  backbone: {use: resnet, depth: 18, channels: 8}
  neck: {use: fpn, channels: 8}
  head: {use: towers, channels: 8, convs: 1}
  max_detections: 20
  score_thresh: 0
optimizer: {use: adamw, lr: 1e-3}
ema: {}
evaluation: {use: coco_map}
checkpoint: {}
"""


def ran(*words: Any) -> Result:
    """A command in this process; an error is in `exception`, as the entry point gets it."""
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run, its checkpoint as an ONNX file in it, and what the command said."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "config.yaml").write_text(CONFIG)
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = ran("run", "config.yaml")
        assert done.exit_code == 0, done.output
        done = ran("export", "work/checkpoints/iter_2.pt", "-o", "work/best.onnx")
        assert done.exit_code == 0, (done.output, done.exception)
    finally:
        os.chdir(before)
    return folder, done.output


@pytest.fixture
def here(exported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(exported[0])
    return exported[0]


def test_it_says_what_was_written_and_how_far_it_is_from_the_original(exported: tuple[Path, str]):
    lines = exported[1].replace("\n  ", " ").splitlines()
    assert lines[0].startswith("wrote work/best.onnx (")
    assert lines[0].endswith("any number of images of 96x64")
    assert lines[1].startswith("checked with ONNX Runtime: 60 detections in 3 images of the data; largest difference: ")
    assert lines[2] == "next: detkernel test work/best.onnx"
    assert sorted(path.name for path in (exported[0] / "work").glob("*best*")) == ["best.onnx"]


def test_a_test_of_the_file_measures_what_the_checkpoints_does(here: Path):
    original, file = ran("test", "work/checkpoints/iter_2.pt"), ran("test", "work/best.onnx")
    assert file.exit_code == 0, (file.output, file.exception)
    metrics = [
        {
            name: float(value)
            for name, value in (line.rsplit(": ", 1) for line in done.output.splitlines() if "coco/" in line)
        }
        for done in (original, file)
    ]
    assert len(metrics[0]) >= 12
    assert metrics[1] == pytest.approx(metrics[0], abs=1e-3, nan_ok=True)


def test_predictions_are_the_originals_whatever_the_batch(here: Path, tmp_path: Path):
    draw = np.random.default_rng(0)
    photos = []
    for number in range(3):
        photos.append(tmp_path / f"{number}.png")
        Image.fromarray(draw.integers(0, 255, (80, 100, 3), dtype=np.uint8)).save(photos[-1])
    with load("work/checkpoints/iter_2.pt", device="cpu") as model, load("work/best.onnx") as file:
        assert file.classes == model.classes
        for wanted, found in zip(
            model.predict(photos, score=0), file.predict(photos, score=0, batch_size=2), strict=True
        ):
            np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-4)
    assert ran("predict", "work/best.onnx", photos[0], "-o", tmp_path / "out").exit_code == 0


def test_a_program_without_torch_finds_the_same(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The one that the page about export shows, with a threshold that an untrained detector passes."""
    code = block("docs/guides/export.md", "onnxruntime").replace("0.5", "0")
    assert "torch" not in code
    (tmp_path / "runs/cells/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/cells/checkpoints/best.onnx").symlink_to(here / "work/best.onnx")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    exec(code, values)
    with load("runs/cells/checkpoints/best.onnx") as file:
        found = file.predict("image.jpg", score=0)
    place = values["valid"][0]
    assert len(found) == place.sum() == 20
    np.testing.assert_allclose(values["boxes"][0][place] / values["scale"], found.boxes, atol=0.01)
    assert [values["about"]["classes"][label] for label in values["labels"][0][place]] == found.names


def test_labels_go_by_the_names_of_the_data(here: Path):
    from detkernel_export.exported import metadata
    from detkernel_export.session import OnnxDetector

    held = metadata(Path("work/best.onnx"))
    assert held["classes"] == ["circle", "square", "triangle"]
    images = torch.randint(0, 255, (2, 3, 64, 96), dtype=torch.uint8)
    as_it_is, turned, fewer = (
        OnnxDetector(Path("work/best.onnx"), held, classes, "cpu")(images)
        for classes in (held["classes"], ["triangle", "circle", "square"], ["triangle"])
    )
    assert torch.equal(turned.labels, (as_it_is.labels + 1) % 3)
    kept = as_it_is.labels == 2
    assert fewer.valid.sum() == (kept & as_it_is.valid).sum()
    assert torch.equal(fewer.scores[0][fewer.valid[0]], as_it_is.scores[0][kept[0] & as_it_is.valid[0]])
    with pytest.raises(UserError, match="does not know the class 'circles' of the data, did you mean 'circle'"):
        OnnxDetector(Path("work/best.onnx"), held, ["circles"], "cpu")


def test_larger_images_are_refused_and_so_is_training(here: Path):
    done = ran("test", "work/best.onnx", "data.val_transforms=[]", "data.val.side=128")
    assert "takes images of up to 96x64" in str(done.exception)
    done = ran("run", "work/best.onnx", "optimizer={use: adamw, lr: 0.1}")
    assert isinstance(done.exception, UserError)
    assert "an exported file cannot be trained" in str(done.exception)


def test_a_file_that_differs_is_not_kept(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import detkernel_export.export as module

    target = tmp_path / "new" / "best.onnx"
    monkeypatch.setattr("detkernel_export.graph.program", lambda *_: None)
    source = Path("work/best.onnx").read_bytes()
    monkeypatch.setattr("detkernel_export.graph.onnx_file", lambda _, path, *__: Path(path).write_bytes(source))
    with load("work/checkpoints/iter_2.pt", device="cpu") as model:
        for parameter in model.module.parameters():
            parameter.data.mul_(1.01)
        with pytest.raises(UserError, match=r"does not find what the original does: it was removed; .*allowed 0\.0001"):
            list(module.write(model, target, "onnx"))
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "12"], "--size: expected height x width in pixels, such as 480x640, got '12'"),
        (["-o", "best.pt2"], "best.pt2: expected a file that ends with .onnx"),
        (["--set", "data.val_transforms=[]"], "--size: its transforms leave images as large as they are"),
    ],
)
def test_mistakes_are_told(here: Path, words: list[str], said: str):
    done = ran("export", "work/checkpoints/iter_2.pt", *words)
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_what_it_says_fits_80_columns(here: Path, monkeypatch: pytest.MonkeyPatch):
    said = "checked with ONNX Runtime: 400 detections in 4 images of the data; largest difference: scores 6.3e-07"
    monkeypatch.setattr("detkernel_export.export.write", lambda *_, **__: iter([said]))
    monkeypatch.setenv("COLUMNS", "80")
    lines = ran("export", "work/checkpoints/iter_2.pt").output.splitlines()
    assert " ".join(lines).split() == said.split()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80


def test_what_is_missing_is_said_with_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for words in (["export", "work/checkpoints/iter_2.pt"], ["test", "work/best.onnx"]):
        assert "pip install 'detkernel-export[onnx]'" in str(ran(*words).exception)


def test_files_of_others_are_refused(here: Path, tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "a.pt2").write_bytes(b"PK")
    for name, said in (
        ("broken.onnx", "not an ONNX file that can be run"),
        ("a.pt2", "any other torch.export file can run code when torch loads it"),
    ):
        done = ran("test", tmp_path / name)
        assert isinstance(done.exception, (CheckpointError, ConfigError))
        assert said in str(done.exception)


@long
def test_a_torch_export_file_that_was_written_here_is_tested_and_predicted_with(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = ran("export", "work/checkpoints/iter_2.pt", "--to", "torch-export", "-o", "work/best.pt2")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "next: detkernel test work/best.pt2" in done.output
    metrics = [
        [line for line in ran("test", name).output.splitlines() if "coco/bbox_mAP" in line]
        for name in ("work/checkpoints/iter_2.pt", "work/best.pt2")
    ]
    assert metrics[0]
    assert metrics[1] == metrics[0]
    copied = tmp_path / "copied.pt2"
    copied.write_bytes(Path("work/best.pt2").read_bytes())
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    with load("work/checkpoints/iter_2.pt", device="cpu") as model, load(copied) as file:
        assert file.classes == model.classes
        wanted, found = model.predict(pixels, score=0), file.predict(pixels, score=0)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-6)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))
    refused = ran("test", "work/best.pt2")
    assert isinstance(refused.exception, CheckpointError)
    assert "not a file that `detkernel export` wrote for you here" in str(refused.exception)


def test_differences_pair_what_has_changed_places():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 90, 90]]])
    one = Predictions(boxes, torch.tensor([[0.5, 0.5]]), torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    other = Predictions(boxes.flip(1) + 1, torch.tensor([[0.5, 0.4]]), torch.tensor([[1, 0]]), one.valid)
    assert differences(other, one, 100) == pytest.approx({"score": 0.1, "box": 0.01, "mask": 0, "keypoint": 0})
    less = one._replace(valid=torch.tensor([[True, False]]))
    assert differences(less, one, 100)["score"] == float("inf")
