"""What a sampler gives is what an epoch trains on, from the middle too and on every process."""

from collections import Counter

import numpy as np
import pytest
from detkernel import UserError, option, plugin
from detkernel_data.loading.batch_sampler import BatchSampler
from detkernel_data.loading.batch_shapes import known_shapes
from detkernel_data.loading.loader import Loader
from detkernel_data.loading.samplers import ClassBalanced
from detkernel_data.transforms.standard import Resize
from detkernel_detection import Sampler
from detkernel_detection.testing import TinyDataset, tiny_kernel


@plugin
class Rare(TinyDataset):
    """Forty images, of which one has the second class."""

    size: int = option(default=40, help="how many")

    def annotations(self, index):
        found = super().annotations(index)
        found.labels[:] = int(index == 7)
        return found


@plugin
class Backwards(Sampler):
    """The last images first; `twice`: the first of them again in the place of the last."""

    twice: bool = option(default=False, help="whether one comes twice")
    wrong: int = option(default=-1, help="a position to give for the first")

    def positions(self, indices, epoch, generator):
        found = sorted(indices, reverse=True)
        if self.twice:
            found[-1] = found[0]
        return found if self.wrong < 0 else [self.wrong, *found[1:]]


def made(sampler, dataset=None, **options):
    loader = Loader(train=dataset or Rare(size=6), sampler=sampler, batch_size=2, workers=0, **options)
    return loader.build_loader(tiny_kernel({"data": loader}).state, "train")


def test_an_epoch_takes_what_the_sampler_gives():
    loader = made(Backwards())
    assert [batch.indices for batch in loader.batches(0)] == [[5, 4], [3, 2], [1, 0]]
    assert [batch.indices for batch in loader.batches(1, start=1)] == [[3, 2], [1, 0]]
    assert made(Backwards(twice=True)).batch_sampler.draws(0)[-1] == [(1, 0), (5, 1)]


def test_processes_share_what_it_gives():
    group = np.arange(6)
    parts = [BatchSampler([group], 1, 0, True, rank=r, world_size=2, sampler=Backwards()).batches(0) for r in (0, 1)]
    assert parts == [[[5], [3], [1]], [[4], [2], [0]]]


@pytest.mark.parametrize("position", [6, 99])
def test_positions_that_are_not_trained_on_are_an_error(position):
    with pytest.raises(UserError, match="Backwards: it gives 6 positions for epoch 0; expected 6, as many"):
        next(made(Backwards(wrong=position)).batches(0))


def test_rare_classes_are_drawn_more_often():
    loader = made(ClassBalanced(threshold=1.0), Rare())
    seen = Counter(index for epoch in range(50) for batch in loader.batch_sampler.batches(epoch) for index in batch)
    assert sum(seen.values()) == 50 * 40
    others = [seen[index] for index in range(40) if index != 7]
    assert 4 < seen[7] / np.mean(others) < 9  # sqrt(40) times as often
    assert made(ClassBalanced(threshold=1.0), Rare()).batch_sampler.batches(3) == loader.batch_sampler.batches(3)
    assert loader.batch_sampler.batches(3) != loader.batch_sampler.batches(4)
    loader = made(ClassBalanced(threshold=0.001), Rare())
    seen = Counter(index for epoch in range(50) for batch in loader.batch_sampler.batches(epoch) for index in batch)
    assert seen[7] < 2 * np.mean([seen[index] for index in range(40)])


def test_automatic_shapes_hold_any_mixture_of_aspects():
    loader = made(ClassBalanced(), batch_shapes="auto", train_transforms=[Resize(long=32)])
    assert known_shapes(loader).images == [(32, 32)]
