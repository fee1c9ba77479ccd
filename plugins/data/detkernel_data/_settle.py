"""From what a reader found to flat arrays: classes matched, sizes checked, boxes mended, pictures chosen.

Whatever is left out on the way is told in the notes, one line a reason, with its count and its first places.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from detkernel import DataError
from detkernel.errors import relative

from detkernel_data._annotations import FlatAnnotations, Masks, Texts, offsets_of, pack_ids
from detkernel_data._classes import match_classes
from detkernel_data._pictures import Header, read_headers, size_text
from detkernel_data._report import Problems, counted, first
from detkernel_data._rle import mask_area, mask_problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkernel_data._files import FileDataset
    from detkernel_data._table import Table

ROUNDING = 0.01
"""Pixels out of the picture that are not worth a word: COCO's files round to hundredths."""
SLIP = 1.0
"""Pixels out of the picture that come from counting from 0 instead of 1, or from rounding: always clipped."""


def settle(
    table: Table, rules: FileDataset, class_names: Sequence[str] | None, *, may_lack: bool
) -> tuple[FlatAnnotations, tuple[str, ...], list[str]]:
    """(annotations, classes, notes) of what the rules keep. Raises `DataError`, also when they keep nothing."""
    notes: list[str] = []
    if not table.files:
        raise DataError(f"{table.source}: there is no picture in it")
    classes, labels = match_classes(table, class_names, rules.ignore_classes, notes, may_lack=may_lack)
    measure(table, rules, notes)
    raw = pixel_boxes(table)
    check_masks(table)
    clean, usable = clean_boxes(table, raw, labels >= 0, rules.bad_boxes, notes)
    kept = choose_pictures(table, usable, rules, notes)
    picture = np.asarray(table.picture, dtype=np.int64)
    chosen = (labels >= 0) & kept[picture]
    if not (usable & chosen).any():
        reasons = "".join(f"\n  {note}" for note in notes) or "\n  the annotations have no object at all"
        raise DataError(f"{table.source}: no object is left of {len(picture)}, in {len(kept)} pictures:{reasons}")
    return build(table, raw, clean, labels, chosen, usable, kept), classes, notes


def measure(table: Table, rules: FileDataset, notes: list[str]) -> None:
    """Compare the stated sizes with the pictures' own, and fill in those that are not stated."""
    problems = Problems(table.source)
    unstated, rotated = [], []
    apply_exif = rules.exif_orientation == "apply"
    chosen = [i for i, height in enumerate(table.heights) if rules.check_pictures or height == 0]
    for index, header in zip(chosen, read_headers([table.files[index] for index in chosen]), strict=True):
        if isinstance(header, DataError):
            problems.add(str(header))
            continue
        found = header.upright() if apply_exif else (header.height, header.width)
        stated = table.heights[index], table.widths[index]
        if header.orientation != 1 and not apply_exif:
            rotated.append(relative(table.files[index]))
        if stated == (0, 0):
            table.heights[index], table.widths[index] = found
            unstated.append(table.where_picture(index))
        elif stated != found:
            problems.add(_size_problem(table, index, header, apply_exif))
    problems.stop()
    if unstated and len(unstated) < len(table.files):
        notes.append(f"{counted(len(unstated), 'picture')} of no stated size, taken from the file: {_list(unstated)}")
    if rotated:
        notes.append(f"{counted(len(rotated), 'picture')} with an EXIF orientation, ignored: {_list(rotated)}")


def check_masks(table: Table) -> None:
    """Raises `DataError` for segmentations that do not fit their pictures."""
    problems = Problems(table.source)
    for number, mask in enumerate(table.masks or ()):
        picture = table.picture[number]
        problem = mask_problem(mask, table.heights[picture], table.widths[picture])
        if problem:
            problems.add(f"{table.where(number)}: its segmentation: {problem}")
    problems.stop()


def pixel_boxes(table: Table) -> NDArray[np.float64]:
    """[M, 4] the boxes as the files have them, in pixels; the masks are brought to pixels in place."""
    boxes = np.array(table.boxes, dtype=np.float64).reshape(-1, 4)
    if table.fractions:
        sizes = _sizes(table)
        boxes *= np.tile(sizes, 2)
        _scale_masks(table, sizes)
    return boxes


