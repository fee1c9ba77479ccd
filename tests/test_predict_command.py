"""`detkernel predict` and `detkernel_export.load`, with a checkpoint of a real run."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from detkernel import CheckpointError, ConfigError, DataError, UserError
from detkernel.cli import cli, main
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.yolo import Yolo
from detkernel_detection import Dataset
from detkernel_export import Model, load
from PIL import Image

CONFIG = """
run: {until: 2 iters, validate: every 2 iters, work_dir: work}
device: {threads: 1}
data:
  use: loader
  train: {use: shapes, size: 4, side: 64, sizes: [12, 40]}
  val: {use: shapes, size: 2, side: 64, sizes: [12, 40], split: val}
  val_transforms: [{use: resize, size: [96, 96]}]
  batch_size: 2
  workers: 0
model:
  use: retinanet
  backbone: {use: resnet, depth: 18, channels: 16}
  neck: {use: fpn, channels: 16}
  head: {use: towers, channels: 16, convs: 1}
  max_detections: 20
  score_thresh: 0
optimizer: {use: adamw, lr: 1e-3}
evaluation: {use: coco_map}
checkpoint: {}
"""
ALL = ["--score", "0"]
FORMS = ("coco", "yolo", "voc", "csv")


def ran(*words: Any) -> Result:
    """A command in this process; an error is in `exception`, as the entry point gets it."""
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a checkpoint of it elsewhere, and three photos, one of them in a folder below."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(CONFIG)
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = ran("run", "config.yaml")
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
    draw = np.random.default_rng(0)
    (folder / "photos" / "more").mkdir(parents=True)
    for name, size in (("a.png", (80, 100)), ("b.jpg", (60, 60)), ("more/a.png", (80, 100))):
        Image.fromarray(draw.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / "photos" / name)
    (folder / "best.pt").write_bytes((folder / "work" / "checkpoints" / "iter_2.pt").read_bytes())
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to predict in."""
    monkeypatch.chdir(tmp_path)
    return trained


@pytest.fixture(scope="module")
def model(trained: Path) -> Any:
    with load(trained / "best.pt") as loaded:
        yield loaded


class TestLoad:
    def test_two_lines_find_what_a_test_finds(self, here: Path, model: Model):
        found = model.predict(str(here / "photos" / "a.png"), score=0)
        assert (len(found), found.width, found.height) == (20, 100, 80)
        assert model.classes == ("circle", "square", "triangle")
        with torch.no_grad():
            from detkernel_detection.predictor import Predictor

            wanted = Predictor(model.module, model.transforms).predict(here / "photos" / "a.png")
        assert torch.equal(found.detections.boxes, wanted.boxes)
        assert torch.equal(found.detections.scores, wanted.scores)
        assert not list(Path.cwd().iterdir()), "nothing is written"

    def test_several_are_found_as_each_alone_whatever_the_batch(self, here: Path, model: Model):
        photos = [here / "photos" / name for name in ("a.png", "b.jpg", "more/a.png")]
        alone = [model.predict(photo, score=0) for photo in photos]
        for one, other in zip(model.predict(photos, score=0, batch_size=2), alone, strict=True):
            assert one.path == other.path
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        pixels = np.asarray(Image.open(photos[0]))
        assert np.array_equal(model.predict(pixels, score=0).boxes, alone[0].boxes)
        middle = float(alone[0].scores[5])
        assert len(model.predict(photos[0], score=middle)) == 6

    def test_it_leaves_the_random_numbers_of_its_caller_alone(self, here: Path):
        torch.manual_seed(3)
        first = torch.rand(1)
        torch.manual_seed(3)
        load(here / "best.pt", device="cpu").close()
        assert torch.equal(torch.rand(1), first)

    def test_after_it_is_closed_it_says_so(self, here: Path):
        closed = load(here / "best.pt")
        closed.close()
        with pytest.raises(UserError, match="it is closed"):
            closed.predict(here / "photos" / "a.png")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("none.pt", "there is no such checkpoint"),
            ("photos", "is a folder; give a checkpoint in it"),
        ],
    )
    def test_what_is_not_a_checkpoint(self, here: Path, name: str, said: str):
        with pytest.raises(UserError, match=said):
            load(here / name)

    def test_one_word_alone_is_answered_with_what_is_missing(self, here: Path):
        assert str(ran("predict", here / "best.pt").exception).startswith("on which images? detkernel predict ")
        said = str(ran("predict", here / "photos").exception)
        assert said.startswith("with which detector, and on which images? detkernel predict CHECKPOINT ")

    def test_of_the_folder_of_a_run_it_is_the_best(self, here: Path):
        with load(here / "work") as model:
            assert model.name == str(here / "work/checkpoints/last.pt"), "this run kept no best one"

    def test_weights_of_others_need_a_config(self, here: Path, model: Model, tmp_path: Path):
        torch.save(model.module.state_dict(), tmp_path / "weights.pt")
        with pytest.raises(CheckpointError):
            load(tmp_path / "weights.pt")
        names = "checkpoint.load_from_classes=[circle, square, triangle]"
        with load(tmp_path / "weights.pt", config=here / "config.yaml", overrides=[names]) as other:
            photo = here / "photos" / "b.jpg"
            assert np.array_equal(other.predict(photo, score=0).boxes, model.predict(photo, score=0).boxes)

    def test_a_checkpoint_of_a_stranger_runs_no_code_and_writes_nowhere(self, here: Path, tmp_path: Path):
        from detkernel_checkpoint import checkpoint_file

        content = checkpoint_file.read(here / "best.pt")
        config = content["provenance"]["config"]
        (tmp_path / "evil.py").write_text("raise SystemExit('run')")
        config["model"] = {"use": "./evil.py:Evil"}
        checkpoint_file.write(tmp_path / "evil.pt", content)
        with pytest.raises(ConfigError, match="may not run code from a file"):
            load(tmp_path / "evil.pt")

    def test_pretrained_weights_are_not_looked_for(self, here: Path, tmp_path: Path):
        """A checkpoint has all weights: what its options name may be a download, or gone."""
        from detkernel_checkpoint import checkpoint_file

        content = checkpoint_file.read(here / "best.pt")
        content["provenance"]["config"]["model"]["weights"] = "gone.pth"
        checkpoint_file.write(tmp_path / "tuned.pt", content)
        with load(tmp_path / "tuned.pt") as loaded:
            assert len(loaded.predict(here / "photos" / "a.png", score=0)) == 20


