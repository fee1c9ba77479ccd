"""Loaders: what hands batches to the loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from detkernel_detection.dataset import Dataset
from detkernel_detection.structures import Batch


class Loader(Protocol):
    """What `build_loader` returns.

    One that holds something, such as worker processes, also has a `close()`: it is called when the run ends, well or
    not, and may be called twice.
    """

    dataset: Dataset

    def __len__(self) -> int:
        """Batches in an epoch (on this process)."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the one at `start` on. The order depends on (seed, epoch) only, and finding
        the start reads nothing that lies before it."""
