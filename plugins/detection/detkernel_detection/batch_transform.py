"""Batch transforms: what changes a whole training batch on its device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import attrs
from detkernel.plugin import Part, option

from detkernel_detection.dataset import Dataset
from detkernel_detection.structures import Batch

if TYPE_CHECKING:
    import torch


@attrs.frozen(eq=False)
class BatchContext:
    """What a batch transform may ask for."""

    epoch: int
    iteration: int
    """Of the run, counted from 0."""
    rank: int
    """Of the process that the batch is for."""
    checking: bool
    """Under `detkernel check`: then iteration 0 is for the costliest batch that there can be, 1 for the smallest."""
    field_kinds: Mapping[str, str]
    """How each field of the targets changes with the image (`Dataset.fields`)."""
    seed: Callable[..., int]

    def generator(self, *numbers: int) -> torch.Generator:
        """A CPU generator that follows from the seed of the run, the place of the transform and these numbers alone:
        `generator(context.iteration)` is the same on every process, with `context.rank` as well it is not."""
        import torch

        return torch.Generator().manual_seed(self.seed(*numbers))


@attrs.define(kw_only=True, eq=False, slots=False)  # not @plugin: it is a kind of part, not a part itself
class BatchTransform(Part, ABC):
    """Changes a training batch in place, once it is on its device. It asks the device nothing.

    Random numbers come from `context.generator` alone, so that a resumed run gets the same and workers play no part.
    """

    moves_fields: ClassVar[tuple[str, ...]] = ("value",)
    """The kinds of fields (`Dataset.fields`) that stay true through it, as of a `Transform`. The loader refuses
    others."""

    active: tuple[int, int] | None = option(
        default=None,
        at_least=0,
        help="training epochs in which it is used, counted from 0: from the first number on, before the second",
    )

    def is_active(self, epoch: int) -> bool:
        """Whether it is used in a training epoch, counted from 0."""
        return self.active is None or self.active[0] <= epoch < self.active[1]

    def prepare(self, dataset: Dataset) -> None:
        """Called once before the first batch: the place to check options against the data."""

    def output_sizes(self, size: tuple[int, int]) -> Sequence[tuple[int, int]]:
        """Every (height, width) that a batch of `size` can have after it: by this the shapes of a run are known."""
        return [size]

    def most_objects(self, most: int) -> int:
        """The most objects that an image has after it, where each has at most `most` before."""
        return most

    @abstractmethod
    def __call__(self, batch: Batch, context: BatchContext) -> None:
        """Change the batch in place: images, targets, sizes, scales and what else it has stay true to each other."""
