"""From samples to a batch: padded to few shapes, and packed so that a device gets it in two copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from detkernel_detection.structures import Batch, ImageId, Sample, Target, Targets

SMALLEST = 8
"""The least number of places for the objects of an image."""
ALIGNMENT = 16
"""Bytes: a view of another type must begin at a multiple of its item's size."""

FIELD = "fields."
"""What the names of fields begin with in a buffer."""

Layout: TypeAlias = "dict[str, tuple[torch.dtype, tuple[int, ...], int]]"
"""Name -> type, shape and first byte of a tensor in a buffer."""


def places(count: int) -> int:
    """M, the places that an image of so many objects gets: a power of two, at least 8."""
    return max(SMALLEST, 1 << (count - 1).bit_length()) if count else SMALLEST


@attrs.define(eq=False)
class Packed:
    """A batch as it travels from a worker: one tensor of images, one of all their objects, and a few plain values."""

    images: Tensor
    buffer: Tensor
    """uint8 [bytes]: the targets, see `layout`."""
    layout: Layout
    counts: list[int]
    indices: list[int]
    image_ids: list[ImageId]
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]
    scales: list[tuple[float, float]]
    extras: list[dict[str, Any]]

    def pin_memory(self) -> Packed:
        """What torch's loader calls in its pinning thread."""
        self.images, self.buffer = self.images.pin_memory(), self.buffer.pin_memory()
        return self

    def unpack(self) -> Batch:
        targets, image_sizes = _targets(self.buffer, self.layout)
        return Batch(
            images=self.images,
            targets=targets,
            counts=self.counts,
            indices=self.indices,
            image_ids=self.image_ids,
            sizes=self.sizes,
            image_sizes=image_sizes,
            original_sizes=self.original_sizes,
            scales=self.scales,
            packed=(self.buffer, self.layout, targets),
            extras=self.extras,
        )


def make_batch(
    images: Tensor,
    targets: Sequence[Target] | None = None,
    *,
    indices: Sequence[int] | None = None,
    image_ids: Sequence[ImageId] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    original_sizes: Sequence[tuple[int, int]] | None = None,
    scales: Sequence[tuple[float, float]] | None = None,
) -> Batch:
    """A batch of padded images [B, 3, H, W] with their targets; without, none has an object.

    By default indices and ids count from 0, images are not padded, and their files are as large as they are.
    """
    count, shape = len(images), (int(images.shape[-2]), int(images.shape[-1]))
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    given = [nothing] * count if targets is None else list(targets)
    sizes = [shape] * count if sizes is None else list(sizes)
    columns = _columns(given, sizes, shape)
    return Batch(
        images=images,
        image_sizes=columns.pop("image_sizes"),
        targets=_made(columns),
        counts=[len(target) for target in given],
        indices=list(range(count) if indices is None else indices),
        image_ids=list(range(count) if image_ids is None else image_ids),
        sizes=sizes,
        original_sizes=list(sizes if original_sizes is None else original_sizes),
        scales=[(1.0, 1.0)] * count if scales is None else list(scales),
    )


def pack_samples(samples: Sequence[Sample], shape: tuple[int, int] | None = None) -> Packed:
    """Some samples, padded to a (height, width), by default the largest of theirs. Raises ValueError where some
    have masks or keypoints and others have not, or where one is larger than the shape."""
    sizes = [sample.size for sample in samples]
    largest = tuple(max(sides) for sides in zip(*sizes, strict=True))
    height, width = shape or largest
    if height < largest[0] or width < largest[1]:
        raise ValueError(f"an image of {largest[1]}x{largest[0]} does not fit a batch of {width}x{height}")
    images = torch.zeros(len(samples), height, width, 3, dtype=samples[0].image.dtype).permute(0, 3, 1, 2)
    for image, sample, (h, w) in zip(images, samples, sizes, strict=True):
        image[:, :h, :w].copy_(sample.image)
    targets = [sample.target for sample in samples]
    buffer, layout = pack(_columns(targets, sizes, (height, width)))
    return Packed(
        images=images,
        buffer=buffer,
        layout=layout,
        counts=[len(target) for target in targets],
        indices=[sample.index for sample in samples],
        image_ids=[sample.image_id for sample in samples],
        sizes=sizes,
        original_sizes=[sample.original_size for sample in samples],
        scales=[sample.scale for sample in samples],
        extras=[sample.extras for sample in samples],
    )


