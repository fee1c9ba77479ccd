"""Deformable DETR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import Neck
from detkernel_detection.parts import Queries

from detkernel_detectors.models.sets import SetDetector, joined, layer_names, parted
from detkernel_detectors.necks import ChannelMapper

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn

    from detkernel_detectors.transformers.deformable_detr import Encoded
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class DeformableFamily(SetDetector):
    """What Deformable DETR and what came of it share: the encoder, and the shape of the decoder."""

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"neck\.(convs|extra_convs)\.(\d+)\.gn\.", r"neck.\1.\2.norm."),
        (r"bbox_head\.(cls|reg)_branches\.", r"transformer.\1."),
        (r"((?:en|de)coder\.layers\.\d+\.self_attn)\.attn\.", r"transformer.\1."),
        (r"((?:en|de)coder\.layers\.\d+\.ffn)\.layers\.0\.0\.", r"transformer.\1.0."),
        (r"((?:en|de)coder\.layers\.\d+\.ffn)\.layers\.1\.", r"transformer.\1.3."),
        (r"(encoder\.|decoder\.|level_embed|query_embedding|reference_points_fc|memory_trans|pos_trans)",
         r"transformer.\1"),
    )  # fmt: skip

    neck: Neck = option(factory=ChannelMapper, help="what makes maps of equal channels of the backbone's")
    queries: int = option(default=300, at_least=1, help="objects an image that are asked for")
    encoder_layers: int = option(default=6, at_least=0, help="in which places of all maps look at each other")
    decoder_layers: int = option(default=6, at_least=1, help="in which queries look at these places")
    attention_heads: int = option(default=8, at_least=1, help="of each attention; the channels are a multiple of it")
    points: int = option(default=4, at_least=1, help="places of each map that a head looks at")
    ffn_channels: int = option(default=1024, at_least=1, help="between the two layers that follow an attention")
    dropout: float = option(default=0.1, at_least=0, below=1, help="share of values left out in training")
    temperature: float = option(default=10000.0, above=0, help="of the wave lengths that tell a place")
    position_offset: float = option(default=-0.5, help="of the number of a place in its row and column")

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {f"transformer.cls.*.{kind}": ClassOutput() for kind in ("weight", "bias")}

    def forwarded(self, network: Any, features: list[Tensor], sizes: Tensor | None, size: tuple[int, int]) -> Encoded:
        encoded: Encoded = network.transformer.encode(features, sizes, size)
        return encoded


@plugin
class DeformableDetr(DeformableFamily):
    """Deformable DETR (Zhu et al. 2021): attention to a few places of each map, so that fine maps are affordable.

    https://arxiv.org/abs/2010.04159. The options as they are are its plain form; with `refine` each layer changes the
    box of the layer before, and with `two_stage` the queries begin as proposals of the encoder.
    """

    refine: bool = option(default=False, help="whether each decoder layer starts from the box of the one before")
    two_stage: bool = option(default=False, help="whether queries start as the best proposals of the encoder")

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        from detkernel_detectors.transformers.deformable_detr import DeformableDetrTransformer

        self.check_heads(channels, self.attention_heads)
        made = DeformableDetrTransformer(self, channels, len(strides), classes, self.two_stage, self.refine)
        return {"transformer": made}

    # Training: every layer's predictions are matched and have losses, and so have the proposals of all places, which
    # only say whether anything is there: their first logit.

    def losses(self, encoded: Encoded, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        proposals = heads.transformer.proposed(encoded) if self.two_stage else None
        queries = heads.transformer.decode(encoded, proposals)
        names = layer_names(self.decoder_layers)
        if proposals is None:
            return self.set_losses(queries, self.assigner.assign(queries, targets), targets, names)
        there = Queries(proposals.logits, proposals.boxes.sigmoid(), encoded.scale, proposals.logits.shape[1:2])
        any_class = there._replace(logits=there.logits[..., :1].expand_as(there.logits))
        matches, first = parted(self.assigner.assign(joined(queries, any_class), targets), queries, there)
        anything = targets._replace(labels=torch.zeros_like(targets.labels))
        return {
            **self.set_losses(queries, matches, targets, names),
            **self.set_losses(there, first, anything, ["enc_"]),
        }

    # Inference: the best pairs of query and class of the last layer.

    def predicted(self, encoded: Encoded, heads: Any) -> Queries:
        proposals = heads.transformer.proposed(encoded) if self.two_stage else None
        queries: Queries = heads.transformer.decode(encoded, proposals)
        return queries
