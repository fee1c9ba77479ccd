"""What detection plugins exchange: images with their annotations, targets, batches, losses and detections.

Everywhere outside a model: boxes are xyxy in absolute pixels (`x2 - x1` is the width), labels are 0-based positions in
`classes`, images are uint8 RGB of shape [3, H, W] (channels-last in memory where that is free). Nothing here imports
torch or numpy: the classes only carry their arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import attrs

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

Losses: TypeAlias = "Mapping[str, Tensor]"
"""What `train_step` returns: named scalars. The sum of every entry whose name contains "loss" is minimised; the others
(an accuracy, say) are only logged."""

ImageId: TypeAlias = "int | str"

T = TypeVar("T")


@attrs.define(eq=False)
class Annotations:
    """What a data set knows of one image, in the coordinates of the file. Arrays of N objects; NumPy, not torch."""

    image_id: ImageId
    path: str
    """The image's file, for messages; a generated image has a made-up name."""
    height: int
    width: int
    boxes: NDArray[np.float64]
    """[N, 4] xyxy, absolute pixels."""
    labels: NDArray[np.int64]
    """[N] 0-based positions in the data set's `classes`."""
    area: NDArray[np.float64]
    """[N] the area that COCO's size ranges go by (the mask's where there is one, else the box's)."""
    crowd: NDArray[np.bool_]
    """[N] COCO's `iscrowd`: matched by any number of detections, never trained on."""
    difficult: NDArray[np.bool_]
    """[N] VOC's `difficult`: not counted when missed, never trained on."""
    masks: Sequence[Any] | None = None
    """N COCO segmentations: polygons ([[x, y, ...], ...]) or RLE dicts; None where the data set has none."""
    keypoints: NDArray[np.float32] | None = None
    """[N, K, 3] x, y, visibility (0 not labelled, 1 hidden, 2 visible); None where the data set has none."""
    ids: NDArray[np.int64] | None = None
    """[N] annotation ids, where the form has them."""
    fields: Mapping[str, NDArray[Any]] = attrs.field(factory=dict)
    """Further values of the objects, [N] or [N, ...], by name (`Dataset.fields` says of which kind): a track id, a
    weight, an angle."""

    def __len__(self) -> int:
        return len(self.labels)


@attrs.define(eq=False)
class Target:
    """What a model is trained on for one image, in the coordinates of the transformed image. Torch tensors."""

    boxes: Tensor
    """float32 [N, 4] xyxy."""
    labels: Tensor
    """int64 [N], 0-based."""
    masks: Tensor | None = None
    """uint8 [N, H, W], 0 or 1."""
    keypoints: Tensor | None = None
    """float32 [N, K, 3]."""
    fields: dict[str, Tensor] = attrs.field(factory=dict)
    """Further values of the objects, [N] or [N, ...], by name."""

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, which: Tensor) -> Target:
        """Only the objects that a bool or index tensor selects."""
        return self._map(lambda tensor: tensor[which])

    def _map(self, change: Callable[[Tensor], Tensor]) -> Target:
        masks = None if self.masks is None else change(self.masks)
        keypoints = None if self.keypoints is None else change(self.keypoints)
        fields = {name: change(values) for name, values in self.fields.items()}
        return Target(change(self.boxes), change(self.labels), masks, keypoints, fields)


class Targets(NamedTuple):
    """The objects of B images, padded to M places each. M comes from few sizes, so that a run meets few shapes.

    It holds tensors alone: DistributedDataParallel and `torch.compile` take it as it is. The objects of an image stand
    first; the padding is 0, and a model must not depend on it.
    """

    boxes: Tensor
    """float32 [B, M, 4] xyxy in pixels of the batch's images."""
    labels: Tensor
    """int64 [B, M], 0-based."""
    valid: Tensor
    """bool [B, M]: which places hold an object."""
    masks: Tensor | None = None
    """uint8 [B, M, H, W], 0 or 1, of the batch's height and width."""
    keypoints: Tensor | None = None
    """float32 [B, M, K, 3] x, y, visibility."""
    fields: dict[str, Tensor] | None = None
    """Further values of the objects, [B, M] or [B, M, ...], by name; None: there are none."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Targets:
        """Each tensor changed, such as moved to a device."""
        masks = None if self.masks is None else change(self.masks)
        keypoints = None if self.keypoints is None else change(self.keypoints)
        fields = None if self.fields is None else {name: change(values) for name, values in self.fields.items()}
        return Targets(change(self.boxes), change(self.labels), change(self.valid), masks, keypoints, fields)


@attrs.frozen(eq=False)
class Context:
    """What a transform may ask for in training, beside its sample (`Sample.context`)."""

    fetch: Callable[[int], Sample]
    """The sample at a position of the data set, as it is before the first transform. Nothing random is in it."""
    indices: Sequence[int]
    """The positions that are trained on: what to draw another sample from."""
    classes: Sequence[str]
    epochs: int | None
    """How many epochs the run has; `sample.epoch` counts them from 0."""

    def another(self) -> Sample:
        """A sample drawn from torch's generator."""
        import torch

        return self.fetch(int(self.indices[int(torch.randint(len(self.indices), ()))]))


