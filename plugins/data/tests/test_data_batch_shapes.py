"""Batches of few shapes, known before the run; and nothing that is learned depends on the padding."""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from detkernel import ConfigError, UserError, option, plugin
from detkernel_data.loading import workers
from detkernel_data.loading.batch_shapes import known_shapes
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.standard import V2, Crop, Flip, Resize
from detkernel_detection import Annotations, Dataset
from detkernel_detection.batching import pack_samples
from detkernel_detection.detector import Detector
from detkernel_detection.testing import tiny_kernel


@plugin
class Sized(Dataset):
    """Images of given sizes, each with some objects."""

    sizes: list[tuple[int, int]] = option(help="heights and widths")
    objects: int = option(default=3, help="objects of the fullest image; the others have one")

    def load(self):
        self.classes = ("a", "b")

    def __len__(self):
        return len(self.sizes)

    def image(self, index):
        draw = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, *self.sizes[index]), generator=draw, dtype=torch.uint8)

    def annotations(self, index):
        height, width = self.sizes[index]
        count = self.objects if index == 0 else 1
        boxes, flags = np.tile([1.0, 1, 9, 9], (count, 1)), np.zeros(count, dtype=bool)
        return Annotations(index, f"{index}.jpg", height, width, boxes, np.zeros(count, int), boxes[:, 0], flags, flags)


MIXED = [(40, 60), (60, 40), (30, 60), (60, 30), (40, 40), (41, 60)]


def made(mode="train", **options):
    transforms = options.pop("transforms", [Resize(short=40, long=64), Flip()])
    options = {"train": Sized(sizes=MIXED), "batch_size": 2, "workers": 0, "train_transforms": transforms, **options}
    loader = Loader(val_transforms=[Resize(short=40, long=64)], val=options["train"], **options)
    return loader.build_loader(tiny_kernel({"data": loader}).state, mode)


def shapes_of(loader, epochs=2):
    return {tuple(batch.images.shape[2:]) for epoch in range(epochs) for batch in loader.batches(epoch)}


@pytest.mark.parametrize("mode", ["train", "val"])
def test_automatic_shapes_are_one_of_landscape_and_one_of_portrait_images(mode):
    loader = made(mode, batch_shapes="auto", train=Sized(sizes=[(20, 60), (60, 20), (21, 64), (60, 18)]))
    assert shapes_of(loader) == {(32, 64), (64, 32)}
    assert known_shapes(loader).images == [(32, 64), (64, 32)]


def test_every_batch_of_a_run_has_a_shape_that_was_known():
    loader = made(batch_shapes=[(64, 48), (48, 64)], train=Sized(sizes=MIXED, objects=9))
    known = known_shapes(loader)
    assert known == ([(48, 64), (64, 48)], [8, 16], [2])
    seen = {(len(b), *b.images.shape[2:], *b.targets.valid.shape[1:]) for e in range(8) for b in loader.batches(e)}
    assert {shape[1:3] for shape in seen} == {(48, 64), (64, 48)}
    assert {shape[3] for shape in seen} == {8, 16}
    assert len(seen) <= known.total == 4
    assert known_shapes(made(batch_size=4, batch_shapes=[(64, 64)])).batch_sizes == [2, 4]
    assert known_shapes(made(batch_size=4, batch_shapes=[(64, 64)], drop_last=True)).batch_sizes == [4]
    assert known_shapes(made()).total is made().shape_count is None
    assert loader.shape_count == known.total == 4


def test_a_batch_gets_the_smallest_shape_that_holds_its_images():
    loader = made(batch_shapes=[(64, 64), (48, 64), (64, 48)], group_by_aspect=False, shuffle=False)
    assert [tuple(batch.images.shape[2:]) for batch in loader.batches(0)] == [(64, 64), (64, 64), (48, 64)]


