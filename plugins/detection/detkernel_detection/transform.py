"""Transforms: what changes a sample on its way to a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import attrs
from detkernel.plugin import Part, option

from detkernel_detection.dataset import Dataset
from detkernel_detection.structures import Sample


@attrs.define(kw_only=True, eq=False, slots=False)  # not @plugin: it is a kind of parts, and no part itself
class Transform(Part, ABC):
    """Changes one sample. Random numbers come from torch's, NumPy's or Python's global generator: the loader seeds all
    three by (seed, epoch, index) before the first transform, so results do not depend on workers or order.

    `@plugin(needs=("masks",))` says what it needs of the training samples beside boxes; the model need not be trained
    on it. `sample.context` gives other samples, the classes and the number of epochs to those that want them.
    """

    scales_only: ClassVar[bool] = False
    """Whether every point stays where it is but for a scaling that `sample.scale` records: what validation may use,
    since detections are divided by that scale to get back to the file's coordinates."""

    moves_fields: ClassVar[tuple[str, ...]] = ("value",)
    """The kinds of fields (`Dataset.fields`) that stay true through it: it selects objects by `Target.keep`, and
    changes the values of other kinds as the image is changed. "any": it moves nothing. The loader refuses others."""

    active: tuple[int, int] | None = option(
        default=None,
        at_least=0,
        help="training epochs in which it is used, counted from 0: from the first number on, before the second",
    )

    def is_active(self, epoch: int) -> bool:
        """Whether it is used in a training epoch, counted from 0."""
        return self.active is None or self.active[0] <= epoch < self.active[1]

    def prepare(self, dataset: Dataset) -> None:
        """Called once before the first sample: the place to check options against the data."""

    def output_size(self, size: tuple[int, int] | None) -> tuple[int, int] | None:
        """The (height, width) that an image of `size` has after it, the largest where it draws one; None: not known.

        `size` is None where a transform before it does not say. By this the loader knows the shapes of its batches.
        """
        return None

    def most_objects(self, most: int, another: int) -> int:
        """The most objects that a sample has after it, where one before it has at most `most` and any other sample of
        the data set `another`: a transform that adds objects says so here."""
        return most

    def adds_fields(self) -> Mapping[str, float]:
        """The fields of kind "value" that it changes, each with the value that an object begins with where the data set
        has no such field. Every training sample has them then, float32 [N]. The loader refuses what nobody uses."""
        return {}

    @abstractmethod
    def __call__(self, sample: Sample) -> Sample:
        """Return the changed sample; the given one may be changed in place."""