@attrs.define(eq=False)
class Sample:
    """One image on its way through the transforms."""

    image: Tensor
    """uint8 [3, H, W]; float32 once a transform has normalised it (models leave a float image as it is)."""
    target: Target
    index: int
    """Position in the data set."""
    image_id: ImageId
    original_size: tuple[int, int]
    """(height, width) of the file."""
    scale: tuple[float, float] = (1.0, 1.0)
    """(y, x) factors from the file's coordinates to this image's; detections are divided by them."""
    epoch: int = 0
    field_kinds: Mapping[str, str] = attrs.field(factory=dict)
    """How each of the target's fields changes with the image (`Dataset.fields`)."""
    context: Context | None = None
    """In training: where other samples come from."""
    extras: dict[str, Any] = attrs.field(factory=dict)
    """Whatever else a transform or a plugin wants to hand on with this image: it is in `Batch.extras`."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) now."""
        height, width = self.image.shape[-2:]
        return int(height), int(width)


@attrs.define(eq=False)
class Batch:
    """Some images with their targets, padded at the right and the bottom to one size (`batching.make_batch`)."""

    images: Tensor
    """uint8 or normalised float32 [B, 3, H, W], channels-last; the padding is 0."""
    targets: Targets
    counts: list[int]
    """The number of objects of each image: how much of `targets` is theirs, without asking the device."""
    indices: list[int]
    """Positions in the data set, one an image."""
    image_ids: list[ImageId]
    sizes: list[tuple[int, int]]
    """(height, width) of each image without its padding."""
    image_sizes: Tensor
    """int64 [B, 2]: `sizes` where the images are, for a model."""
    original_sizes: list[tuple[int, int]]
    """(height, width) of each image's file."""
    scales: list[tuple[float, float]]
    """(y, x) factors from the file's coordinates to the batch's; detections are divided by them."""
    packed: tuple[Tensor, Any, Targets] | None = None
    """What `targets` and `image_sizes` are views of, how, and those targets: moved to a device as one piece."""
    extras: list[dict[str, Any]] = attrs.field(factory=list)
    """`Sample.extras` of each image; empty where the batch was made of no samples. They stay where they are."""

    def __len__(self) -> int:
        return len(self.indices)

    def target(self, number: int) -> Target:
        """The objects of one image, without the padding."""
        found = self.targets.map(lambda values: values[number, : self.counts[number]])
        return Target(found.boxes, found.labels, found.masks, found.keypoints, found.fields or {})

    def each_target(self) -> list[Target]:
        """The objects of each image, without the padding."""
        return [self.target(number) for number in range(len(self))]

    def keep(self, numbers: Sequence[int]) -> Batch:
        """A batch of some of its images, by their places."""
        which = list(numbers)

        def some(values: list[T]) -> list[T]:
            return [values[number] for number in which]

        return Batch(
            images=self.images[which],
            targets=self.targets.map(lambda values: values[which]),
            counts=some(self.counts),
            indices=some(self.indices),
            image_ids=some(self.image_ids),
            sizes=some(self.sizes),
            image_sizes=self.image_sizes[which],
            original_sizes=some(self.original_sizes),
            scales=some(self.scales),
            extras=some(self.extras) if self.extras else [],
        )

    def move(self, device: torch.device | str, non_blocking: bool = False) -> None:
        """Move images and targets to a device, in place: two copies, one of the images and one of all else."""
        from detkernel_detection.batching import moved

        moved(self, device, non_blocking)


@attrs.define(eq=False)
class Detections:
    """What a model found in one image, in the coordinates of the file, sorted by falling score."""

    image_id: ImageId
    index: int
    boxes: Tensor
    """float32 [N, 4] xyxy, absolute pixels."""
    scores: Tensor
    """float32 [N], 0..1."""
    labels: Tensor
    """int64 [N], 0-based."""
    masks: Tensor | None = None
    """uint8 [N, H, W] of the file's size, 0 or 1."""
    keypoints: Tensor | None = None
    """float32 [N, K, 3]."""
    fields: dict[str, Tensor] = attrs.field(factory=dict)
    """Further values of the detections, [N] or [N, ...], by name: a track id, an angle."""

    def __len__(self) -> int:
        return len(self.scores)

    def keep(self, which: Tensor) -> Detections:
        """Only those that a bool or index tensor selects."""
        return self._map(lambda tensor: tensor[which])

    def to(self, device: torch.device | str) -> Detections:
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Detections:
        masks = None if self.masks is None else change(self.masks)
        keypoints = None if self.keypoints is None else change(self.keypoints)
        boxes, scores, labels = change(self.boxes), change(self.scores), change(self.labels)
        fields = {name: change(values) for name, values in self.fields.items()}
        return Detections(self.image_id, self.index, boxes, scores, labels, masks, keypoints, fields)
