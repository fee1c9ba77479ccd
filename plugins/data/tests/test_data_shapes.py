"""Drawn images: the same everywhere, other ones by seed, split and index, with exact boxes and masks."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from detkernel_data.shapes import KINDS, Shapes, compose, outline
from detkernel_detection.testing import DatasetContract
from pycocotools import mask as coco_mask


def shapes(**options: object) -> Shapes:
    dataset = Shapes(**{"size": 20, "side": 64, "sizes": (6, 30), **options})  # type: ignore[arg-type]
    dataset.load()
    return dataset


def content(dataset: Shapes, index: int) -> str:
    """A hash of an image and its annotations."""
    notes = dataset.annotations(index)
    parts = [dataset.image(index).numpy().tobytes(), notes.boxes.tobytes(), notes.labels.tobytes(), repr(notes.masks)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""pycocotools 2.0.11 in `decode`."""


class TestContract(DatasetContract):
    def dataset(self) -> Shapes:
        return Shapes(size=6, side=48, sizes=(6, 20), kinds=KINDS)


def test_an_image_follows_from_seed_split_and_index() -> None:
    first = shapes()
    assert [content(first, index) for index in range(20)] == [content(shapes(), index) for index in range(20)]
    assert len({content(first, index) for index in range(20)}) == 20
    assert content(shapes(size=5), 3) == content(first, 3), "an image does not depend on how many there are"
    others = [shapes(seed=1), shapes(split="val"), shapes(split="test"), shapes(overlap=0.5, objects=(9, 9))]
    assert len({content(dataset, 3) for dataset in [first, *others]}) == 5


def test_the_same_images_on_every_machine() -> None:
    scene = compose((1, 0, 0, 0), shapes(kinds=KINDS)._plan())
    assert hashlib.sha256(scene.canvas.tobytes()).hexdigest()[:16] == "761f6c5d32b97c96"


def test_boxes_are_exact_for_their_masks() -> None:
    dataset = shapes(objects=(1, 12), overlap=0.5, kinds=KINDS)
    for index in range(len(dataset)):
        notes = dataset.annotations(index)
        assert notes.masks is not None
        pixels = coco_mask.decode(list(notes.masks))
        assert pixels.shape == (64, 64, len(notes))
        assert pixels.sum(2).max() == 1, "each pixel shows one shape"
        for number, (x1, y1, x2, y2) in enumerate(notes.boxes):
            rows, columns = np.nonzero(pixels[:, :, number])
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x1, y1, x2, y2)
            assert notes.area[number] == len(rows)
    assert dataset.annotations(0).path == "shapes train 0"


def test_shapes_have_one_bright_colour_and_their_class() -> None:
    dataset = shapes(objects=(3, 3), kinds=("cross", "square"))
    notes, image = dataset.annotations(0), dataset.image(0)
    assert dataset.classes == ("cross", "square")
    assert notes.masks is not None
    for pixels in coco_mask.decode(list(notes.masks)).transpose(2, 0, 1):
        colours = {tuple(colour) for colour in image.permute(1, 2, 0).numpy()[pixels == 1].tolist()}
        assert len(colours) == 1
        assert max(colours.pop()) >= 200
    assert {notes.labels.tolist()[0]} <= {0, 1}


def test_no_more_is_hidden_than_allowed() -> None:
    for overlap in (0.0, 0.3):
        dataset = shapes(objects=(8, 8), sizes=(20, 20), overlap=overlap, kinds=("square",), size=10)
        areas = np.concatenate([dataset.annotations(index).area for index in range(10)])
        assert areas.min() >= 400 * (1 - overlap)


def test_tiny_images() -> None:
    dataset = shapes(side=16, sizes=(6, 16), objects=(1, 100), kinds=KINDS)
    for index in range(len(dataset)):
        notes = dataset.annotations(index)
        assert len(notes) >= 1
        assert dataset.image(index).shape == (3, 16, 16)
        assert (notes.boxes[:, 2:] <= 16).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [6, 7, 30])
def test_outlines_fill_their_square(kind: str, size: int) -> None:
    pixels = outline(kind, size)
    assert pixels.any(0).all()
    assert pixels.any(1)[1:].all(), "the tip of a triangle may lie between two pixels"
    assert (pixels == pixels[:, ::-1]).all()


def test_fingerprint_follows_from_the_options() -> None:
    first = shapes().fingerprint()
    assert shapes().fingerprint() == first
    others = [shapes(seed=1), shapes(split="val"), shapes(size=19), shapes(side=65), shapes(kinds=("square",))]
    assert len({first, *(dataset.fingerprint() for dataset in others)}) == 6


def test_indices_count_from_the_end_too() -> None:
    dataset = shapes()
    assert content(dataset, -1) == content(dataset, 19)
    assert dataset.annotations(-1).image_id == 19
    for index in (20, -21):
        with pytest.raises(IndexError):
            dataset.image(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": (3, 2)}, r"objects: expected the smaller number first, got \[3, 2\]"),
        ({"sizes": (20, 10)}, r"sizes: expected the smaller number first, got \[20, 10\]"),
        ({"sizes": (6, 65)}, r"sizes: expected at most the image's side of 64, got 65"),
        ({"sizes": (5, 10)}, r"sizes: expected at least 6, got 5"),
        ({"kinds": ()}, r"kinds: expected at least one, and each once"),
        ({"kinds": ("square", "square")}, r"kinds: expected at least one, and each once"),
        ({"overlap": 0.6}, r"overlap: expected at most 0.5, got 0.6"),
        ({"side": 8}, r"side: expected at least 16, got 8"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(**options)
