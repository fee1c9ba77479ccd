"""Boxes as the files have them, and which of them can be trained on: in pixels, inside of the image, each once."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
from detkernel import DataError
from detkernel_detection.images import size_text

from detkernel_data.annotations import Masks
from detkernel_data.report import Problems, counted, note

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkernel_data.formats.table import Table

ROUNDING = 0.01
"""Pixels out of the image that are not worth a word: COCO's files round to hundredths."""
SLIP = 1.0
"""Pixels out of the image that come from counting from 0 instead of 1, or from rounding: always clipped."""
SURE = 20
"""Boxes from which on a pattern in all of them is not a chance."""
_LESS_SURE = 3


def pixel_boxes(table: Table) -> NDArray[np.float64]:
    """[M, 4] the boxes as the files have them, in pixels; masks and areas are brought to pixels in place."""
    boxes = np.array(table.boxes, dtype=np.float64).reshape(-1, 4)
    if table.fractions:
        sizes = object_sizes(table)
        boxes *= np.tile(sizes, 2)
        _scale_masks(table, sizes)
        if table.area is not None:
            area = np.asarray(table.area)
            table.area = np.where(area <= 1, area * sizes.prod(1), area).tolist()
    return boxes


def object_sizes(table: Table) -> NDArray[np.float64]:
    """[M, 2] width and height of each object's image."""
    image = np.asarray(table.image, dtype=np.int64)
    return np.stack([table.widths, table.heights], axis=1)[image].astype(np.float64)