def test_automatic_shapes_follow_the_last_resize():
    crop_first = made(batch_shapes="auto", transforms=[Crop(), Resize(long=33)])
    assert known_shapes(crop_first).images == [(64, 64)]
    fixed = made(batch_shapes="auto", transforms=[Crop(), Resize(size=(32, 64))])
    assert known_shapes(fixed).images == [(32, 64)] == list(shapes_of(fixed))
    several = made(batch_shapes="auto", transforms=[Resize(short=[16, 24, 32])], train=Sized(sizes=[(40, 60)] * 4))
    assert known_shapes(several).images == [(32, 64)] == list(shapes_of(several))


@pytest.mark.parametrize("transforms", [[Crop()], [Resize(short=30), Crop(), Resize(short=20)]])
def test_shapes_that_cannot_be_known_are_an_error(transforms):
    with pytest.raises(ConfigError, match="'auto' needs transforms that say how large their images are, and Crop does"):
        made(batch_shapes="auto", transforms=transforms)
    with pytest.raises(ConfigError, match="V2 does not"):
        made(batch_shapes="auto", transforms=[V2(name="RandomZoomOut")])


def test_an_image_that_no_shape_holds_is_named():
    loader = made(batch_shapes=[(48, 64)])
    with pytest.raises(UserError, match=r"no shape of data.batch_shapes \(width x height: 64x48\) holds the images"):
        list(loader.batches(0))


def test_a_start_in_the_middle_gives_the_same_batches():
    options = {"batch_shapes": [(48, 64), (64, 48)], "train": Sized(sizes=MIXED, objects=9)}
    whole, later = list(made(**options).batches(3)), list(made(**options).batches(3, start=1))
    for one, other in zip(whole[1:], later, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes, other.targets.boxes)


def test_the_check_says_how_many_shapes_there_are():
    options = {"val": None, "train": Sized(sizes=MIXED, objects=9), "batch_size": 2, "workers": 0}
    loader = Loader(**options, batch_shapes=[(48, 64), (64, 48)], train_transforms=[Resize(short=40, long=64)])
    kernel = tiny_kernel({"data": loader})
    kernel.state.loaders["train"] = loader.build_loader(kernel.state, "train")
    text = loader.summary(kernel.state)["train batch shapes"]
    assert text == "4 at most: 64x48, 48x64 pixels; places for objects: 8, 16; images a batch: 2"


class Pixels(Detector):
    """A detector of one linear layer a pixel, which knows where its images end."""

    def __init__(self):
        super().__init__(["a", "b"])
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)

    def forward_outputs(self, images, sizes=None):
        rows = torch.arange(images.shape[2]) < sizes[:, :1]
        columns = torch.arange(images.shape[3]) < sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return (self.layer(images) * inside).double().sum((2, 3)) / inside.double().sum((2, 3))

    def losses(self, outputs, targets, sizes=None):
        distance = (targets.boxes.double() - outputs[:, None]).abs().sum(2)
        return {"loss": torch.where(targets.valid, distance, 0.0).sum() / targets.valid.sum()}


def test_losses_do_not_depend_on_the_padding():
    loader = made(train=Sized(sizes=MIXED, objects=9))
    samples = [loader.samples.sample(0, index) for index in range(4)]
    model, losses = Pixels(), []
    for shape in (None, (64, 64), (96, 128)):
        batch = pack_samples(samples, shape).unpack()
        losses.append(model(batch.images, batch.targets, batch.image_sizes)["loss"])
        gradient = torch.autograd.grad(losses[-1], model.layer.weight)[0]
        assert gradient.abs().sum() > 0
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in pairwise(losses))


@pytest.mark.parametrize(("cores", "beside", "expected"), [(16, None, 16), (16, "4", 4), (2, "4", 1), (6, "4", 1)])
def test_each_process_has_as_many_workers_as_its_share_of_the_cores(cores, beside, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if beside:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
    assert workers.worker_count(None) == expected
    assert workers.worker_count(3) == 3
