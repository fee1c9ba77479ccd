"""What is asked of all images of a data set at once: how many objects they have, and how large they are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from detkernel_detection import Dataset
from numpy.typing import NDArray

from detkernel_data.masks import trainable, without_mask


class Overview(NamedTuple):
    """Of each image."""

    objects: NDArray[np.int64]
    """[n] objects to train on: neither crowds nor difficult."""
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]

    def take(self, chosen: NDArray[np.int64]) -> Overview:
        """Of some images."""
        return Overview(self.objects[chosen], self.heights[chosen], self.widths[chosen])


def overview(dataset: Dataset) -> Overview:
    """A data set that knows says it at once (`overview()`); of others, every annotation is looked at."""
    own = getattr(dataset, "overview", None)
    if own is not None:
        found: Overview = own()
        return found
    notes = map(dataset.annotations, range(len(dataset)))
    rows = [(int(trainable(one).sum()), one.height, one.width) for one in notes]
    return Overview(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)


def maskless(dataset: Dataset) -> NDArray[np.int64]:
    """[n] how many objects of each image there are to train on that have no mask; as `overview`, at once where the
    data set knows (`maskless()`)."""
    own = getattr(dataset, "maskless", None)
    if own is not None:
        found: NDArray[np.int64] = own()
        return found
    notes = map(dataset.annotations, range(len(dataset)))
    return np.array([(trainable(one) & without_mask(one)).sum() for one in notes], dtype=np.int64)
