"""RT-DETRv2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import ClassLoss, Neck, SetAssigner
from detkernel_detection.boxes import clip, overlap, xyxy
from detkernel_detection.parts import Matches, Queries

from detkernel_detectors.assigners.hungarian import FocalCost, GiouCost, HungarianAssigner, L1Cost
from detkernel_detectors.backbones.paddle import PADDLE
from detkernel_detectors.losses.classes import Varifocal
from detkernel_detectors.losses.sums import shared_count
from detkernel_detectors.models.dense import wanted_of
from detkernel_detectors.models.sets import SetDetector
from detkernel_detectors.necks import HybridEncoder

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn

    from detkernel_detectors.transformers.denoising import Denoising
    from detkernel_detectors.transformers.rtdetr import Decoded, Encoded
else:
    from detkernel_detection import lazy_torch as torch


ENCODER: tuple[tuple[str, str | None], ...] = (
    (r"encoder\.input_proj\.", "neck.inputs."),
    (r"encoder\.encoder\.0\.layers\.0\.", "neck.attention."),
    (r"encoder\.lateral_convs\.", "neck.laterals."),
    (r"encoder\.fpn_blocks\.", "neck.top_down."),
    (r"encoder\.downsample_convs\.", "neck.downs."),
    (r"encoder\.pan_blocks\.", "neck.bottom_up."),
)
DECODER: tuple[tuple[str, str | None], ...] = (
    (r"decoder\.input_proj\.", "head.inputs."),
    (r"decoder\.decoder\.layers\.\d+\.cross_attn\.num_points_scale", None),
    (r"decoder\.decoder\.layers\.", "head.layers."),
    (r"decoder\.denoising_class_embed\.", "head.denoising."),
    *((rf"decoder\.query_pos_head\.layers\.{number}\.", f"head.position.{2 * number}.") for number in range(2)),
    (r"decoder\.enc_output\.", "head.selection."),
    (r"decoder\.enc_score_head\.", "head.selection.cls."),
    *((rf"decoder\.enc_bbox_head\.layers\.{number}\.", f"head.selection.reg.{2 * number}.") for number in range(3)),
    (r"decoder\.dec_score_head\.", "head.cls."),
    *((rf"decoder\.dec_bbox_head\.(\d+)\.layers\.{number}\.", rf"head.reg.\1.{2 * number}.") for number in range(3)),
    (r"decoder\.(anchors|valid_mask)$", None),
)
"""How the names of parameters begin in the published files, and ours."""


@plugin
class RtDetr(SetDetector):
    """RT-DETR (Zhao et al. 2024) in its second version (Lv et al. 2024): a DETR as fast as a YOLO, and without NMS.

    https://arxiv.org/abs/2304.08069, https://arxiv.org/abs/2407.17140. Images are stretched to one size; where they are
    not, their padding counts as a part of them.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        *((rf"backbone\.{theirs}", f"backbone.{ours}") for theirs, ours in PADDLE),
        *ENCODER,
        *DECODER,
    )
    published_by: ClassVar[str] = "RT-DETR"

    neck: Neck = option(factory=HybridEncoder, help="what makes a pyramid of the backbone's maps")
    channels: int = option(default=256, at_least=1, help="of the decoder's queries; a multiple of its heads")
    queries: int = option(default=300, at_least=1, help="objects an image that are asked for")
    decoder_layers: int = option(default=6, at_least=1, help="in which queries look at a few places of the maps")
    evaluated_layers: int | None = option(
        default=None, at_least=1, help="how many of these detect; null: all, as in all but RT-DETR-R50-m, which has 3"
    )
    attention_heads: int = option(default=8, at_least=1, help="of each attention of the decoder")
    points: list[int] = option(
        factory=lambda: [4, 4, 4], at_least=1, help="places of each map, fine to coarse, that a head looks at"
    )
    ffn_channels: int = option(default=1024, at_least=1, help="between the two layers that follow an attention")
    denoising: int = option(default=100, at_least=0, help="pairs of noisy queries in training, at least; 0: none")
    label_noise: float = option(
        default=0.5, at_least=0, at_most=1, help="twice the chance that a noisy query has another class"
    )
    box_noise: float = option(
        default=1.0, at_least=0, help="how far a side moves, in halves of the box: up to so far, then to twice as far"
    )
    assigner: SetAssigner = option(
        factory=lambda: HungarianAssigner(
            costs=[FocalCost(weight=2.0, epsilon=1e-8), L1Cost(weight=5.0), GiouCost(weight=2.0)]
        ),
        help="which queries are to predict which objects",
    )
    class_loss: ClassLoss = option(factory=Varifocal, help="of the classes of all queries, by the IoU of their boxes")
    image_mean: tuple[float, float, float] = option(default=(0.0, 0.0, 0.0), help="of R, G and B, on 0..255")
    image_std: tuple[float, float, float] = option(
        default=(255.0, 255.0, 255.0), above=0, help="of R, G and B, on 0..255"
    )
    max_detections: int = option(default=300, at_least=1, help="detections an image")

    # The decoder begins with the best places of the encoder's maps, and each layer makes their boxes better.

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        self.check(strides)
        return {"head": self.decoder(channels, len(strides), classes)}

    def decoder(self, channels: int, levels: int, classes: int) -> nn.Module:
        from detkernel_detectors.transformers.rtdetr import Decoder

        return Decoder(self, channels, levels, classes)

    def check(self, strides: Sequence[int]) -> None:
        """Raise ConfigError for options that do not fit each other or the neck."""
        if len(self.points) != len(strides):
            found = f"got {len(self.points)} for maps of strides {list(strides)}"
            raise wrong(self, "points", f"expected a number for each map of the neck, {found}")
        if (self.evaluated_layers or 1) > self.decoder_layers:
            raise wrong(self, "evaluated_layers", f"there are {self.decoder_layers}, got {self.evaluated_layers}")

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        outputs = ["head.selection.cls", *(f"head.cls.{number}" for number in range(self.decoder_layers))]
        found = {f"{name}.{kind}": ClassOutput() for name in outputs for kind in ("weight", "bias")}
        return {**found, "head.denoising.weight": ClassOutput(background="last")}

    def forwarded(self, network: Any, features: list[Tensor], sizes: Tensor | None, size: tuple[int, int]) -> Encoded:
        found: Encoded = network.head.encode(features, size)
        return found

    # Training: in every layer, and of the places that the decoder began with, each object is one query's. The noisy
    # queries know theirs.

    def losses(self, encoded: Encoded, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        noise = self.noise(encoded, targets)
        decoded: Decoded = heads.head(encoded, noise, learns=True)
        given = dict(zip(self.names, layers_of(decoded), strict=True))
        sets = {name: later(one, noise) for name, one in given.items()}
        sets["_enc_0"] = (encoded.selected.logits.float(), encoded.selected.boxes.sigmoid())
        queries = together(sets, encoded.scale)
        matches, count = self.assigner.assign(queries, targets), shared_count(targets.valid)
        found = self.losses_of(sets, queries, targets, matches, matches, count, count)
        if noise is not None:
            noisy = {f"_dn_{number}": first(one, noise) for number, one in enumerate(given.values())}
            found |= self.noise_losses(noisy, noise, encoded, targets)
        return found

    @property
    def names(self) -> list[str]:
        """What the losses of each layer of the decoder end in."""
        return [*(f"_aux_{number}" for number in range(self.decoder_layers - 1)), ""]

    def noise(self, encoded: Encoded, targets: Targets) -> Denoising | None:
        """Noisy queries."""
        from detkernel_detectors.transformers import denoising

        if not self.denoising:
            return None
        draws = denoising.draw(targets, encoded.selected.logits.shape[-1], self.denoising)
        return denoising.noisy(targets, encoded.scale, draws, self.denoising, self.label_noise, self.box_noise)

    def noise_losses(
        self, noisy: Mapping[str, Set], noise: Denoising, encoded: Encoded, targets: Targets
    ) -> dict[str, Tensor]:
        """Those of all layers, of which each has the same matches."""
        matches, count = repeated(noise.matches, len(noisy)), shared_count(noise.matches.positive)
        return self.losses_of(noisy, together(noisy, encoded.scale), targets, matches, matches, count, count)

    def losses_of(
        self,
        names: Iterable[str],
        queries: Queries,
        targets: Targets,
        own: Matches,
        shared: Matches,
        count: Tensor,
        shared_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of each set of queries: of classes by its `own` matches and `count`, of boxes by the others."""
        background, whole = queries.logits.shape[-1], covering(queries.scale)
        corners = xyxy(queries.boxes) * queries.scale
        labels, wanted = wanted_of(own, targets, whole, background)
        quality = torch.where(own.positive, overlap(corners.detach(), wanted).iou, 0.0)
        classes = self.class_loss(queries.logits, labels, quality) * (own.positive | own.negative)
        parts = {"vfl": classes / count}
        _, wanted = wanted_of(shared, targets, whole, background)
        for name, loss in (("bbox", self.box_loss), ("giou", self.iou_loss)):
            parts[name] = self.box_losses(loss, queries, corners, wanted) * shared.positive / shared_boxes
        return {
            f"loss_{part}{name}": one.sum()
            for part, values in parts.items()
            for name, one in zip(names, torch.split(values, list(queries.counts), 1), strict=True)
        }

    # Inference: the best pairs of query and class.

    def predicted(self, outputs: Encoded, heads: Any) -> Queries:
        decoded: Decoded = heads.head(outputs)
        return together({"": layers_of(decoded)[-1]}, outputs.scale)

    def predictions(self, outputs: Encoded, sizes: Tensor | None, heads: Any) -> Predictions:
        found = super().predictions(outputs, sizes, heads)
        return found._replace(boxes=clip(found.boxes, sizes))


Set = tuple["Tensor", "Tensor"]
"""Logits [B, N, C] and boxes [B, N, 4] of some queries."""


def layers_of(decoded: Any) -> list[Set]:
    """Of all queries, layer by layer."""
    return list(zip(decoded.logits, decoded.boxes, strict=True))


def first(one: Set, noise: Denoising) -> Set:
    """Of the noisy queries."""
    count = noise.labels.shape[1]
    return one[0][:, :count], one[1][:, :count]


def later(one: Set, noise: Denoising | None) -> Set:
    """Of the other ones."""
    count = 0 if noise is None else noise.labels.shape[1]
    return one[0][:, count:], one[1][:, count:]


def together(sets: Mapping[str, Set], scale: Tensor) -> Queries:
    """Sets of queries one after the other."""
    logits, boxes = (torch.cat(values, 1) for values in zip(*sets.values(), strict=True))
    return Queries(logits, boxes, scale, tuple(one.shape[1] for one, _ in sets.values()))


def repeated(matches: Matches, times: int) -> Matches:
    """The same for so many sets."""
    return Matches(*(value.repeat(1, times) for value in matches[:3]))


def covering(scale: Tensor) -> Tensor:
    """[B, 1, 4] xyxy: the whole image."""
    return torch.cat([torch.zeros_like(scale[..., :2]), scale[..., 2:]], -1)
