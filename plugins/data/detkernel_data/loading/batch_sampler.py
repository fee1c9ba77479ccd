"""Which images make which batch: a function of (seed, epoch) and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from detkernel import UserError

if TYPE_CHECKING:
    from detkernel_detection import Dataset, Sampler
    from numpy.typing import NDArray

    from detkernel_data.loading.history import History


def seed_of(*numbers: int) -> int:
    """A 63-bit seed from some numbers: neighbours get unrelated ones."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


@attrs.frozen(eq=False)
class BatchSampler:
    """The batches of every epoch, for one of several processes.

    Images of a group (portrait and landscape, say) share batches, so that little is padded. In training, a last batch
    that does not reach all processes is filled up with the group's first images: every process takes as many steps.
    In validation each image is in exactly one batch of one process.
    """

    groups: Sequence[NDArray[np.int64]]
    """Positions in the data set, a list for each group."""
    batch_size: int
    """Images a batch and process."""
    seed: int
    training: bool
    shuffle: bool = True
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    sampler: Sampler | History | None = None
    """What gives the positions of an epoch of the one group; None: each position comes once."""

    def __len__(self) -> int:
        """Batches in an epoch, on this process."""
        if self.training:
            return sum(self._rounds(group, self.batch_size * self.world_size) for group in self.groups)
        batches = sum(self._rounds(group, self.batch_size) for group in self.groups)
        return len(range(self.rank, batches, self.world_size))

    @property
    def batch_sizes(self) -> list[int]:
        """How many images the batches of an epoch have, rising: those of a group's last batch may be fewer."""
        if self.drop_last or (self.training and self.world_size > 1):
            return [self.batch_size]
        full = {self.batch_size for group in self.groups if len(group) >= self.batch_size}
        return sorted(full | {len(group) % self.batch_size for group in self.groups} - {0})

    @property
    def smallest_batch(self) -> int:
        """Images in the smallest batch of an epoch."""
        if self.drop_last or (self.training and self.world_size > 1):
            return self.batch_size
        return min(((len(group) - 1) % self.batch_size + 1 for group in self.groups if len(group)), default=0)

    def batches(self, epoch: int) -> list[list[int]]:
        """The positions in each batch of an epoch."""
        return [[index for index, _ in batch] for batch in self.draws(epoch)]

    def draws(self, epoch: int) -> list[list[tuple[int, int]]]:
        """As `batches`; each position with how often it came before in the epoch: then it gets other random numbers."""
        if not self.training:
            batches = [batch for group in self.groups for batch in self._cut(group, self.batch_size)]
            return [[(index, 0) for index in batch] for batch in batches[self.rank :: self.world_size]]
        seen: defaultdict[int, int] = defaultdict(int)
        found = []
        for batch in self._whole_batches(epoch):
            counted = []
            for index in batch:
                counted.append((index, seen[index]))
                seen[index] += 1
            found.append(counted[self.rank * self.batch_size : (self.rank + 1) * self.batch_size])
        return found

    def _whole_batches(self, epoch: int) -> list[list[int]]:
        """The positions in each batch over all processes."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        total = self.batch_size * self.world_size
        batches = []
        for group in self.groups:
            order = self._order(group, epoch, generator)
            batches += [self._filled(batch, order) for batch in self._cut(order, total)]
        if not self.shuffle or self.sampler is not None:
            return batches
        return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]

    def _order(self, group: NDArray[np.int64], epoch: int, generator: torch.Generator) -> NDArray[np.int64]:
        """The positions of a group in the order of an epoch."""
        if self.sampler is None:
            return group[torch.randperm(len(group), generator=generator).numpy()] if self.shuffle else group
        order = np.asarray(self.sampler.positions(group.tolist(), epoch, generator), dtype=np.int64)
        if order.shape != group.shape or not np.isin(order, group).all():
            name = type(getattr(self.sampler, "sampler", self.sampler)).__name__
            raise UserError(
                f"{name}: it gives {order.size} positions for epoch {epoch}; expected "
                f"{len(group)}, as many as there are images to train on, each of them one of those"
            )
        return order

    def _rounds(self, group: NDArray[np.int64], size: int) -> int:
        return len(group) // size if self.drop_last else -(-len(group) // size)

    def _cut(self, group: NDArray[np.int64], size: int) -> list[list[int]]:
        rounds, positions = self._rounds(group, size), group.tolist()
        return [positions[number * size : (number + 1) * size] for number in range(rounds)]

    def _filled(self, batch: list[int], group: NDArray[np.int64]) -> list[int]:
        """A batch over all processes, of which each gets as many."""
        if self.world_size == 1:
            return batch
        missing = self.batch_size * self.world_size - len(batch)
        return [*batch, *np.resize(group, missing).tolist()]


class Extremes:
    """Under `detkernel check`: first a batch with the largest images, then one of the fewest and smallest.

    With a shuffled training, any of a group's images can meet in its last batch.
    """

    def __init__(self, batch_sampler: BatchSampler, dataset: Dataset) -> None:
        self.batch_sampler, self.world_size = batch_sampler, batch_sampler.world_size
        notes = [dataset.annotations(index) for index in range(len(dataset))]
        self._area = [note.height * note.width for note in notes]
        self._shorter = [min(note.height, note.width) for note in notes]

    @property
    def batch_size(self) -> int:
        return self.batch_sampler.batch_size

    @property
    def batch_sizes(self) -> list[int]:
        return self.batch_sampler.batch_sizes

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def draws(self, epoch: int) -> list[list[tuple[int, int]]]:
        return [[(index, 0) for index in batch] for batch in self.batches(epoch)]

    def batches(self, epoch: int) -> list[list[int]]:
        batches = self.batch_sampler.batches(epoch)
        if len(batches) < 2:
            return batches
        if not (self.batch_sampler.training and self.batch_sampler.shuffle):
            large = max(batches, key=lambda batch: max(self._area[index] for index in batch))
            small = min(batches, key=lambda batch: (len(batch), min(self._shorter[index] for index in batch)))
            return [large, small, *batches[2:]]
        groups = [group.tolist() for group in self.batch_sampler.groups]
        large = self._chosen(groups, max(map(len, batches)), max, self._area)
        small = self._chosen(groups, min(map(len, batches)), min, self._shorter)
        return [large, small, *batches[2:]]

    def _chosen(
        self, groups: list[list[int]], count: int, best: Callable[..., list[int]], size: Sequence[int]
    ) -> list[int]:
        """The `count` largest or smallest images of the group that has the largest or smallest."""
        able = [group for group in groups if len(group) >= count] or groups
        ordered = [sorted(group, key=size.__getitem__, reverse=best is max) for group in able]
        return best(ordered, key=lambda group: size[group[0]])[:count]
