"""The interface of a model: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from detkernel_detection.class_mapping import ClassOutput
from detkernel_detection.normalize import Normalize
from detkernel_detection.predictions import Predictions
from detkernel_detection.structures import Targets


class Detector(nn.Module):
    """A model that detects: `model(images, targets)` gives losses, `model(images)` gives predictions.

    Everything that goes in and comes out is a tensor, or a named tuple or dict of tensors, so that
    DistributedDataParallel wraps it, `torch.compile` takes it whole and `torch.export` writes it. A subclass writes
    `forward_outputs`, `losses` and `predictions`; one that has no such parts (an adapter) overrides `forward`.
    """

    classes: tuple[str, ...]
    """Names in label order."""
    class_outputs: Mapping[str, ClassOutput]
    """Which tensors of the state dict hold classes, and how (`class_mapping`): weights are taken by class name."""
    keypoint_names: tuple[str, ...] = ()
    """Names of an object's keypoints, in the order of the outputs."""
    keypoint_outputs: Mapping[str, ClassOutput]
    """Which tensors hold keypoints, as `class_outputs`: weights are taken by keypoint name."""
    key_maps: Mapping[str, Sequence[tuple[str, str | None]]]
    """Where others publish weights of the same network: their name -> (expression, replacement) pairs that turn their
    names of tensors into this module's (`weights.renamed`)."""
    background_first: Collection[str] = ()
    """Those of `key_maps` in whose networks the class of no object is the first one, wherever this one has it."""
    max_detections: int | None = None
    """How many detections an image it gives at most; evaluators compare their limits with it."""
    mask_space: Literal["box", "image"] = "box"
    """What the grids of predicted masks lie over (`Predictions.masks`)."""
    mask_paste: Literal["expanded", "exact"] = "expanded"
    """How a grid over a box comes onto the image: enlarged by a pixel and to whole pixels, as torchvision does it; or
    exactly where the box is, as MMDetection does it."""
    mask_threshold: float = 0.5
    """How likely a pixel must be the object's to count."""
    unexportable: str = ""
    """Why it cannot become one graph of tensors, for an export's message; by default it can."""

    def __init__(self, classes: Sequence[str], normalize: Normalize | None = None) -> None:
        super().__init__()
        self.classes = tuple(classes)
        self.normalize = Normalize() if normalize is None else normalize

    def forward(
        self,
        images: Tensor,
        targets: Targets | None = None,
        sizes: Tensor | None = None,
        after_forward: Callable[[Any], Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | Predictions:
        """Losses by name where there are targets, else `Predictions`.

        `images`: uint8, or float that is normalised already, [B, 3, H, W]. `sizes`: int64 [B, 2], height and width of
        each image without its padding; None: there is none. `after_forward` is given the outputs before there are
        losses, and gives further losses.
        """
        outputs = self.forward_outputs(self.normalize(images, sizes), sizes)
        if targets is None:
            return self.predictions(outputs, sizes)
        further = {} if after_forward is None else after_forward(outputs)
        return {**self.losses(outputs, targets, sizes), **further}

    @property
    def has_parts(self) -> bool:
        """Whether it forwards in parts, so that there is a place between outputs and losses."""
        return type(self).forward is Detector.forward

    def forward_outputs(self, images: Tensor, sizes: Tensor | None = None) -> Any:
        """What the network says of normalised images: everything that `losses` and `predictions` need."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_outputs")

    def losses(self, outputs: Any, targets: Targets, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Named losses; the sum of those whose name contains "loss" is minimised."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    def predictions(self, outputs: Any, sizes: Tensor | None = None) -> Predictions:
        """Detections in pixels of the batch's images, clipped to `sizes`."""
        raise NotImplementedError(f"{type(self).__name__} has no predictions")
