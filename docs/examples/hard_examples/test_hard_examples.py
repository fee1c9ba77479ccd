from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from detkernel import hookimpl, plugin
from detkernel.testing import Recorder
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loading.loader import Loader
from detkernel_detection.testing import TinyDataset, tiny_kernel
from detkernel_runtime.device import Device
from hard_examples import HardExamples


def drawn(sampler, epochs=range(1, 101)):
    """How often images are drawn in some epochs, once sampler has heard of them."""
    generator = torch.Generator().manual_seed(0)
    return Counter(index for epoch in epochs for index in sampler.positions(range(4), epoch, generator))


def prepared(heard=((0, 1.0), (1, 1.0), (2, 1.0), (3, 5.0)), **options):
    sampler = HardExamples(**options)
    sampler.prepare(TinyDataset(size=4), range(4))
    if heard:
        sampler.update(*map(np.array, zip(*heard, strict=True)))
    return sampler


def test_the_first_epoch_has_each_image_once():
    assert drawn(prepared(heard=()), [0]) == {0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(
    ("options", "share"), [({"even": 0}, 5 / 8), ({"even": 1}, 1 / 4), ({"even": 0, "power": 2}, 25 / 28)]
)
def test_an_image_is_drawn_in_proportion_to_its_loss(options, share):
    assert drawn(prepared(**options))[3] / 400 == pytest.approx(share, abs=0.06)


def test_the_average_moves_and_what_is_not_finite_is_not_heard():
    sampler = prepared([(3, 8.0), (3, 4.0), (3, float("nan")), (2, float("inf"))], momentum=0.75)
    assert sampler.state_dict()["averages"] == [None, None, None, 7.0]
    assert min(drawn(prepared([(3, 8.0)], even=0)).values()) > 60  # those not heard of count as the hardest
    assert drawn(prepared([(n, 0.0) for n in range(4)]), [1]).total() == 4


@plugin
class Killed:
    """Fails, as a killed run does, in an iteration."""

    @hookimpl
    def before_train_iter(self, run):
        if run.iter == 10:
            raise KeyboardInterrupt


def kernel(folder, workers=0, recorder=None):
    data = Loader(train=TinyDataset(size=6), sampler=HardExamples(even=0.1, power=3.0), workers=workers)
    plugins = {"data": data, "device": Device(device="cpu"), "checkpoint": Checkpoint(every="2 iters")}
    return tiny_kernel(plugins, until="5 epochs", work_dir=folder, recorder=recorder)


def test_killed_and_resumed_with_other_workers_it_ends_bit_for_bit_the_same(tmp_path):
    recorder = Recorder()
    through = kernel(tmp_path / "through", recorder=recorder).run()
    images = [fired.arguments["batch"].indices for fired in recorder.of("after_train_iter")]
    epochs = [sorted(chain(*images[number : number + 3])) for number in range(0, 15, 3)]
    assert epochs[0] == list(range(6))
    assert max(len(set(epoch)) for epoch in epochs[1:]) < 6
    killed = kernel(tmp_path / "killed", workers=1)
    killed.state.bus._manager.register(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    recorder = Recorder()
    resumed = kernel(tmp_path / "killed", recorder=recorder).run()
    assert [fired.arguments["batch"].indices for fired in recorder.of("after_train_iter")] == images[10:]
    for name, value in through.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
