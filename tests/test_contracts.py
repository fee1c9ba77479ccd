"""The contracts of transforms and data sets: each fault fails with a telling message, and what is right passes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest
import torch
from detkernel import UserError, option, plugin, state
from detkernel_data.transforms import mixing
from detkernel_data.transforms.standard import V2, Color, Crop, Expand, Flip, MinIouCrop, Normalize, Pad, Resize
from detkernel_detection import Annotations, Dataset, Sample, Target, Transform
from detkernel_detection.testing import DatasetContract, TinyDataset, TransformContract

HERE = Path(__file__).parents[1]


FIELDS = "test_keeps_fields_with_their_objects"


@plugin
class Mixed(Transform):
    """Makes a target of its own."""

    def __call__(self, sample: Sample) -> Sample:
        sample.target = Target(sample.target.boxes, sample.target.labels)
        return sample


@plugin
class Reversed(Transform):
    """Turns the objects around, and leaves the fields as they are."""

    def __call__(self, sample: Sample) -> Sample:
        sample.target = attrs.evolve(
            sample.target, boxes=sample.target.boxes.flip(0), labels=sample.target.labels.flip(0)
        )
        return sample


@plugin
class By(Transform):
    """Changes a sample by a function."""

    function: Callable[[Sample], Any] = option(help="what to do")

    def __call__(self, sample: Sample) -> Sample:
        return self.function(sample)  # type: ignore[no-any-return]


@plugin
class Scales(By):
    """Claims that it only scales."""

    scales_only: ClassVar[bool] = True


@plugin
class Private(Transform):
    """Draws from a generator of its own."""

    _own: random.Random = state(factory=lambda: random.Random(0))

    def __call__(self, sample: Sample) -> Sample:
        return darken(sample) if self._own.random() < 0.5 else sample


@plugin
class PrivateTorch(Transform):
    """Draws from a torch generator of its own."""

    _own: Any = state(factory=lambda: torch.Generator().manual_seed(0))

    def __call__(self, sample: Sample) -> Sample:
        return darken(sample) if torch.rand((), generator=self._own) < 0.5 else sample


@plugin
class Mosaic(Transform):
    """Puts the image and three others of the data set into the quarters of a larger one."""

    moves_fields: ClassVar[tuple[str, ...]] = ()

    _others: Any = state()

    def prepare(self, dataset: Dataset) -> None:
        self._others = dataset

    def __call__(self, sample: Sample) -> Sample:
        if sample.target.masks is not None or sample.target.keypoints is not None:
            raise UserError("mosaic takes boxes alone")
        height, width = sample.size
        place = int(torch.randint(4, ()))
        canvas = torch.zeros(3, 2 * max(height, 64), 2 * max(width, 64), dtype=torch.uint8)
        boxes, labels = [], []
        for quarter in range(4):
            y, x = (quarter // 2) * max(height, 64), (quarter % 2) * max(width, 64)
            image, target = sample.image, sample.target
            if quarter != place:
                index = int(torch.randint(len(self._others), ()))
                notes, image = self._others.annotations(index), self._others.image(index)
                target = Target(torch.from_numpy(notes.boxes).float(), torch.from_numpy(notes.labels))
            canvas[:, y : y + image.shape[1], x : x + image.shape[2]] = image
            boxes.append(target.boxes + torch.tensor([x, y, x, y]))
            labels.append(target.labels)
        sample.image, sample.target = canvas, Target(torch.cat(boxes), torch.cat(labels))
        return sample


def darken(sample: Sample) -> Sample:
    sample.image = sample.image // 2
    return sample


def flipped(sample: Sample) -> Sample:
    """Image and boxes, but neither masks nor keypoints."""
    width = sample.size[1]
    x1, y1, x2, y2 = sample.target.boxes.unbind(1)
    sample.target.boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
    sample.image = sample.image.flip(-1)
    return sample


def flipped_by_numpy(sample: Sample) -> Sample:
    return whole_flip(sample) if np.random.rand() < 0.5 else sample


def flipped_by_python(sample: Sample) -> Sample:
    return whole_flip(sample) if random.random() < 0.5 else sample


def whole_flip(sample: Sample) -> Sample:
    if sample.target.masks is not None:
        sample.target.masks = sample.target.masks.flip(-1)
    if sample.target.keypoints is not None:
        sample.target.keypoints = sample.target.keypoints * torch.tensor([-1.0, 1, 1])
        sample.target.keypoints[..., 0] += sample.size[1]
    return flipped(sample)


def flipped_image(sample: Sample) -> Sample:
    if torch.rand(()) < 0.5:
        sample.image = sample.image.flip(-1)
    return sample


def shifted_boxes(sample: Sample) -> Sample:
    sample.target.boxes = sample.target.boxes + 5
    return sample


def halved(sample: Sample) -> Sample:
    sample.image = sample.image[:, ::2, ::2]
    return sample


def halved_with_boxes(sample: Sample) -> Sample:
    sample.target.boxes = sample.target.boxes / 2
    return halved(sample)


def turned_image(sample: Sample) -> Sample:
    sample.image = sample.image.transpose(1, 2)
    return sample


def large_boxes(sample: Sample) -> Sample:
    height, width = sample.size
    sample.target.boxes = torch.tensor([[0.0, 0, width, height]]).expand(len(sample.target), 4)
    return sample


def flat_boxes(sample: Sample) -> Sample:
    sample.target.boxes[:, 2] = sample.target.boxes[:, 0]
    return sample


def set_to(name: str, change: Callable[[Any], Any]) -> Transform:
    """Changes one attribute, of the sample or (dotted) of its target."""

    def function(sample: Sample) -> Sample:
        holder = sample.target if name.startswith("target.") else sample
        attribute = name.removeprefix("target.")
        setattr(holder, attribute, change(getattr(holder, attribute)))
        return sample

    return By(function=function)


def needs_a_box(sample: Sample) -> Sample:
    sample.target.boxes[0].clamp_(min=0)
    return sample


def by_chance(sample: Sample) -> Sample:
    return darken(sample) if random.SystemRandom().random() < 0.3 else sample


MOVES, VALID = "test_moves_boxes_with_their_objects", "test_keeps_the_sample_valid"
DRAWS, SCALE = "test_draws_from_the_seeded_generators", "test_records_its_scale"
POINTS = "test_moves_keypoints_with_their_objects"


@pytest.mark.parametrize(
    ("transform", "test", "message"),
    [
        (By(function=flipped_image), MOVES, "an object of class . is seen at .* boxes move with the image"),
        (By(function=shifted_boxes), MOVES, "but its boxes are at"),
        (By(function=halved), MOVES, "boxes move with the image"),
        (By(function=turned_image), MOVES, "boxes move with the image"),
        (By(function=large_boxes), MOVES, "boxes are much larger than their objects"),
        (set_to("target.labels", lambda labels: labels.flip(0)), MOVES, "an object of class"),
        (Scales(function=halved_with_boxes), SCALE, "multiply sample.scale by the factors"),
        (Scales(function=whole_flip), SCALE, "a transform that moves objects is not scales_only"),
        (set_to("target.labels", lambda labels: (labels + 1) % 3), VALID, "an object keeps its class"),
        (set_to("target.labels", torch.zeros_like), VALID, "an object keeps its class"),
        (set_to("target.labels", lambda labels: None), VALID, "target.labels is NoneType, not a tensor"),
        (set_to("target.labels", lambda labels: labels[:1]), VALID, "expected int64 and as many"),
        (By(function=flat_boxes), VALID, "has no area or is not xyxy"),
        (set_to("target.boxes", lambda boxes: boxes + 20), VALID, "lies outside of the changed image"),
        (set_to("image", lambda image: image * 0.9), VALID, "float32 with values on 0..255"),
        (set_to("image", lambda image: image.long()), VALID, "the image became torch.int64; it stays uint8"),
        (set_to("index", lambda index: index + 1), VALID, "sample.index was 0 and became 1; evaluators"),
        (set_to("image_id", str.upper), VALID, "sample.image_id was 'probe-0'"),
        (Mixed(), FIELDS, r"have the field that is their class as \[\]"),
        (Reversed(), FIELDS, "what leaves an object out leaves out its fields"),
        (By(function=lambda sample: None), VALID, "returned NoneType; it returns the sample"),
        (By(function=needs_a_box), "test_takes_an_image_without_boxes", "without boxes it raised IndexError"),
        (By(function=flipped), "test_moves_masks_with_their_objects", "masks move with the image"),
        (set_to("target.masks", lambda masks: None), "test_moves_masks_with_their_objects", "the masks are gone"),
        (By(function=flipped), POINTS, "keypoints move with the image"),
        (set_to("target.keypoints", lambda points: None), POINTS, "the keypoints are gone"),
        (set_to("target.keypoints", lambda points: points[:1]), POINTS, r"keypoints are \[1, 4, 3\] for 2 boxes"),
        (Private(), DRAWS, "not from a generator of your own or the system's"),
        (PrivateTorch(), DRAWS, "not from a generator of your own or the system's"),
        (By(function=by_chance), DRAWS, "which the loader seeds by"),
        (By(function=lambda sample: sample), "test_travels_to_a_worker", "cannot be pickled"),
    ],
)
def test_a_broken_transform_fails(transform: Transform, test: str, message: str) -> None:
    contract = TransformContract()
    contract.transform = lambda: transform  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=message):
        getattr(contract, test)()


@pytest.mark.parametrize(
    "transform",
    [
        By(function=darken),
        By(function=flipped_by_numpy),
        By(function=flipped_by_python),
        Mosaic(),
        Resize(short=[30, 50, 200], long=300),
        Resize(size=(50, 50)),
        Resize(long=50, factor=(0.5, 2.0)),
        Pad(size=(500, 50)),
        Flip(direction="both"),
        Crop(),
        MinIouCrop(),
        Expand(probability=1.0),
        mixing.Mosaic(size=(128, 160)),
        mixing.Mixup(weights=True),
        mixing.CopyPaste(),
        Color(brightness=1, contrast=1, saturation=1, hue=0.5, probability=1.0),
        Normalize(),
        V2(name="RandomRotation", args={"degrees": 180, "expand": True}),
        V2(name="ElasticTransform"),
        V2(name="RandomPhotometricDistort"),
        V2(name="GaussianBlur", args={"kernel_size": 7, "sigma": 3.0}),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_a_right_transform_passes(transform: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    if "DETKERNEL_LONG" not in os.environ:
        monkeypatch.setattr("detkernel_detection.testing.transform_contract.SEEDS", range(6))
    contract = TransformContract()
    contract.transform = lambda: transform  # type: ignore[method-assign]
    for test in every_test_of(contract):
        getattr(contract, test)()


@plugin
class Remembers(TinyDataset):
    """Images that depend on what was asked for before."""

    _asked: int = state(default=0)

    def image(self, index: int) -> Any:
        self._asked += 1
        return super().image(index) + self._asked


@plugin
class FlipsItself(TinyDataset):
    """Images mirrored by chance."""

    def image(self, index: int) -> Any:
        image = super().image(index)
        return image.flip(-1) if torch.rand(()) < 0.5 else image


@plugin
class Doubles(TinyDataset):
    """Twice as long when loaded again."""

    _names: list[str] = state(factory=list)

    def load(self) -> None:
        super().load()
        self._names += [f"{index}.png" for index in range(self.size)]

    def __len__(self) -> int:
        return len(self._names)


@plugin
class Unsorted(TinyDataset):
    """Classes in the order of a set."""

    def load(self) -> None:
        super().load()
        self.classes = tuple(set(self.classes))


@plugin
class Unfit(TinyDataset):
    """Cannot travel to a worker."""

    _open: Any = state(factory=lambda: (number for number in ()))


@plugin
class Altered(TinyDataset):
    """Annotations with something replaced."""

    fields: dict[str, Any] = option(help="what to replace, by name")

    def annotations(self, index: int) -> Annotations:
        return attrs.evolve(super().annotations(index), **self.fields)


def nan_box() -> Any:
    return np.array([[0, np.nan, 4, 4]])


@pytest.mark.parametrize(
    ("dataset", "test", "message"),
    [
        (Remembers(), "test_images_do_not_depend_on_order_or_chance", "image 7 .* remembers nothing between calls"),
        (FlipsItself(), "test_images_do_not_depend_on_order_or_chance", "draws no random numbers"),
        (Doubles(), "test_loads_the_same_twice", r"a second load\(\) made of 8 images.* 16 images"),
        (
            Altered(fields={"image_id": 7}),
            "test_every_image_has_its_own_id",
            "tiny-0 and tiny-1 have the same image_",
        ),
        (Altered(fields={"image_id": 7.0}), "test_every_image_has_its_own_id", "image_id is float, expected int or"),
        (Altered(fields={"labels": np.array([0.0])}), "test_labels_are_positions_in_classes", "float64, expected int"),
        (Altered(fields={"labels": np.array([3])}), "test_labels_are_positions_in_classes", "0-based positions"),
        (
            Altered(fields={"labels": None}),
            "test_labels_are_positions_in_classes",
            "labels is NoneType, expected a Num",
        ),
        (Altered(fields={"boxes": [[0, 0, 4, 4]]}), "test_boxes_are_valid", "boxes is list, expected a NumPy array"),
        (Altered(fields={"boxes": nan_box()}), "test_boxes_are_valid", "a box is not finite"),
        (Altered(fields={"boxes": np.array([[0, 0, 40, 9]])}), "test_boxes_are_valid", "lies outside of the 32 x 32"),
        (Altered(fields={"boxes": np.array([[9, 0, 9, 9]])}), "test_boxes_are_valid", "a box has no area"),
        (Altered(fields={"boxes": np.zeros(0)}), "test_boxes_are_valid", r"expected \[N, 4\]"),
        (Unfit(), "test_is_the_same_in_every_process", "cannot be pickled"),
        (Unsorted(), "test_is_the_same_in_every_process", "sort what came out of one"),
    ],
)
def test_a_broken_data_set_fails(dataset: Dataset, test: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)  # another process imports this module
    contract = DatasetContract()
    contract.dataset = lambda: dataset  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=message):
        getattr(contract, test)()


def test_a_right_data_set_passes() -> None:
    contract = DatasetContract()
    contract.dataset = lambda: TinyDataset(empty=2)  # type: ignore[method-assign]
    for test in every_test_of(contract):
        if test != "test_is_the_same_in_every_process":  # TestDataset in test_testing.py runs it
            getattr(contract, test)()


def every_test_of(contract: object) -> list[str]:
    return [name for name in dir(contract) if name.startswith("test_")]
