"""Batch transforms: what changes a whole batch follows from the seed and the iteration, and its shapes are known."""

import numpy as np
import pytest
import torch
from detkernel import ConfigError, option, plugin
from detkernel_data.loading.batch_shapes import known_shapes
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.batch import MultiScale
from detkernel_detection import Annotations, BatchTransform, Dataset, Transform
from detkernel_detection.testing import tiny_kernel


@plugin
class Blocks(Dataset):
    """A bright block in each image, with its mask, corners, track id and angle; every other image is smaller."""

    kind: str = option(default="angle", help="kind of the field `angle`")

    def load(self):
        self.classes, self.keypoint_names = ("block",), ("one", "two")
        self.fields = {"track_id": "value", "angle": self.kind}

    def __len__(self):
        return 8

    def image(self, index):
        image = torch.full((64 - 16 * (index % 2), 96, 3), 20, dtype=torch.uint8).permute(2, 0, 1)
        image[:, 8:32, 16:64] = 250
        return image

    def annotations(self, index):
        return Annotations(
            *(index, f"block-{index}", 64 - 16 * (index % 2), 96),
            boxes=np.array([[16.0, 8, 64, 32]]),
            labels=np.array([0]),
            area=np.array([1152.0]),
            crowd=np.zeros(1, bool),
            difficult=np.zeros(1, bool),
            masks=[[[16, 8, 64, 8, 64, 32, 16, 32]]],
            keypoints=np.array([[[16, 8, 2], [64, 32, 1]]], dtype=np.float32),
            fields={"track_id": np.array([index]), "angle": np.array([45.0])},
        )


@plugin(needs=("masks", "keypoints"))
class Needs:
    """A model that is trained on masks and keypoints."""


def made(*transforms, seed=0, rank=0, checking=False, **options):
    """A loader plugin and its run."""
    options = {"train": Blocks(), "batch_size": 2, "workers": 0, "shuffle": False, **options}
    plugin = Loader(batch_transforms=list(transforms), **options)
    run = tiny_kernel({"data": plugin, "needs": Needs()}, seed=seed).state
    run.checking = checking
    run.loaders["train"] = plugin.build_loader(run, "train")
    run.rank = rank
    return plugin, run


def batches(plugin, run, start=0, count=12):
    """What the iterations from one on are trained on."""
    for iteration in range(start, start + count):
        run.epoch, run.iter = divmod(iteration, 4)[0], iteration
        run.batch = iteration % 4
        batch = next(run.loaders["train"].batches(run.epoch, start=run.batch))
        plugin.before_train_iter(run, batch)
        yield batch


def shapes(*transforms, start=0, count=12, **options):
    return [tuple(batch.images.shape[2:]) for batch in batches(*made(*transforms, **options), start, count)]


def test_the_size_changes_every_so_many_iterations():
    found = shapes(MultiScale(sizes=[32, 64, 96, 128], every=3), count=24)
    thirds = [found[n : n + 3] for n in range(0, 24, 3)]
    assert all(len(set(third)) == 1 for third in thirds)
    assert {third[0] for third in thirds} == {(32, 32), (32, 64), (64, 96), (96, 128)}
    assert len(set(shapes(MultiScale(sizes=[32, 64, 96, 128], every=24), count=24))) == 1


def test_a_size_follows_from_the_seed_and_the_iteration_alone():
    scale = MultiScale(between=(32, 160), every=1)
    undisturbed = shapes(scale)
    assert shapes(scale, start=5, count=7) == undisturbed[5:]
    assert shapes(scale, rank=1) == undisturbed
    assert shapes(scale, workers=0, prefetch=1) == undisturbed
    assert shapes(scale, seed=1) != undisturbed
    assert {longer for _, longer in shapes(scale, count=60)} == {32, 64, 96, 128, 160}


def test_all_of_a_batch_is_resized():
    (batch,) = batches(*made(MultiScale(sizes=[192], step=64)), count=1)
    assert batch.images.shape == (2, 3, 128, 192)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes == [(128, 192), (96, 192)] == [tuple(size) for size in batch.image_sizes.tolist()]
    assert batch.scales == [(2.0, 2.0)] * 2
    assert batch.original_sizes == [(64, 96), (48, 96)]
    for number in range(2):
        target = batch.target(number)
        assert target.boxes.tolist() == [[32, 16, 128, 64]]
        assert target.keypoints.tolist() == [[[32, 16, 2], [128, 64, 1]]]
        assert target.fields["track_id"].tolist() == [number]
        assert target.masks.shape == (1, 128, 192)
        assert target.masks.sum() == 96 * 48
        assert target.masks[0, 16:64, 32:128].all()
        bright = (batch.images[number, 0] > 150).nonzero()
        assert [*bright.amin(0).tolist(), *bright.amax(0).tolist()] == [16, 32, 63, 127]
    assert not batch.images[1, :, 96:].any()


