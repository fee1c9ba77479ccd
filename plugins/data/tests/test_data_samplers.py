"""What a sampler gives is what an epoch trains on, from the middle too and on every process."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detkernel import ConfigError, DataError, UserError, option, plugin
from detkernel.processes import Processes
from detkernel_data.loading.batch_sampler import BatchSampler
from detkernel_data.loading.batch_shapes import known_shapes
from detkernel_data.loading.history import History
from detkernel_data.loading.loader import Loader
from detkernel_data.loading.samplers import BySource, ClassBalanced
from detkernel_data.transforms.standard import Resize
from detkernel_data.wrappers import Concat
from detkernel_detection import Sampler, Transform
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
    loader = Loader(
        train=Rare(size=6) if dataset is None else dataset, sampler=sampler, batch_size=2, workers=0, **options
    )
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


@plugin
class Highest(Sampler):
    """The images with the highest losses so far, each twice; in the first epoch all of them."""

    losses: dict[int, float] = option(factory=dict, help="what was heard last of each image")
    heard: list[list[tuple[int, float]]] = option(factory=list, help="what was heard before each epoch")

    def update(self, indices, losses):
        self.heard.append(list(zip(indices.tolist(), losses.tolist(), strict=True)))
        self.losses.update(self.heard[-1])

    def positions(self, indices, epoch, generator):
        order = sorted(indices, key=lambda index: -self.losses.get(index, 0))
        return order if not self.losses else [index for index in order[: len(order) // 2] for _ in range(2)]

    def state_dict(self):
        return {"losses": {str(index): loss for index, loss in self.losses.items()}}

    def load_state_dict(self, state):
        self.losses = {int(index): loss for index, loss in state["losses"].items()}


def listening(workers=0, sampler=None, state=None, prefetch=2):
    """A loader plugin, and a function that trains some iterations of an epoch: the loss of an image is its position."""
    plugin = Loader(
        train=TinyDataset(size=8), sampler=sampler or Highest(), batch_size=2, workers=workers, prefetch=prefetch
    )
    loader = plugin.build_loader(tiny_kernel({"data": plugin}).state, "train")
    if state is not None:
        plugin.load_state_dict(state)

    def train(epoch, start=0, stop=4):
        seen = []
        for batch in loader.batches(epoch, start):
            seen.append(batch.indices)
            loss = torch.tensor(float(max(batch.indices)))
            plugin.after_train_iter(batch, {"loss_a": loss / 2, "loss_b": loss / 2, "accuracy": 99 * loss})
            if start + len(seen) == stop:
                break
        return seen

    return plugin, train


def test_a_sampler_hears_the_loss_of_each_image_before_the_next_epoch():
    sampler = Highest()
    _, train = listening(sampler=sampler)
    assert train(0) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sampler.heard == []
    assert train(1) == [[6, 6], [7, 7], [4, 4], [5, 5]]
    train(2)
    first = [(0, 1), (1, 1), (2, 3), (3, 3), (4, 5), (5, 5), (6, 7), (7, 7)]
    assert sampler.heard == [first, [(6, 6), (6, 6), (7, 7), (7, 7), (4, 4), (4, 4), (5, 5), (5, 5)]]


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (2, 8)])
def test_what_workers_load_early_does_not_change_what_a_sampler_has_heard(workers, prefetch):
    undisturbed = listening()[1]
    plugin, train = listening(workers, prefetch=prefetch)
    assert [train(epoch) for epoch in range(3)] == [undisturbed(epoch) for epoch in range(3)]
    plugin.after_run()


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_sampler_goes_on_from_the_middle_of_an_epoch(stop):
    plugin, undisturbed = listening()
    expected = [undisturbed(epoch) for epoch in range(4)]
    plugin, train = listening(workers=1)
    assert train(0) == expected[0]
    assert train(1, stop=stop) == expected[1][:stop]
    plugin.before_save()
    state = plugin.state_dict()
    plugin.after_run()
    _, train = listening(state=state)
    assert train(1, start=stop) == expected[1][stop:] if stop < 4 else True
    assert [train(2), train(3)] == expected[2:]


class Pair(Processes):
    """Two threads that stand for processes."""

    def __init__(self):
        self.barrier, self.values = threading.Barrier(2, timeout=20), [None, None]

    def of(self, rank):
        mine = Processes()
        mine.gathered = lambda value: self._gathered(rank, value)
        mine.from_main = lambda make: self._from_main(rank, make)
        return mine

    def _gathered(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values) if rank == 0 else []
        self.barrier.wait()
        return found

    def _from_main(self, rank, make):
        if rank == 0:
            self.values[0] = make()
        self.barrier.wait()
        found = self.values[0]
        self.barrier.wait()
        return found


@pytest.mark.parametrize("saves", [(), (1,), (0, 2)])
def test_processes_hear_the_same_in_the_same_order_however_often_they_save(saves):
    pair = Pair()

    def train(rank):
        run = tiny_kernel().state
        run.processes = pair.of(rank)
        sampler = Highest()
        history = History(sampler, run, range(8))
        batches = BatchSampler([np.arange(8)], 1, 0, True, rank=rank, world_size=2, sampler=history)
        seen = []
        for epoch in range(3):
            for number, batch in enumerate(batches.batches(epoch)):
                seen.append(batch)
                history.hear(batch, {"loss": torch.tensor(float(batch[0]))})
                if number in saves:
                    history.gather()
        return sampler.heard, seen

    with ThreadPoolExecutor(2) as pool:
        (heard, first), (other, second) = pool.map(train, (0, 1))
    assert heard == other
    assert heard[0] == [(index, index) for index in range(8)]
    assert [index for (index,) in first[4:8]] == [index for (index,) in second[4:8]] == [7, 6, 5, 4]


def test_a_state_of_other_images_or_of_another_sampler_does_not_fit():
    plugin, train = listening()
    train(0)
    plugin.before_save()
    state = plugin.state_dict()
    small = Loader(train=TinyDataset(size=4), sampler=Highest(), workers=0)
    small.build_loader(tiny_kernel({"data": small}).state, "train")
    with pytest.raises(ValueError, match="images that are not trained on"):
        small.load_state_dict(state)
    without = Loader(train=TinyDataset(size=8), sampler=Backwards(), workers=0)
    assert without.state_dict() == {}
    with pytest.raises(ValueError, match="another sampler"):
        without.load_state_dict(state)


def test_a_sampler_is_for_the_images_that_are_trained_on_alone():
    @plugin(loaders=("more",))
    class Asks:
        """Asks for a further loader."""

    loader = Loader(train=Rare(), further={"more": TinyDataset(size=4)}, sampler=ClassBalanced(), workers=0)
    run = tiny_kernel({"data": loader, "asks": Asks()}).state
    train, more = (loader.build_loader(run, mode) for mode in ("train", "more"))
    assert len(train.batch_sampler.batches(0)) == 20
    assert sorted(index for batch in more.batch_sampler.batches(0) for index in batch) == [0, 1, 2, 3]


def several(ratios, *sizes, empty=0):
    return made(BySource(ratios=ratios), Concat(datasets=[TinyDataset(size=size, empty=empty) for size in sizes]))


def test_sources_are_mixed_by_their_ratios():
    loader = several([1, 3], 8, 4)
    drawn = [[index for batch in loader.batch_sampler.batches(epoch) for index in batch] for epoch in range(4)]
    for epoch in drawn:
        assert len(epoch) == 12
        counts = Counter(epoch)
        assert sum(counts[index] for index in range(8)) == 3
        assert max(counts[index] for index in range(8)) == 1
        assert {counts[index] for index in range(8, 12)} <= {2, 3}  # 9 of 4 images: each twice, one three times
        assert epoch != sorted(epoch)
    assert len({tuple(epoch) for epoch in drawn}) == 4
    assert len({index for epoch in drawn for index in epoch if index < 8}) > 3
    assert [several([1, 3], 8, 4).batch_sampler.batches(e) for e in range(2)] == [
        loader.batch_sampler.batches(e) for e in range(2)
    ]


def test_ratios_want_a_concat_and_one_for_each_data_set():
    with pytest.raises(ConfigError, match="ratios: expected 2, one a data set of `concat`, got 1"):
        several([1], 8, 4)
    with pytest.raises(ConfigError, match="ratios: it needs a `concat` of several data sets"):
        made(BySource(ratios=[1]))
    with pytest.raises(DataError, match="data set 1 of `concat` has no image to train on"):
        several([1, 1], 8, 2, empty=2)


def test_an_image_that_comes_again_gets_other_random_numbers():
    loader = several([1, 1], 10, 1)
    loader.samples.transforms = [Shift()]
    again = [batch.images[n] for batch in loader.batches(0) for n, index in enumerate(batch.indices) if index == 10]
    assert len(again) == 5
    assert len({image.contiguous().numpy().tobytes() for image in again}) == 5


@plugin
class Shift(Transform):
    """Adds a random number to an image."""

    def __call__(self, sample):
        sample.image = sample.image + torch.randint(20, (3, 1, 1), dtype=torch.uint8)
        return sample
