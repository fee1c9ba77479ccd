"""Annotations of a whole data set in a few flat arrays.

A list of objects, one an image, would be copied into every loader worker by reference counting; an array is shared
after a fork and is one block to pickle for a spawned worker.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from detkernel_detection import Annotations, ImageId
from numpy.lib.stride_tricks import sliding_window_view

from detkernel_data.masks import mask_area

if TYPE_CHECKING:
    from numpy.typing import NDArray

Polygon = Sequence[float]


class Texts:
    """A list of texts in one array of bytes. Half characters survive: JSON and the names of files may have such."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.offsets = offsets_of([len(text) for text in encoded])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.data[start:end].tobytes().decode("utf-8", "surrogatepass")

    def tolist(self) -> list[str]:
        """All of them."""
        data = self.data.tobytes()
        return [data[start:end].decode("utf-8", "surrogatepass") for start, end in pairwise(self.offsets.tolist())]

    def take(self, chosen: NDArray[np.int64]) -> Texts:
        """Some of them, in that order."""
        return self.packed(*_gathered(self.data, self.offsets, chosen))

    @classmethod
    def sparse(cls, count: int, texts: Mapping[int, str]) -> Texts:
        """So many, all of them empty but for some, by their places in rising order."""
        made, lengths = cls(texts.values()), np.zeros(count, dtype=np.int64)
        lengths[list(texts)] = np.diff(made.offsets)
        return cls.packed(made.data, offsets_of(lengths))

    @classmethod
    def packed(cls, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Texts:
        """From what they are made of (`arrays`)."""
        made = cls.__new__(cls)
        made.data, made.offsets = data, offsets
        return made

    @classmethod
    def joined(cls, several: Sequence[Texts]) -> Texts:
        """Those of several, one behind the other."""
        data = np.concatenate([one.data for one in several])
        return cls.packed(data, _joined_offsets([one.offsets for one in several]))

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What it is made of."""
        return self.data, self.offsets


class Masks:
    """COCO segmentations: the numbers of all polygons in one array, run lengths as JSON text."""

    def __init__(self, masks: Sequence[Any]) -> None:
        polygons = [mask if isinstance(mask, list) else [] for mask in masks]
        parts = [np.asarray(part, dtype=np.float64) for polygon in polygons for part in polygon]
        self.numbers = np.concatenate(parts) if parts else np.zeros(0)
        self.parts = offsets_of([len(part) for part in parts])
        self.objects = offsets_of([len(polygon) for polygon in polygons])
        self.runs = Texts(self.text_of(mask if isinstance(mask, dict) else None) for mask in masks)

    @staticmethod
    def text_of(runs: Mapping[str, Any] | None) -> str:
        """Run lengths as they are kept; empty for none."""
        return json.dumps([runs["size"], runs["counts"]]) if runs else ""

    @classmethod
    def packed(
        cls, numbers: NDArray[np.float64], parts: NDArray[np.int64], objects: NDArray[np.int64], runs: Texts
    ) -> Masks:
        """From what they are made of (`arrays`): numbers, where each polygon's begin, where each object's polygons
        begin, run lengths."""
        made = cls.__new__(cls)
        made.numbers, made.parts, made.objects, made.runs = numbers, parts, objects, runs
        return made

    @classmethod
    def joined(cls, several: Sequence[Masks]) -> Masks:
        """Those of several, one behind the other."""
        return cls.packed(
            np.concatenate([one.numbers for one in several]),
            _joined_offsets([one.parts for one in several]),
            _joined_offsets([one.objects for one in several]),
            Texts.joined([one.runs for one in several]),
        )

    def take(self, chosen: NDArray[np.int64]) -> Masks:
        """Those of some objects, in that order."""
        if len(chosen) == len(self) and (chosen == np.arange(len(self))).all():
            return self
        parts, objects = ragged(self.objects, chosen)
        numbers, offsets = _gathered(self.numbers, self.parts, parts)
        return self.packed(numbers, offsets, objects, self.runs.take(chosen))

    def __len__(self) -> int:
        return len(self.objects) - 1

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        if runs := self.runs[index]:
            return dict(zip(("size", "counts"), json.loads(runs), strict=True))
        numbers = range(self.objects[index], self.objects[index + 1])
        return [self.numbers[self.parts[part] : self.parts[part + 1]].tolist() for part in numbers]

    def any(self) -> bool:
        """Whether an object has one."""
        return bool(self.objects[-1] or self.runs.offsets[-1])

    def scale(self, sizes: NDArray[np.float64]) -> None:
        """Multiply the polygons of each object by its [M, 2] width and height; not one with an odd number of
        coordinates, which `mask_problem` refuses."""
        lengths = np.diff(self.parts)
        part_of = np.repeat(np.arange(len(self)), np.diff(self.objects))
        factors = np.where((lengths % 2 == 0)[:, None], sizes[part_of], 1.0)
        of_number = np.repeat(np.arange(len(lengths)), lengths)
        odd = (np.arange(len(self.numbers)) - self.parts[of_number]) % 2
        self.numbers = self.numbers * factors[of_number, odd]

    def suspects(self, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The objects in whose masks something may be wrong, given the sizes of their images: all with run lengths,
        and those with a polygon that `mask_problem` refuses."""
        lengths, values = np.diff(self.parts), self.numbers
        part_of = np.repeat(np.arange(len(self)), np.diff(self.objects))
        bad = (lengths % 2 != 0) | (lengths < 6)
        if len(values) and (lengths > 0).all():  # what `reduceat` gives for an empty part is another's
            low, high = np.minimum.reduceat(values, self.parts[:-1]), np.maximum.reduceat(values, self.parts[:-1])
            side = np.maximum(heights, widths)[part_of]
            bad |= ~((low >= -side) & (high <= 2 * side))  # a number that is none is in neither
        wrong = np.bincount(part_of[bad], minlength=len(self)) > 0
        return np.flatnonzero(wrong | (np.diff(self.runs.offsets) > 0))

    @cached_property
    def missing(self) -> NDArray[np.bool_]:
        """[M] whether an object has no mask: no polygon with a width and a height, and no run of pixels."""
        width, height = (self._extent(axis) for axis in (0, 1))
        part_of = np.repeat(np.arange(len(self.objects) - 1), np.diff(self.objects))
        drawn = np.bincount(part_of[(width > 0) & (height > 0)], minlength=len(self.objects) - 1) > 0
        for number in np.flatnonzero(np.diff(self.runs.offsets)).tolist():
            drawn[number] = mask_area(self[number]) > 0
        return ~drawn

    def _extent(self, axis: int) -> NDArray[np.float64]:
        """The width (0) or height (1) of each polygon."""
        values, starts = self.numbers[axis::2], self.parts[:-1] // 2
        if not len(starts):
            return np.zeros(0)
        extent: NDArray[np.float64] = np.maximum.reduceat(values, starts) - np.minimum.reduceat(values, starts)
        return extent

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What it is made of."""
        return self.numbers, self.parts, self.objects, *self.runs.arrays()


class MaskView(Sequence[Any]):
    """The segmentations of one image, made when they are asked for; pickled, a list of them."""

    def __init__(self, masks: Masks, objects: Sequence[int]) -> None:
        self._masks = masks
        self._objects = objects

    def __len__(self) -> int:
        return len(self._objects)

    def missing(self) -> NDArray[np.bool_]:
        """[N] whether an object has no mask."""
        return self._masks.missing[np.asarray(self._objects, dtype=np.int64)]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._masks[number] for number in self._objects[index]]
        return self._masks[self._objects[index]]

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[Any]]]:
        return list, (list(self),)


@attrs.define(eq=False)
class FlatAnnotations:
    """All annotations of n images and M objects, the objects in the order of their images."""

    image_ids: NDArray[np.int64] | Texts
    files: Texts
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    """[n + 1] where each image's objects begin."""
    boxes: NDArray[np.float64]
    """[M, 4] as the files have them; this and the arrays below are those of `Annotations`."""
    clean: NDArray[np.float64]
    """[M, 4] cut to their images."""
    usable: NDArray[np.bool_]
    """[M] whether an object may be trained on; the others are truth to measure by, nothing else."""
    labels: NDArray[np.int64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    masks: Masks | None = None
    keypoints: NDArray[np.float32] | None = None
    ids: NDArray[np.int64] | None = None
    fields: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    known_digest: str = ""
    """What `digest` gives, where the arrays come from the cache."""
    stored: tuple[str, int] | None = None
    """The file of the cache that the arrays lie in, and its checksum: another process opens it, in place of getting
    copies of them."""

    def __len__(self) -> int:
        return len(self.heights)

    def __reduce__(self) -> Any:
        if self.stored is not None:
            from detkernel_data.formats.kept import reopened

            return reopened, self.stored
        return FlatAnnotations, attrs.astuple(self, recurse=False)

    def objects_to_train_on(self) -> NDArray[np.int64]:
        """[n] how many each image has: those that are usable, neither crowds nor difficult."""
        return self._by_image(self.usable & ~self.crowd & ~self.difficult)

    def maskless(self) -> NDArray[np.int64]:
        """[n] how many of these have no mask."""
        trained = self.usable & ~self.crowd & ~self.difficult
        return self._by_image(trained if self.masks is None else trained & self.masks.missing)

    def _by_image(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        image = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        return np.bincount(image[chosen], minlength=len(self))

    def __getitem__(self, index: int) -> Annotations:
        """What may be trained on in an image."""
        objects = self._objects(index)
        usable = self.usable[objects.start : objects.stop]
        if usable.all():
            return self._of(index, objects, self.clean)
        return self._of(index, [objects.start + int(number) for number in np.flatnonzero(usable)], self.clean)

    def truth(self, index: int) -> Annotations:
        """All objects of an image, as the files have them."""
        return self._of(index, self._objects(index), self.boxes)

    def _objects(self, index: int) -> range:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        return range(int(self.offsets[index]), int(self.offsets[index + 1]))

    def _of(self, index: int, numbers: Sequence[int], boxes: NDArray[np.float64]) -> Annotations:
        objects = slice(numbers.start, numbers.stop) if isinstance(numbers, range) else numbers
        return Annotations(
            image_id=self.image_id(index),
            path=self.files[index],
            height=int(self.heights[index]),
            width=int(self.widths[index]),
            boxes=boxes[objects],
            labels=self.labels[objects],
            area=self.area[objects],
            crowd=self.crowd[objects],
            difficult=self.difficult[objects],
            masks=None if self.masks is None else MaskView(self.masks, numbers),
            keypoints=None if self.keypoints is None else self.keypoints[objects],
            ids=None if self.ids is None else self.ids[objects],
            fields={name: values[objects] for name, values in self.fields.items()},
        )

    def image_id(self, index: int) -> ImageId:
        return self.image_ids[index] if isinstance(self.image_ids, Texts) else int(self.image_ids[index])

    def digest(self, classes: Sequence[str]) -> str:
        """A short hash of the images' ids, names and sizes, and of their objects; folders may move."""
        if self.known_digest:
            return self.known_digest
        digest = sha256(repr((tuple(classes), len(self))).encode())
        names = Texts(map(os.path.basename, self.files.tolist()))
        for field in attrs.fields(FlatAnnotations):
            if field.name in ("known_digest", "stored"):
                continue
            for values in _arrays(names if field.name == "files" else getattr(self, field.name)):
                digest.update(repr(np.shape(values)).encode())
                digest.update(b"" if values is None else np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()[:16]


def _arrays(column: Any) -> Iterable[Any]:
    if isinstance(column, (Texts, Masks)):
        return column.arrays()
    return column.values() if isinstance(column, dict) else [column]


def pack_ids(ids: Sequence[ImageId]) -> NDArray[np.int64] | Texts:
    """Whole numbers stay such; as soon as one id is text, all are."""
    if all(isinstance(number, int) for number in ids):
        return np.array(ids, dtype=np.int64)
    return Texts(str(name) for name in ids)


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """[n + 1] where each of n consecutive runs begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def ragged(offsets: NDArray[np.int64], chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(positions of the items of some runs, [n + 1] where each of these runs begins among them)."""
    lengths = np.diff(offsets)[chosen]
    starts = offsets_of(lengths)
    return np.arange(starts[-1]) + np.repeat(offsets[chosen] - starts[:-1], lengths), starts


def _gathered(
    values: NDArray[Any], offsets: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The items of some runs, and where each of them begins.

    All runs of a length are copied at once, as rows: to copy the items by as many positions takes ten times as long.
    """
    lengths = np.diff(offsets)[chosen]
    starts = offsets_of(lengths)
    found = np.empty(starts[-1], dtype=values.dtype)
    order = np.argsort(lengths, kind="stable")
    kinds, firsts = np.unique(lengths[order], return_index=True)
    for length, some in zip(kinds.tolist(), np.split(order, firsts)[1:], strict=True):
        if length:
            rows = sliding_window_view(found, length, writeable=True)
            rows[starts[some]] = sliding_window_view(values, length)[offsets[chosen[some]]]
    return found, starts


def _joined_offsets(several: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return offsets_of(np.concatenate([np.diff(one) for one in several]))
