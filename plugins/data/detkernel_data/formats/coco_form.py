"""What files of COCO's form have in them: how the options of the data set read them, and which names mean something."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from detkernel_data.formats.entry import Entry
from detkernel_data.formats.table import Table
from detkernel_data.report import counted, note


class Category(NamedTuple):
    name: str
    keypoints: tuple[str, ...]


class Form(NamedTuple):
    """How the file is to be read, by the options of the data set."""

    masks: bool
    bbox: Literal["xywh", "xyxy", "cxcywh"]
    fractions: bool
    evaluate_ignored: bool
    drop_missing: bool
    fields: tuple[str, ...] = ()
    """Further keys of annotations that are read."""
    headers: bool = True
    """Whether the stated sizes of all images are compared with their files."""


USED = {
    "images": {"id", "file_name", "coco_url", "width", "height"},
    "annotations": {
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "difficult", "segmentation"),
        *("keypoints", "num_keypoints"),
    },
    "categories": {"id", "name", "keypoints"},
    "": {"images", "annotations", "categories"},
}
MEAN_NOTHING = {
    *("info", "licenses", "license", "type", "url", "flickr_url", "flickr_640_url", "coco_url", "date_captured"),
    *("supercategory", "skeleton", "color", "synset", "def", "synonyms", "frequency", "image_count", "instance_count"),
}
"""Where images come from, and what COCO and LVIS say of categories for people."""
Field: TypeAlias = tuple[str, str]
"""(part of the file, name)."""
_LVIS = ("neg_category_ids", "not_exhaustive_category_ids")


def empty_table(source: str, declared: list[str], form: Form) -> Table:
    """Without an image, with the words that messages about this file need."""
    table: Table

    def where(index: int) -> str:
        assert table.ids is not None
        name = os.path.basename(table.files[table.image[index]])  # noqa: PTH119 - called for many objects
        return f"{source}: annotation {table.ids[index]} '{table.names[index]}' of {name}"

    table = Table(
        source=source,
        declared=lambda: declared,
        where=where,
        where_image=lambda index: f"{source}: image {table.image_ids[index]}",
        fractions=form.fractions,
        fractions_advice="Set `bbox_unit: fractions`",
        corners_advice="" if form.bbox != "xywh" else "Set `bbox_format: xyxy` if they are",
        masks_advice="; where only boxes are trained, `masks: false` reads none",
        area=[],
        crowd=[],
        ids=[],
    )
    return table


def take_flags(table: Table, form: Form, ignored: Sequence[bool], difficult: Sequence[bool]) -> None:
    """Flags that change what an object counts for are used, and said to be: `ignore` and `difficult` of each, and an
    id of 0."""
    numbers = np.flatnonzero(ignored)
    if np.any(difficult):
        table.difficult = list(difficult)
    without_id = np.flatnonzero(np.asarray(table.ids) == 0)
    if len(without_id):
        what = (
            "an annotation has the id 0, by which pycocotools marks what was not found: there it counts as missed, "
            "whatever is detected, here as any other"
        )
        remedy = "number annotations from 1 to have pycocotools' metrics agree"
        table.notes.append(note(what, [table.where(int(without_id[0]))], remedy))
    if not len(numbers):
        return
    if form.evaluate_ignored:
        table.untrained = list(ignored)
        how = "not trained on; evaluation counts them, as pycocotools does"
        remedy = "`evaluate_ignored: false` counts them neither as missed nor what is found there as wrong"
    else:
        table.difficult = np.logical_or(ignored, difficult).tolist()
        how, remedy = "neither trained on nor counted in evaluation", "`evaluate_ignored: true` counts them"
    places = [table.where(int(number)) for number in numbers]
    table.notes.append(note(f"{counted(len(places), 'object')} with `ignore` set: {how}", places, remedy))


def count_unused(entries: Iterable[Mapping[str, Any]], part: str, fields_read: Sequence[str]) -> Counter[Field]:
    """How many entries have a value under a name that nothing reads."""
    known = USED[part] | MEAN_NOTHING | set(fields_read)
    counts: Counter[Field] = Counter()
    for fields in entries:
        if not known.issuperset(fields):
            counts.update((part, name) for name in set(fields) - known if fields[name] not in (None, "", [], {}))
    return counts


def report_unused(table: Table, data: Entry, counts: Counter[Field]) -> None:
    """Fields that are not read, since one of them may change what the others mean. `counts`: of the annotations."""
    for part in ("images", "categories", ""):
        counts.update(count_unused(data.fields[part] if part else [data.fields], part, ()))
    lvis = max((counts.pop(("images", name), 0) for name in _LVIS), default=0)
    if lvis:
        table.notes.append(
            note(
                f"`neg_category_ids` and `not_exhaustive_category_ids` of {counted(lvis, 'image')}, as LVIS has them, "
                "are what `lvis_map` goes by; with other evaluators, a detection of a class that was not annotated in "
                "an image counts as wrong"
            )
        )
    if counts:
        named = [
            f"`{name}`" + (f" of {number} {part}" if part else "") for (part, name), number in sorted(counts.items())
        ]
        table.notes.append(note("fields that are not used", named))
