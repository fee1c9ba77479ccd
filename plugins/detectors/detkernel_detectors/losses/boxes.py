"""Losses of boxes. `wanted` boxes have a positive extent; predicted ones need not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from detkernel import option, plugin
from detkernel_detection import BoxLoss, boxes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class L1(BoxLoss):
    """The sum of the four absolute differences, of the numbers of the box coder."""

    compares: ClassVar[Literal["boxes", "deltas"]] = "deltas"

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        return self.weight * (predicted - wanted).abs().sum(-1)


@plugin
class SmoothL1(BoxLoss):
    """L1 that is quadratic near 0 (Girshick 2015): d^2 / (2 beta) below beta, else |d| - beta / 2."""

    compares: ClassVar[Literal["boxes", "deltas"]] = "deltas"
    beta: float = option(default=1.0, above=0, help="difference from which it is linear")

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        smooth = torch.nn.functional.smooth_l1_loss(predicted, wanted, reduction="none", beta=self.beta)
        return self.weight * smooth.sum(-1)


@plugin
class SquaredError(BoxLoss):
    """The sum of the squared differences, of the numbers of the box coder (Redmon and Farhadi 2018)."""

    compares: ClassVar[Literal["boxes", "deltas"]] = "deltas"

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        return self.weight * (predicted - wanted).square().sum(-1)


@plugin
class Iou(BoxLoss):
    """From the intersection over union (Yu et al. 2016): -ln IoU, 1 - IoU or 1 - IoU^2."""

    form: Literal["log", "linear", "square"] = option(default="log", help="-ln IoU, 1 - IoU or 1 - IoU^2")

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        iou = boxes.overlap(predicted, wanted).iou
        if self.form == "log":
            return -self.weight * iou.clamp(min=boxes.EPSILON).log()
        return self.weight * (1 - (iou if self.form == "linear" else iou.square()))


@plugin
class Giou(BoxLoss):
    """1 - GIoU (Rezatofighi et al. 2019), which has a gradient where boxes do not meet."""

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        return self.weight * (1 - boxes.generalized_iou(predicted, wanted))


@plugin
class Diou(BoxLoss):
    """1 - DIoU (Zheng et al. 2020): IoU less the distance of the centres, by the diagonal around both."""

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        return self.weight * (1 - boxes.distance_iou(predicted, wanted))


@plugin
class Ciou(BoxLoss):
    """1 - CIoU (Zheng et al. 2020): DIoU less the difference of the aspect ratios.

    CIoU = DIoU - a v, v = (2/pi (atan(w/h) - atan(w_p/h_p)))^2, a = v / (1 - IoU + v) without gradient, 0 where
    IoU <= 1/2.
    """

    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        angles = [
            torch.atan((box[..., 2] - box[..., 0]) / (box[..., 3] - box[..., 1] + boxes.EPSILON))
            for box in (predicted, wanted)
        ]
        v = (2 / math.pi * (angles[1] - angles[0])).square()
        iou = boxes.overlap(predicted, wanted).iou.detach()
        a = torch.where(iou > 0.5, v.detach() / (1 - iou + v.detach()), 0.0)
        return self.weight * (1 - (boxes.distance_iou(predicted, wanted) - a * v).clamp(-1, 1))
