"""The shapes of batches: few, and known before a run, so that what is compiled for a shape is compiled few times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from detkernel import UserError, wrong
from detkernel_detection import Dataset, Sample, Transform
from detkernel_detection.batching import places

from detkernel_data.formats.overview import overview

if TYPE_CHECKING:
    from detkernel_data.loading.batches import Batches
    from detkernel_data.loading.loader import Loader

Size = tuple[int, int]
"""Height and width."""
STRIDE = 32
"""Automatic shapes are multiples of it: the coarsest map of most detectors."""


class Known(NamedTuple):
    """Every shape that the batches of a mode can have."""

    images: list[Size]
    """Empty: each batch is as large as its largest image."""
    places: list[int]
    """For the objects of an image."""
    batch_sizes: list[int]

    @property
    def total(self) -> int | None:
        """How many shapes there can be; None where those of the images are not known."""
        return len(self.images) * len(self.places) * len(self.batch_sizes) or None


def choose_shapes(options: Loader, transforms: Sequence[Transform], dataset: Dataset) -> list[Size]:
    """(height, width) of the batches, smallest first; empty where they are as large as their images.

    Raises `ConfigError` where they are to be found automatically, and a transform does not say what it makes.
    """
    if options.batch_shapes is None:
        return []
    if options.batch_shapes != "auto":
        return by_area(options.batch_shapes)
    largest: dict[bool, Size] = {}
    seen = overview(dataset)
    for height, width in set(zip(seen.heights.tolist(), seen.widths.tolist(), strict=True)):
        found = _output_size(options, transforms, (height, width))
        group = options.group_by_aspect and options.sampler is None and width >= height
        before = largest.get(group, (0, 0))
        largest[group] = max(before[0], found[0]), max(before[1], found[1])
    return by_area(
        [(-(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE) for height, width in largest.values()]
    )


def by_area(shapes: Sequence[Size]) -> list[Size]:
    return sorted(set(shapes), key=lambda shape: (shape[0] * shape[1], shape))


def _output_size(options: Loader, transforms: Sequence[Transform], size: Size) -> Size:
    """The most that the transforms make of an image."""
    found: Size | None = size
    unknown = ""
    for transform in transforms:
        before, found = found, transform.output_size(found)
        if transform.active is not None and before != found:
            found = None  # some epochs are without it
        unknown = unknown or type(transform).__name__ if found is None else ""
    if found is None:
        raise wrong(
            options,
            "batch_shapes",
            f"'auto' needs transforms that say how large their images are, and {unknown} does not; put a `resize` with "
            "`size` or `long` behind it, or list the shapes, such as [[800, 1344], [1344, 800]]",
        )
    return found


def fitting(samples: Sequence[Sample], shapes: Sequence[Size]) -> Size | None:
    """The smallest shape that holds the samples. Raises `UserError` where none does; None where any size will do."""
    if not shapes:
        return None
    height, width = (max(sides) for sides in zip(*(sample.size for sample in samples), strict=True))
    for shape in shapes:
        if height <= shape[0] and width <= shape[1]:
            return shape
    known = ", ".join(f"{wide}x{high}" for high, wide in shapes)
    names = ", ".join(f"'{sample.image_id}' of {sample.size[1]}x{sample.size[0]}" for sample in samples[:4])
    raise UserError(
        f"data: no shape of data.batch_shapes (width x height: {known}) holds the images {names} together; resize them "
        "to less, or add a shape that does"
    )


def known_shapes(loader: Batches) -> Known:
    """What the batches of a loader can be. It looks at every annotation."""
    dataset = loader.dataset
    another = int(overview(dataset).objects.max(initial=0))
    most = another
    for transform in loader.samples.transforms:
        most = transform.most_objects(most, another)
    shapes = list(loader.samples.shapes)
    for step in loader.batch_transforms:
        most = max(most, step.most_objects(most))
        made = [size for shape in shapes for size in step.output_sizes(shape)]
        shapes = by_area(made if step.active is None else [*shapes, *made])
    sizes = [places(0)]
    while sizes[-1] < places(most):
        sizes.append(2 * sizes[-1])
    return Known(shapes, sizes, loader.batch_sampler.batch_sizes)


def describe(known: Known) -> str:
    """For `detkernel check`."""
    room = f"places for objects: {', '.join(map(str, known.places))}"
    if known.total is None:
        return f"as large as the largest image of each (`data.batch_shapes` fixes them); {room}"
    images = ", ".join(f"{width}x{height}" for height, width in known.images)
    batches = ", ".join(map(str, known.batch_sizes))
    return f"{known.total} at most: {images} pixels; {room}; images a batch: {batches}"
