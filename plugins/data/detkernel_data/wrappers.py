"""Data sets made of others: joined, repeated, or a part."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from detkernel import DataError, option, plugin, state
from detkernel.errors import did_you_mean, relative
from detkernel.files import read_regular
from detkernel_detection import Annotations, Dataset, ImageId
from detkernel_detection.findings import Note

from detkernel_data.formats.dataset import check_names
from detkernel_data.formats.overview import Overview, maskless, overview
from detkernel_data.report import Problems, first

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_LONGEST_LIST = 2**28


@plugin
class Concat(Dataset):
    """Several data sets, one behind the other; their classes are matched by name.

    If two of them share an image's id, all ids become texts with the position of the data set, such as `1/000005`.
    Annotation ids are left out.
    """

    datasets: list[Dataset] = option(help="the data sets")
    class_names: list[str] | None = option(
        default=None, help="classes in label order, where the data sets differ; null: all must have the same"
    )
    _ends: list[int] = state(factory=list)
    _labels: list[Any] = state(factory=list)
    _prefixed: bool = state(default=False)

    def __attrs_post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("datasets: expected at least one")
        check_names(self.class_names, [])

    def load(self) -> None:
        for dataset in self.datasets:
            dataset.load()
        self.classes = self._joined_classes()
        self.notes = [
            one.inside(f"data set {n}") if isinstance(one, Note) else f"data set {n}: {one}"
            for n, part in enumerate(self.datasets)
            for one in part.notes
        ]
        self.keypoint_names = _same_keypoints(self.datasets)
        self.category_ids = _same_numbers(self.datasets)
        self.fields = _same_fields(self.datasets)
        self._labels = [np.array([self.classes.index(name) for name in part.classes]) for part in self.datasets]
        self._ends = list(accumulate(len(part) for part in self.datasets))
        ids = [str(part.annotations(index).image_id) for part in self.datasets for index in range(len(part))]
        self._prefixed = len(set(ids)) < len(ids)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def image(self, index: int) -> Tensor:
        number, position = self._find(index)
        return self.datasets[number].image(position)

    def annotations(self, index: int) -> Annotations:
        number, position = self._find(index)
        return self._joined(number, self.datasets[number].annotations(position))

    def truth(self, index: int) -> Annotations:
        number, position = self._find(index)
        return self._joined(number, self.datasets[number].truth(position))

    def _joined(self, number: int, found: Annotations) -> Annotations:
        image_id = f"{number}/{found.image_id}" if self._prefixed else found.image_id
        return attrs.evolve(found, image_id=image_id, labels=self._labels[number][found.labels], ids=None)

    def overview(self) -> Overview:
        return Overview(*(np.concatenate(column) for column in zip(*map(overview, self.datasets), strict=True)))

    def maskless(self) -> NDArray[np.int64]:
        return np.concatenate([maskless(dataset) for dataset in self.datasets])

    def fingerprint(self) -> str:
        return _join([*self.classes, *(part.fingerprint() for part in self.datasets)])

    def source(self, index: int) -> int:
        """Which of the data sets an image is of."""
        return self._find(index)[0]

    def _find(self, index: int) -> tuple[int, int]:
        index = _position(index, len(self))
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _joined_classes(self) -> tuple[str, ...]:
        head, *others = (part.classes for part in self.datasets)
        if self.class_names is None:
            for number, classes in enumerate(others, start=1):
                if set(classes) != set(head):
                    differing = ", ".join(f"'{name}'" for name in sorted(set(classes) ^ set(head)))
                    raise DataError(
                        f"concat: data sets 0 and {number} differ in the classes {differing}; give `class_names` here "
                        "if objects of a class really cannot be in one of them, or fix the data"
                    )
            return head
        known = {name for part in self.datasets for name in part.classes}
        for name in self.class_names:
            if name not in known:
                raise DataError(f"concat: `class_names`: no data set has '{name}'{did_you_mean(name, known)}")
        unlisted = sorted(known.difference(self.class_names))
        if unlisted:
            raise DataError(f"concat: `class_names` does not list '{unlisted[0]}', which a data set has")
        return tuple(self.class_names)


@plugin
class Repeat(Dataset):
    """A data set, several times over: longer epochs of a small one."""

    dataset: Dataset = option(help="the data set")
    times: int = option(at_least=1, help="how often each image is in it")

    def load(self) -> None:
        self.dataset.load()
        self.classes, self.notes = self.dataset.classes, self.dataset.notes
        self.keypoint_names, self.category_ids = self.dataset.keypoint_names, dict(self.dataset.category_ids)
        self.fields, self.federated = dict(self.dataset.fields), self.dataset.federated

    def __len__(self) -> int:
        return len(self.dataset) * self.times

    def image(self, index: int) -> Tensor:
        return self.dataset.image(_position(index, len(self)) % len(self.dataset))

    def annotations(self, index: int) -> Annotations:
        return self.dataset.annotations(_position(index, len(self)) % len(self.dataset))

    def truth(self, index: int) -> Annotations:
        return self.dataset.truth(_position(index, len(self)) % len(self.dataset))

    def overview(self) -> Overview:
        return Overview(*(np.tile(column, self.times) for column in overview(self.dataset)))

    def maskless(self) -> NDArray[np.int64]:
        return np.tile(maskless(self.dataset), self.times)

    def fingerprint(self) -> str:
        return _join([str(self.times), self.dataset.fingerprint()])


@plugin
class Subset(Dataset):
    """A part of a data set, in its order: the first images, a random part, or named ones. For quick trials."""

    dataset: Dataset = option(help="the data set")
    first: int | None = option(default=None, at_least=1, help="the first so many images")
    fraction: float | None = option(default=None, above=0, at_most=1, help="a random part, drawn from `seed`")
    ids: list[int | str] | None = option(default=None, help="the images of these ids")
    id_list: Path | None = option(default=None, help="a text file with the ids of the images, one a line")
    seed: int = option(default=0, at_least=0, help="what `fraction` draws follows from it")
    _chosen: Any = state()

    def __attrs_post_init__(self) -> None:
        given = [name for name in ("first", "fraction", "ids", "id_list") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected one of `first`, `fraction`, `ids` and `id_list`, got {' and '.join(given) or 'none'}"
            )
        if self.ids == []:
            raise ValueError("ids: expected at least one")

    def load(self) -> None:
        self.dataset.load()
        self.classes = self.dataset.classes
        self.keypoint_names, self.category_ids = self.dataset.keypoint_names, dict(self.dataset.category_ids)
        self.fields, self.federated = dict(self.dataset.fields), self.dataset.federated
        self._chosen = np.array(self._choose(len(self.dataset)), dtype=np.int64)
        self.notes = [*self.dataset.notes, f"{len(self._chosen)} of {len(self.dataset)} images"]

    def __len__(self) -> int:
        return 0 if self._chosen is None else len(self._chosen)

    def image(self, index: int) -> Tensor:
        return self.dataset.image(int(self._chosen[_position(index, len(self))]))

    def annotations(self, index: int) -> Annotations:
        return self.dataset.annotations(int(self._chosen[_position(index, len(self))]))

    def truth(self, index: int) -> Annotations:
        return self.dataset.truth(int(self._chosen[_position(index, len(self))]))

    def overview(self) -> Overview:
        return overview(self.dataset).take(self._chosen)

    def maskless(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = maskless(self.dataset)[self._chosen]
        return found

    def fingerprint(self) -> str:
        return _join([self.dataset.fingerprint(), *map(str, self._chosen.tolist())])

    def _choose(self, total: int) -> Sequence[int]:
        if self.first is not None:
            if self.first > total:
                raise DataError(f"subset: `first` is {self.first}, but the data set has {total} images")
            return range(self.first)
        if self.fraction is not None:
            count = max(1, round(total * self.fraction))
            order = np.random.default_rng(self.seed).permutation(total)
            return sorted(order[:count].tolist())
        there = [self.dataset.annotations(index).image_id for index in range(total)]
        return self._of_list(there, self.id_list) if self.id_list is not None else self._of_ids(there, self.ids or [])

    @staticmethod
    def _of_list(there: Sequence[ImageId], path: Path) -> list[int]:
        """A line says an id as text; whole numbers and texts that look alike cannot both be in a data set."""
        try:
            lines = read_regular(path, _LONGEST_LIST).decode("utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{relative(path)}: the list of image ids cannot be read ({reason})") from None
        wanted = {line.strip(): number for number, line in enumerate(lines, start=1) if line.strip()}
        if not wanted:
            raise DataError(f"{relative(path)}: there is no id in this list; expected one a line")
        problems, known = Problems(relative(path)), set(map(str, there))
        for name, number in wanted.items():
            if name not in known:
                examples = ", ".join(map(str, there[:3]))
                problems.add(f"{relative(path)}:{number}: no image has the id '{name}'; ids are such as {examples}")
        problems.stop()
        return [index for index, name in enumerate(there) if str(name) in wanted]

    def _of_ids(self, there: Sequence[ImageId], ids: Sequence[ImageId]) -> list[int]:
        wanted = set(ids)
        missing = sorted(map(repr, wanted.difference(there)))
        if missing:
            examples = ", ".join(map(repr, there[:3]))
            raise DataError(f"subset: `ids`: no image has {', '.join(first(missing))}; ids are such as {examples}")
        return [index for index, name in enumerate(there) if name in wanted]


def _position(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"image {index} of {length}")
    return index % length


def _same_keypoints(datasets: Sequence[Dataset]) -> tuple[str, ...]:
    found = {tuple(dataset.keypoint_names) for dataset in datasets}
    if len(found) > 1:
        raise DataError("concat: the data sets have different keypoints; expected the same in all of them")
    return found.pop()


def _same_fields(datasets: Sequence[Dataset]) -> dict[str, str]:
    first, *others = (dict(dataset.fields) for dataset in datasets)
    for number, fields in enumerate(others, start=1):
        if fields != first:
            raise DataError(
                f"concat: the `fields` are {first} in data set 0 and {fields} in {number}; expected the same"
            )
    return first


def _same_numbers(datasets: Sequence[Dataset]) -> dict[str, int]:
    """The category ids of all, or none where two number a class differently."""
    pairs = {pair for dataset in datasets for pair in dataset.category_ids.items()}
    return dict(pairs) if len(dict(pairs)) == len(pairs) else {}


def _join(parts: Sequence[str]) -> str:
    from hashlib import sha256

    return sha256("\n".join(parts).encode()).hexdigest()[:16]
