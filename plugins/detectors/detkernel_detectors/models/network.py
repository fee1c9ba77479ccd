"""The module of a detector. What it learns and finds, its plugin says: the family's file in this room."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detkernel import Run, wrong
from detkernel_detection.detector import Detector
from detkernel_detection.normalize import Normalize
from detkernel_detection.predictions import Predictions
from detkernel_detection.structures import Targets
from detkernel_detection.weights import Weights, load_into, read_weights
from torch import Tensor

from detkernel_detectors.models.dense import MMDETECTION, TORCHVISION, BaseDetector


class Network(Detector):
    """Backbone, neck and head in a row, and what else the family has."""

    head: Any

    def __init__(self, family: BaseDetector, classes: Sequence[str]) -> None:
        super().__init__(
            classes,
            Normalize(family.image_mean, family.image_std, family.size_divisible, 1.0, family.channel_order == "bgr"),
        )
        self.family = family
        backbone: Any = family.backbone.build()
        for name in ("channels", "strides"):
            if not hasattr(backbone, name):
                used = type(family.backbone).__qualname__
                raise wrong(family, "backbone", f"{used}.build() gave a module without `{name}`")
        neck: Any = family.neck.build(backbone.channels, backbone.strides)
        head = getattr(family, "head", None)
        if not isinstance(neck.channels, int) and not getattr(head, "per_level", False):
            given = f"maps of {', '.join(map(str, neck.channels))} channels"
            used = f"{type(family).__qualname__}" if head is None else f"the head {type(head).__qualname__}"
            raise wrong(family, "neck", f"it gives {given}, and {used} takes maps of equal channels")
        loss = getattr(family, "class_loss", None)
        if loss is not None and loss.of_one_choice != family.one_choice:
            rest = "of one choice among classes and no object" if loss.of_one_choice else "of each class by itself"
            raise wrong(
                family, "class_loss", f"{type(loss).__qualname__} is {rest}; {type(family).__qualname__} is not"
            )
        self.backbone, self.neck = backbone, neck
        self.strides = tuple(neck.strides)
        for name, head in family.heads(neck.channels, self.strides, len(self.classes)).items():
            self.add_module(name, head)
        names = list(self.state_dict())
        self.class_outputs = {
            name: output
            for pattern, output in family.class_outputs().items()
            for name in fnmatch.filter(names, pattern)
        }
        self.key_maps = {family.published_by: (*MMDETECTION, *family.key_map)}
        if family.torchvision_builders:
            self.key_maps["torchvision"] = (*TORCHVISION, *family.torchvision_key_map)
            self.background_first = ("torchvision",)
        self.max_detections = family.max_detections
        for name in ("mask_paste", "mask_space", "mask_threshold"):  # of families with masks
            setattr(self, name, getattr(family, name, getattr(self, name)))

    def forward_outputs(self, images: Tensor, sizes: Tensor | None = None) -> Any:
        features = self.neck(list(self.backbone(images).values()))
        height, width = images.shape[-2:]
        return self.family.forwarded(self, features, sizes, (height, width))

    def losses(self, outputs: Any, targets: Targets, sizes: Tensor | None = None) -> dict[str, Tensor]:
        return self.family.losses(outputs, targets, sizes, self)

    def predictions(self, outputs: Any, sizes: Tensor | None = None) -> Predictions:
        return self.family.predictions(outputs, sizes, self)


def load(family: BaseDetector, run: Run, model: Network) -> None:
    """Load the weights asked for."""
    if family.weights is None:
        return
    loaded = load_into(model, _weights(family, family.weights), run.classes, given=family.weights_classes)
    run.log.log(logging.WARNING if loaded.surprising else logging.INFO, "loaded %s", loaded.text)


def _weights(family: BaseDetector, name: str) -> Weights:
    source, colon, published = name.partition(":")
    if colon and source == "torchvision":
        from detkernel_detection import torchvision_weights

        if not family.torchvision_builders:
            raise wrong(family, "weights", f"torchvision publishes none for {type(family).__qualname__}")
        return torchvision_weights.find(family, family.torchvision_builders, published)
    if colon and source == "mmdet":
        from detkernel_detectors import zoo

        return zoo.find(family, published)
    path = Path(name).expanduser()
    if not path.is_file():
        raise wrong(family, "weights", f"there is no file '{name}'")
    return read_weights(path)
