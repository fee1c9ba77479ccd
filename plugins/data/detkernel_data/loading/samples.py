"""From a position in the data set to a sample. Runs in the loader's workers."""

from __future__ import annotations

import random
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from detkernel import DataError, UserError
from detkernel.errors import relative
from detkernel_detection import Annotations, Context, Dataset, Sample, Target, Transform
from detkernel_detection.batching import Packed, pack_samples
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

from detkernel_data.loading.batch_sampler import seed_of
from detkernel_data.loading.batch_shapes import fitting
from detkernel_data.masks import target_masks, trainable


@attrs.frozen
class Failure:
    """What went wrong with a sample, as a value: an exception raised in a worker arrives as a text of its traceback."""

    message: str
    traceback: str = ""
    """Empty for a mistake in the data."""

    def error(self) -> Exception:
        if not self.traceback:
            return DataError(self.message)
        return RuntimeError(f"{self.message}\n\n{self.traceback}")


@attrs.define(eq=False)
class Samples(torch.utils.data.Dataset[Any]):
    """What torch's loader asks for batches: each item is an epoch, and a batch's positions with their repetitions."""

    dataset: Dataset
    transforms: Sequence[Transform]
    seed: int
    masks: bool = False
    keypoints: bool = False
    seeded: bool = True
    """Whether a sample sets the random generators: only training draws random numbers."""
    missing_masks: str = "drop"
    shapes: Sequence[tuple[int, int]] = ()
    """(height, width) that batches may have, smallest first; empty: as large as the largest image of each."""
    indices: Sequence[int] = ()
    """The positions that are trained on, for transforms that fetch others."""
    epochs: int | None = None
    masks_kept: bool = True
    """False: masks are there for the transforms alone."""
    added_fields: Mapping[str, float] = attrs.field(factory=dict)
    """What transforms change of each object, and the value that it begins with (`Transform.adds_fields`)."""
    reading: Any = None
    """In a worker, (array, place) where the position of the image that is being read is told, plus 1."""

    def __getitem__(self, item: tuple[int, list[tuple[int, int]]]) -> Packed | Failure:
        try:
            return self._load(*item)
        finally:
            self._tell(0)

    def _load(self, epoch: int, draws: list[tuple[int, int]]) -> Packed | Failure:
        samples = []
        for index, repetition in draws:
            self._tell(index + 1)
            try:
                samples.append(self.sample(epoch, index, repetition))
            except UserError as error:
                return Failure(self._told(index, error))
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                return Failure(self._named(index, self._guilty(error), problem), traceback.format_exc())
        try:
            return _pack(samples, self.shapes)
        except UserError as error:
            return Failure(str(error))

    def _tell(self, place: int) -> None:
        if self.reading is not None:
            array, worker = self.reading
            array[worker] = place

    def raw(self, epoch: int, index: int) -> Sample:
        """One image as it is in the data set."""
        notes = self.dataset.annotations(index)
        return Sample(
            image=self.dataset.image(index),
            target=self._target(notes),
            index=index,
            image_id=notes.image_id,
            original_size=(notes.height, notes.width),
            epoch=epoch,
            field_kinds={**dict.fromkeys(self.added_fields, "value"), **self.dataset.fields},
        )

    def sample(self, epoch: int, index: int, repetition: int = 0) -> Sample:
        """One image, transformed; the same whenever and wherever it is asked for.

        `repetition`: how often the epoch had it before; each time it gets other random numbers.
        """
        sample = self.raw(epoch, index)
        if self.seeded:
            seed_all(seed_of(self.seed, epoch, index, *([repetition] if repetition else [])))
            sample.context = Context(partial(self.raw, epoch), self.indices, self.dataset.classes, self.epochs)
        for transform in self.transforms:
            if self.seeded and not transform.is_active(epoch):
                continue
            sample = transform(sample)
            problem = _problem(sample)
            if problem:
                raise UserError(self._named(index, transform, problem))
        if not self.masks_kept:
            sample.target.masks = None
        return sample

    def _target(self, notes: Annotations) -> Target:
        """The objects to train on: neither crowds nor difficult ones, and where masks are needed, those with one."""
        keep = trainable(notes)
        masks = keypoints = None
        if self.masks:
            masks, keep = target_masks(notes, keep, self.missing_masks)
        if self.keypoints:
            keypoints = torch.from_numpy(_needed(notes, notes.keypoints, "keypoints")[keep].astype(np.float32))
        boxes, labels = notes.boxes[keep].astype(np.float32), notes.labels[keep].astype(np.int64)
        kinds = self.dataset.fields
        fields = {name: _field(_needed(notes, notes.fields.get(name), name)[keep], kinds[name]) for name in kinds}
        for name, value in self.added_fields.items():
            fields[name] = fields[name].float() if name in fields else torch.full((len(labels),), value)
        return Target(torch.from_numpy(boxes), torch.from_numpy(labels), masks, keypoints, fields)

    def _told(self, index: int, error: UserError) -> str:
        """A mistake, with the image's name: what a data set raises has it, what a transform raises may not."""
        message, guilty = str(error), self._guilty(error)
        if isinstance(guilty, Transform) and relative(self.dataset.annotations(index).path) not in message:
            return self._named(index, guilty, message)
        return message

    def _guilty(self, error: Exception) -> object:
        """The transform or data set whose frame the error came through."""
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        return next((part for part in reversed(frames) if isinstance(part, (Transform, Dataset))), None)

    def _named(self, index: int, guilty: object, problem: str) -> str:
        place = f" in {type(guilty).__qualname__}" if guilty is not None else ""
        return f"{relative(self.dataset.annotations(index).path)} (image {index}){place}: {problem}"


