"""TOOD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import Run, hookimpl, option, plugin, state
from detkernel_detection import Assigner, BoxCoder, BoxLoss, ClassLoss, DynamicAssigner, Head, Neck
from detkernel_detection.boxes import centres
from detkernel_detection.parts import RARE, Output, Predicted

from detkernel_detectors.assigners.atss import AtssAssigner
from detkernel_detectors.assigners.task_aligned import TaskAlignedAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.coders.distance import centreness, distances
from detkernel_detectors.heads import TaskAlignedHead
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import Focal, QualityFocal
from detkernel_detectors.losses.sums import averaged, shared_count
from detkernel_detectors.models.dense import AnchorDetector, Candidates, Maps, wanted_of
from detkernel_detectors.necks import Fpn

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Tood(AnchorDetector):
    """TOOD (Feng et al. 2021): one-stage detection whose two tasks are aligned, by its head and by its matching.

    https://arxiv.org/abs/2108.07755.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.inter_convs\.(\d+)\.conv\.", r"head.tower.\1.conv."),
        (r"bbox_head\.inter_convs\.(\d+)\.[bg]n\.", r"head.tower.\1.norm."),
        (r"bbox_head\.(cls|reg)_decomp\.layer_attention\.", r"head.\1_decomposition.attention."),
        (r"bbox_head\.(cls|reg)_decomp\.reduction_conv\.conv\.", r"head.\1_decomposition.conv."),
        (r"bbox_head\.(cls|reg)_decomp\.reduction_conv\.[bg]n\.", r"head.\1_decomposition.norm."),
        (r"bbox_head\.tood_(cls|reg)\.", r"head.\1."),
        (r"bbox_head\.cls_prob_module\.", "head.alignment."),
        (r"bbox_head\.reg_offset_module\.", "head.offsets."),
    )

    neck: Neck = option(factory=lambda: Fpn(extra_from="output"), help="what makes a pyramid of the backbone's maps")
    head: Head = option(factory=TaskAlignedHead, help="what predicts from the pyramid: `reg` are distances in strides")
    assigner: DynamicAssigner = option(
        factory=TaskAlignedAssigner, help="which anchors are to predict which objects, behind the initial epochs"
    )
    class_loss: ClassLoss = option(
        factory=QualityFocal, help="of the scores of all anchors, by the alignment of positive ones"
    )
    initial_epochs: int = option(default=4, at_least=0, help="epochs in which predictions play no part in the matching")
    initial_assigner: Assigner = option(factory=AtssAssigner, help="which anchors are positive in the initial epochs")
    initial_class_loss: ClassLoss = option(factory=Focal, help="of the classes of all anchors in the initial epochs")
    box_loss: BoxLoss = option(
        factory=lambda: Giou(weight=2.0),
        help="of the boxes of positive anchors, weighted by alignment, or by centre-ness in the initial epochs",
    )
    regression: Literal["distances", "deltas"] = option(
        default="distances",
        help="how a box is told: by the distances of its sides, or by deltas to its anchor (`box_coder`), as in "
        "MMDetection's anchor-based models",
    )
    box_coder: BoxCoder = option(
        factory=lambda: DeltaCoder(stds=(0.1, 0.1, 0.2, 0.2)),
        help="how deltas tell a box, relative to its anchor",
    )
    nms_thresh: float = option(default=0.6, at_least=0, at_most=1, help="IoU above which a detection is dropped")

    _initial: bool = state(default=False)

    # Every place has one anchor, with a logit for each class and one of whether both tasks agree on it: the score is
    # the geometric mean of their probabilities. Each of the four sides of its box is read at a place of its own nearby.

    def outputs(self, classes: int) -> list[Output]:
        self.check_one_per_place()
        return [
            Output("cls", classes, "cls", bias=RARE),
            Output("reg", 4, "reg", scaled=self.regression == "deltas"),
            Output("alignment", 1, "cls", bias=RARE),
            Output("offsets", 8, "reg"),
        ]

    # Training: an object's best anchors by score and IoU. Boxes are compared in strides.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        priors, logits, found = self.priors(maps, sizes), self._aligned_logits(maps), self._boxes(maps)
        strides = priors.strides[:, None]
        if self._initial:
            matches = self.initial_assigner.assign(priors, targets)
            labels, wanted = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
            central = centreness(distances(centres(priors.boxes), wanted))
            weights, count = torch.where(matches.positive, central, 0.0), shared_count(matches.positive)
            classes = self.initial_class_loss(logits, labels)
        else:
            scores = logits.detach().sigmoid()
            predicted = Predicted(scores, found.detach() * strides, logits.detach())
            matches = self.assigner.assign(priors, targets, predicted)
            assert matches.quality is not None
            labels, wanted = wanted_of(matches, targets, priors.boxes, logits.shape[-1])
            weights, count = matches.quality, shared_count(matches.quality)
            classes = self.class_loss(logits, labels, matches.quality)
        return {
            "loss_cls": averaged(classes, matches.positive | matches.negative, count),
            "loss_bbox": averaged(self.box_loss(found, wanted / strides), weights, shared_count(weights)),
        }

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        self._initial = run.epoch < self.initial_epochs

    # Inference: a score is that of both tasks. Boxes are clipped last.

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        priors = self.priors(maps, sizes)
        boxes = self._boxes(maps) * priors.strides[:, None]
        return Candidates(self._aligned_logits(maps).sigmoid(), boxes, priors.counts, clipped=False)

    def _aligned_logits(self, maps: Maps) -> Tensor:
        """[B, N, C]: of the geometric means, ln p - ln(1 - p)."""
        logits, alignment = self.logits(maps), maps.flat("alignment", 1)
        log = (torch.nn.functional.logsigmoid(logits) + torch.nn.functional.logsigmoid(alignment)) / 2
        return log - (-torch.expm1(log)).clamp(min=1e-30).log()

    def _boxes(self, maps: Maps) -> Tensor:
        """float32 [B, N, 4], in strides."""
        made = []
        for told, offsets in zip(maps.outputs["reg"], maps.outputs["offsets"], strict=True):
            boxes = boxes_around(told) if self.regression == "distances" else self._by_anchors(told)
            made.append(aligned_boxes(boxes, offsets).flatten(2).transpose(1, 2))
        return torch.cat(made, 1)

    def _by_anchors(self, deltas: Tensor) -> Tensor:
        """[B, 4, H, W] -> boxes in strides."""
        width, height = self.anchors.sides[0]
        half = deltas.new_tensor([width, height]).float()[:, None, None] / 2
        anchors = torch.cat([places(deltas) - half, places(deltas) + half]).movedim(0, -1)
        return self.box_coder.decode(anchors, deltas.float().movedim(1, -1)).movedim(-1, 1)


def places(like: Tensor) -> Tensor:
    """float32 [2, H, W]: x and y of each place of a map, in strides."""
    height, width = like.shape[-2:]
    y, x = (torch.arange(side, device=like.device, dtype=torch.float32) for side in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def boxes_around(sides: Tensor) -> Tensor:
    """Distances [B, 4, H, W] in strides -> boxes [B, 4, H, W] in strides."""
    return torch.cat([places(sides) - sides[:, :2].float(), places(sides) + sides[:, 2:].float()], 1)


def aligned_boxes(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Boxes [B, 4, H, W] in strides and offsets [B, 8, H, W], y and x for each side -> boxes [B, 4, H, W], each side
    read where its offset says. A box that would be inverted is read where it is."""
    from torchvision.ops import deform_conv2d

    read = deform_conv2d(boxes, offsets.float(), boxes.new_ones(4, 1, 1, 1))
    inverted = (read[:, :2] > read[:, 2:]).any(1, keepdim=True)
    return torch.where(inverted, boxes, read)