def test_an_angle_turns_where_the_aspect_changes():
    (batch,) = batches(*made(MultiScale(sizes=[96], step=96)), count=1)  # 64x96 becomes 96x96
    assert batch.scales == [(1.5, 1.0)] * 2
    assert batch.target(0).fields["angle"].item() == pytest.approx(np.degrees(np.arctan(1.5)))
    assert batch.target(0).boxes.tolist() == [[16, 12, 64, 48]]
    with pytest.raises(ConfigError, match=r"batch_transforms: MultiScale cannot move the field 'angle' of kind 'ellip"):
        made(MultiScale(sizes=[96]), train=Blocks(kind="ellipse"))


def test_a_transform_that_needs_what_samples_do_not_have():
    @plugin(needs=("maks",))
    class Odd(Transform):
        """Its author slipped."""

        def __call__(self, sample):
            return sample

    with pytest.raises(ConfigError, match=r"train_transforms: Odd needs 'maks', did you mean 'masks'\?"):
        made(MultiScale(sizes=[96]), train_transforms=[Odd()])


def test_every_shape_is_known_before_the_run():
    options = {"batch_shapes": [(64, 96)]}
    scale = MultiScale(between=(64, 128), every=1)
    plugin, run = made(scale, **options)
    known = known_shapes(run.loaders["train"])
    assert known.images == [(32, 64), (64, 96), (96, 128)]
    assert {tuple(batch.images.shape[2:]) for batch in batches(plugin, run, count=40)} == set(known.images)
    text = plugin.summary(run)["train batch shapes"]
    assert text.startswith("3 at most: 64x32, 96x64, 128x96 pixels")
    partly = made(MultiScale(sizes=[192], active=(1, 2)), **options)[1]
    assert known_shapes(partly.loaders["train"]).images == [(64, 96), (128, 192)]
    assert known_shapes(made(scale)[1].loaders["train"]).total is None


def test_a_batch_transform_is_used_in_its_epochs_only():
    found = shapes(MultiScale(sizes=[192], active=(1, 2)))
    assert found == [(64, 96)] * 4 + [(128, 192)] * 4 + [(64, 96)] * 4


def test_the_check_takes_the_largest_and_the_smallest():
    found = shapes(MultiScale(between=(32, 256)), count=2, checking=True)
    assert [longer for _, longer in found] == [256, 32]


@plugin
class Drawn(BatchTransform):
    """Puts what it draws into the extras."""

    moves_fields = ("any",)

    def __call__(self, batch, context):
        shared, own = context.generator(context.iteration), context.generator(context.iteration, context.rank)
        batch.extras = [{"drawn": tuple(torch.rand((), generator=one).item() for one in (shared, own))}]

    def most_objects(self, most):
        return 2 * most + 8


def test_what_is_drawn_differs_by_iteration_and_place_and_where_it_is_wanted_by_process():
    def drawn(place, rank):
        plugin, run = made(*[Drawn()] * (place + 1), rank=rank)
        return [batch.extras[0]["drawn"] for batch in batches(plugin, run, count=6)]

    (first, other), again = (drawn(0, rank) for rank in (0, 1)), drawn(0, 0)
    assert first == again
    assert [shared for shared, _ in first] == [shared for shared, _ in other]
    assert not {own for _, own in first} & {own for _, own in other}
    assert len({*first, *drawn(1, 0)}) == 12


def test_a_batch_transform_may_add_objects():
    assert known_shapes(made(Drawn())[1].loaders["train"]).places == [8, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either `sizes` or `between`"),
        ({"sizes": [32], "between": (32, 64)}, "give either `sizes` or `between`"),
        ({"sizes": [32, 40]}, r"sizes: expected multiples of `step`, 32, the smaller first, got \[32, 40\]"),
        ({"between": (96, 64)}, r"between: expected multiples of `step`, 32, the smaller first, got \[96, 64\]"),
        ({"between": (64, 100)}, r"between: expected multiples of `step`, 32, the smaller first, got \[64, 100\]"),
    ],
)
def test_sizes_that_make_no_sense_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MultiScale(**options)
