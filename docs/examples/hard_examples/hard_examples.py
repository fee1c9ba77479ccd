"""Hard-example mining: images with high losses are trained on more often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from detkernel import option, plugin, state
from detkernel_detection import Dataset, Sampler

if TYPE_CHECKING:
    import torch


@plugin
class HardExamples(Sampler):
    """Draw images in proportion to a moving average of their losses, after a first epoch with each of them once.

    The loss of an image is that of the batches that it was in: the average tells it from those that came with it.
    """

    momentum: float = option(default=0.5, at_least=0, below=1, help="share of an average that a new loss leaves")
    power: float = option(default=1.0, above=0, help="what the averages are raised to: more than 1 for the hardest")
    even: float = option(default=0.25, at_least=0, at_most=1, help="share of an epoch drawn whatever the losses are")

    _averages: list[float | None] = state(factory=list)
    """By position; None: not heard of yet."""

    def prepare(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self._averages = [None] * len(dataset)

    def update(self, indices: Any, losses: Any) -> None:
        for index, loss in zip(indices.tolist(), losses.tolist(), strict=True):
            before = self._averages[index]
            if isfinite(loss):
                self._averages[index] = loss if before is None else self.momentum * (before - loss) + loss

    def positions(self, indices: Sequence[int], epoch: int, generator: torch.Generator) -> Sequence[int]:
        import torch

        heard = [average for average in map(self._averages.__getitem__, indices) if average is not None]
        if not heard:
            return [indices[number] for number in torch.randperm(len(indices), generator=generator)]
        averages = (self._averages[index] for index in indices)
        unknown = max(heard)  # an image that was never seen may be as hard as any
        hard = torch.tensor([unknown if one is None else one for one in averages], dtype=torch.float64)
        hard = (hard.clamp(min=0) / max(unknown, 1e-12)) ** self.power + 1e-12
        weights = self.even / len(indices) + (1 - self.even) * hard / hard.sum()
        drawn = torch.multinomial(weights, len(indices), replacement=True, generator=generator)
        return [indices[number] for number in drawn]

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages = list(state["averages"])
