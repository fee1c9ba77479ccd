"""What `detkernel doctor` looks for beyond what the readers report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs
import numpy as np
from detkernel_detection import Dataset, Transform
from detkernel_detection.findings import Finding
from numpy.typing import NDArray

from detkernel_data.doctor.images import Seen, counts, matches_suffix, pairs

TINY = 4.0
"""Pixels, in the resized image: smaller objects leave no trace in a map of stride 8."""
HUGE = 0.95
"""Share of the image that a box covers."""
LONG = 5.0
"""Ratio of the sides of an image."""
_PLAIN_MODES = ("RGB", "L", "YCbCr")


@attrs.define(eq=False)
class SplitData:
    """A data set of the config, loaded, and what its files are."""

    name: str
    dataset: Dataset
    transforms: Sequence[Transform]
    paths: list[str]
    sizes: NDArray[np.int64]
    """[n, 2] height and width."""
    boxes: list[NDArray[np.float64]]
    labels: list[NDArray[np.int64]]

    @classmethod
    def of(cls, name: str, dataset: Dataset, transforms: Sequence[Transform]) -> SplitData:
        notes = [dataset.annotations(index) for index in range(len(dataset))]
        sizes = np.array([(one.height, one.width) for one in notes], dtype=np.int64).reshape(-1, 2)
        boxes, labels = [np.asarray(one.boxes) for one in notes], [np.asarray(one.labels) for one in notes]
        return cls(name, dataset, transforms, [one.path for one in notes], sizes, boxes, labels)

    def scale(self, index: int) -> float:
        """By how much the transforms make an image larger, as far as they say."""
        size: tuple[int, int] | None = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        for transform in self.transforms:
            size = transform.output_size(size)
        return 1.0 if size is None else float(np.sqrt(size[0] * size[1] / self.sizes[index].prod()))

    def place(self, index: int) -> str:
        return self.paths[index]


def everything(splits: Sequence[SplitData], seen: Mapping[str, Seen]) -> list[Finding]:
    """About the splits together, then about each. `seen`: of the images that were looked at."""
    found = [*of_all(splits, seen)]
    for split in splits:
        own = [*of_readers(split), *of_split(split, seen)]
        if not any("without an object" in one.what for one in own):
            own += empty(split)
        found += own
    return found


def of_readers(split: SplitData) -> Iterator[Finding]:
    """What the reader reported while it loaded the data."""
    for note in split.dataset.notes:
        yield attrs.evolve(Finding.of_note(note), split=split.name)


def of_split(split: SplitData, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    """About one split: boxes and files."""
    yield from _boxes(split)
    yield from _files(split, seen)


def _boxes(split: SplitData) -> Iterator[Finding]:
    tiny, huge, twice = [], [], []
    for index, (boxes, labels) in enumerate(zip(split.boxes, split.labels, strict=True)):
        if not len(boxes):
            continue
        sides = boxes[:, 2:] - boxes[:, :2]
        small = np.sqrt(sides.prod(1)) * split.scale(index) < TINY
        large = sides.prod(1) > HUGE * split.sizes[index].prod()
        tiny += [f"{split.place(index)}: {_box(boxes[number])}" for number in np.flatnonzero(small)]
        huge += [f"{split.place(index)}: {_box(boxes[number])}" for number in np.flatnonzero(large)]
        twice += [f"{split.place(index)}: {_box(box)}" for box in _of_two_classes(boxes, labels)]
    if tiny:
        yield Finding(
            f"boxes with a side below {TINY:.0f} pixels once the image is resized", len(tiny), tiny,
            "too small to be found: take larger images, or cut them into tiles",
            "train_transforms" if split.name == "train" else "val_transforms", split.name,
        )  # fmt: skip
    if huge:
        yield Finding(
            f"boxes that cover more than {HUGE:.0%} of their image", len(huge), huge,
            "often a label of the whole image: check that such a box is meant", "", split.name,
        )  # fmt: skip
    if twice:
        yield Finding(
            "boxes that are there with two classes", len(twice), twice,
            "one of the two is probably wrong; classes that mean the same can be merged", "rename_classes", split.name,
        )  # fmt: skip


def _of_two_classes(boxes: NDArray[np.float64], labels: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    first: dict[tuple[float, ...], int] = {}
    found = []
    for box, label in zip(boxes, labels.tolist(), strict=True):
        if first.setdefault(tuple(box.round(2).tolist()), label) != label:
            found.append(box)
    return found


def _box(box: NDArray[np.float64]) -> str:
    x1, y1, x2, y2 = (f"{value:.6g}" for value in box)
    return f"x {x1}..{x2}, y {y1}..{y2}"


def _files(split: SplitData, seen: Mapping[str, Seen]) -> Iterator[Finding]:
    def those(wanted: Callable[[str, Seen], bool]) -> list[str]:
        return [path for path in split.paths if path in seen and wanted(path, seen[path])]

    modes = counts(seen[path].mode for path in split.paths if path in seen and seen[path].mode)
    odd = those(lambda _, one: bool(one.mode) and one.mode not in _PLAIN_MODES)
    if odd or len(modes) > 1:
        listed = ", ".join(f"{mode} {number}x" for mode, number in modes.items())
        others = odd or those(lambda _, one: bool(one.mode) and one.mode != next(iter(modes)))
        deep = any(seen[path].mode.startswith(("I", "F")) for path in odd)
        yield Finding(
            f"images of other colour modes than the rest ({listed})" if len(modes) > 1 else f"images of mode {listed}",
            len(others), others,
            "16 bits a channel are read by their upper bits" if deep else "read as RGB: alpha is left out",
            "bit_depth" if deep else "", split.name,
        )  # fmt: skip
    kinds = counts(seen[path].kind for path in split.paths if path in seen and seen[path].kind)
    misnamed = those(lambda path, one: bool(one.kind) and not matches_suffix(path, one.kind))
    if misnamed:
        yield Finding(
            "images that are not what their suffix says", len(misnamed),
            [f"{path} is {seen[path].kind}" for path in misnamed],
            "they are read as what they are; other tools may refuse them: rename them", "", split.name,
        )  # fmt: skip
    if len(kinds) > 1:
        listed = ", ".join(f"{kind} {number}x" for kind, number in kinds.items())
        rare = those(lambda _, one: bool(one.kind) and one.kind != next(iter(kinds)))
        yield Finding(
            f"images of several formats ({listed})", len(rare), rare,
            "where classes have formats of their own, a model learns the format", "", split.name,
        )  # fmt: skip
    narrow = np.flatnonzero(split.sizes.max(1) > LONG * split.sizes.min(1)).tolist() if len(split.sizes) else []
    if narrow:
        yield Finding(
            f"images more than {LONG:.0f} times as long as wide", len(narrow), [split.place(index) for index in narrow],
            "resized to one shape they are distorted, or padded: cut them into tiles",
            "train_transforms" if split.name == "train" else "val_transforms", split.name,
        )  # fmt: skip


def of_all(splits: Sequence[SplitData], seen: Mapping[str, Seen]) -> Iterator[Finding]:
    """About the splits together: images that are in several, classes that are in one."""
    yield from _copies(splits, seen)
    yield from _classes(splits)


def _copies(splits: Sequence[SplitData], seen: Mapping[str, Seen]) -> Iterator[Finding]:
    places = list(dict.fromkeys((split.name, path) for split in splits for path in split.paths if path in seen))
    found: dict[tuple[str, str], list[str]] = {}
    for kind, matched in zip(("identical", "near-identical"), pairs([seen[path] for _, path in places]), strict=True):
        for one, other in matched:
            (first, path), (second, copy) = places[one], places[other]
            names = first if first == second else " and ".join(sorted((first, second), key=_order))
            found.setdefault((kind, names), []).append(f"{copy} is {path}" if path != copy else path)
    for (kind, names), examples in found.items():
        across = " and " in names
        advice = (
            "what is validated on was trained on, so its metrics say too much: keep copies in one split"
            if across
            else "each counts as often as it is there: remove the copies"
        )
        what = f"{kind} images in {names}" if across else f"{kind} images within {names}"
        yield Finding(what, len(examples), examples, advice, "subset" if across else "", names)


def _order(name: str) -> tuple[int, str]:
    """Where a split comes in a list of names."""
    known = ("train", "val", "test")
    return (known.index(name) if name in known else len(known), name)


def _classes(splits: Sequence[SplitData]) -> Iterator[Finding]:
    if len(splits) < 2:
        return
    used: dict[str, set[str]] = {}
    for split in splits:
        numbers = {label for labels in split.labels for label in labels.tolist()}
        for number in numbers:
            used.setdefault(split.dataset.classes[number], set()).add(split.name)
    alone: dict[str, list[str]] = {}
    for name, splits_of in used.items():
        if len(splits_of) == 1:
            alone.setdefault(next(iter(splits_of)), []).append(name)
    for split_name, names in alone.items():
        trained = split_name == "train"
        advice = (
            "they are never measured: another split would have some"
            if trained
            else "they cannot be found, since nothing is trained for them: move some of their images to train"
        )
        what = f"classes with objects in {split_name} alone"
        yield Finding(what, len(names), names, advice, "ignore_classes", split_name)
    for split in splits:
        lacking = [name for name in split.dataset.classes if name not in used]
        if lacking:
            what = "classes without an object in any split"
            yield Finding(what, len(lacking), lacking, "the model has outputs for them", "ignore_classes", "all")
            return


def empty(split: SplitData) -> Iterator[Finding]:
    """Images without a box to train on."""
    without = [split.place(index) for index, labels in enumerate(split.labels) if not len(labels)]
    if without:
        share = len(without) / len(split.paths)
        yield Finding(
            f"images without an object ({share:.0%} of the split)", len(without), without,
            "not trained on by default, and counted in validation", "skip_empty", split.name,
        )  # fmt: skip