def pack(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Layout]:
    """(buffer, layout): uint8 [bytes], and where each tensor lies in it."""
    layout: Layout = {}
    end = 0
    for name, tensor in tensors.items():
        start = -(-end // ALIGNMENT) * ALIGNMENT
        layout[name] = (tensor.dtype, tuple(tensor.shape), start)
        end = start + tensor.numel() * tensor.element_size()
    buffer = torch.zeros(end, dtype=torch.uint8)
    for name, view in views(buffer, layout).items():
        view.copy_(tensors[name])
    return buffer, layout


def views(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors in a buffer, wherever it lies. They share its memory."""
    return {
        name: buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for name, (dtype, shape, start) in layout.items()
    }


def moved(batch: Batch, device: Any, non_blocking: bool) -> None:
    """Move a batch in place. Targets that somebody has exchanged are moved one tensor at a time."""
    batch.images = batch.images.to(device, non_blocking=non_blocking)
    if batch.packed is not None and batch.packed[2] is batch.targets:
        buffer, layout, _ = batch.packed
        buffer = buffer.to(device, non_blocking=non_blocking)
        batch.targets, batch.image_sizes = _targets(buffer, layout)
        batch.packed = (buffer, layout, batch.targets)
        return
    batch.targets = batch.targets.map(lambda values: values.to(device, non_blocking=non_blocking))
    batch.image_sizes = batch.image_sizes.to(device, non_blocking=non_blocking)


def _targets(buffer: Tensor, layout: Layout) -> tuple[Targets, Tensor]:
    columns = views(buffer, layout)
    image_sizes = columns.pop("image_sizes")
    return _made(columns), image_sizes


def _made(columns: Mapping[str, Tensor]) -> Targets:
    fields = {name.removeprefix(FIELD): values for name, values in columns.items() if name.startswith(FIELD)}
    others: dict[str, Any] = {name: values for name, values in columns.items() if not name.startswith(FIELD)}
    return Targets(**others, fields=fields or None)


def _columns(targets: Sequence[Target], sizes: Sequence[tuple[int, int]], shape: tuple[int, int]) -> dict[str, Tensor]:
    """What a `Targets` is made of, and the sizes of the images."""
    room = places(max(map(len, targets), default=0))
    valid = torch.zeros(len(targets), room, dtype=torch.bool)
    for row, target in zip(valid, targets, strict=True):
        row[: len(target)] = True
    columns = {
        "boxes": _stacked([target.boxes for target in targets], room),
        "labels": _stacked([target.labels for target in targets], room),
        "valid": valid,
        "image_sizes": torch.tensor(sizes),
    }
    masks = _all_or_none([target.masks for target in targets], "masks")
    if masks:
        columns["masks"] = torch.zeros((len(targets), room, *shape), dtype=torch.uint8)
        for row, given in zip(columns["masks"], masks, strict=True):
            row[: len(given), : given.shape[-2], : given.shape[-1]] = given
    keypoints = _all_or_none([target.keypoints for target in targets], "keypoints")
    if keypoints:
        columns["keypoints"] = _stacked(keypoints, room)
    for name in dict.fromkeys(name for target in targets for name in target.fields):
        values = _all_or_none([target.fields.get(name) for target in targets], name)
        if len({value.dtype for value in values}) > 1:
            raise ValueError(f"'{name}' is made of whole numbers in some images of a batch, and of others elsewhere")
        columns[FIELD + name] = _stacked(values, room)
    return columns


def _stacked(values: Sequence[Tensor], room: int) -> Tensor:
    """[N, ...] of each image -> [B, room, ...]."""
    made = values[0].new_zeros((len(values), room, *values[0].shape[1:]))
    for row, value in zip(made, values, strict=True):
        row[: len(value)] = value
    return made


def _all_or_none(values: Sequence[Tensor | None], what: str) -> list[Tensor]:
    given = [value for value in values if value is not None]
    if given and len(given) < len(values):
        raise ValueError(f"{len(values) - len(given)} of {len(values)} images of a batch have no {what}")
    return given
