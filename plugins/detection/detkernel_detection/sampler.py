"""Samplers: which images an epoch of training takes, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detkernel.plugin import Part

from detkernel_detection.dataset import Dataset

if TYPE_CHECKING:
    import torch


class Sampler(Part, ABC):
    """Gives the positions of an epoch of training.

    What it gives follows from what `prepare` saw, the epoch and the generator: a resumed run, and every process, asks
    for it anew and must get the same.
    """

    def prepare(self, dataset: Dataset, indices: Sequence[int]) -> None:
        """Called once, before the first epoch, with the positions that are trained on."""

    @abstractmethod
    def positions(self, indices: Sequence[int], epoch: int, generator: torch.Generator) -> Sequence[int]:
        """As many positions as `indices` has, each of them one of those, in the order of training. One may come several
        times, and gets other random numbers each time. `generator` is seeded by (seed, epoch)."""