class TestCommand:
    def test_every_form_is_read_again(self, here: Path, model: Model):
        done = ran("predict", here / "best.pt", here / "photos", *ALL, *(w for f in FORMS for w in ("--save", f)))
        assert done.exit_code == 0, done.output
        assert "3 images, 60 detections of score 0 or more" in done.output
        output = Path("predictions")
        assert {str(path.relative_to(output)) for path in (output / "drawn").rglob("*.jpg")} == {
            "drawn/a.jpg", "drawn/b.jpg", "drawn/more/a.jpg",
        }  # fmt: skip
        names = ("a.png", "b.jpg", "more/a.png")
        wanted = {name: model.predict(here / "photos" / name, score=0) for name in names}
        coco = Coco(annotation_file=output / "coco.json", image_folder=output / "images")
        self.check_read(coco, wanted, model)
        self.check_read(Yolo(data=output / "data.yaml", split="val"), wanted, model)
        self.check_read(Voc(root=output, split=None, image_folder="images"), wanted, model)
        with (output / "detections.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 60
        assert rows[0]["image"] == str(here / "photos" / "a.png")
        assert float(rows[0]["score"]) == pytest.approx(float(wanted["a.png"].scores[0]), abs=1e-6)
        scores = [entry["score"] for entry in json.loads((output / "coco.json").read_text())["annotations"]]
        assert scores[:20] == [float(score) for score in wanted["a.png"].scores]

    def check_read(self, dataset: Dataset, wanted: dict[str, Any], model: Model) -> None:
        """Boxes without area are left out by every reader's `truth`."""
        dataset.load()
        seen = 0
        for index in range(len(dataset)):
            notes = dataset.truth(index)
            name = Path(notes.path).name.replace("more_", "more/")
            if name in wanted:
                seen += 1
                assert len(notes) == len(wanted[name])
                np.testing.assert_allclose(notes.boxes, wanted[name].boxes, atol=2e-3)
                theirs = [dataset.classes[label] for label in notes.labels]
                assert theirs == wanted[name].names
        assert seen == len(wanted)

    def test_the_score_of_the_best_f1_at_validation_is_the_default(self, here: Path, model: Model):
        from detkernel_checkpoint import checkpoint_file

        photo = here / "photos" / "a.png"
        middle = float(model.predict(photo, score=0).scores[5])
        content = checkpoint_file.read(here / "best.pt")
        assert model.best_score is None, "its run has no plugin that measures it"
        content["position"]["metrics"]["score_threshold"] = middle
        checkpoint_file.write(Path("measured.pt"), content)
        done = ran("predict", "measured.pt", photo)
        assert f"1 image, 6 detections of score {middle:.3g} or more" in done.output
        assert f"  score {middle:.3g} has the best F1 at its validation; --score takes another" in done.output
        done = ran("predict", "measured.pt", photo, *ALL)
        assert "20 detections of score 0 or more" in done.output
        assert "F1" not in done.output
        with load("measured.pt") as loaded:
            assert len(loaded.predict(photo)) == 6

    def test_nothing_but_drawings_unless_asked_for(self, here: Path):
        done = ran("predict", here / "best.pt", here / "photos" / "b.jpg", "-o", "out")
        assert [path.name for path in Path("out").iterdir()] == ["drawn"]
        assert "nothing was found; --score 0.1 shows more" in done.output
        ran("predict", here / "best.pt", here / "photos" / "b.jpg", "-o", "two", "--no-draw", "--save", "csv")
        assert [path.name for path in Path("two").iterdir()] == ["detections.csv"]

    def test_broken_images_are_told_and_the_others_done(self, here: Path):
        (Path("mixed")).mkdir()
        (Path("mixed") / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
        (Path("mixed") / "good.jpg").write_bytes((here / "photos" / "b.jpg").read_bytes())
        done = ran("predict", here / "best.pt", "mixed", *ALL)
        assert isinstance(done.exception, DataError)
        assert "1 of 2 images cannot be read; all others are done:\n  mixed/bad.jpg: " in str(done.exception)
        assert Path("predictions/drawn/good.jpg").is_file()
        assert "1 image, 20 detections" in done.output
        done = ran("predict", here / "best.pt", "mixed/bad.jpg", *ALL)
        assert str(done.exception).startswith("1 of 1 image cannot be read:\n  mixed/bad.jpg: ")
        assert done.output == "", "nothing was done"

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["none.jpg"], "none.jpg: there is no such image, folder or video"),
            (["0"], "0: there is no such image, folder or video; a camera is camera:0"),
            (["photos", "-o", "best.pt"], "best.pt: there is a file of this name; give another folder with --output"),
            (["photos/a.png", "-o", "photos"], "lies in the folder for the results"),
        ],
    )
    def test_mistakes_are_told_before_anything(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
    ):
        monkeypatch.chdir(trained)
        done = ran("predict", "best.pt", *words)
        assert isinstance(done.exception, UserError)
        assert said in str(done.exception)
        assert not (trained / "predictions").exists()

    def test_the_entry_point_ends_with_status_2(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ):
        monkeypatch.setattr(sys, "argv", ["detkernel", "predict", "none.pt", "none.jpg"])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        assert (ended.value.code, told.out) == (2, "")
        assert told.err == "error: none.jpg: there is no such image, folder or video\n"

    def test_a_video_becomes_one_with_drawings(self, here: Path):
        cv2 = pytest.importorskip("cv2")
        writer = cv2.VideoWriter("film.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (400, 300))
        for level in range(5):
            writer.write(np.full((300, 400, 3), 40 * level, dtype=np.uint8))
        writer.release()
        done = ran("predict", here / "best.pt", "film.avi", *ALL, "--frames", 4, "--save", "csv", "--save", "coco")
        assert done.exit_code == 0, done.output
        drawn = cv2.VideoCapture("predictions/drawn/film.mp4")
        assert int(drawn.get(cv2.CAP_PROP_FRAME_COUNT)) == 4
        assert (drawn.get(cv2.CAP_PROP_FRAME_WIDTH), drawn.get(cv2.CAP_PROP_FPS)) == (400, 10)
        drawn.release()
        assert (Path("predictions") / "images" / "film_000004.jpg").is_file()
        Path("broken.mp4").write_bytes(b"no film")
        done = ran("predict", here / "best.pt", "broken.mp4")
        assert isinstance(done.exception, DataError)
        assert "broken.mp4: cannot be opened" in str(done.exception)


def test_a_huge_image_is_looked_at_in_tiles(here: Path, model: Model):
    Image.MAX_IMAGE_PIXELS, before = 4000, Image.MAX_IMAGE_PIXELS
    try:
        with pytest.raises(DataError, match="cut it into tiles"):
            model.predict(here / "photos" / "a.png")
        found = model.predict(here / "photos" / "a.png", score=0, tiles=64)
        assert Image.MAX_IMAGE_PIXELS == 4000
    finally:
        Image.MAX_IMAGE_PIXELS = before
    assert len(found) > 20
    assert found.boxes[:, 2].max() > 64


def test_a_high_image_is_converted_in_strips(tmp_path: Path):
    from detkernel_detection.images import decode

    pixels = np.random.default_rng(0).integers(0, 255, (4200, 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "high.png")
    assert np.array_equal(decode(str(tmp_path / "high.png"), apply_exif=False).permute(1, 2, 0).numpy(), pixels)
