"""COCO form: one JSON file of instances, one folder of pictures."""

from __future__ import annotations

from pathlib import Path

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

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        from detkernel_data._coco import read

        table, self.category_ids, self.keypoint_names = read(self.annotation_file, self.image_folder, masks=self.masks)
        self._settle(table, self.class_names)
