"""Mosaic, mixup and copy-paste: what they show is annotated, and it follows from (seed, epoch, position) alone."""

import attrs
import numpy as np
import pytest
import torch
from detkernel import ConfigError, UserError, option, plugin
from detkernel_data.loading.batch_sampler import BatchSampler
from detkernel_data.loading.batch_shapes import known_shapes
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.mixing import CopyPaste, Mixup, Mosaic
from detkernel_data.transforms.standard import Flip, Resize
from detkernel_detection import Annotations, Dataset, Transform
from detkernel_detection.testing import tiny_kernel

COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]


@plugin
class Blocks(Dataset):
    """A bright block on black in each image, with its mask, its corners as keypoints, a track id and an angle."""

    size: int = option(default=4, help="how many")

    def load(self):
        self.classes, self.keypoint_names = ("a", "b", "c", "d"), ("one", "two")
        self.fields = {"track_id": "value", "angle": "angle"}

    def __len__(self):
        return self.size

    def _box(self, index):
        return 8 + 4 * index, 6, 28 + 4 * index, 26

    def image(self, index):
        image = torch.zeros(48, 64, 3, dtype=torch.uint8).permute(2, 0, 1)
        x1, y1, x2, y2 = self._box(index)
        image[:, y1:y2, x1:x2] = torch.tensor(COLOURS[index % 4], dtype=torch.uint8)[:, None, None]
        return image

    def annotations(self, index):
        x1, y1, x2, y2 = self._box(index)
        return Annotations(
            *(index, f"block-{index}", 48, 64),
            boxes=np.array([[x1, y1, x2, y2]], dtype=float),
            labels=np.array([index % 4]),
            area=np.array([400.0]),
            crowd=np.zeros(1, bool),
            difficult=np.zeros(1, bool),
            masks=[[[x1, y1, x2, y1, x2, y2, x1, y2]]],
            keypoints=np.array([[[x1, y1, 2], [x2, y2, 2]]], dtype=np.float32),
            fields={"track_id": np.array([index]), "angle": np.array([10.0 * index])},
        )


@plugin(needs=("masks", "keypoints"))
class Needs:
    """A model that is trained on masks and keypoints."""


def made(*transforms, needs=True, until="4 epochs", **options):
    options = {"train": Blocks(), "batch_size": 2, "workers": 0, "train_transforms": list(transforms), **options}
    loader = Loader(**options)
    kernel = tiny_kernel({"data": loader, **({"needs": Needs()} if needs else {})}, until=until)
    return loader.build_loader(kernel.state, "train")


def colour_box(image, label):
    """Where an image shows the colour of a class."""
    colour = torch.tensor(COLOURS[label], dtype=torch.float32)[:, None, None]
    where = ((image.float() - colour).abs().amax(0) < 70).nonzero()
    return [*where.amin(0).flip(0).tolist(), *(where.amax(0).flip(0) + 1).tolist()] if len(where) else None


@pytest.mark.parametrize(
    "transform", [Mosaic(size=(80, 96)), CopyPaste(probability=1), Flip()], ids=lambda t: type(t).__name__
)
def test_masks_boxes_keypoints_and_fields_stay_with_their_objects(transform):
    loader = made(transform)
    objects = 0
    for epoch in range(12):
        sample = loader.samples.sample(epoch, epoch % 4)
        target = sample.target
        assert len(target.boxes) == len(target.masks) == len(target.keypoints) == len(target.fields["track_id"])
        for box, label, mask, track in zip(
            target.boxes, target.labels.tolist(), target.masks, target.fields["track_id"].tolist(), strict=True
        ):
            assert track == label
            if target.labels.tolist().count(label) > 1:
                continue
            seen = sample.image.float()[:, mask.bool()].mean(1)
            assert (seen - torch.tensor(COLOURS[label], dtype=torch.float32)).abs().max() < 60
            rows, columns = mask.nonzero().T
            around = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (around - box).abs().max() <= 1.5
            objects += 1
        points = target.keypoints[target.keypoints[..., 2] > 0]
        height, width = sample.size
        assert (points[:, :2] >= 0).all()
        assert (points[:, :2] <= torch.tensor([width, height])).all()
    assert objects > 6