def clean_boxes(
    table: Table, boxes: NDArray[np.float64], chosen: NDArray[np.bool_], policy: str, notes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The boxes cut to their pictures, and which of the chosen objects can be used.

    Raises `DataError` for the first that cannot, where the policy says so.
    """
    sizes = _sizes(table)
    clipped = np.clip(boxes, 0, np.tile(sizes, 2))
    flat = chosen & _without_area(boxes)
    outside = chosen & ~flat & _without_area(clipped)
    reach = np.abs(boxes - clipped).max(1, initial=0)
    inside = chosen & ~flat & ~outside
    slips = inside & (reach > ROUNDING) & (reach <= SLIP)
    sticking_out = inside & (reach > SLIP)

    for which, reason in ((flat, "without area"), (outside, "outside its picture")):
        _report(table, which, boxes, reason, "error" if policy == "error" else "drop", notes)
    _report(table, sticking_out, boxes, "reaching out of its picture", policy, notes)
    _report(table, slips, boxes, "reaching out of its picture by a pixel or less", "clip", notes)

    return clipped, inside if policy == "clip" else inside & ~sticking_out


def choose_pictures(table: Table, usable: NDArray[np.bool_], rules: FileDataset, notes: list[str]) -> NDArray[np.bool_]:
    """Which pictures stay."""
    heights, widths = np.asarray(table.heights), np.asarray(table.widths)
    kept: NDArray[np.bool_] = np.minimum(heights, widths) >= rules.min_side
    _report_pictures(table, ~kept, f"dropped, a side of less than {rules.min_side} pixels", notes)
    objects = np.bincount(np.asarray(table.picture, dtype=np.int64)[usable], minlength=len(kept))
    empty = kept & (objects == 0)
    if not rules.keep_empty:
        kept &= ~empty
    _report_pictures(table, empty, "without an object " + ("kept" if rules.keep_empty else "dropped"), notes)
    return kept


def build(
    table: Table,
    raw: NDArray[np.float64],
    clean: NDArray[np.float64],
    labels: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    usable: NDArray[np.bool_],
    kept: NDArray[np.bool_],
) -> FlatAnnotations:
    """The flat arrays of the objects and pictures that stay."""
    picture = np.asarray(table.picture, dtype=np.int64)
    order = np.flatnonzero(chosen)
    order = order[np.argsort(picture[order], kind="stable")]
    pictures = np.flatnonzero(kept)

    def flags(column: list[bool] | None) -> NDArray[np.bool_]:
        return np.zeros(len(order), dtype=bool) if column is None else np.asarray(column, dtype=bool)[order]

    def picked(column: Sequence[Any]) -> list[Any]:
        return [column[number] for number in order.tolist()]

    return FlatAnnotations(
        image_ids=pack_ids([table.image_ids[number] for number in pictures]),
        files=Texts(table.files[number] for number in pictures),
        heights=np.asarray(table.heights, dtype=np.int64)[pictures],
        widths=np.asarray(table.widths, dtype=np.int64)[pictures],
        offsets=offsets_of(np.bincount(picture[order], minlength=len(kept))[pictures]),
        boxes=raw[order],
        clean=clean[order],
        usable=usable[order],
        labels=labels[order],
        area=_areas(table, raw, order),
        crowd=flags(table.crowd),
        difficult=flags(table.difficult),
        masks=None if table.masks is None else Masks(picked(table.masks)),
        keypoints=None if table.keypoints is None else _keypoints(picked(table.keypoints)),
        ids=None if table.ids is None else np.asarray(table.ids, dtype=np.int64)[order],
    )


def _sizes(table: Table) -> NDArray[np.float64]:
    """[M, 2] width and height of each object's image."""
    picture = np.asarray(table.picture, dtype=np.int64)
    return np.stack([table.widths, table.heights], axis=1)[picture].astype(np.float64)


def _without_area(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the corners are one in the precision that models reckon with, or are swapped."""
    corners = boxes.astype(np.float32)
    swapped: NDArray[np.bool_] = np.any(corners[:, 2:] <= corners[:, :2], axis=1)
    return swapped


def _areas(table: Table, boxes: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
    """What the file states; else the mask's, else the box's."""
    areas = (boxes[order, 2:] - boxes[order, :2]).prod(1)
    stated = np.full(len(order), np.nan) if table.area is None else np.asarray(table.area, dtype=np.float64)[order]
    for position in np.flatnonzero(np.isnan(stated)):
        if table.masks and (mask := table.masks[int(order[position])]):
            areas[position] = mask_area(mask)
    return np.where(np.isnan(stated), areas, stated)


def _scale_masks(table: Table, sizes: NDArray[np.float64]) -> None:
    for polygons, size in zip(table.masks or (), sizes, strict=False):
        for polygon in polygons:
            polygon[:] = array("d", np.frombuffer(polygon) * np.tile(size, len(polygon) // 2))


def _keypoints(rows: Sequence[Sequence[float]]) -> NDArray[np.float32]:
    return np.asarray(rows, dtype=np.float32).reshape(len(rows), -1, 3)


def _report(
    table: Table, which: NDArray[np.bool_], boxes: NDArray[np.float64], reason: str, action: str, notes: list[str]
) -> None:
    numbers = np.flatnonzero(which)
    if not len(numbers):
        return
    places = [f"{table.where(int(number))} ({_box_text(table, int(number), boxes[number])})" for number in numbers]
    if action == "error":
        problems = Problems(table.source)
        for place in places:
            problems.add(f"{place}: a box {reason}; mend the file, or set `bad_boxes` to clip or drop")
        problems.stop()
    done = "clipped" if action == "clip" else "dropped"
    notes.append(f"{counted(len(numbers), 'box')} {reason} {done}: {_list(places)}")


def _report_pictures(table: Table, which: NDArray[np.bool_], what: str, notes: list[str]) -> None:
    numbers = np.flatnonzero(which)
    if len(numbers):
        files = [relative(table.files[number]) for number in numbers[:20]]
        rest = [""] * (len(numbers) - len(files))
        notes.append(f"{counted(len(numbers), 'picture')} {what}: {_list([*files, *rest])}")


def _box_text(table: Table, number: int, box: NDArray[np.float64]) -> str:
    x1, y1, x2, y2 = (f"{value:.6g}" for value in box)
    picture = table.picture[number]
    return f"x {x1}..{x2}, y {y1}..{y2} in {size_text(table.heights[picture], table.widths[picture])}"


def _size_problem(table: Table, index: int, header: Header, apply_exif: bool) -> str:
    stated = table.heights[index], table.widths[index]
    found = header.upright() if apply_exif else (header.height, header.width)
    advice = "correct the annotation or replace the picture"
    if not apply_exif and header.upright() == stated:
        advice = (
            f"it carries EXIF orientation {header.orientation}: set `exif_orientation: apply` if its boxes were drawn "
            "on the upright picture"
        )
    return (
        f"{table.where_picture(index)}: states a size of {size_text(*stated)}, but {relative(table.files[index])} "
        f"is {size_text(*found)}; {advice}"
    )


def _list(places: Sequence[str]) -> str:
    return "; ".join(first(places))
