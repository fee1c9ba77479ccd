"""Which classes were looked for in which image, where not all were looked for in all: LVIS's way of annotating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from detkernel_detection.structures import ImageId


@attrs.frozen(eq=False)
class Federated:
    """What an evaluation by LVIS's rules needs beside the objects; `Dataset.federated`. A few flat arrays."""

    classes: tuple[str, ...]
    """The names that positions here stand for; a data set may have them in another order."""
    frequency: Mapping[str, str]
    """By class: "r", "c" or "f", in how many images of the training data it is: below 10, below 100, or more."""
    rows: Mapping[ImageId, int]
    """The position of each image."""
    negative: tuple[NDArray[np.int32], NDArray[np.int64]]
    """The classes that are verified not to be in an image: those of all images, and where each image's begin and end
    [n + 1]."""
    not_exhaustive: tuple[NDArray[np.int32], NDArray[np.int64]]
    """The classes of which not all objects in an image are annotated, in the same form."""

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        frequency: Mapping[str, str],
        images: Sequence[ImageId],
        negative: Sequence[Sequence[int]],
        not_exhaustive: Sequence[Sequence[int]],
    ) -> Federated:
        """From lists of positions in the classes, one an image."""
        rows = {image: row for row, image in enumerate(images)}
        return cls(tuple(classes), dict(frequency), rows, _flat(negative), _flat(not_exhaustive))

    def renamed(self, names: Mapping[str, str]) -> Federated:
        """With other names of classes; of classes that are merged, the most frequent one's frequency."""
        if not names:
            return self
        frequency: dict[str, str] = {}
        for name, value in self.frequency.items():
            new = names.get(name, name)
            frequency[new] = max(frequency.get(new, value), value, key="rcf".index)
        return attrs.evolve(self, classes=tuple(names.get(name, name) for name in self.classes), frequency=frequency)

    def negatives_of(self, image_id: ImageId) -> list[str]:
        """The names of the classes that are verified not to be in an image."""
        return self._names(self.negative, image_id)

    def not_exhaustive_of(self, image_id: ImageId) -> list[str]:
        """The names of the classes of which not all objects in an image are annotated."""
        return self._names(self.not_exhaustive, image_id)

    def _names(self, lists: tuple[NDArray[np.int32], NDArray[np.int64]], image_id: ImageId) -> list[str]:
        values, ends = lists
        row = self.rows[image_id]
        return [self.classes[position] for position in values[ends[row] : ends[row + 1]].tolist()]


def _flat(lists: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    import numpy as np

    ends = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(one) for one in lists], out=ends[1:])
    return np.array([value for one in lists for value in one], np.int32), ends
