"""YOLO form: a `data.yaml`, folders of pictures, and a text file of labels a picture."""

from __future__ import annotations

from pathlib import Path

from detkernel import option, plugin

from detkernel_data._files import FileDataset, check_names


@plugin
class Yolo(FileDataset):
    """Pictures and labels in YOLO form: boxes, or polygons, which become masks and boxes.

    The labels of `.../images/.../a.jpg` are `.../labels/.../a.txt`; a picture without such a file has no objects.
    """

    data: Path = option(help="the data.yaml with `names`, `path` and the splits, or the folder that has it")
    split: str = option(help="which of the file's splits: train, val or test")
    class_names: list[str] | None = option(
        default=None, help="some of the file's `names` in label order; null: all of them, in their order"
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        from detkernel_data._yolo import read

        table, notes = read(self.data, self.split)
        self._settle(table, self.class_names)
        self.notes = [*notes, *self.notes]
