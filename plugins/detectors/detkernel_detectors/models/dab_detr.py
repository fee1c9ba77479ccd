"""DAB-DETR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkernel import option, plugin
from detkernel_detection import ClassLoss, SetAssigner

from detkernel_detectors.assigners.hungarian import FocalCost, GiouCost, HungarianAssigner, L1Cost
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.models.detr import DetrFamily

if TYPE_CHECKING:
    from torch import nn


@plugin
class DabDetr(DetrFamily):
    """DAB-DETR (Liu et al. 2022): queries that are boxes, and are refined from layer to layer.

    https://arxiv.org/abs/2201.12329.
    """

    assigner: SetAssigner = option(
        factory=lambda: HungarianAssigner(
            costs=[FocalCost(weight=2.0, epsilon=1e-8), L1Cost(weight=5.0), GiouCost(weight=2.0)]
        ),
        help="which queries are to predict which objects",
    )
    class_loss: ClassLoss = option(factory=Focal, help="of the classes of all queries")
    dropout: float = option(default=0.0, at_least=0, below=1, help="share of values left out in training")
    temperature: float = option(default=20.0, above=0, help="of the wave lengths that tell a place of the map")
    max_detections: int = option(default=300, at_least=1, help="detections an image")

    def transformer(self, channels: int, classes: int) -> nn.Module:
        from detkernel_detectors.transformers.detr import DabTransformer

        return DabTransformer(self, channels, classes)
