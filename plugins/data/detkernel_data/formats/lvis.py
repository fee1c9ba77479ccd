"""What LVIS's annotation files say beside COCO's: which classes were looked for in which image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detkernel import DataError
from detkernel_detection.federated import Federated

from detkernel_data.annotations import Texts, pack_ids
from detkernel_data.formats.entry import Entry
from detkernel_data.report import Problems

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEYS = ("neg_category_ids", "not_exhaustive_category_ids")
RARE, COMMON = 10, 100
"""A class in fewer images of the training data is rare, or else in fewer is common."""


def read_federated(data: Entry, source: str, names: Mapping[int, str]) -> Federated | None:
    """What the file says, or None where its images have no such lists. Raises `DataError`.

    `names`: the class of each category id.
    """
    images = [value for value in data.list("images") if isinstance(value, dict)]
    if not any(key in image for image in images for key in KEYS):
        return None
    places = {number: position for position, number in enumerate(names)}
    problems = Problems(source)
    lists: dict[str, list[list[int]]] = {key: [] for key in KEYS}
    for image in images:
        for key in KEYS:
            found = image.get(key) or []
            listed = found if isinstance(found, list) else [found]
            unknown = [one for one in listed if type(one) is not int or one not in places]
            if unknown:
                where = f"{source}: image {image.get('id')}"
                problems.add(f"{where}: `{key}`: expected a list of category ids, got {unknown[0]!r}")
                continue
            lists[key].append([places[one] for one in listed])
    problems.stop()
    frequency = _frequency(data, source, names)
    return Federated.of(list(names.values()), frequency, [image["id"] for image in images], *lists.values())


def _frequency(data: Entry, source: str, names: Mapping[int, str]) -> dict[str, str]:
    """By class: as stated, or by the number of images."""
    found: dict[str, str] = {}
    for category in data.list("categories"):
        stated, images = category.get("frequency"), category.get("image_count")
        if stated is None and type(images) is int:
            stated = "r" if images < RARE else "c" if images < COMMON else "f"
        if stated not in ("r", "c", "f", None):
            raise DataError(
                f"{source}: category {category['id']}: `frequency`: expected r, c or f (rare, common, frequent), "
                f"got {stated!r}"
            )
        if stated is not None:
            found[names[category["id"]]] = stated
    return found


_ARRAYS = tuple(f"federated.{name}" for name in ("negative", "negative_ends", "not_exhaustive", "not_exhaustive_ends"))


def packed_federated(federated: Federated | None) -> dict[str, NDArray[Any]]:
    """The lists of all images, and their ids, as named arrays; `frequency` and the classes' names are not in them."""
    if federated is None:
        return {}
    found: dict[str, NDArray[Any]] = dict(zip(_ARRAYS, (*federated.negative, *federated.not_exhaustive), strict=True))
    ids = pack_ids(list(federated.rows))
    if isinstance(ids, Texts):
        found["federated.ids.data"], found["federated.ids.offsets"] = ids.arrays()
    else:
        found["federated.ids"] = ids
    return found


def unpacked_federated(
    classes: Sequence[str], frequency: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]
) -> Federated:
    """From what `packed_federated` gave."""
    ids = arrays.get("federated.ids")
    if ids is None:
        names = Texts.packed(arrays["federated.ids.data"], arrays["federated.ids.offsets"])
        rows: dict[Any, int] = {name: row for row, name in enumerate(names.tolist())}
    else:
        rows = {number: row for row, number in enumerate(ids.tolist())}
    negative, negative_ends, listed, listed_ends = (arrays[name] for name in _ARRAYS)
    return Federated(tuple(classes), dict(frequency), rows, (negative, negative_ends), (listed, listed_ends))
