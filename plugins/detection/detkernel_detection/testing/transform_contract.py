"""What a transform promises: annotations stay with what is seen, and a seed gives one result."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

from detkernel.errors import UserError

from detkernel_detection import Sample, Target, Transform
from detkernel_detection.testing.boxes import Box, contains, iou, rounded
from detkernel_detection.testing.generators import seed_all
from detkernel_detection.testing.images import annotated, cornered, masked, probe_for, seen
from detkernel_detection.testing.tiny import TinyDataset

SEEDS = range(20)


class TransformContract:
    """A transform keeps all annotations with their objects, and its random numbers are the seeded ones."""

    def transform(self) -> Transform:
        """The transform. Where it draws whether to do something, let it do so half of the time or more."""
        raise NotImplementedError("return your transform")

    def test_keeps_the_sample_valid(self) -> None:
        transform = self._prepared()
        for seed in SEEDS:
            _check_values(_apply(transform, probe_for(transform, seed), seed), probe_for(transform, seed))

    def test_moves_boxes_with_their_objects(self) -> None:
        """The same image with and without an object, transformed with one seed, differs where the object now is."""
        self._compare(annotated, "boxes")

    def test_moves_masks_with_their_objects(self) -> None:
        """A transform that cannot move masks says so: it raises a `UserError`."""
        with suppress(UserError):
            self._compare(masked, "masks", masks=True)

    def test_moves_keypoints_with_their_objects(self) -> None:
        """A transform that cannot move keypoints says so: it raises a `UserError`."""
        with suppress(UserError):
            self._compare(cornered, "keypoints", keypoints=True)

    def test_keeps_fields_with_their_objects(self) -> None:
        """Each object has its class as a field too; what the transform says of fields it cannot move is believed."""
        transform = self._prepared()
        if not {"value", "any"}.intersection(transform.moves_fields):
            return
        for seed in SEEDS:
            found = _apply(transform, probe_for(transform, seed, fields=True), seed).target
            numbers = found.fields["number"].tolist() if "number" in found.fields else []
            assert numbers == found.labels.tolist(), (
                f"objects of the classes {found.labels.tolist()} have the field that is their class as {numbers}: "
                "what leaves an object out leaves out its fields (Target.keep does)"
            )

    def test_records_its_scale(self) -> None:
        transform = self._prepared()
        if transform.scales_only:
            for seed in SEEDS:
                _check_scale(
                    _apply(transform, probe_for(transform, seed), seed),
                    probe_for(transform, seed).target.boxes.tolist(),
                )

    def test_takes_an_image_without_boxes(self) -> None:
        transform = self._prepared()
        for seed in SEEDS:
            given, before = probe_for(transform, seed), probe_for(transform, seed)
            for one in (given, before):
                one.target = one.target.keep(one.target.labels < 0)
            try:
                found = _apply(transform, given, seed)
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(
                    f"on an image without boxes it raised {type(error).__name__}: {error}; data has such images, "
                    "and crops make more of them: boxes are [0, 4] then"
                ) from error
            _check_values(found, before)

    def test_draws_from_the_seeded_generators(self) -> None:
        transform = self._prepared()
        forth = [_frozen(_apply(transform, probe_for(transform, seed), seed)) for seed in SEEDS]
        back = [_frozen(_apply(transform, probe_for(transform, seed), seed)) for seed in reversed(SEEDS)][::-1]
        assert forth == back, (
            "the same image with the same seed gave another result when the images came in another order; draw "
            "from torch's, NumPy's or Python's global generator, which the loader seeds by (seed, epoch, index) before "
            "each image, not from a generator of your own or the system's, and remember nothing between images"
        )

    def test_travels_to_a_worker(self) -> None:
        transform = self._prepared()
        try:
            there = pickle.loads(pickle.dumps(transform))
        except Exception as error:
            raise AssertionError(
                f"the transform cannot be pickled ({error}): it travels to the loader's workers, so keep options and "
                "tensors, and neither lambdas nor open files"
            ) from error
        for seed in SEEDS:
            here, result = (_frozen(_apply(each, probe_for(transform, seed), seed)) for each in (transform, there))
            assert here == result, "pickled, as on its way to a loader's worker, the transform gives another result"

    def _prepared(self) -> Transform:
        dataset = TinyDataset(side=64)
        dataset.load()
        transform = self.transform()
        transform.prepare(dataset)
        return transform

    def _compare(self, boxes_of: Callable[[Sample, int], list[Box]], what: str, **annotations: bool) -> None:
        """Every object that is seen clearly must be annotated there; half of them, where others' objects are added."""
        transform, problems, fits, adds, fewer = self._prepared(), [], [], False, False
        for seed in SEEDS:
            found = _apply(transform, probe_for(transform, seed, **annotations), seed)
            adds |= len(found.target) > len(probe_for(transform, seed).target)
            for label in set(found.target.labels.tolist()):
                place = seen(found, _apply(transform, probe_for(transform, seed, without=label, **annotations), seed))
                boxes = boxes_of(found, label)
                fewer |= place is not None and not boxes
                if place is not None and (boxes or what != "keypoints"):  # some may be out of the image
                    problems.append(_problem(place, label, boxes, what, slack=2 + 0.01 * max(found.size)))
                    fits.append(max((iou(place, box) for box in boxes), default=0))
        assert problems or not fewer, (
            f"in none of {len(SEEDS)} images were all {what} of an object left, though objects were; keep those that "
            "are still in the image"
        )
        wrong = [problem for problem in problems if problem]
        assert not wrong or (adds and 2 * len(wrong) < len(problems)), wrong[0]
        assert not fits or median(fits) > 0.5, (
            f"the {what} are much larger than their objects: the median IoU is {median(fits):.2f}; {what} follow the "
            "image when it is resized"
        )