def test_a_mosaic_has_four_images():
    loader = made(Mosaic(size=(80, 96), scale=(0.5, 0.5), center=(0.5, 0.5), visible=0))
    counts = [len(loader.samples.sample(epoch, 0).target) for epoch in range(4)]
    assert counts == [4] * 4
    sample = loader.samples.sample(0, 0)
    assert sample.size == (80, 96)
    assert colour_box(sample.image, 0) is not None
    assert {(x, y) < (48, 40) for x, y in sample.target.boxes[:1, :2].tolist()} == {True}  # its own is the upper left


def test_a_mixup_shows_both_images_with_the_objects_of_both():
    loader = made(Mixup(probability=1, ratio=(0.75, 0.75)))
    for epoch in range(4):
        sample = loader.samples.sample(epoch, 0)
        other = int(sample.target.labels[1])
        expected = 0.75 * Blocks().image(0).float() + 0.25 * Blocks().image(other).float()
        assert torch.equal(sample.image, expected.round().to(torch.uint8))
        assert sample.target.labels.tolist() == [0, other]
        assert sample.target.fields["track_id"].tolist() == [0, other]


def test_what_a_pasted_object_hides_is_not_in_the_mask_below():
    loader = made(CopyPaste(probability=1, scale=(1.0, 1.0), visible=0.3))
    hidden = dropped = 0
    for epoch in range(16):
        target = loader.samples.sample(epoch, 0).target
        assert target.masks.sum(0).max() == 1
        dropped += 0 not in target.labels.tolist()
        if len(target) == 2:
            below = target.masks[0].sum()
            assert 0.3 * 400 <= below <= 400
            hidden += bool(below < 400)
    assert hidden
    assert dropped


def test_masks_are_loaded_for_a_transform_and_not_handed_to_a_model_without():
    loader = made(CopyPaste(probability=1), needs=False)
    batch = next(loader.batches(0))
    assert batch.targets.masks is None
    assert max(batch.counts) == 2


@pytest.mark.parametrize("transform", [Mosaic(size=(32, 32)), Mixup(), CopyPaste()], ids=lambda t: type(t).__name__)
def test_any_number_of_workers_and_any_start_give_the_same(transform):
    def batches(workers, start=0):
        loader = made(transform, Resize(size=(32, 32)), workers=workers)
        found = [(b.images.clone(), b.targets.boxes.clone()) for b in loader.batches(1, start)]
        loader.close()
        return found

    undisturbed = batches(0)
    for found, expected in ((batches(2), undisturbed), (batches(0, 1), undisturbed[1:])):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])


def test_a_transform_is_used_in_its_epochs_only():
    loader = made(Mosaic(size=(80, 96), active=(1, 3)), Flip(probability=1, active=(0, 1)))
    assert [loader.samples.sample(epoch, 0).size for epoch in range(4)] == [(48, 64), (80, 96), (80, 96), (48, 64)]
    plain = Blocks().image(0)
    assert torch.equal(loader.samples.sample(3, 0).image, plain)
    assert torch.equal(loader.samples.sample(0, 0).image, plain.flip(-1))


def test_validation_and_a_bare_sample_have_no_other_images():
    sample = made().samples.raw(0, 0)
    for transform in (Mosaic(), Mixup(), CopyPaste()):
        with pytest.raises(UserError, match=f"{type(transform).__name__}: it needs other images, which only training"):
            transform(sample)


def test_the_places_for_objects_hold_what_is_added():
    assert known_shapes(made()).places == [8]
    many = made(Mosaic(size=(32, 32)), Mixup(), Mosaic(size=(32, 32)))
    assert many.samples.transforms[0].most_objects(5, 5) == 20
    assert known_shapes(many).places == [8]
    assert Mixup().most_objects(20, 5) == 25
    assert CopyPaste(most=3).most_objects(20, 5) == 23


@plugin
class Notes(Transform):
    """Puts what it is told into the extras."""

    moves_fields = ("any",)

    def __call__(self, sample):
        context = sample.context
        sample.extras |= {"epochs": context.epochs, "classes": context.classes, "drawn": float(torch.rand(()))}
        sample.extras["other"] = context.fetch(2).image_id
        return sample


