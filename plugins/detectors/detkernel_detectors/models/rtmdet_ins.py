"""RTMDet with instance masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import option, plugin
from detkernel_detection import DynamicAssigner
from detkernel_detection.parts import Matches, Output, Priors

from detkernel_detectors.assigners.dynamic import DynamicSoftLabel
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import Maps
from detkernel_detectors.models.rtmdet import Rtmdet

if TYPE_CHECKING:
    import torch
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn
else:
    from detkernel_detection import lazy_torch as torch

FINE = 4
"""The stride at which masks are learned."""


@plugin(needs=("masks",))
class RtmdetIns(Rtmdet):
    """RTMDet-Ins (Lyu et al. 2022): RTMDet that also says which pixels are an object's. Needs masks.

    https://arxiv.org/abs/2212.07784. Each point gives the weights of a small network of its own (CondInst, Tian et al.
    2020), which reads features that all share.
    """

    mask_space: ClassVar[Literal["box", "image"]] = "image"
    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.reg_convs\.", None),  # those of the classes again
        (r"bbox_head\.kernel_convs\.(\d+)\.(\d+)\.conv\.", r"head.kernel_tower.convs.\1.\2."),
        (r"bbox_head\.kernel_convs\.(\d+)\.(\d+)\.bn\.", r"head.kernel_tower.norms.\1.\2."),
        *Rtmdet.key_map,
        (r"bbox_head\.rtm_kernel\.", "head.kernels."),
        (r"bbox_head\.mask_head\.fusion_conv\.", "mask_features.fusion."),
        (r"bbox_head\.mask_head\.stacked_convs\.", "mask_features.convs."),
        (r"bbox_head\.mask_head\.projection\.", "mask_features.projection."),
    )

    assigner: DynamicAssigner = option(
        factory=lambda: DynamicSoftLabel(centre="mask"), help="which points are to predict which objects"
    )
    distance: Literal["exponential", "linear", "rectified"] = option(
        default="rectified", help="how the head tells distances in strides: by logarithms, as they are, through a ReLU"
    )
    mask_channels: int = option(default=256, at_least=1, help="channels of the convolutions for masks")
    mask_convs: int = option(default=4, at_least=0, help="convolutions of the features that masks are read from")
    mask_weight: float = option(default=2.0, at_least=0, help="factor of the loss of the masks")
    masks: int = option(
        default=64, at_least=1, help="positive points of an image whose masks are learned, by chance if there are more"
    )
    score_thresh: float = option(default=0.05, at_least=0, at_most=1, help="score above which an object is detected")
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")
    candidates: int = option(default=1000, at_least=1, help="detections of a level before NMS, by falling score")
    max_detections: int = option(default=100, at_least=1, help="detections an image")

    # Every point gives the 169 parameters of a network beside its classes and its box. Boxes are predicted from the
    # tower of the classes: by a slip in MMDetection the published models are so, and their masks are the better for it
    # (0.3 AP, https://github.com/open-mmlab/mmdetection/issues/9835).

    def outputs(self, classes: int) -> list[Output]:
        from detkernel_detectors.heads.mask_kernels import PARAMETERS

        boxes = [output._replace(branch="cls") for output in super().outputs(classes)]
        return [*boxes, Output("kernels", PARAMETERS, "kernel")]

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        from detkernel_detectors.blocks import BatchNorm
        from detkernel_detectors.heads.mask_kernels import MaskFeatures

        features = MaskFeatures(channels, self.mask_channels, len(strides), self.mask_convs, BatchNorm(1e-5, 0.1))
        return {**super().heads(channels, strides, classes), "mask_features": features}

    # Training: the masks of positive points, at a stride of 4. MMDetection numbers the points of an image that is
    # smaller than its batch without those in the padding, and takes the parameters of others for them: its loss is
    # another there, but not in its recipe, whose images are padded before.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        from detkernel_detectors.heads.mask_kernels import dice

        losses, priors, matches = self.matched_losses(maps, targets, sizes)
        chance = torch.where(matches.positive, torch.rand_like(priors.strides.expand_as(matches.matched)), -1.0)
        drawn, places = chance.topk(min(self.masks, chance.shape[1]))
        chosen = drawn >= 0
        logits = self._masks(maps, priors, places, heads, FINE)
        truth = _truth(targets, matches, places, maps.size)
        loss = self.mask_weight * averaged(dice(logits.sigmoid(), truth), chosen, shared_count(chosen))
        return {**losses, "loss_mask": loss}

    # Inference: the masks of what is detected, as large as the images.

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any = None) -> Predictions:
        found = self.chosen(maps, sizes)
        assert found.fields is not None
        masks = self._masks(maps, self.points_of(maps, sizes), found.fields["prior"], heads, 1).sigmoid()
        return found._replace(masks=masks, fields=None)

    def _masks(self, maps: Maps, priors: Priors, places: Tensor, heads: Any, stride: int) -> Tensor:
        """Logits [B, K, H, W] at a stride, of the points at places [B, K]."""
        from detkernel_detectors.heads.mask_kernels import PARAMETERS, read_masks

        parameters = maps.flat("kernels", PARAMETERS).gather(1, places[..., None].expand(-1, -1, PARAMETERS))
        points, strides = priors.boxes[places][..., :2], priors.strides[places]
        logits = read_masks(heads.mask_features(maps.features), parameters, points, strides, maps.strides[0])
        size = [side // stride for side in maps.size]
        return torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)


def _truth(targets: Targets, matches: Matches, places: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 [B, K, H / 4, W / 4]: the masks of the objects of the points at places [B, K]."""
    assert targets.masks is not None
    (height, width), (high, wide) = targets.masks.shape[-2:], size
    masks = torch.nn.functional.pad(targets.masks, (0, wide - width, 0, high - height))
    masks = masks[..., FINE // 2 :: FINE, FINE // 2 :: FINE]
    owners = matches.matched.gather(1, places)[..., None, None].expand(-1, -1, *masks.shape[-2:])
    return masks.gather(1, owners).float()
