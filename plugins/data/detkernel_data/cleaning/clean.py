"""From what a reader found to flat arrays: classes matched, sizes checked, boxes cleaned, images chosen.

Whatever is left out on the way is reported in the notes, one line a reason, with its count and its first places.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from detkernel import DataError
from detkernel.errors import relative
from detkernel_detection import Annotations, Dataset
from detkernel_detection.images import Header, read_headers, size_text
from detkernel_detection.segmentations import mask_problem

from detkernel_data.annotations import FlatAnnotations, Masks, Texts, offsets_of, pack_ids
from detkernel_data.cleaning.boxes import (
    ROUNDING,
    check_units,
    clean_boxes,
    find_duplicates,
    pixel_boxes,
    report_duplicates,
)
from detkernel_data.cleaning.classes import match_classes, rename_classes
from detkernel_data.masks import mask_area
from detkernel_data.report import EXAMPLES, Problems, counted, note, with_advice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkernel_data.formats.dataset import FileDataset
    from detkernel_data.formats.table import Table


def clean(
    table: Table, rules: FileDataset, class_names: Sequence[str] | None, *, may_lack: bool
) -> tuple[FlatAnnotations, tuple[str, ...], list[str]]:
    """(annotations, classes, notes) of what the rules keep. Raises `DataError`, also when they keep nothing."""
    notes: list[str] = [*table.notes]
    if not table.files:
        raise DataError(f"{table.source}: there is no image in it")
    rename_classes(table, rules.rename_classes)
    may_lack = may_lack or (rules.allow_no_objects and not table.names)
    classes, labels = match_classes(table, class_names, rules.ignore_classes, notes, may_lack=may_lack)
    if not classes:
        raise DataError(f"{table.source}: there is no class: no object has a name; `class_names` gives some")
    dropped = drop_images(table, rules, notes)
    labels[dropped[np.asarray(table.image, dtype=np.int64)]] = -1
    measure(table, rules, notes, dropped)
    raw = pixel_boxes(table)
    check_units(table, raw, notes)
    check_masks(table, dropped)
    repeated = find_duplicates(table, raw, labels)
    report_duplicates(table, repeated, rules.duplicates, notes)
    chosen = (labels >= 0) & ~(repeated & (rules.duplicates == "drop"))
    clipped, usable = clean_boxes(table, raw, chosen, rules.bad_boxes, notes)
    if table.untrained is not None:
        usable &= ~np.asarray(table.untrained, dtype=bool)
    kept = choose_images(table, usable, rules, notes, dropped)
    chosen &= kept[np.asarray(table.image, dtype=np.int64)]
    if not ((usable & chosen).any() or (rules.allow_no_objects and kept.any())):
        raise DataError(_nothing_left(table, kept, notes))
    return flat(table, raw, clipped, labels, chosen, usable, kept), classes, notes


def _nothing_left(table: Table, kept: NDArray[np.bool_], notes: Sequence[str]) -> str:
    reasons = "".join(f"\n  {one}" for one in notes) or "\n  the annotations have no object at all"
    advice = ""
    if kept.any():
        advice = (
            "\n  `allow_no_objects: true` takes images without one object, as a part of a `concat` say; the loader "
            "trains on such images with `skip_empty: false`"
        )
    return f"{table.source}: no object is left of {len(table.image)}, in {len(kept)} images:{reasons}{advice}"


def drop_images(table: Table, rules: FileDataset, notes: list[str]) -> NDArray[np.bool_]:
    """Which images `bad_images: drop` leaves out: those that cannot be decoded."""
    dropped = np.zeros(len(table.files), dtype=bool)
    if rules.bad_images == "drop":
        from detkernel_data.loading.check_images import find_undecodable
        from detkernel_data.loading.workers import worker_count

        problems = find_undecodable(table.files, worker_count(None))
        dropped[[index for index, _ in problems]] = True
        if problems:
            reasons = [message.partition("; ")[0] for _, message in problems]
            remedy = "`bad_images: error` refuses them"
            told = note(f"{counted(len(problems), 'image')} that cannot be decoded dropped", reasons, remedy)
            notes.append(told)
            if dropped.all():
                raise DataError(f"{table.source}: no image is left: {told}")
    return dropped


def measure(table: Table, rules: FileDataset, notes: list[str], dropped: NDArray[np.bool_]) -> None:
    """Compare the stated sizes with the images' own, and fill in those that are not stated."""
    problems = Problems(table.source)
    unstated: list[str] = []
    turned: list[str] = []
    animated: list[str] = []
    apply_exif = rules.exif_orientation == "apply"
    chosen = [i for i, height in enumerate(table.heights) if (rules.check_images or height == 0) and not dropped[i]]
    for index, header in zip(chosen, _headers(table, chosen), strict=True):
        if isinstance(header, DataError):
            problems.add(with_advice(header))
            continue
        found = header.upright() if apply_exif else (header.height, header.width)
        stated = table.heights[index], table.widths[index]
        if header.orientation != 1:
            turned.append(table.files[index])
        if header.animated:
            animated.append(table.files[index])
        if stated == (0, 0):
            table.heights[index], table.widths[index] = found
            unstated.append(table.where_image(index))
        elif stated != found:
            problems.add("" if problems.full else _size_problem(table, index, header, apply_exif))
    problems.stop()
    if unstated and len(unstated) < len(table.files):
        notes.append(note(f"{counted(len(unstated), 'image')} of no stated size, taken from the file", unstated))
    if animated:
        what = f"{counted(len(animated), 'image')} with several frames or pages: the first of each is taken"
        notes.append(note(what, animated, shown=_shown(animated)))
    if turned:
        done = "turned upright" if apply_exif else "taken as stored"
        remedy = (
            "`exif_orientation: ignore` takes them as stored"
            if apply_exif
            else "`exif_orientation: apply` turns them upright, which is how most tools show them when boxes are drawn"
        )
        what = f"{counted(len(turned), 'image')} with an EXIF orientation {done}"
        notes.append(note(what, turned, remedy, shown=_shown(turned)))


