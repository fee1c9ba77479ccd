"""Pascal VOC form: a folder of pictures, one of XML files, and lists of names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from detkernel import option, plugin

from detkernel_data._files import FileDataset, check_names

VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
"""The 20 classes, in the order of the challenge and of MMDetection."""


@plugin
class Voc(FileDataset):
    """Pictures and annotations in Pascal VOC form.

    Boxes are the file's coordinates less `origin`, fractions kept; width is `xmax - xmin`, as in MMDetection 2.x.
    Objects that are `difficult` are kept and flagged. A picture belongs to the XML file of the same stem.
    """

    root: Path = option(help="the folder with the three below, such as VOCdevkit/VOC2007")
    split: str | list[str] | None = option(
        help="name or names of lists in `split_folder`, such as trainval; null: every annotation file"
    )
    class_names: list[str] | Literal["voc"] | None = option(
        default=None, help="classes in label order; 'voc': the 20 of the challenge; null: all in the folder, sorted"
    )
    origin: Literal[0, 1] = option(default=1, help="the coordinate of the first pixel: 1 as VOC writes, or 0")
    image_folder: str = option(default="JPEGImages", help="the pictures' folder in `root`")
    annotation_folder: str = option(default="Annotations", help="the XML files' folder in `root`")
    split_folder: str = option(default="ImageSets/Main", help="the lists' folder in `root`")
    unlabelled: Literal["keep", "drop", "error"] | None = option(
        default=None,
        help="images without an XML file: taken as images without objects, left out, or an error; null: an error where "
        "a list names them, else left out, and counted",
    )
    orphan_labels: Literal["drop", "error"] = option(
        default="error", help="XML files without an image: left out and counted, or an error"
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        from detkernel_data._voc import read

        table = read(
            images=self.root / self.image_folder,
            annotations=self.root / self.annotation_folder,
            splits=self.root / self.split_folder,
            split=[self.split] if isinstance(self.split, str) else self.split,
            origin=self.origin,
            unlabelled=self.unlabelled,
            orphans=self.orphan_labels,
        )
        standard = self.class_names == "voc"
        wanted = VOC_CLASSES if standard or isinstance(self.class_names, str) else self.class_names
        self._settle(table, wanted, may_lack=standard)
