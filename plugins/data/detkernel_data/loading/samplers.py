"""The standard samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel import DataError, option, plugin, state, wrong
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


@plugin
class BySource(Sampler):
    """Images of the data sets of a `concat` in given proportions, whatever their sizes.

    An epoch has as many images as without it. Each data set's images come in random order, all of them once before any
    comes again; what an epoch has no room for, others have.
    """

    ratios: list[float] = option(above=0, help="how much of an epoch each data set is, in the order of `concat`")
    _sources: Any = state()
    """The images of each data set: where they are in `indices`."""

    def prepare(self, dataset: Dataset, indices: Sequence[int]) -> None:
        import numpy as np

        from detkernel_data.wrappers import Concat

        if not isinstance(dataset, Concat):
            raise wrong(self, "ratios", "it needs a `concat` of several data sets to train on")
        if len(self.ratios) != len(dataset.datasets):
            raise wrong(
                self, "ratios", f"expected {len(dataset.datasets)}, one a data set of `concat`, got {len(self.ratios)}"
            )
        source = np.array([dataset.source(index) for index in indices])
        self._sources = [np.flatnonzero(source == number) for number in range(len(self.ratios))]
        for number, found in enumerate(self._sources):
            if not len(found):
                raise DataError(f"by_source: data set {number} of `concat` has no image to train on; leave it out")

    def positions(self, indices: Sequence[int], epoch: int, generator: torch.Generator) -> Sequence[int]:
        import numpy as np
        import torch

        ends = np.round(np.cumsum(self.ratios) / sum(self.ratios) * len(indices)).astype(int)
        drawn = []
        for source, count in zip(self._sources, np.diff(ends, prepend=0).tolist(), strict=True):
            while count > 0:
                order = torch.randperm(len(source), generator=generator).numpy()[:count]
                drawn.append(source[order])
                count -= len(order)
        mixed = np.concatenate(drawn)[torch.randperm(len(indices), generator=generator).numpy()]
        found: list[int] = np.asarray(indices)[mixed].tolist()
        return found
