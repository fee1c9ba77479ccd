"""A prediction: images without annotations, the classes of the weights, and what a validation would have found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import Run, UserError, hookimpl, plugin, state
from detkernel.testing import Recorder
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.formats.image_folder import ImageFolder
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.standard import Flip, Resize
from detkernel_detection import Detections
from detkernel_detection.testing import TinyDataset, tiny_kernel
from detkernel_evaluation.coco import CocoMap
from detkernel_runtime.device import Device
from PIL import Image


@plugin
class Keep:
    """Keeps what is found in a test, and the error that a run ends with."""

    found: list[Detections] = state(factory=list)
    ended: Any = state()
    training: bool = state()

    @hookimpl
    def after_val_iter(self, run: Run, detections: list[Detections]) -> None:
        if run.mode == "test":
            self.found += detections

    @hookimpl
    def before_run(self, run: Run) -> None:
        self.training = run.model.training

    @hookimpl
    def after_run(self, run: Run) -> None:
        self.ended = run.error, self.training


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The images of the test set, in PNG files, one of them below another folder."""
    dataset, folder = TinyDataset(size=5, seed=9), tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    dataset.load()
    for number in range(5):
        name = f"{number}.png" if number < 4 else "more/4.png"
        Image.fromarray(dataset.image(number).permute(1, 2, 0).numpy()).save(folder / name)
    (folder / "read.me").write_text("not an image")
    return folder


def kernel(folder: Path, recorder: Recorder | None = None, workers: int = 0, **plugins: Any) -> Any:
    photos = ImageFolder(root=folder / "photos", recursive=True)
    data = Loader(
        train=TinyDataset(size=4), test=TinyDataset(size=5, seed=9), predict=photos, workers=workers,
        val_transforms=[Resize(size=(48, 48))],
    )  # fmt: skip
    standard = {"device": Device(device="cpu"), "data": data, "coco": CocoMap(), "checkpoint": Checkpoint()}
    active = {name: part for name, part in {**standard, **plugins}.items() if part is not None}
    return tiny_kernel(active, work_dir=folder / "work", recorder=recorder)


def test_it_finds_what_a_test_finds_and_fires_nothing_of_a_validation(tmp_path: Path, photos: Path):
    kernel(tmp_path).run()
    tested, keep = kernel(tmp_path, keep=(kept := Keep())), Keep()
    tested.test()
    recorder = Recorder()
    predicting = kernel(tmp_path, recorder, keep=keep)
    files = sorted(tmp_path.rglob("*"))
    pairs = list(predicting.predict())
    assert [batch.image_ids for batch, _ in pairs] == [["0.png", "1.png"], ["2.png", "3.png"], ["more/4.png"]]
    found_now = [found for _, several in pairs for found in several]
    for found, wanted in zip(found_now, kept.found, strict=True):
        for name in ("boxes", "scores", "labels"):
            assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert set(recorder.names("val")) == {"val_step"}
    assert not recorder.names("train_")
    run = predicting.state
    assert (run.mode, run.trains, run.classes) == ("predict", False, TinyDataset.classes or tested.state.classes)
    assert list(run.loaders) == ["predict"]
    assert not run.metrics
    assert keep.ended == (None, False)
    assert sorted(tmp_path.rglob("*")) == files


def test_one_that_is_left_early_is_ended_in_order(tmp_path: Path, photos: Path):
    kernel(tmp_path).run()
    keep, recorder = Keep(), Recorder()
    predictions = kernel(tmp_path, recorder, workers=1, keep=keep).predict()
    next(predictions)
    predictions.close()
    assert keep.ended == (None, False)
    assert recorder.names()[-1] == "after_run"


