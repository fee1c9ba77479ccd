"""Samplers: which images an epoch of training takes, and in which order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detkernel.plugin import Part

from detkernel_detection.dataset import Dataset

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Sampler(Part, ABC):
    """Gives the positions of an epoch of training.

    What it gives follows from what `prepare` saw, the epoch and the generator: a resumed run, and every process, asks
    for it anew and must get the same. A sampler with state, one that has `update` or `state_dict`, is asked once, when
    the epoch begins: what it gave is in the checkpoint, and loading of an epoch begins when the one before is done.
    """

    def prepare(self, dataset: Dataset, indices: Sequence[int]) -> None:
        """Called once, before the first epoch, with the positions that are trained on."""

    @abstractmethod
    def positions(self, indices: Sequence[int], epoch: int, generator: torch.Generator) -> Sequence[int]:
        """As many positions as `indices` has, each of them one of those, in the order of training. One may come several
        times, and gets other random numbers each time. `generator` is seeded by (seed, epoch)."""

    def update(self, indices: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """Called before an epoch, with what was trained on in the one before: positions [N] in the order of training,
        over all processes, and of each the loss of its batch, [N], which may not be finite. The same on every process.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values. It is the same on every process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; `prepare` was called before."""