def _apply(transform: Transform, sample: Sample, seed: int) -> Sample:
    """The transformed sample, of which the form is checked."""
    seed_all(seed)
    given = sample.target
    before = {"masks": given.masks is not None, "keypoints": given.keypoints is not None}
    found: Any = transform(sample)
    assert isinstance(found, Sample), (
        f"the transform returned {type(found).__name__}; it returns the sample, also where it changed it in place"
    )
    _check_image(found)
    _check_target(found.target, found.size)
    for name, there in before.items():
        assert not there or getattr(found.target, name) is not None, (
            f"the {name} are gone: change target.{name} like the image, or raise a UserError that says that the "
            "transform cannot"
        )
    return found


def _check_image(sample: Sample) -> None:
    image, kind = sample.image, str(sample.image.dtype)
    assert image.shape == (3, *sample.size), f"the image has the shape {list(image.shape)}, not [3, H, W]"
    assert kind in ("torch.uint8", "torch.float32"), (
        f"the image became {kind}; it stays uint8, or is float32 once it is normalised"
    )
    assert kind == "torch.uint8" or image.min() < 0 or image.max() <= 2, (
        "the image became float32 with values on 0..255: models take a float image for a normalised one; bring it "
        "back with .clamp(0, 255).to(torch.uint8)"
    )


def _check_target(target: Target, size: tuple[int, int]) -> None:
    boxes, labels = target.boxes, target.labels
    for name, value in (("boxes", boxes), ("labels", labels)):
        assert hasattr(value, "dtype"), f"target.{name} is {type(value).__name__}, not a tensor"
    assert (str(boxes.dtype), *boxes.shape) == ("torch.float32", len(boxes), 4), (
        f"boxes are {boxes.dtype} {list(boxes.shape)}, expected float32 [N, 4]"
    )
    assert (str(labels.dtype), *labels.shape) == ("torch.int64", len(boxes)), (
        f"labels are {labels.dtype} {list(labels.shape)} for {len(boxes)} boxes, expected int64 and as many: what "
        "leaves an object out leaves out its box, label and mask (Target.keep does)"
    )
    if target.masks is not None:
        expected = [len(boxes), *size]
        assert list(target.masks.shape) == expected, f"masks are {list(target.masks.shape)}, expected {expected}"
    if target.keypoints is not None:
        points, *shape = target.keypoints.shape
        assert (points, shape[1:]) == (len(boxes), [3]), (
            f"keypoints are {[points, *shape]} for {len(boxes)} boxes, expected [N, K, 3]"
        )


def _check_values(found: Sample, given: Sample) -> None:
    for name in ("index", "image_id", "original_size", "epoch"):
        before, after = getattr(given, name), getattr(found, name)
        assert before == after, f"sample.{name} was {before!r} and became {after!r}; evaluators and logs go by it"
    height, width = found.size
    for x1, y1, x2, y2 in found.target.boxes.tolist():
        box = rounded((x1, y1, x2, y2))
        assert min(x2 - x1, y2 - y1) > 0, f"the box {box} has no area or is not xyxy; leave such an object out"
        slack = 1e-3 * max(height, width) / 64  # float32
        assert contains((0, 0, width, height), (x1, y1, x2, y2), slack), (
            f"the box {box} lies outside of the changed image of {height} x {width}: clip boxes to it"
        )
    before, after = (Counter(sample.target.labels.tolist()) for sample in (given, found))
    assert len(found.target) > len(given.target) or not after - before, (
        f"the labels {given.target.labels.tolist()} became {found.target.labels.tolist()}: an object keeps its class"
    )


def _problem(place: Box, label: int, boxes: list[Box], what: str, slack: float) -> str:
    """What is wrong with the annotations of an object that is seen at a place, or nothing."""
    if any(contains(box, place, slack) for box in boxes):
        return ""
    return (
        f"an object of class {label} is seen at {rounded(place)} of the changed image, but its {what} are at "
        f"{[rounded(box) for box in boxes]}: {what} move with the image"
    )


def _check_scale(found: Sample, before: list[Box]) -> None:
    y, x = found.scale
    if len(found.target) == len(before):
        for old, new in zip(before, found.target.boxes.tolist(), strict=True):
            expected = [side * factor for side, factor in zip(old, (x, y, x, y), strict=True)]
            assert all(abs(one - other) < 1 + 0.01 * other for one, other in zip(new, expected, strict=True)), (
                f"the transform has scales_only, but the box {rounded(old)} became {rounded(new)} with sample.scale "
                f"(y, x) = {found.scale}: multiply sample.scale by the factors of the resizing, since validation "
                "divides detections by it; a transform that moves objects is not scales_only"
            )


def _frozen(sample: Sample) -> tuple[Any, ...]:
    """All of it, to compare."""
    tensors = sample.image, sample.target.boxes, sample.target.labels
    parts = [(str(part.dtype), list(part.shape), part.contiguous().numpy().tobytes()) for part in tensors]
    return (*parts, sample.scale)
