"""D-FINE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import Backbone, Neck
from detkernel_detection.boxes import overlap, xyxy
from detkernel_detection.parts import Matches

from detkernel_detectors.backbones import Hgnetv2
from detkernel_detectors.losses.distribution import two_bins
from detkernel_detectors.losses.sums import shared_count
from detkernel_detectors.models.dense import wanted_of
from detkernel_detectors.models.rtdetr import (
    DECODER,
    ENCODER,
    RtDetr,
    covering,
    first,
    later,
    layers_of,
    repeated,
    together,
)
from detkernel_detectors.necks import HybridEncoder

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn

    from detkernel_detectors.transformers.dfine import Refined
    from detkernel_detectors.transformers.rtdetr import Encoded
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Dfine(RtDetr):
    """D-FINE (Peng et al. 2024): RT-DETR whose layers refine distributions of where the sides of a box are.

    https://arxiv.org/abs/2410.13842.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"encoder\.downsample_convs\.(\d+)\.0\.", r"neck.downs.\1."),
        *ENCODER,
        (r"decoder\.(decoder\.)?(up|reg_scale)$", None),
        (r"decoder\.decoder\.layers\.(\d+)\.gateway\.", r"head.layers.\1.norm2."),
        *(
            (
                rf"decoder\.decoder\.lqe_layers\.(\d+)\.reg_conf\.layers\.{number}\.",
                rf"head.quality.\1.mlp.{2 * number}.",
            )
            for number in range(2)
        ),
        *((rf"decoder\.pre_bbox_head\.layers\.{number}\.", f"head.first.{2 * number}.") for number in range(3)),
        *DECODER,
    )
    published_by: ClassVar[str] = "D-FINE"

    backbone: Backbone = option(factory=Hgnetv2, help="what makes feature maps of an image")
    neck: Neck = option(
        factory=lambda: HybridEncoder(fusion="elan"), help="what makes a pyramid of the backbone's maps"
    )
    points: list[int] = option(
        factory=lambda: [3, 6, 3], at_least=1, help="places that a query looks at in each level, fine to coarse"
    )
    bins: int = option(default=33, at_least=5, help="distances that a side can have; an odd number")
    box_scale: float = option(
        default=4.0, above=0, help="what distances are divided by, in sides of the box: 8 tells half as far, and finer"
    )
    fine_weight: float = option(default=0.15, at_least=0, help="factor of the loss of the distributions (FGL)")
    distill_weight: float = option(
        default=1.5, at_least=0, help="factor of the loss that has earlier layers learn from the last one (DDF)"
    )
    temperature: float = option(default=5.0, above=0, help="what logits are divided by for that")

    def decoder(self, channels: int, levels: int, classes: int) -> nn.Module:
        from detkernel_detectors.transformers.dfine import FineDecoder

        return FineDecoder(self, channels, levels, classes)

    def check(self, strides: Sequence[int]) -> None:
        super().check(strides)
        if self.bins % 2 == 0:
            raise wrong(self, "bins", f"expected an odd number, with 0 in the middle, got {self.bins}")

    # Training: classes are learned by the matches of each layer; boxes by those of all layers together (GO-LSD), so
    # that a query does not have to serve one object here and another one there.

    def losses(self, encoded: Encoded, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        noise, scale = self.noise(encoded, targets), encoded.scale
        decoded: Refined = heads.head(encoded, noise, learns=True)
        before = (decoded.first_logits, decoded.anchors)
        given = dict(zip(self.names, layers_of(decoded), strict=True))
        sets = {name: later(one, noise) for name, one in {**given, "_pre": before}.items()}
        sets["_enc_0"] = (encoded.selected.logits.float(), encoded.selected.boxes.sigmoid())
        queries = together(sets, scale)
        matches = self.assigner.assign(queries, targets)
        union = voted(matches, len(sets), targets.labels.shape[1])
        every, count, shared = repeated(union, len(sets)), shared_count(targets.valid), shared_count(union.positive)
        found = self.losses_of(sets, queries, targets, matches, every, count, shared)
        balance = shared_count(union.positive, 0.0).sqrt(), shared_count(union.negative, 0.0).sqrt()
        where = slice(0 if noise is None else noise.labels.shape[1], None)
        found |= self.side_losses(self.names, decoded, where, union, targets, scale, shared, balance)
        del found["loss_ddf"]  # of the last layer by itself
        if noise is not None:
            noisy = {f"_dn_{number}": first(one, noise) for number, one in enumerate(given.values())}
            names, where, known = list(noisy), slice(where.start), noise.matches
            noisy["_dn_pre"] = first(before, noise)
            found |= self.noise_losses(noisy, noise, encoded, targets)
            count = shared_count(known.positive)
            found |= self.side_losses(names, decoded, where, known, targets, scale, count, balance)
        return found

    def side_losses(
        self,
        names: Sequence[str],
        decoded: Refined,
        where: slice,
        matches: Matches,
        targets: Targets,
        scale: Tensor,
        count: Tensor,
        balance: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """Losses of the distributions of some queries, for each layer: by the truth, and by those of the last layer.

        The first (FGL) weighs a query by the IoU of its box. The second (DDF) does so too, and those without an object
        by their best score; both kinds are averaged, and these averages by `balance`, the roots of their numbers.
        """
        from detkernel_detectors.transformers.dfine import bins_of, distances_of, steps

        sides, anchors = decoded.sides[:, :, where], decoded.anchors[:, where].detach()
        logits, boxes = decoded.logits[-1, :, where].detach(), decoded.boxes[:, :, where].detach()
        _, wanted = wanted_of(matches, targets, covering(scale), logits.shape[-1])
        iou = torch.where(matches.positive, overlap(xyxy(boxes) * scale, wanted).iou, 0.0)  # [L, B, N]
        below, rest = bins_of(
            distances_of(anchors, wanted / scale, self.box_scale), steps(self.bins, self.box_scale, anchors)
        )
        cross = two_bins(sides, below.expand(sides.shape[:-1]), rest).sum(-1)
        fine = self.fine_weight * (cross * iou).sum((1, 2)) / count

        student, teacher = ((one / self.temperature).log_softmax(-1) for one in (sides, sides[-1].detach()))
        apart = (teacher.exp() * (teacher - student)).sum(-1).mean(-1) * self.temperature**2  # [L, B, N]
        with_object = (apart * iou).sum((1, 2)) / shared_count(matches.positive)
        weight = torch.where(matches.negative, logits.sigmoid().amax(-1), 0.0)
        without = (apart * weight).sum((1, 2)) / shared_count(matches.negative)
        matched, unmatched = balance
        mean = (with_object * matched + without * unmatched) / (matched + unmatched).clamp(min=1)
        parts = {"fgl": fine, "ddf": self.distill_weight * mean}
        return {
            f"loss_{part}{name}": one for part, each in parts.items() for name, one in zip(names, each, strict=True)
        }


def voted(matches: Matches, sets: int, objects: int) -> Matches:
    """[B, Q] of [B, sets * Q]: a query is to find the object that most sets match it with, the first one of several."""
    matched, positive = (value.view(len(value), sets, -1).transpose(1, 2) for value in matches[:2])  # [B, Q, sets]
    votes = positive.new_zeros((*positive.shape[:2], objects), dtype=torch.int64)
    most, place = votes.scatter_add(2, matched, positive.long()).max(-1)
    return Matches(torch.where(most > 0, place, 0), most > 0, most == 0)
