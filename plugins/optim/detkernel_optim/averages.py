"""A second set of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Averages:
    """Averaged floating-point tensors of a model, parameters and buffers alike; others are those of the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        state = {name: value.detach() for name, value in model.state_dict().items()}
        self._names = [name for name, value in state.items() if value.is_floating_point()]
        self._weights = [state[name] for name in self._names]
        self._averages = [weight.clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weight, all tensors in one call."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    @torch.no_grad()
    def restart(self) -> None:
        """The averages become the weights."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the weights, in place: who holds a tensor of the model keeps it."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._model.state_dict(), **dict(zip(self._names, self._averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in zip(self._names, self._averages, strict=True):
            given = state[name]
            if given.shape != average.shape or not given.is_floating_point():
                raise ValueError(f"its average of '{name}' is {given.dtype} {list(given.shape)}")
            average.copy_(given)
