"""DETR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import Neck, SetAssigner
from detkernel_detection.boxes import xyxy
from detkernel_detection.parts import Queries

from detkernel_detectors.assigners.hungarian import GiouCost, HungarianAssigner, L1Cost, SoftmaxCost
from detkernel_detectors.losses.classes import Softmax
from detkernel_detectors.models.sets import SetDetector, layer_names, padded
from detkernel_detectors.necks import ChannelMapper

if TYPE_CHECKING:
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn

    from detkernel_detectors.transformers.deformable_detr import Encoded


@plugin
class DetrFamily(SetDetector):
    """What DETR and its kin share that look at all places of one map."""

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"bbox_head\.fc_cls\.", r"transformer.cls."),
        (r"bbox_head\.reg_ffn\.layers\.0\.0\.", r"transformer.reg.0."),
        (r"bbox_head\.reg_ffn\.layers\.1\.", r"transformer.reg.2."),
        (r"bbox_head\.fc_reg\.layers\.0\.", r"transformer.reg.0."),
        (r"bbox_head\.fc_reg\.layers\.1\.", r"transformer.reg.2."),
        (r"bbox_head\.fc_reg\.layers\.2\.", r"transformer.reg.4."),
        (r"bbox_head\.fc_reg\.", r"transformer.reg.4."),
        (r"((?:en|de)coder\.layers\.\d+\.(?:self|cross)_attn)\.attn\.", r"transformer.\1."),
        (r"((?:en|de)coder\.layers\.\d+\.ffn)\.layers\.0\.([01])\.", r"transformer.\1.\2."),
        (r"((?:en|de)coder\.layers\.\d+\.ffn)\.layers\.1\.", r"transformer.\1.3."),
        (r"((?:en|de)coder\.(?:query_scale|ref_point_head|ref_anchor_head))\.layers\.0\.", r"transformer.\1.0."),
        (r"((?:en|de)coder\.(?:query_scale|ref_point_head|ref_anchor_head))\.layers\.1\.", r"transformer.\1.2."),
        (r"(encoder\.|decoder\.|query_embedding)", r"transformer.\1"),
    )

    neck: Neck = option(
        factory=lambda: ChannelMapper(finest=32, extra=0, groups=None), help="what makes one map of the backbone's"
    )
    queries: int = option(default=300, at_least=1, help="objects an image that are asked for")
    encoder_layers: int = option(default=6, at_least=0, help="in which the places of the map look at each other")
    decoder_layers: int = option(default=6, at_least=1, help="in which queries look at these places")
    attention_heads: int = option(default=8, at_least=1, help="of each attention; the channels are a multiple of it")
    ffn_channels: int = option(default=2048, at_least=1, help="between the two layers that follow an attention")
    dropout: float = option(default=0.1, at_least=0, below=1, help="share of values left out in training")
    temperature: float = option(default=10000.0, above=0, help="of the wave lengths that tell a place of the map")

    def transformer(self, channels: int, classes: int) -> nn.Module:
        """Encoder and decoder."""
        raise NotImplementedError

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        if len(strides) != 1:
            raise wrong(self, "neck", f"expected one that gives one map, got one of strides {list(strides)}")
        self.check_heads(channels, self.attention_heads)
        return {"transformer": self.transformer(channels, classes)}

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {f"transformer.cls.{kind}": ClassOutput() for kind in ("weight", "bias")}

    def forwarded(self, network: Any, features: list[Tensor], sizes: Tensor | None, size: tuple[int, int]) -> Encoded:
        encoded: Encoded = network.transformer.encode(features, sizes, size)
        return encoded

    # Training: every layer's predictions are matched to the objects and have losses.

    def losses(self, encoded: Encoded, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        queries = self.predicted(encoded, heads)
        return self.set_losses(
            queries, self.assigner.assign(queries, targets), targets, layer_names(len(queries.counts))
        )

    def predicted(self, encoded: Encoded, heads: Any) -> Queries:
        queries: Queries = heads.transformer.decode(encoded)
        return queries


@plugin
class Detr(DetrFamily):
    """DETR (Carion et al. 2020): a transformer that is asked for objects, each of which is found once.

    https://arxiv.org/abs/2005.12872.
    """

    one_choice: ClassVar[bool] = True

    assigner: SetAssigner = option(
        factory=lambda: HungarianAssigner(costs=[SoftmaxCost(), L1Cost(weight=5.0), GiouCost(weight=2.0)]),
        help="which queries are to predict which objects",
    )
    class_loss: Softmax = option(factory=Softmax, help="of the classes of all queries, of which one is no object")
    queries: int = option(default=100, at_least=1, help="objects an image that are asked for")

    def transformer(self, channels: int, classes: int) -> nn.Module:
        from detkernel_detectors.transformers.detr import DetrTransformer

        return DetrTransformer(self, channels, classes)

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {f"transformer.cls.{kind}": ClassOutput(background="last") for kind in ("weight", "bias")}

    def background(self, logits: Tensor) -> int:
        return logits.shape[-1] - 1

    def class_counts(self, positive: Tensor, negative: Tensor) -> Tensor:
        return positive + self.class_loss.background * negative

    # Inference: each query has one class.

    def best(self, queries: Queries) -> Predictions:
        scores, labels = queries.logits.softmax(-1)[..., :-1].max(-1)
        scores, places = scores.topk(min(self.max_detections, scores.shape[1]))
        corners = (xyxy(queries.boxes) * queries.scale).gather(1, places[..., None].expand(-1, -1, 4))
        return padded(corners, scores, labels.gather(1, places), queries.scale, self.max_detections)