def test_a_transform_is_told_the_run():
    for until, epochs in (("4 epochs", 4), ("5 iters", 3)):
        extras = next(made(Notes(), until=until).batches(0)).extras[0]
        assert {key: extras[key] for key in ("epochs", "other")} == {"epochs": epochs, "other": 2}
        assert extras["classes"] == ("a", "b", "c", "d")


def test_a_repeated_position_gets_other_random_numbers():
    sampler = BatchSampler([np.arange(3)], 2, 0, training=True, rank=1, world_size=2)
    (batch,) = sampler.draws(0)
    whole = sorted([*BatchSampler([np.arange(3)], 2, 0, training=True, world_size=2).draws(0)[0], *batch])
    assert [index for index, _ in whole] in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2])
    assert sorted(number for _, number in whole) == [0, 0, 0, 1]
    samples = made(Notes()).samples
    first, again = (samples.sample(0, 1, repetition).extras["drawn"] for repetition in (0, 1))
    assert first != again
    assert samples.sample(0, 1).extras["drawn"] == first


@plugin
class Weighted:
    """A model whose losses go by the weight of an object."""

    uses_fields = ("weight",)


def weighted(*transforms, **options):
    loader = Loader(
        **{"train": Blocks(), "batch_size": 2, "workers": 0, "train_transforms": list(transforms), **options}
    )
    return loader.build_loader(tiny_kernel({"data": loader, "weighted": Weighted()}, until="4 epochs").state, "train")


def test_the_weight_of_an_object_is_the_share_of_its_image_where_that_is_asked_for():
    found = weighted(Mixup(probability=1, ratio=(0.75, 0.75), weights=True)).samples.sample(0, 0).target
    assert found.fields["weight"].tolist() == [0.75, 0.25]
    twice = weighted(*[Mixup(probability=1, ratio=(0.75, 0.75), weights=True)] * 2).samples.sample(0, 0).target
    assert twice.fields["weight"].tolist() == [0.5625, 0.1875, 0.25]
    assert "weight" not in weighted(Mixup(probability=1)).samples.sample(0, 0).target.fields
    batch = next(weighted(Mixup(probability=0.5, weights=True, active=(0, 1)), batch_size=4).batches(0))
    assert {1.0, 0.5} == {weight for one in batch.each_target() for weight in one.fields["weight"].tolist()}
    batch = next(weighted(Mixup(probability=1, weights=True, active=(0, 1)), batch_size=4).batches(1))
    assert [one.fields["weight"].tolist() for one in batch.each_target()] == [[1.0]] * 4


@pytest.mark.parametrize("mosaic_first", [True, False])
def test_weights_go_with_their_objects_through_a_mosaic(mosaic_first):
    parts = [Mosaic(size=(80, 96), visible=0), Mixup(probability=1, ratio=(0.75, 0.75), weights=True)]
    loader = weighted(*(parts if mosaic_first else parts[::-1]))
    found = [loader.samples.sample(epoch, 0).target for epoch in range(4)]
    for target in found:
        assert len(target.fields["weight"]) == len(target)
        assert set(target.fields["weight"].tolist()) <= ({0.75, 0.25} if mosaic_first else {0.75, 0.25, 1.0})
    assert any(len(target) > 2 for target in found)


@plugin
class Certain(Blocks):
    """How sure an annotator was is a weight that the data has already."""

    kind: str = option(default="value", help="how it changes")

    def load(self):
        super().load()
        self.fields = {"weight": self.kind}

    def annotations(self, index):
        return attrs.evolve(super().annotations(index), fields={"weight": np.array([2])})


def test_the_weight_that_the_data_has_is_multiplied():
    mixup = Mixup(probability=1, ratio=(0.75, 0.75), weights=True)
    found = weighted(mixup, train=Certain()).samples.sample(0, 0).target
    assert found.fields["weight"].tolist() == [1.5, 0.5]
    with pytest.raises(ConfigError, match="'weight' of the objects, which is of kind 'angle' in the data"):
        weighted(mixup, train=Certain(kind="angle"))


def test_weights_that_no_loss_goes_by_are_an_error():
    with pytest.raises(
        ConfigError, match=r"Mixup changes the field 'weight' of the objects, but no active plugin says"
    ):
        made(Mixup(weights=True))
