"""Data sets: images with their annotations, by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from detkernel.plugin import Part

from detkernel_detection.structures import Annotations

if TYPE_CHECKING:
    from torch import Tensor

    from detkernel_detection.federated import Federated


class Dataset(Part, ABC):
    """A data set: images with their annotations, by index.

    `load` is called once, before anything else, in the main process; it reads and checks every annotation (no image
    is decoded) and raises `DataError` for what cannot be used. The object then travels to the loader's workers, so hold
    annotations in a few flat arrays, not in a list of dicts (reference counting copies that into every worker).
    """

    classes: tuple[str, ...] = ()
    """Class names in label order, known after `load`."""
    notes: Sequence[str] = ()
    """What `load` left out and why, one line each with its count; the loader logs them."""
    category_ids: Mapping[str, int] = MappingProxyType({})
    """The file's own number of each class, by name, where its form has them (COCO's, with gaps)."""
    fields: Mapping[str, str] = MappingProxyType({})
    """The further values of each object (`Annotations.fields`), by name, and how they change with the image: "value":
    not at all (a track id, a weight), "angle": degrees from the x axis towards the y axis. A transform says which kinds
    it can move; another kind of your own needs transforms that know it."""
    federated: Federated | None = None
    """Which classes were looked for in which image, where the data says so (LVIS); None: all of them in all. A data set
    that wraps another hands it on."""
    keypoint_names: Sequence[str] = ()
    """Names of the keypoints in their order, where the data set has some: a flip swaps `left_*` and `right_*`."""

    @abstractmethod
    def load(self) -> None:
        """Read and check the annotations; set `classes` and `notes`."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """Decode one image: uint8 [3, H, W] RGB. Raises `DataError` naming the file if it cannot be decoded."""

    @abstractmethod
    def annotations(self, index: int) -> Annotations:
        """What may be trained on in one image, without decoding it: boxes with an area, inside of the image."""

    def truth(self, index: int) -> Annotations:
        """What detections are measured by: the same objects as the files have them, neither clipped nor dropped.

        Boxes may reach out of the image or have no area. A data set that cleans nothing leaves this as it is; one that
        wraps another asks that one's.
        """
        return self.annotations(index)

    def fingerprint(self) -> str:
        """A short hash that changes with the images' names, order or annotations; a resume compares it."""
        import hashlib

        digest = hashlib.sha256(repr((self.classes, len(self))).encode())
        for index in range(len(self)):
            notes = self.annotations(index)
            digest.update(f"{notes.image_id}{notes.height}{notes.width}".encode())
            digest.update(notes.boxes.tobytes())
            digest.update(notes.labels.tobytes())
        return digest.hexdigest()[:16]