def test_it_wants_weights_and_their_classes(tmp_path: Path, photos: Path):
    with pytest.raises(UserError, match="so there are no weights to predict"):
        next(kernel(tmp_path, checkpoint=Checkpoint(load_from=None, resume="auto")).predict())
    torch.save(kernel(tmp_path, checkpoint=None).run().model.state_dict(), tmp_path / "weights.pt")
    for checkpoint in (None, Checkpoint(load_from=tmp_path / "weights.pt")):
        with pytest.raises(UserError, match="the data to predict on has no classes"):
            next(kernel(tmp_path, checkpoint=checkpoint).predict())
    named = Checkpoint(load_from=tmp_path / "weights.pt", load_from_classes=["one", "two", "three"])
    predicting = kernel(tmp_path, checkpoint=named)
    assert len(list(predicting.predict())) == 3
    assert predicting.state.classes == ("one", "two", "three")


def test_it_takes_transforms_that_only_scale_and_wants_images(tmp_path: Path, photos: Path):
    kernel(tmp_path).run()
    moving = Loader(train=TinyDataset(), predict=ImageFolder(root=photos), val_transforms=[Flip()], workers=0)
    with pytest.raises(UserError, match=r"Flip \(number 0\) moves objects"):
        next(kernel(tmp_path, data=moving).predict())
    with pytest.raises(UserError, match="give the loader a `predict` data set"):
        next(kernel(tmp_path, data=Loader(train=TinyDataset(), workers=0)).predict())


class TestImageFolder:
    def test_images_are_upright_and_below_it_only_if_asked_for(self, photos: Path):
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.new("RGB", (40, 20), (255, 0, 0)).save(photos / "turned.jpg", exif=turned)
        folder = ImageFolder(root=photos)
        folder.load()
        notes = [folder.annotations(index) for index in range(len(folder))]
        assert [note.image_id for note in notes] == ["0.png", "1.png", "2.png", "3.png", "turned.jpg"]
        assert (notes[4].height, notes[4].width) == tuple(folder.image(4).shape[1:]) == (40, 20)
        assert not any(len(note) for note in notes)

    def test_what_is_not_an_image_is_an_error_or_left_out(self, photos: Path):
        (photos / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
        with pytest.raises(UserError, match=r"broken\.jpg"):
            ImageFolder(root=photos).load()
        folder = ImageFolder(root=photos, bad_images="drop")
        folder.load()
        assert (len(folder), [note.split(":")[0] for note in folder.notes]) == (4, ["1 of 5 images cannot be read"])

    def test_an_empty_folder_and_none(self, tmp_path: Path):
        (tmp_path / "a" / "b").mkdir(parents=True)
        with pytest.raises(UserError, match="there is no image in this folder; recursive=true looks below it"):
            ImageFolder(root=tmp_path / "a").load()
        with pytest.raises(UserError, match="there is no such folder of"):
            ImageFolder(root=tmp_path / "c").load()

    def test_16_bits_are_read_as_the_values_use_them_or_as_told(self, tmp_path: Path):
        Image.new("I;16", (8, 8), 4095).save(tmp_path / "deep.png")
        for given, seen in ((None, 255), (16, 15)):
            folder = ImageFolder(root=tmp_path, bit_depth=given)
            folder.load()
            assert int(folder.image(0).max()) == seen

    def test_it_is_unlabelled_training_data(self, tmp_path: Path, photos: Path):
        @plugin(loaders=("unlabelled",))
        class Unlabelled:
            """Takes a batch of a further loader."""

            seen: list[Any] = state(factory=list)

            @hookimpl
            def before_train_iter(self, run: Run) -> None:
                batch = run.next_batch("unlabelled")
                self.seen.append((batch.counts, sorted(batch.image_ids)))

        taker = Unlabelled()
        data = Loader(train=TinyDataset(size=4), further={"unlabelled": ImageFolder(root=photos)}, workers=0)
        tiny_kernel({"data": data, "taker": taker}, until="2 iters", work_dir=tmp_path).run()
        assert sorted(name for _, names in taker.seen for name in names) == [f"{number}.png" for number in range(4)]
        assert all(list(counts) == [0, 0] for counts, _ in taker.seen)
