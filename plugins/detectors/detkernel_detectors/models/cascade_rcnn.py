"""Cascade R-CNN, and Cascade Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import Assigner, BoxCoder, BoxLoss
from detkernel_detection.boxes import clip

from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.losses.boxes import SmoothL1
from detkernel_detectors.models.dense import KeyMap, Maps
from detkernel_detectors.models.rcnn import Drawn, MaskedRcnn, Rcnn

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class CascadeRcnn(Rcnn):
    """Cascade R-CNN (Cai and Vasconcelos 2018): stages in a row, each of which refines the boxes of the one before and
    is trained for more overlap.

    https://arxiv.org/abs/1712.00726, as MMDetection trains it. The device is asked for the NMS of the proposals alone.
    """

    key_map: ClassVar[KeyMap] = (
        *Rcnn.key_map,
        (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.", r"box_heads.\1.convs.\2.conv."),
        (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.[bg]n\.", r"box_heads.\1.convs.\2.norm."),
        (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.(\d+)\.", r"box_heads.\1.fcs.\2."),
        (r"roi_head\.bbox_head\.(\d+)\.fc_(cls|reg)\.", r"box_heads.\1.\2."),
    )

    rpn_border: int | None = option(
        default=0,
        at_least=0,
        help="pixels by which an anchor may reach over a side of its image to be learned from; null: any",
    )
    rpn_box_loss: BoxLoss = option(factory=lambda: SmoothL1(beta=1 / 9), help="of the proposals of positive anchors")
    proposals_train: int = option(default=2000, at_least=1, help="proposals of an image, in training")
    assigners: list[Assigner] = option(
        factory=lambda: [MaxIouAssigner(positive=iou, negative=iou, best=None) for iou in (0.5, 0.6, 0.7)],
        help="which boxes are to find which objects, for each stage",
    )
    box_coders: list[BoxCoder] = option(
        factory=lambda: [
            DeltaCoder(stds=stds)
            for stds in ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
        ],
        help="how a box is told, relative to that of the stage before, for each stage",
    )
    stage_weights: list[float] = option(
        factory=lambda: [1.0, 0.5, 0.25], at_least=0, help="factor of the losses of each stage"
    )
    box_loss: BoxLoss = option(factory=SmoothL1, help="of the boxes of positive ones, in every stage")

    def __attrs_post_init__(self) -> None:
        counts = {"assigners": len(self.assigners), "box_coders": len(self.box_coders)}
        for name, count in counts.items():
            if count != len(self.stage_weights):
                raise wrong(self, name, f"expected one for each of the {len(self.stage_weights)} stages, got {count}")

    # Each stage has a head of its own, with one box for all classes.

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        self.check_assigners(**{f"assigners.{stage}": assigner for stage, assigner in enumerate(self.assigners)})
        heads = torch.nn.ModuleList([self.box_head.build(channels, classes + 1, 1) for _ in self.stage_weights])
        return {"head": self.rpn_head(channels), "box_heads": heads}

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {"box_heads.*.cls.*": ClassOutput(background="last")}

    # Training: what a stage has drawn, and refined, the next one draws from, together with the objects.

    def losses(self, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        losses, proposals = self.first_stage(maps, targets, sizes)
        boxes, valid = proposals.boxes, proposals.valid
        for stage, (head, assigner, coder) in enumerate(
            zip(heads.box_heads, self.assigners, self.box_coders, strict=True)
        ):
            found = self.draw(assigner, boxes, valid, targets, len(heads.classes))
            logits, deltas = self.read(head, maps, found.boxes)
            told = self.box_losses(found, logits, deltas, coder, self.box_loss)
            told |= self.further_losses(stage, found, maps, targets, sizes, heads)
            for name, value in told.items():
                losses[f"s{stage}.{name}"] = value * self.stage_weights[stage] if "loss" in name else value
            boxes = self._refined(coder, found.boxes, deltas, sizes)
            valid = found.chosen & ~found.given
        return losses

    def further_losses(
        self, stage: int, found: Drawn, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any
    ) -> dict[str, Tensor]:
        """What a stage learns beside classes and boxes."""
        return {}

    # Inference: boxes go through all stages; classes are told by the mean of what each says.

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any) -> Predictions:
        proposals = self.proposed(maps, sizes)
        boxes, said = proposals.boxes, []
        for head, coder in zip(heads.box_heads, self.box_coders, strict=True):
            logits, deltas = self.read(head, maps, boxes)
            said.append(logits)
            boxes = self._refined(coder, boxes, deltas, sizes)
        return self.detected(torch.stack(said).mean(0), boxes[:, :, None], proposals.valid, sizes)

    def _refined(self, coder: BoxCoder, boxes: Tensor, deltas: Tensor, sizes: Tensor | None) -> Tensor:
        """Without a gradient, and clipped to the images."""
        return clip(coder.decode(boxes, deltas[:, :, 0].detach()), sizes)


@plugin
class CascadeMaskRcnn(MaskedRcnn, CascadeRcnn):
    """Cascade Mask R-CNN (Cai and Vasconcelos 2019): Cascade R-CNN that also says which pixels of a box are the
    object's. Needs masks.

    https://arxiv.org/abs/1906.09756, as MMDetection trains it: every stage has a mask head too.
    """

    key_map: ClassVar[KeyMap] = (
        *CascadeRcnn.key_map,
        (r"roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.conv\.", r"mask_heads.\1.convs.\2.conv."),
        (r"roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.[bg]n\.", r"mask_heads.\1.convs.\2.norm."),
        (r"roi_head\.mask_head\.(\d+)\.upsample\.", r"mask_heads.\1.upsample."),
        (r"roi_head\.mask_head\.(\d+)\.conv_logits\.", r"mask_heads.\1.logits."),
    )

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        masks = torch.nn.ModuleList([self.mask_head.build(channels, classes) for _ in self.stage_weights])
        return {**super().heads(channels, strides, classes), "mask_heads": masks}

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {**super().class_outputs(), "mask_heads.*.logits.*": ClassOutput()}

    def further_losses(
        self, stage: int, found: Drawn, maps: Maps, targets: Targets, sizes: Tensor | None, heads: Any
    ) -> dict[str, Tensor]:
        return {"loss_mask": self.mask_losses(found, maps, targets, sizes, heads.mask_heads[stage])}

    # Inference: the mean of the masks that the heads of all stages see in the last boxes.

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any) -> Predictions:
        return self.with_masks(super().predictions(maps, sizes, heads), maps, heads.mask_heads)
