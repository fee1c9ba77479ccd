"""torchvision's detectors behind the interface of a `Detector`: losses and detections stay theirs, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detkernel_detection.detector import Detector
from detkernel_detection.normalize import Normalize
from detkernel_detection.predictions import Predictions
from detkernel_detection.structures import Targets
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

LOSSES = {
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_bbox",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_bbox",
    "classification": "loss_cls",
    "bbox_regression": "loss_bbox",
    "bbox_ctrness": "loss_centerness",
}
"""torchvision's names of losses -> MMDetection's."""


class Images:
    """A padded batch that looks like torchvision's list of images: their sizes are all that is asked of each."""

    def __init__(self, tensor: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        self.tensor, self.sizes = tensor, list(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return (image[:, :h, :w] for image, (h, w) in zip(self.tensor, self.sizes, strict=True))


class AsTheyAre(nn.Module):
    """In place of `GeneralizedRCNNTransform`: images are resized, normalised and padded before the model."""

    def forward(self, images: Images, targets: Any = None) -> tuple[ImageList, Any]:
        return ImageList(images.tensor, images.sizes), targets

    def postprocess(self, detections: Any, _sizes: Any, _originals: Any) -> Any:
        """Detections stay in the coordinates of the batch."""
        return detections


class Adapter(Detector):
    """A detector of torchvision. Its parts are this module's own, so that parameters keep torchvision's names."""

    unexportable = "how many candidates torchvision's keep depends on the image, and with it the shapes of tensors"
    inner: Any
    """The detector itself. It is not a child: that would give each parameter a second name."""

    def __init__(
        self, inner: Any, classes: Sequence[str], *, background: bool, normalize: Normalize, max_detections: int
    ) -> None:
        super().__init__(classes, normalize)
        inner.transform = AsTheyAre()
        for name, child in inner.named_children():
            if name != "transform":
                self.add_module(name, child)
        object.__setattr__(self, "inner", inner)
        self.background, self.max_detections = background, max_detections

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        self.inner.training = mode
        return self

    def forward(  # type: ignore[override]  # no `after_forward`, since torchvision's have no parts
        self,
        images: Tensor,
        targets: Targets | None = None,
        sizes: Tensor | None = None,
        *,
        shapes: Sequence[tuple[int, int]] | None = None,
        counts: Sequence[int] | None = None,
    ) -> dict[str, Tensor] | Predictions:
        """As `Detector.forward`. torchvision works on lists of images, so it must know on the host the `shapes` of the
        images and the `counts` of their objects (`Batch` does); without them the device is asked."""
        if shapes is None:
            height, width = images.shape[-2:]
            shapes = [(height, width)] * len(images) if sizes is None else [(h, w) for h, w in sizes.tolist()]
        given = Images(self.normalize(images, sizes), shapes)
        if targets is None:
            return self._predictions(self.inner(given), images)
        losses = self.inner(given, self._targets(targets, targets.valid.sum(1).tolist() if counts is None else counts))
        return {LOSSES.get(name, name): loss for name, loss in losses.items()}

    def _targets(self, targets: Targets, counts: Sequence[int]) -> list[dict[str, Tensor]]:
        """torchvision's: a dict an image, without padding; label 0 is the background where the model has one."""
        found = []
        for number, objects in enumerate(counts):
            columns = targets.map(lambda values, number=number, objects=objects: values[number, :objects])  # type: ignore[misc]
            one = {"boxes": columns.boxes, "labels": columns.labels + int(self.background)}
            for name in ("masks", "keypoints"):
                value = getattr(columns, name)
                if value is not None:
                    one[name] = value
            found.append(one)
        return found

    def _predictions(self, found: Sequence[dict[str, Tensor]], images: Tensor) -> Predictions:
        """Padded to `max_detections` places."""
        places = self.max_detections or 0

        def stacked(name: str) -> Tensor | None:
            if not found or name not in found[0]:
                return None
            values = [one[name] for one in found]
            room = (value.new_zeros((places - len(value), *value.shape[1:])) for value in values)
            return torch.stack([torch.cat(pair) for pair in zip(values, room, strict=True)])

        boxes, scores, labels = stacked("boxes"), stacked("scores"), stacked("labels")
        assert boxes is not None
        assert scores is not None
        assert labels is not None
        counts = torch.tensor([len(one["scores"]) for one in found], device=images.device)
        valid = torch.arange(places, device=images.device) < counts[:, None]
        masks = stacked("masks")
        return Predictions(
            boxes,
            scores,
            torch.where(valid, labels - int(self.background), 0),
            valid,
            None if masks is None else masks[:, :, 0],
            stacked("keypoints"),
        )
