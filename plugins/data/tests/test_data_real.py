"""Data sets as published: their counts, and masks as pycocotools draws them."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.yolo import Yolo
from detkernel_data.masks import rasterise
from detkernel_detection import Dataset
from pycocotools.coco import COCO

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""pycocotools 2.0.11 in `decode`."""


def counts(dataset: Dataset) -> Counter[str]:
    found = [dataset.annotations(index) for index in range(len(dataset))]
    return Counter(dataset.classes[label] for notes in found for label in notes.labels)


def check(dataset: Dataset, sample: int = 3) -> None:
    """Every box is valid, and some images decode to their size."""
    for index in range(len(dataset)):
        notes = dataset.annotations(index)
        assert (notes.boxes >= 0).all()
        assert (notes.boxes <= [notes.width, notes.height] * 2).all()
        assert (notes.boxes[:, 2:] > notes.boxes[:, :2]).all()
    for index in range(0, len(dataset), max(1, len(dataset) // sample)):
        notes, image = dataset.annotations(index), dataset.image(index)
        assert image.shape == (3, notes.height, notes.width)
        assert image.float().std() > 1


def compare_masks(dataset: Coco, images: Sequence[int]) -> int:
    """How many masks of these images are pixel by pixel those of pycocotools; all must be."""
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(dataset.annotation_file))
    equal = 0
    for index in images:
        notes = dataset.annotations(index)
        assert notes.masks is not None
        assert notes.ids is not None
        ours = rasterise(notes.masks, notes.height, notes.width).numpy()
        for pixels, number in zip(ours, notes.ids.tolist(), strict=True):
            assert np.array_equal(pixels, reference.annToMask(reference.anns[number])), f"annotation {number}"
            equal += 1
    return equal


def test_blood_cells(real_data: Path) -> None:
    root = real_data / "bccd_voc/BCCD"
    parts = {split: Voc(root=root, split=split) for split in ("train", "val", "test")}
    total: Counter[str] = Counter()
    for part in parts.values():
        part.load()
        check(part)
        total += counts(part)
        assert part.classes == ("Platelets", "RBC", "WBC")
    assert [len(part) for part in parts.values()] == [205, 87, 72]
    assert total == {"RBC": 4155 - 2, "WBC": 372, "Platelets": 361}
    dropped = [note for part in parts.values() for note in part.notes if "without area dropped" in note]
    assert len(dropped) == 2
    assert all(note.startswith("1 box") and "'RBC'" in note for note in dropped)
    assert {name for note in dropped for name in ("00338", "00343") if f"BloodImage_{name}.xml" in note} == {
        "00338",
        "00343",
    }


def test_coco_with_open_licences(real_data: Path) -> None:
    total: Counter[str] = Counter()
    classes, crowds, empty = [], 0, 0
    for split, size in (("train2017", 71), ("val2017", 31)):
        root = real_data / "coco_open"
        dataset = Coco(annotation_file=root / f"annotations/instances_{split}.json", image_folder=root / split)
        dataset.load()
        check(dataset)
        assert len(dataset) == size
        assert len(dataset.classes) == 80
        total += counts(dataset)
        classes.append(len(counts(dataset)))
        found = [dataset.annotations(index) for index in range(size)]
        crowds += sum(int(notes.crowd.sum()) for notes in found)
        empty += sum(len(notes) == 0 for notes in found)
        assert compare_masks(dataset, range(size)) == sum(map(len, found))
        areas = np.concatenate([notes.area for notes in found])
        assert (areas > 0).all()
    assert (total.total(), len(total), crowds, empty) == (910, 69, 10, 3)
    assert classes == [60, 47]
    assert dataset.classes[:3] == ("person", "bicycle", "car")
    assert dataset.classes[-1] == "toothbrush"


@pytest.mark.parametrize("kind", ["", "_rle"])
def test_nuclei(real_data: Path, kind: str) -> None:
    total = 0
    for split, size in (("train", 250), ("val", 84)):
        root = real_data / "nuclei_coco"
        file = root / f"annotations/instances_{split}{kind}.json"
        dataset = Coco(annotation_file=file, image_folder=root / f"images/{split}")
        dataset.load()
        check(dataset)
        assert len(dataset) == size
        assert dataset.classes == ("nucleus",)
        assert compare_masks(dataset, range(0, size, 5)) > 100
        total += counts(dataset).total()
    assert total == 9543


def test_the_area_of_run_lengths_is_the_stated_one(real_data: Path) -> None:
    from detkernel_data.masks import mask_area

    root = real_data / "nuclei_coco"
    dataset = Coco(annotation_file=root / "annotations/instances_val_rle.json", image_folder=root / "images/val")
    dataset.load()
    for index in range(len(dataset)):
        notes = dataset.annotations(index)
        assert [mask_area(mask) for mask in notes.masks or ()] == notes.area.tolist()


def test_dollies(real_data: Path) -> None:
    total: Counter[str] = Counter()
    for split, size in (("train", 146), ("val", 48)):
        dataset = Yolo(data=real_data / "bmw_dolly_yolo/data.yaml", split=split)
        dataset.load()
        check(dataset)
        assert len(dataset) == size
        assert dataset.classes == ("Dolly", "Wheels")
        assert isinstance(dataset.image(0), torch.Tensor)
        total += counts(dataset)
    assert total == {"Wheels": 687, "Dolly": 194}
