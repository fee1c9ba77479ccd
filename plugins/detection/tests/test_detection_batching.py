"""Batches: padded to few shapes, moved in two copies, and the same objects wherever they lie."""

from __future__ import annotations

import pytest
import torch
from detkernel_detection import Sample, Target
from detkernel_detection.batching import make_batch, pack, pack_samples, places, views


def target(count: int, seed: int = 0, size: tuple[int, int] | None = None, points: int = 0) -> Target:
    draw = torch.Generator().manual_seed(seed)
    masks = None if size is None else torch.randint(0, 2, (count, *size), generator=draw, dtype=torch.uint8)
    keypoints = torch.rand(count, points, 3, generator=draw) if points else None
    return Target(torch.rand(count, 4, generator=draw), torch.arange(count), masks, keypoints)


def sample(count: int, height: int, width: int, index: int) -> Sample:
    image = torch.full((3, height, width), 100 + index, dtype=torch.uint8)
    return Sample(image, target(count, index, (height, width), points=2), index, f"i{index}", (2 * height, 2 * width))


@pytest.mark.parametrize(("count", "expected"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (100, 128)])
def test_places_are_powers_of_two(count: int, expected: int):
    assert places(count) == expected


def test_samples_are_padded_and_come_back_as_they_were():
    samples = [sample(3, 5, 7, 0), sample(0, 8, 4, 1), sample(9, 2, 2, 2)]
    batch = pack_samples(samples).unpack()
    assert batch.images.shape == (3, 3, 8, 7)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.targets.boxes.shape == (3, 16, 4)
    assert batch.targets.masks is not None
    assert batch.targets.masks.shape == (3, 16, 8, 7)
    assert batch.targets.valid.sum(1).tolist() == batch.counts == [3, 0, 9]
    assert batch.image_sizes.tolist() == [[5, 7], [8, 4], [2, 2]]
    assert batch.sizes == [(5, 7), (8, 4), (2, 2)]
    for one, found in zip(samples, batch.each_target(), strict=True):
        height, width = one.size
        assert torch.equal(found.boxes, one.target.boxes)
        assert torch.equal(found.labels, one.target.labels)
        assert torch.equal(found.masks[:, :height, :width], one.target.masks)
        assert found.masks.sum() == one.target.masks.sum()
        assert torch.equal(found.keypoints, one.target.keypoints)
    for number, (height, width) in enumerate(batch.sizes):
        assert batch.images[number, :, :height, :width].unique().tolist() == [100 + number]
        assert int(batch.images[number].sum()) == (100 + number) * 3 * height * width  # the padding is 0


def test_a_given_shape_holds_every_image():
    assert pack_samples([sample(1, 5, 7, 0)], (16, 32)).unpack().images.shape == (1, 3, 16, 32)
    with pytest.raises(ValueError, match="an image of 7x5 does not fit a batch of 6x16"):
        pack_samples([sample(1, 5, 7, 0)], (16, 6))


@pytest.mark.parametrize("column", ["masks", "keypoints"])
def test_some_with_and_some_without_are_an_error(column: str):
    samples = [sample(1, 4, 4, 0), sample(1, 4, 4, 1)]
    setattr(samples[1].target, column, None)
    with pytest.raises(ValueError, match=f"1 of 2 images of a batch have no {column}"):
        pack_samples(samples)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.copies += function is torch.ops.aten._to_copy.default
        return function(*arguments, **(keywords or {}))


def test_a_batch_moves_in_two_copies():
    """Before targets were packed: one for the images, and up to four for every image of the batch."""
    batch = pack_samples([sample(3, 5, 7, n) for n in range(8)]).unpack()
    with Counting() as counting:
        batch.move("meta")
    assert counting.copies == 2
    assert {value.device.type for value in (*batch.targets[:5], batch.images, batch.image_sizes)} == {"meta"}
    assert batch.targets.boxes.shape == (8, 8, 4)
    assert batch.counts == [3] * 8


def test_exchanged_targets_move_too():
    batch = pack_samples([sample(3, 5, 7, 0)]).unpack()
    batch.targets = batch.targets._replace(boxes=batch.targets.boxes + 1)
    wanted = batch.targets.boxes.clone()
    batch.move("cpu")
    assert torch.equal(batch.targets.boxes, wanted)


def test_a_part_of_a_batch():
    batch = pack_samples([sample(n, 4, 4 + n, n) for n in range(4)]).unpack()
    part = batch.keep([3, 1])
    assert (part.counts, part.indices, part.image_ids) == ([3, 1], [3, 1], ["i3", "i1"])
    assert part.sizes == [(4, 7), (4, 5)] == [tuple(size) for size in part.image_sizes.tolist()]
    assert torch.equal(part.target(0).boxes, batch.target(3).boxes)
    assert torch.equal(part.images[1], batch.images[1])


def test_a_batch_without_targets():
    batch = make_batch(torch.zeros(2, 3, 4, 6))
    assert (batch.counts, batch.sizes, batch.original_sizes) == ([0, 0], [(4, 6)] * 2, [(4, 6)] * 2)
    assert not batch.targets.valid.any()


def test_views_of_a_buffer_have_any_type():
    given = {
        "flags": torch.tensor([True, False, True]),
        "numbers": torch.arange(5),
        "none": torch.zeros(0, 4),
        "half": torch.rand(3, 2).half(),
    }
    buffer, layout = pack(given)
    found = views(buffer, layout)
    assert all(torch.equal(found[name], value) for name, value in given.items())
    found["numbers"][0] = 7
    assert views(buffer, layout)["numbers"][0] == 7
