"""What a reader found in a data set's files, column by column, before anything is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
from detkernel_detection import ImageId
from detkernel_detection.federated import Federated

if TYPE_CHECKING:
    import numpy as np
    from detkernel import DataError
    from detkernel_detection.images import Header
    from numpy.typing import NDArray

    from detkernel_data.aside import Aside

Box: TypeAlias = tuple[float, float, float, float]


@attrs.define(eq=False, kw_only=True)
class Table:
    """Lists of one entry an image, and of one entry an object; plain Python, since that is fast to append to.

    A reader of large files has the columns of objects as arrays, and masks as `Masks`, and puts those in their places.
    """

    source: str
    """The file or folder that messages about the whole data set name."""
    declared: Callable[[], Sequence[str]]
    """Every class name that the data set knows, in label order, whether or not an object here has it."""
    where: Callable[[int], str]
    """The place of an object, by its position in the lists: its file, and its line or id."""
    where_image: Callable[[int], str]
    """The place that states an image's size, by the image's position."""
    fractions: bool = False
    """Whether boxes and polygons are fractions of the image's width and height, still to be multiplied."""
    origin: int = 0
    """What the reader took off from the coordinates in the files."""
    fractions_advice: str = "Multiply them by the width and height of the image"
    corners_advice: str = ""
    """What to do where the files have two corners for a corner and a size; empty where they cannot."""
    masks_advice: str = ""
    notes: list[str] = attrs.field(factory=list)
    """What the reader left out or did not use."""

    image_ids: list[ImageId] = attrs.field(factory=list)
    files: list[str] = attrs.field(factory=list)
    heights: list[int] = attrs.field(factory=list)
    """0 where the annotations do not state it."""
    widths: list[int] = attrs.field(factory=list)

    image: list[int] = attrs.field(factory=list)
    """Position of the object's image."""
    names: list[str] = attrs.field(factory=list)
    boxes: list[Box] = attrs.field(factory=list)
    """xyxy, finite numbers."""
    area: list[float] | None = None
    """None, or NaN for an object: the mask's, else the box's."""
    crowd: list[bool] | None = None
    difficult: list[bool] | None = None
    untrained: list[bool] | None = None
    """Not trained on, though they count like others when detections are measured."""
    masks: list[Any] | None = None
    keypoints: Sequence[Sequence[float]] | NDArray[np.float64] | None = None
    """3K numbers an object."""
    ids: list[int] | None = None
    headers: Aside[list[Header | DataError]] | None = None
    """Of all images, where another process is reading them already."""
    federated: Federated | None = None
    """Which classes were looked for in which image, by the names in the file; None: all of them in all."""
    fields: dict[str, list[Any]] = attrs.field(factory=dict)
    """Further values of each object, by name: numbers, or lists of as many."""

    def add_image(self, image_id: ImageId, file: str, height: int, width: int) -> int:
        """Append an image and return its position."""
        self.image_ids.append(image_id)
        self.files.append(file)
        self.heights.append(height)
        self.widths.append(width)
        return len(self.files) - 1

    def add_object(self, image: int, name: str, box: Box) -> None:
        self.image.append(image)
        self.names.append(name)
        self.boxes.append(box)
