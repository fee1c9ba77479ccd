"""COCO form: one JSON file of instances, one folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from detkernel import option, plugin

from detkernel_data._files import FileDataset, check_names


@plugin
class Coco(FileDataset):
    """Pictures and instances in COCO form, with polygons or run lengths and keypoints where they are given.

    Category ids may have gaps: classes are the categories' names in the order of their ids. Crowds are kept and
    flagged.
    """

    annotation_file: Path = option(help="the JSON file, such as annotations/instances_train2017.json")
    image_folder: Path = option(help="the folder that the pictures' `file_name` starts from")
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

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        from detkernel_data._coco import Form, read

        form = Form(
            masks=self.masks,
            bbox=self.bbox_format,
            fractions=self.bbox_unit == "fractions",
            evaluate_ignored=self.evaluate_ignored,
            drop_missing=self.bad_images == "drop",
        )
        table, numbers, self.keypoint_names = read(self.annotation_file, self.image_folder, form)
        self.category_ids = {}
        for name, number in numbers.items():  # of classes that are merged, the first number
            self.category_ids.setdefault(self.rename_classes.get(name, name), number)
        self._settle(table, self.class_names)