def _headers(table: Table, chosen: Sequence[int]) -> list[Header | DataError]:
    """Those of some images."""
    if table.headers is None:
        return read_headers([table.files[index] for index in chosen])
    found = table.headers.result()
    return [found[index] for index in chosen]


def check_masks(table: Table, dropped: NDArray[np.bool_]) -> None:
    """Raises `DataError` for segmentations that do not fit their images."""
    problems = Problems(table.source)
    for number, mask in _checked_masks(table):
        image = table.image[number]
        if dropped[image]:
            continue
        problem = mask_problem(mask, table.heights[image], table.widths[image])
        if problem:
            problems.add(
                "" if problems.full else f"{table.where(number)}: its segmentation: {problem}{table.masks_advice}"
            )
    problems.stop()


def _checked_masks(table: Table) -> Iterator[tuple[int, Any]]:
    """The masks that `mask_problem` is to look at, one by one, each with its object."""
    masks: list[Any] | Masks | None = table.masks
    if not isinstance(masks, Masks):
        yield from enumerate(masks or ())
        return
    image = np.asarray(table.image, dtype=np.int64)
    heights, widths = np.asarray(table.heights)[image], np.asarray(table.widths)[image]
    for number in masks.suspects(heights, widths).tolist():
        yield number, _as_arrays(masks[number])


def _as_arrays(mask: Any) -> Any:
    """A mask as the readers of files give it."""
    return [array("d", part) for part in mask] if isinstance(mask, list) else mask


