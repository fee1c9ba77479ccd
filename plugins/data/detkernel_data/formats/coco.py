"""COCO form: one JSON file of instances, one folder of images."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from detkernel import option, plugin
from detkernel.errors import relative
from detkernel_detection.images import read_headers

from detkernel_data.aside import Aside
from detkernel_data.formats import coco_entries
from detkernel_data.formats.coco_form import Form, count_unused, empty_table, report_unused
from detkernel_data.formats.dataset import FileDataset, check_names, without_collector
from detkernel_data.formats.entry import Entry
from detkernel_data.formats.kept import Kept
from detkernel_data.formats.lvis import read_federated

if TYPE_CHECKING:
    from detkernel_data.formats.coco_form import Category
    from detkernel_data.formats.coco_quick import Split
    from detkernel_data.formats.table import Table


_MANY = 10_000
"""Images whose headers take so long to read that another process is worth it."""


def read(path: Path, images: Path, form: Form) -> tuple[Table, dict[str, int], tuple[str, ...]]:
    """Everything that the file says, its category ids by name, and the names of the keypoints.

    Raises `DataError` with all problems found.
    """
    source = relative(path)
    found = split(path)
    ordinary = None if found is None else _read_quickly(source, found, images, form)
    if ordinary is not None:
        return ordinary
    del found  # it holds the content of the file
    data = Entry(source, coco_entries.parse(path, form.masks))
    categories = coco_entries.read_categories(data, source)
    points = coco_entries.read_keypoint_names(categories, source)
    table = empty_table(source, [categories[number].name for number in sorted(categories)], form)
    positions = coco_entries.add_images(table, data, images, form.drop_missing)
    objects = coco_entries.Objects(table, categories, positions, len(points), form)
    objects.add_all(coco_entries.read_annotations(data, len(positions)))
    report_unused(table, data, count_unused(data.fields["annotations"], "annotations", form.fields))
    return _with_federated(table, data, source, categories, points)


def _with_federated(
    table: Table, data: Entry, source: str, categories: dict[int, Category], points: tuple[str, ...]
) -> tuple[Table, dict[str, int], tuple[str, ...]]:
    table.federated = read_federated(data, source, {number: found.name for number, found in categories.items()})
    return table, {categories[number].name: number for number in sorted(categories)}, points


def split(path: Path) -> Split | None:
    """The file for the quick reader; None where that is not installed, or where the file is not for it."""
    if find_spec("msgspec") is None:
        return None  # it only saves time and memory
    from detkernel_data.formats import coco_quick

    try:
        return coco_quick.split(path, coco_entries.LARGEST)
    except OSError:
        return None  # the careful reader says why


def _read_quickly(
    source: str, found: Split, images: Path, form: Form
) -> tuple[Table, dict[str, int], tuple[str, ...]] | None:
    """What `read` gives, in blocks of a thousand annotations; None where one of them wants a closer look."""
    from detkernel_data.formats import coco_quick

    data = Entry(source, found.fields)
    categories = coco_entries.read_categories(data, source)
    points = coco_entries.read_keypoint_names(categories, source)
    table = empty_table(source, [categories[number].name for number in sorted(categories)], form)
    seen = coco_quick.images(found.fields.get("images"), images)
    if seen is None:
        positions = coco_entries.add_images(table, data, images, form.drop_missing)
    else:
        table.image_ids, table.files, table.heights, table.widths = seen
        positions = {number: place for place, number in enumerate(table.image_ids)}
        if form.headers and len(table.files) >= _MANY:
            table.headers = Aside(partial(read_headers, table.files))
    columns = coco_quick.columns(found.annotations, categories, positions, len(points), form)
    if columns is None:
        return None
    columns.fill(table, form)
    report_unused(table, data, columns.unused)
    return _with_federated(table, data, source, categories, points)


@plugin
class Coco(FileDataset):
    """Images and instances in COCO form, with polygons or run lengths and keypoints where they are given.

    Category ids may have gaps: classes are the categories' names in the order of their ids. Crowds are kept and
    flagged.
    """

    annotation_file: Path = option(help="the JSON file, such as annotations/instances_train2017.json")
    image_folder: Path = option(help="the folder that the images' `file_name` starts from")
    class_names: list[str] | None = option(
        default=None, help="categories in label order; null: all, in the order of their ids"
    )
    masks: bool = option(default=True, help="keep segmentations; false saves memory where only boxes are trained")
    bbox_format: Literal["xywh", "xyxy", "cxcywh"] = option(
        default="xywh", help="corner and size, as in COCO's own files, two corners, or centre and size"
    )
    bbox_unit: Literal["pixels", "fractions"] = option(
        default="pixels", help="'fractions': boxes and polygons are parts of the image's width and height, 0 to 1"
    )
    evaluate_ignored: bool = option(
        default=True,
        help="count objects with `ignore: 1` in evaluation, as pycocotools does; false: they are neither missed nor is "
        "what is found there wrong. They are never trained on",
    )
    cache: bool = option(
        default=True,
        help="keep the annotations of a file of more than 4 MB, cleaned, below ~/.cache/detkernel: the next run, and "
        "each loader worker, map them into memory; they are read again as soon as a file or an option is another",
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        kept = Kept.of(self) if self.cache else None
        if kept is not None and kept.take(self):
            return
        form = Form(
            masks=self.masks,
            bbox=self.bbox_format,
            fractions=self.bbox_unit == "fractions",
            evaluate_ignored=self.evaluate_ignored,
            drop_missing=self.bad_images == "drop",
            fields=tuple(self.fields),
            headers=self.check_images,
        )
        with without_collector():
            table, numbers, self.keypoint_names = read(self.annotation_file, self.image_folder, form)
            self.category_ids = {}
            for name, number in numbers.items():  # of classes that are merged, the first number
                self.category_ids.setdefault(self.rename_classes.get(name, name), number)
            self.federated = table.federated and table.federated.renamed(self.rename_classes)
            self._clean(table, self.class_names)
        del table  # it is as large as what is kept of it
        if kept is not None:
            kept.put(self)
