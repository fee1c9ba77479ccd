"""The standard samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel import option, plugin, state
from detkernel_detection import Dataset, Sampler

if TYPE_CHECKING:
    import torch


@plugin
class ClassBalanced(Sampler):
    """Images with rare classes more often (repeat factors of LVIS, Gupta et al. 2019), drawn with replacement.

    A class that is in a share f of the images asks for max(1, sqrt(threshold / f)) of each of its images; an image is
    drawn in proportion to what the rarest of its classes asks for. An epoch has as many images as without it.
    """

    threshold: float = option(
        default=0.1, above=0, at_most=1, help="share of the images below which a class is drawn more often"
    )
    _weights: Any = state()

    def prepare(self, dataset: Dataset, indices: Sequence[int]) -> None:
        import numpy as np

        from detkernel_data.masks import trainable

        present = np.zeros((len(indices), len(dataset.classes)), dtype=bool)
        for row, index in zip(present, indices, strict=True):
            notes = dataset.annotations(int(index))
            row[notes.labels[trainable(notes)]] = True
        share = np.maximum(present.mean(0), 1 / len(present))
        self._weights = np.where(present, np.maximum(1, np.sqrt(self.threshold / share)), 1).max(1)

    def positions(self, indices: Sequence[int], epoch: int, generator: torch.Generator) -> Sequence[int]:
        import numpy as np
        import torch

        # torch.multinomial takes at most 2**24 choices; the inverse of the cumulated weights takes any number
        ends = np.cumsum(self._weights)
        drawn = torch.rand(len(indices), generator=generator, dtype=torch.float64).numpy() * ends[-1]
        found: list[int] = np.asarray(indices)[np.searchsorted(ends, drawn, side="right")].tolist()
        return found
