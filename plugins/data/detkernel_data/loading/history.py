"""What a sampler with state has heard, and the order that it gave for the epoch under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detkernel import Run
from detkernel_detection import Losses, Sampler
from numpy.typing import NDArray


class History:
    """Asks a sampler with state once for the order of each epoch, when the epoch begins, and keeps it with the state.

    Workers load images long before they are trained on. Were the order asked for when they need it, it would follow
    from what the sampler had heard by then, which depends on the number of workers and on where a run was resumed.
    """

    def __init__(self, sampler: Sampler, run: Run, indices: Sequence[int]) -> None:
        self.sampler, self._run, self._indices = sampler, run, np.asarray(indices)
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)
        self._own: list[tuple[list[int], Any]] = []
        """The images and the loss of each iteration of this process that the others have not been told."""
        self._heard: list[tuple[int, float]] = []
        """The images of all processes since the epoch began, each with its loss, in the order of training."""

    @staticmethod
    def is_needed(sampler: Sampler) -> bool:
        """Whether a sampler has state."""
        return any(getattr(type(sampler), name) is not getattr(Sampler, name) for name in ("update", "state_dict"))

    def positions(self, indices: Sequence[int], epoch: int, generator: torch.Generator) -> NDArray[np.int64]:
        """The order of an epoch. All processes ask for it at the same place."""
        if epoch != self._epoch:
            self.gather()
            if self._heard:
                images, losses = zip(*self._heard, strict=True)
                self.sampler.update(np.array(images, dtype=np.int64), np.array(losses))
            self._heard = []
            self._order = np.asarray(self.sampler.positions(indices, epoch, generator), dtype=np.int64)
            self._epoch = epoch
        return self._order

    def hear(self, indices: list[int], losses: Losses) -> None:
        """The losses of a batch. Their values stay on the device: asking for them here would make training wait."""
        total = sum(value.detach() for name, value in losses.items() if "loss" in name)
        self._own.append((list(indices), total))

    def gather(self) -> None:
        """Tell all processes what each of them has heard."""
        totals = [torch.as_tensor(total) for _, total in self._own]
        values = torch.stack(totals).double().tolist() if totals else []  # one question to the device
        own = [(images, value) for (images, _), value in zip(self._own, values, strict=True)]
        self._own = []
        gathered = self._run.processes.gathered(own)
        everybody = self._run.processes.from_main(lambda: gathered)
        for iteration in zip(*everybody, strict=True):
            self._heard += [(index, value) for images, value in iteration for index in images]

    def state_dict(self) -> dict[str, Any]:
        """`gather` comes first, on all processes."""
        return {
            "epoch": self._epoch,
            "order": torch.from_numpy(self._order),
            "heard": torch.tensor([index for index, _ in self._heard], dtype=torch.int64),
            "losses": torch.tensor([value for _, value in self._heard], dtype=torch.float64),
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        order, heard = state["order"].numpy(), state["heard"]
        if not np.isin(np.concatenate([order, heard.numpy()]), self._indices).all():
            raise ValueError("the sampler has heard of images that are not trained on")
        self.sampler.load_state_dict(state["sampler"])
        self._epoch, self._order = int(state["epoch"]), order
        self._own, self._heard = [], list(zip(heard.tolist(), state["losses"].tolist(), strict=True))