def check_units(table: Table, boxes: NDArray[np.float64], notes: list[str]) -> None:
    """Raise `DataError` for boxes that are fractions, or corner and corner, where pixels, or corner and size, are
    expected: they would be trained on as other boxes."""
    if table.fractions or not len(boxes):
        return
    written = boxes + table.origin
    if written.min() >= 0 and written.max() <= 1 and written.max() > 0:
        raise DataError(
            f"{table.source}: every box ({len(boxes)}) lies within 0 to 1, as fractions of the image do: "
            f"{_first_box(table, written)}; expected pixels. {table.fractions_advice}"
        )
    if not table.corners_advice:
        return
    x, y, width, height = written[:, 0], written[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    sizes = object_sizes(table)
    as_corners = (width > x) & (height > y) & (width <= sizes[:, 0] + 1) & (height <= sizes[:, 1] + 1)
    beyond = (boxes[:, 2:] > sizes + SLIP).any(1)
    if as_corners.all() and len(boxes) >= _LESS_SURE and beyond.mean() > 0.2:
        message = (
            f"{counted(int(beyond.sum()), 'box')} of {len(boxes)} would reach out of the image, and all would be in it "
            f"if they were two corners, [x1, y1, x2, y2]. {table.corners_advice}"
        )
        if len(boxes) >= SURE:
            raise DataError(f"{table.source}: {message}")
        notes.append(note(message))


def find_duplicates(table: Table, boxes: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[M] whether an object has the image, class and box of one before it."""
    flags = np.asarray(table.crowd if table.crowd is not None else np.zeros(len(boxes)))
    rows = np.column_stack([np.asarray(table.image), labels, flags, boxes]).astype(np.float64)
    hashes = _hashes(rows + 0.0)  # -0.0 becomes 0.0
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():  # as a rule: to know which are the same takes five times as long
        return np.zeros(len(rows), dtype=bool)
    _, before, which = np.unique(hashes, return_index=True, return_inverse=True)
    first = before[which]
    repeated: NDArray[np.bool_] = (first != np.arange(len(rows))) & (rows == rows[first]).all(1) & (labels >= 0)
    return repeated


def _hashes(rows: NDArray[np.float64]) -> NDArray[np.uint64]:
    """[M] one number a row: to sort those takes a tenth of sorting rows."""
    odd = np.random.default_rng(0).integers(1, 2**63, (2, rows.shape[1]), dtype=np.uint64) | np.uint64(1)
    hashes = np.zeros(len(rows), dtype=np.uint64)
    for column, (first, second) in zip(rows.T, odd.T, strict=True):
        bits = np.ascontiguousarray(column).view(np.uint64)
        bits = (bits ^ (bits >> np.uint64(32))) * first  # of whole numbers, only the upper bits differ
        hashes += (bits ^ (bits >> np.uint64(29))) * second
    return hashes


def report_duplicates(table: Table, repeated: NDArray[np.bool_], policy: str, notes: list[str]) -> None:
    """Count them; an error where the policy says so."""
    if not repeated.any():
        return
    numbers = np.flatnonzero(repeated).tolist()
    if policy == "error":
        problems = Problems(table.source)
        for number in numbers:
            problems.add(
                "" if problems.full else f"{table.where(number)}: an object before it in the image has the same class "
                "and box; remove it, or set `duplicates` to drop or keep"
            )  # fmt: skip
        problems.stop()
    remedy = (
        "a perfect detector finds each place once, so duplicates lower its AP; `duplicates: drop` leaves them out"
        if policy == "keep"
        else "`duplicates: keep` takes them"
    )
    done = "kept" if policy == "keep" else "dropped"
    what = f"{counted(len(numbers), 'duplicate')} (same image, class and box) {done}"
    notes.append(note(what, [table.where(number) for number in numbers], remedy))


def clean_boxes(
    table: Table, boxes: NDArray[np.float64], chosen: NDArray[np.bool_], policy: str, notes: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The boxes cut to their images, and which of the chosen objects can be trained on.

    Raises `DataError` for the first that cannot, where the policy says so.
    """
    sizes = object_sizes(table)
    clipped = np.clip(boxes, 0, np.tile(sizes, 2))
    flat = chosen & _without_area(boxes)
    outside = chosen & ~flat & _without_area(clipped)
    reach = np.abs(boxes - clipped).max(1, initial=0)
    inside = chosen & ~flat & ~outside
    slips = inside & (reach > ROUNDING) & (reach <= SLIP)
    sticking_out = inside & (reach > SLIP)
    small = inside & ((boxes[:, 2:] - boxes[:, :2]) < 1).all(1)

    for which, reason in ((flat, "without area"), (outside, "outside the image")):
        _report(table, which, boxes, reason, "error" if policy == "error" else "drop", notes)
    _report(table, sticking_out, boxes, "reaching out of the image", policy, notes)
    _report(table, slips, boxes, "reaching out of the image by a pixel or less", "slip", notes)
    _report(table, small, boxes, "smaller than a pixel", "keep", notes)
    return clipped, inside if policy == "clip" else inside & ~sticking_out


def _without_area(boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the corners are one in the precision that models reckon with, or are swapped."""
    corners = boxes.astype(np.float32)
    swapped: NDArray[np.bool_] = np.any(corners[:, 2:] <= corners[:, :2], axis=1)
    return swapped


def _scale_masks(table: Table, sizes: NDArray[np.float64]) -> None:
    masks: list[Any] | Masks | None = table.masks
    if isinstance(masks, Masks):
        masks.scale(sizes)
        return
    for polygons, size in zip(masks or (), sizes, strict=False):
        for polygon in polygons if isinstance(polygons, list) else ():
            if isinstance(polygon, array) and len(polygon) % 2 == 0:  # others are reported when masks are checked
                polygon[:] = array("d", np.frombuffer(polygon) * np.tile(size, len(polygon) // 2))


def _report(
    table: Table, which: NDArray[np.bool_], boxes: NDArray[np.float64], reason: str, action: str, notes: list[str]
) -> None:
    numbers = np.flatnonzero(which).tolist()
    if not numbers:
        return
    if action == "error":
        problems = Problems(table.source)
        for number in numbers:
            problems.add(
                "" if problems.full else f"{_place(table, number, boxes)}: a box {reason}; fix the file, or set "
                "`bad_boxes` to clip or drop"
            )  # fmt: skip
        problems.stop()
    done = {"clip": "clipped", "slip": "clipped", "drop": "dropped", "keep": "kept"}[action]
    places = [_place(table, number, boxes) for number in numbers]
    notes.append(
        note(f"{counted(len(numbers), 'box')} {reason} {done}", places, _advice(table, boxes[numbers], action))
    )


def _advice(table: Table, boxes: NDArray[np.float64], action: str) -> str:
    """The option that changes it."""
    if action == "slip":
        from_zero = table.origin == 1 and bool((boxes[:, :2] < -ROUNDING).any())
        return "some begin at 0: set `origin: 0` if these files count pixels from 0, not from 1" if from_zero else ""
    if action == "keep":
        return ""
    others = "`bad_boxes: drop` or `error`" if action == "clip" else "`bad_boxes: error` refuses them"
    return f"{others}; evaluation takes them as they are"


def _place(table: Table, number: int, boxes: NDArray[np.float64]) -> str:
    x1, y1, x2, y2 = (f"{value:.6g}" for value in boxes[number])
    image = table.image[number]
    size = size_text(table.heights[image], table.widths[image])
    return f"{table.where(number)} (x {x1}..{x2}, y {y1}..{y2} in {size})"


def _first_box(table: Table, boxes: NDArray[np.float64]) -> str:
    x1, y1, x2, y2 = (f"{value:.6g}" for value in boxes[0])
    return f"{table.where(0)} (x {x1}..{x2}, y {y1}..{y2})"
