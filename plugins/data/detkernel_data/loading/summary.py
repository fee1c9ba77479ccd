"""What `detkernel check` says of the data: images and boxes, by split and class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from detkernel.errors import printable

from detkernel_data.loading.batch_shapes import describe, known_shapes
from detkernel_data.report import counted

if TYPE_CHECKING:
    from detkernel_detection import Dataset

    from detkernel_data.loading.batches import Batches

_ROWS = 30


def lines(
    loaders: Mapping[str, Batches], classes: Sequence[str], *, trained: Callable[[str], bool], decoded: bool
) -> dict[str, str]:
    """A line for each split, and a table of the classes."""
    counts = {mode: count(loader.dataset, len(classes)) for mode, loader in loaders.items()}
    found = {}
    for mode, loader in loaders.items():
        images, _, boxes, empty = counts[mode]
        steps = f"{counted(len(loader), 'iteration')} an epoch" if trained(mode) else counted(len(loader), "batch")
        found[mode] = (
            f"{counted(images, 'image')}{', all decoded' if decoded else ''}, {counted(int(boxes.sum()), 'box')}, "
            f"{counted(empty, 'image')} without a box, {steps}"
        )
    for mode, loader in loaders.items():
        found[f"{mode} batch shapes"] = describe(known_shapes(loader))
    found["boxes by class"] = table(counts, classes)
    return found


Count = tuple[int, "np.ndarray[tuple[int], np.dtype[np.int64]]", "np.ndarray[tuple[int], np.dtype[np.int64]]", int]


def count(dataset: Dataset, classes: int) -> Count:
    """(images, images with a class [C], boxes of a class [C], images without a box)."""
    images, boxes, empty = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64), 0
    for index in range(len(dataset)):
        labels = dataset.annotations(index).labels
        found = np.bincount(labels, minlength=classes)
        boxes += found
        images += found > 0
        empty += not len(labels)
    return len(dataset), images, boxes, empty


def table(counts: Mapping[str, Count], classes: Sequence[str]) -> str:
    """For each class, the boxes and the images that have one, in each split."""
    names = [name if len(name) <= 24 else f"{name[:23]}~" for name in map(printable, classes)]
    rows = [["", *(f"{mode}: boxes  images" for mode in counts)]]
    for number, name in list(enumerate(names))[:_ROWS]:
        cells = [f"{boxes[number]:,}  {images[number]:>6,}" for _, images, boxes, _ in counts.values()]
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]))
    if len(names) > _ROWS:
        text.append(f"and {len(names) - _ROWS} more classes")
    for mode, (_, _, boxes, _) in counts.items():
        lacking = [names[number] for number in np.flatnonzero(boxes == 0)]
        if lacking and len(names) > _ROWS:
            text.append(f"no box in {mode}: {', '.join(lacking[:10])}{', ...' if len(lacking) > 10 else ''}")
    return "\n".join(text)