def _problem(sample: Any) -> str:
    """What is wrong with what a transform gave, or ""."""
    if not isinstance(sample, Sample):
        return f"it gives {type(sample).__name__}; expected the sample"
    image, target = sample.image, sample.target
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3:
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        return f"the image it gives is {found}; expected a tensor [3, H, W]"
    if image.dtype not in (torch.uint8, torch.float32):
        return f"the image it gives is {image.dtype}; expected torch.uint8, or torch.float32 once it is normalised"
    if target.boxes.shape != (len(target.labels), 4):
        return f"it gives {list(target.boxes.shape)} boxes and {len(target.labels)} labels; expected [N, 4] and N"
    if target.masks is not None and target.masks.shape != (len(target.labels), *sample.size):
        return f"it gives masks {list(target.masks.shape)}; expected {[len(target.labels), *sample.size]}"
    if target.keypoints is not None and len(target.keypoints) != len(target.labels):
        return f"it gives keypoints of {len(target.keypoints)} objects, and {len(target.labels)} labels"
    for name in sample.field_kinds:
        values = target.fields.get(name, ())
        if len(values) != len(target.labels):
            return f"it gives {name} of {len(values)} objects, and {len(target.labels)} labels; use `Target.keep`"
    return ""


def _field(values: NDArray[Any], kind: str) -> Tensor:
    """Whole numbers as int64, others and angles as float32."""
    whole = values.dtype.kind in "iub" and kind != "angle"
    return torch.from_numpy(values.astype(np.int64 if whole else np.float32))


def _needed(notes: Annotations, value: Any, what: str) -> Any:
    if value is None:
        raise DataError(f"{notes.path}: it has no {what}, and the model is trained on them; use data that has")
    return value


def _pack(samples: Sequence[Sample], shapes: Sequence[tuple[int, int]]) -> Packed:
    if len({sample.image.dtype for sample in samples}) > 1:
        raise UserError("data: transforms make some images of a batch float and leave others uint8; expected one kind")
    return pack_samples(samples, fitting(samples, shapes))


def seed_all(seed: int) -> None:
    """Set Python's, NumPy's and torch's CPU generators; a GPU's has no part in loading."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
