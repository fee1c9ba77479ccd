"""YOLO form: a `data.yaml`, folders of pictures, and a text file of labels a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from detkernel import option, plugin

from detkernel_data._files import FileDataset, check_names


@plugin
class Yolo(FileDataset):
    """Pictures and labels in YOLO form: boxes, or polygons, which become masks and boxes.

    The labels of `.../images/.../a.jpg` are `.../labels/.../a.txt`; an image without such a file has no objects,
    unless `unlabelled` says otherwise. Boxes are those of the upright image, as the tools that write this form show it.
    """

    data: Path = option(help="the data.yaml with `names`, `path` and the splits, or the folder that has it")
    split: str = option(help="which of the file's splits: train, val or test")
    class_names: list[str] | None = option(
        default=None, help="some of the file's `names` in label order; null: all of them, in their order"
    )
    exif_orientation: Literal["ignore", "apply"] = option(
        default="apply", help="whether boxes were drawn on the picture as stored, or on the upright one"
    )
    unlabelled: Literal["keep", "drop", "error"] = option(
        default="keep", help="images without a label file: taken as images without objects, left out, or an error"
    )
    orphan_labels: Literal["drop", "error"] = option(
        default="drop", help="label files without an image: left out and counted, or an error"
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        from detkernel_data._yolo import read

        table = read(self.data, self.split, self.unlabelled, self.orphan_labels, drop_missing=self.bad_images == "drop")
        self._settle(table, self.class_names)
