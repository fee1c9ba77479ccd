"""A predictor gives what validation gives, for an image in any of its forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import DataError
from detkernel_detection import Sample, Transform
from detkernel_detection.detector import Detector
from detkernel_detection.images import decode
from detkernel_detection.normalize import Normalize
from detkernel_detection.predictions import Predictions
from detkernel_detection.predictor import Predictor, to_tensor
from detkernel_detection.testing import TinyDataset
from PIL import Image
from torch import Tensor, nn


class BrightPixels(Detector):
    """Finds what is bright in a channel, which is its class: one box, the surer the more pixels it has."""

    def __init__(self) -> None:
        super().__init__(("red", "green", "blue"), Normalize((0, 0, 0), (1, 1, 1)))
        self.limit = nn.Parameter(torch.tensor(0.5))
        self.modes: list[Any] = []

    def forward_outputs(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled(), tuple(images.shape)))
        return images > self.limit

    def predictions(self, outputs: Tensor, sizes: Tensor | None = None) -> Predictions:
        boxes = torch.zeros(len(outputs), 3, 4)
        for number, channels in enumerate(outputs):
            for label, bright in enumerate(channels):
                if bright.any():
                    y, x = bright.nonzero().unbind(1)
                    boxes[number, label] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
        scores, labels = (outputs.flatten(2).sum(2) / 1024).sort(descending=True, stable=True)
        boxes = boxes.gather(1, labels[:, :, None].expand(-1, -1, 4))
        return Predictions(boxes, scores, labels, scores > 0)


class Halve(Transform):
    """Takes every second pixel."""

    scales_only = True

    def __call__(self, sample: Sample) -> Sample:
        sample.image, sample.scale = sample.image[:, ::2, ::2], (0.5, 0.5)
        return sample


class Move(Transform):
    """Moves what is seen."""

    def __call__(self, sample: Sample) -> Sample:
        return sample


@pytest.fixture
def image() -> Tensor:
    """A green rectangle of 12 x 8 at (10, 6), and a small blue one."""
    pixels = torch.full((3, 32, 40), 20, dtype=torch.uint8)
    pixels[1, 6:14, 10:22] = 230
    pixels[2, 20:24, 30:34] = 230
    return pixels


def test_an_array_a_tensor_and_a_file_give_the_same(image: Tensor, tmp_path: Path):
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "image.png")
    predictor = Predictor(BrightPixels())
    for form in (image, array, tmp_path / "image.png", str(tmp_path / "image.png")):
        found = predictor.predict(form)
        assert found.boxes.tolist() == [[10, 6, 22, 14], [30, 20, 34, 24]]
        assert [predictor.classes[label] for label in found.labels] == ["green", "blue"]
        assert found.scores.tolist() == [96 / 1024, 16 / 1024]


def test_the_orientation_of_a_file_is_obeyed(image: Tensor, tmp_path: Path):
    turned = Image.fromarray(image.permute(1, 2, 0).numpy()).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert Predictor(BrightPixels()).predict(tmp_path / "turned.png").boxes[0].tolist() == [10, 6, 22, 14]


def test_a_score_may_be_asked_for(image: Tensor):
    assert len(Predictor(BrightPixels()).predict(image, min_score=0.05)) == 1


def test_boxes_come_back_from_a_transform_to_the_pixels_of_the_image(image: Tensor):
    model = BrightPixels()
    found = Predictor(model, transforms=[Halve()]).predict(image)
    assert model.modes[0][2] == (1, 3, 16, 20)
    assert found.boxes.tolist() == [[10, 6, 22, 14], [30, 20, 34, 24]]


def test_images_of_several_sizes_make_one_batch(image: Tensor):
    model = BrightPixels()
    whole, part, nothing = Predictor(model).predict_batch([image, image[:, :16, :24], image[:, :4, :4]])
    assert [shape for _, _, shape in model.modes] == [(3, 3, 32, 40)]
    assert (len(whole), len(part), len(nothing)) == (2, 1, 0)
    assert torch.equal(part.boxes[0], whole.boxes[0])
    assert Predictor(model).predict_batch([]) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_predicts_in_eval_mode_without_gradients_and_keeps_its_mode(image: Tensor, training: bool):
    model = BrightPixels().train(training)
    Predictor(model).predict(image)
    assert model.modes == [(False, False, (1, 3, 32, 40))]
    assert model.training is training


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3)), r"an array of float64 \[4, 4, 3\] is not an image; expected uint8 RGB \[H, W, 3\]"),
        (np.zeros((3, 4, 4), np.uint8), r"an array of uint8 \[3, 4, 4\] is not"),
        (np.zeros((0, 4, 3), np.uint8), r"an array of uint8 \[0, 4, 3\] is not"),
        (torch.zeros(3, 4, 4), r"a tensor of torch.float32 \[3, 4, 4\] is not an image; expected torch.uint8 RGB"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"a tensor of torch.uint8 \[4, 4, 3\]"),
        ("none.png", r"none.png: the image cannot be read \(No such file or directory\)"),
        (
            __file__,
            "predictor.py: no image that can be read; expected a JPEG, PNG or similar; replace the file$",
        ),
    ],
)
def test_what_is_not_an_image_is_said(image: Any, found: str):
    with pytest.raises(DataError, match=found):
        Predictor(BrightPixels()).predict(image)


def test_a_transform_that_moves_objects_is_refused():
    with pytest.raises(ValueError, match="transforms: Move moves objects; prediction takes those that only scale"):
        Predictor(BrightPixels(), transforms=[Move()])


def test_a_data_set_s_image_is_one():
    dataset = TinyDataset()
    dataset.load()
    found = Predictor(BrightPixels()).predict(dataset.image(1))
    assert found.boxes.tolist() == dataset.annotations(1).boxes.tolist()


def test_a_file_is_decoded_as_for_training(tmp_path: Path):
    """Pillow's and torchvision's pixels of a JPEG differ, and 16 bits a channel are not 8."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=40)
    Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(40, 30)).save(tmp_path / "b.png")
    for name in ("a.jpg", "b.png"):
        assert torch.equal(to_tensor(tmp_path / name), decode(str(tmp_path / name), apply_exif=True))
    assert int(to_tensor(tmp_path / "b.png").max()) == 1199 * 50 >> 8
