"""VGG-16 with the names of parameters that torchvision and MMDetection have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel_detection import torchvision_weights
from torch import Tensor, nn

from detkernel_detectors.backbones.parts import Freezable, begin

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Vgg

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Channels, in those of the first stage, and 3x3 convolutions of each."""
HOLES = 6
"""conv6 looks at every sixth pixel, since the pooling before it does not halve the map as VGG's last does."""

NEW = "features.3"
"""How the names of conv6 and conv7 begin, and no others with parameters: weights of a classifier have none."""


class Vgg16(Freezable):
    """Thirteen 3x3 convolutions, with a pooling after each stage, and SSD's conv6 and conv7."""

    def __init__(self, options: Vgg) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sections: list[list[str]] = []
        ends = []
        inside = 3
        for factor, convs in STAGES:
            section = []
            for _ in range(convs):
                section.append(f"features.{len(layers)}")
                layers += [nn.Conv2d(inside, factor * options.channels, 3, padding=1), nn.ReLU(inplace=True)]
                inside = factor * options.channels
            sections.append(section)
            ends.append(len(layers))
            layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
        layers[-1] = nn.MaxPool2d(3, 1, 1)  # in place of one that halves the map
        outside = 2 * inside
        for conv in (nn.Conv2d(inside, outside, 3, padding=HOLES, dilation=HOLES), nn.Conv2d(outside, outside, 1)):
            sections[-1].append(f"features.{len(layers)}")
            layers += [conv, nn.ReLU(inplace=True)]
        self.sections = sections
        self.features = nn.Sequential(*layers)
        self._fine = ends[3]
        self.channels, self.strides = [inside, outside], [8, 16]
        begin(self)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine: Tensor = self.features[: self._fine](images)
        return {"0": fine, "1": self.features[self._fine :](fine)}


def build(options: Vgg) -> Vgg16:
    model = Vgg16(options)
    if options.weights is not None:
        torchvision_weights.load_backbone(model, options, ["vgg16"], options.weights, new=NEW)
    model.freeze(options.trainable_layers)
    return model