def choose_images(
    table: Table, usable: NDArray[np.bool_], rules: FileDataset, notes: list[str], dropped: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which images stay."""
    heights, widths = np.asarray(table.heights), np.asarray(table.widths)
    kept: NDArray[np.bool_] = np.minimum(heights, widths) >= rules.min_side
    _report_images(
        table, ~kept & ~dropped, f"dropped, a side of less than {rules.min_side} pixels", "`min_side`", notes
    )
    kept &= ~dropped
    objects = np.bincount(np.asarray(table.image, dtype=np.int64)[usable], minlength=len(kept))
    empty = kept & (objects == 0)
    if rules.keep_empty:
        _report_images(table, empty, "without an object kept", "`keep_empty: false` drops them", notes)
    else:
        kept &= ~empty
        _report_images(table, empty, "without an object dropped", "`keep_empty: true` keeps them", notes)
    return kept


def flat(
    table: Table,
    raw: NDArray[np.float64],
    clipped: NDArray[np.float64],
    labels: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    usable: NDArray[np.bool_],
    kept: NDArray[np.bool_],
) -> FlatAnnotations:
    """The flat arrays of the objects and images that stay."""
    image = np.asarray(table.image, dtype=np.int64)
    order = np.flatnonzero(chosen)
    order = order[np.argsort(image[order], kind="stable")]
    images = np.flatnonzero(kept)

    def flags(column: list[bool] | None) -> NDArray[np.bool_]:
        return np.zeros(len(order), dtype=bool) if column is None else np.asarray(column, dtype=bool)[order]

    return FlatAnnotations(
        image_ids=pack_ids([table.image_ids[number] for number in images]),
        files=Texts(table.files[number] for number in images),
        heights=np.asarray(table.heights, dtype=np.int64)[images],
        widths=np.asarray(table.widths, dtype=np.int64)[images],
        offsets=offsets_of(np.bincount(image[order], minlength=len(kept))[images]),
        boxes=raw[order],
        clean=clipped[order],
        usable=usable[order],
        labels=labels[order],
        area=_areas(table, raw, order),
        crowd=flags(table.crowd),
        difficult=flags(table.difficult),
        masks=_masks(table.masks, order),
        keypoints=_keypoints(table.keypoints, order),
        ids=None if table.ids is None else np.asarray(table.ids, dtype=np.int64)[order],
        fields={name: np.asarray(values)[order] for name, values in table.fields.items()},
    )


def _masks(masks: list[Any] | Masks | None, order: NDArray[np.int64]) -> Masks | None:
    if masks is None or isinstance(masks, Masks):
        return None if masks is None else masks.take(order)
    return Masks([masks[number] for number in order.tolist()])


def _areas(table: Table, boxes: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
    """What the file states; else the mask's, else the box's."""
    areas = (boxes[order, 2:] - boxes[order, :2]).prod(1)
    stated = np.full(len(order), np.nan) if table.area is None else np.asarray(table.area, dtype=np.float64)[order]
    for position in np.flatnonzero(np.isnan(stated)):
        if table.masks and (mask := table.masks[int(order[position])]):
            areas[position] = mask_area(_as_arrays(mask))
    return np.where(np.isnan(stated), areas, stated)


def _keypoints(
    rows: Sequence[Sequence[float]] | NDArray[np.float64] | None, order: NDArray[np.int64]
) -> NDArray[np.float32] | None:
    """[M, K, 3]"""
    if rows is None:
        return None
    chosen = rows[order] if isinstance(rows, np.ndarray) else [rows[number] for number in order.tolist()]
    return np.asarray(chosen, dtype=np.float32).reshape(len(order), -1, 3)


def _report_images(table: Table, which: NDArray[np.bool_], what: str, remedy: str, notes: list[str]) -> None:
    files = [table.files[number] for number in np.flatnonzero(which)]
    if files:
        notes.append(note(f"{counted(len(files), 'image')} {what}", files, remedy, shown=_shown(files)))


def _shown(files: Sequence[str]) -> list[str]:
    return [relative(file) for file in files[:EXAMPLES]]


def _size_problem(table: Table, index: int, header: Header, apply_exif: bool) -> str:
    stated = table.heights[index], table.widths[index]
    found = header.upright() if apply_exif else (header.height, header.width)
    advice = "correct the annotation or replace the image"
    if stated == (found[1], found[0]) and header.orientation == 1:
        advice = "width and height are swapped; correct the annotation"
    other = (header.height, header.width) if apply_exif else header.upright()
    if other == stated:
        advice = f"it carries EXIF orientation {header.orientation}: set " + (
            "`exif_orientation: ignore` if its boxes were drawn on the image as it is stored"
            if apply_exif
            else "`exif_orientation: apply` if its boxes were drawn on the upright image"
        )
    return (
        f"{table.where_image(index)}: states a size of {size_text(*stated)}, but {relative(table.files[index])} "
        f"is {size_text(*found)}; {advice}"
    )


def validate(dataset: Dataset, mode: str) -> None:
    """Raise `DataError`, with the first images, for boxes or labels that cannot be trained on; decodes nothing."""
    if getattr(dataset, "cleaned", False):
        return  # while it was read, with the lines of its files
    problems = Problems(f"{mode} data")
    for index in range(len(dataset)):
        notes = dataset.annotations(index)
        problem = _problem(notes, len(dataset.classes))
        if problem:
            problems.add(f"{mode} data: image {index} ('{notes.image_id}'): {problem}")
    problems.stop()


def _problem(notes: Annotations, classes: int) -> str:
    boxes, labels = np.asarray(notes.boxes), np.asarray(notes.labels)
    if boxes.dtype.kind != "f" or boxes.ndim != 2 or boxes.shape[1] != 4:
        return f"its boxes are {boxes.dtype} {list(boxes.shape)}, expected float32 [N, 4]: x1, y1, x2, y2 in pixels"
    if labels.dtype.kind not in "iu" or labels.shape != boxes.shape[:1]:
        return f"its labels are {labels.dtype} {list(labels.shape)}, expected int64 [{len(boxes)}], one a box"
    inside = (boxes >= -ROUNDING).all(1) & (boxes <= np.array([notes.width, notes.height] * 2) + ROUNDING).all(1)
    valid = inside & (boxes[:, 2:] > boxes[:, :2]).all(1)  # what is not a number is neither
    if not valid.all():
        number = int(np.argmin(valid))
        box = ", ".join(f"{value:g}" for value in boxes[number])
        return (
            f"box {number} [{box}] has no area, or lies outside of the image of {notes.width}x{notes.height}; "
            "boxes are x1, y1, x2, y2 in pixels"
        )
    known = (labels >= 0) & (labels < classes)
    if not known.all():
        number = int(np.argmin(known))
        return f"label {labels[number]} of box {number} is none of 0..{classes - 1}, the {classes} classes"
    return ""
