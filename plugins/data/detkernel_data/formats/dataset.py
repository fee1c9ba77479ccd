"""What the data sets of image files have in common: their options, decoding, and annotations in flat arrays."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from detkernel import DataError, option, plugin, state
from detkernel.errors import relative
from detkernel_detection import Annotations, Dataset

from detkernel_data.formats.overview import Overview
from detkernel_data.report import with_advice

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from detkernel_data.annotations import FlatAnnotations
    from detkernel_data.formats.table import Table


@plugin
class FileDataset(Dataset):
    """Images in files, with annotations beside them."""

    ignore_classes: list[str] | Literal["others"] = option(
        factory=list, help="classes whose objects are left out; 'others': all that `class_names` does not list"
    )
    bad_boxes: Literal["clip", "drop", "error"] = option(
        default="clip",
        help="for training, a box more than a pixel out of its image is cut to it, dropped, or an error; one without "
        "area in it is dropped, or an error; all are counted. Evaluation takes every box as it is in the file",
    )
    duplicates: Literal["keep", "drop", "error"] = option(
        default="keep", help="an object with the class and box of another in its image: counted in each case"
    )
    rename_classes: dict[str, str] = option(
        factory=dict, help="other names for classes, by those in the files; classes that get one name are merged"
    )
    bad_images: Literal["error", "drop"] = option(
        default="error",
        help="an image that cannot be decoded is an error when it is read, or is left out with its objects: then all "
        "are decoded while the data is loaded, and those that are valid are remembered",
    )
    keep_empty: bool = option(
        default=True, help="keep images without an object; the loader's `skip_empty` is what training goes by"
    )
    allow_no_objects: bool = option(
        default=False, help="take a data set that has images and not one object: background, for a `concat` say"
    )
    min_side: int = option(default=0, at_least=0, help="drop images whose shorter side is below this, in pixels")
    check_images: bool = option(
        default=True, help="compare every image's stated size with its file while loading, else when it is decoded"
    )
    exif_orientation: Literal["ignore", "apply"] = option(
        default="ignore", help="whether boxes were drawn on the image as stored, or on the upright one"
    )
    bit_depth: int | None = option(
        default=None,
        at_least=8,
        at_most=16,
        help="significant bits of images with 16 bits a channel; null: as many as the values of a sample of them need",
    )
    fields: dict[str, Literal["value", "angle"]] = option(
        factory=dict,
        help="further values that go with each object, such as {track_id: value, angle: angle}: keys of COCO's "
        "annotations, elements or <attributes> of VOC's objects, columns of YOLO's lines, in their order. Values stay "
        "as they are, angles (degrees, from the x axis towards the y axis) turn with the image",
    )
    cleaned: ClassVar[bool] = True
    """Every annotation was validated while it was read, with the lines of its files."""
    _flat: FlatAnnotations | None = state()
    _bits: int | None = state()

    def __len__(self) -> int:
        return 0 if self._flat is None else len(self._flat)

    def image(self, index: int) -> Tensor:
        from detkernel_detection.images import ImageError, decode, size_text

        flat = self._loaded()
        path = flat.files[index]
        try:
            image = decode(path, self.exif_orientation == "apply", self.bit_depth or self._bits)
        except ImageError as error:
            raise DataError(with_advice(error)) from None
        stated = int(flat.heights[index]), int(flat.widths[index])
        found = int(image.shape[1]), int(image.shape[2])
        if found != stated:
            raise DataError(
                f"{relative(path)}: the image is {size_text(*found)}, its annotations state {size_text(*stated)}; "
                "correct them or replace the image"
            )
        return image

    def annotations(self, index: int) -> Annotations:
        return self._loaded()[index]

    def truth(self, index: int) -> Annotations:
        return self._loaded().truth(index)

    def fingerprint(self) -> str:
        return self._loaded().digest(self.classes)

    @property
    def flat(self) -> FlatAnnotations:
        """All annotations, once they are loaded."""
        return self._loaded()

    @property
    def found_bits(self) -> int | None:
        """The significant bits that were found in images with 16 bits a channel."""
        return self._bits

    def fill(self, flat: FlatAnnotations, classes: Sequence[str], notes: Sequence[str], bits: int | None) -> None:
        """Take what was loaded before, in place of loading it."""
        self._flat, self.classes, self.notes, self._bits = flat, tuple(classes), list(notes), bits

    def overview(self) -> Overview:
        """What is asked of all images at once, without looking at each."""
        flat = self._loaded()
        return Overview(flat.objects_to_train_on(), np.asarray(flat.heights), np.asarray(flat.widths))

    def maskless(self) -> NDArray[np.int64]:
        """[n] how many objects to train on have no mask."""
        return self._loaded().maskless()

    def _loaded(self) -> FlatAnnotations:
        if self._flat is None:
            raise RuntimeError(f"{type(self).__name__}.load() has not been called")
        return self._flat

    def _clean(self, table: Table, class_names: Sequence[str] | None, *, may_lack: bool = False) -> None:
        """Take up what was read, less what the options leave out. Raises `DataError`."""
        from detkernel_data.cleaning.clean import clean

        self._flat, self.classes, self.notes = clean(table, self, class_names, may_lack=may_lack)
        if self.bit_depth is None:
            self._find_depth()

    def _find_depth(self) -> None:
        from detkernel_detection.images import find_depth

        self._bits, largest = find_depth(self._loaded().files.tolist())
        if self._bits is not None and self._bits < 16:
            self.notes = [
                *self.notes,
                f"images with 16 bits a channel have values up to {largest}: read as {self._bits} bits "
                f"({2**self._bits - 1} becomes 255); `bit_depth` says otherwise",
            ]


@contextmanager
def without_collector() -> Iterator[None]:
    """Python's search for cycles off: where millions of objects are made that have none, it takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_names(class_names: Sequence[str] | str | None, ignored: Sequence[str] | str) -> None:
    """Raises ValueError for names that are listed twice, or both wanted and ignored."""
    wanted = [] if class_names is None or isinstance(class_names, str) else class_names
    if class_names is not None and not class_names:
        raise ValueError("class_names: expected at least one class, or null for all that the data has")
    unwanted = [] if isinstance(ignored, str) else ignored
    for option_name, names in (("class_names", wanted), ("ignore_classes", unwanted)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{option_name}: '{twice[0]}' is listed twice")
    both = sorted(set(wanted) & set(unwanted))
    if both:
        raise ValueError(f"ignore_classes: '{both[0]}' is listed in `class_names` too")
    if ignored == "others" and class_names is None:
        raise ValueError("ignore_classes: 'others' needs `class_names`: the classes that are not ignored")
