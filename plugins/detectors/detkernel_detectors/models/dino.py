"""DINO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import option, plugin
from detkernel_detection import ClassLoss
from detkernel_detection.parts import Matches

from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.models.deformable_detr import DeformableFamily
from detkernel_detectors.models.sets import joined, layer_names, parted

if TYPE_CHECKING:
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.parts import Queries
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn

    from detkernel_detectors.transformers.deformable_detr import Encoded
    from detkernel_detectors.transformers.denoising import Denoising
else:
    pass


@plugin
class Dino(DeformableFamily):
    """DINO (Zhang et al. 2023): Deformable DETR that also learns to tell objects from what nearly is one.

    https://arxiv.org/abs/2203.03605. As MMDetection trains it with four levels.
    """

    key_map: ClassVar[tuple[tuple[str, str | None], ...]] = (
        (r"dn_query_generator\.label_embedding\.", r"transformer.label_embedding."),
        (r"decoder\.ref_point_head\.layers\.0\.", r"transformer.decoder.ref_point_head.0."),
        (r"decoder\.ref_point_head\.layers\.1\.", r"transformer.decoder.ref_point_head.2."),
        *DeformableFamily.key_map,
    )

    class_loss: ClassLoss = option(factory=Focal, help="of the classes of all queries")
    queries: int = option(default=900, at_least=1, help="objects an image that are asked for")
    ffn_channels: int = option(default=2048, at_least=1, help="between the two layers that follow an attention")
    dropout: float = option(default=0.0, at_least=0, below=1, help="share of values left out in training")
    temperature: float = option(default=20.0, above=0, help="of the wave lengths that tell a place of a map")
    position_offset: float = option(default=0.0, help="of the number of a place in its row and column")
    denoising: int = option(default=100, at_least=0, help="pairs of noisy queries in training, at least; 0: none")
    label_noise: float = option(
        default=0.5, at_least=0, at_most=1, help="twice the chance that a noisy query has another class"
    )
    box_noise: float = option(
        default=1.0, at_least=0, help="how far a side moves, in halves of the box: up to so far, then to twice as far"
    )
    max_detections: int = option(default=300, at_least=1, help="detections an image")

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {**super().class_outputs(), "transformer.label_embedding.weight": ClassOutput()}

    def heads(self, channels: int, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        from detkernel_detectors.transformers.dino import DinoTransformer

        self.check_heads(channels, self.attention_heads)
        return {"transformer": DinoTransformer(self, channels, len(strides), classes)}

    # Training: the proposals and every layer's predictions are matched, and have losses. Noisy queries are not matched:
    # one with little noise is to become its object again, and one with much is to be nothing.

    def losses(self, encoded: Encoded, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        transformer = heads.transformer
        noise = self._noise(encoded, targets, transformer) if self.denoising else None
        first = transformer.chosen(transformer.proposed(encoded), encoded.scale)
        noisy, queries = transformer.decode(encoded, first, noise)
        assigned = self.assigner.assign(joined(queries, first), targets)
        matches, proposed = parted(assigned, queries, first)
        names = layer_names(self.decoder_layers)
        found = self.set_losses(queries, matches, targets, names) | self.set_losses(first, proposed, targets, ["enc_"])
        if noise is not None:
            found |= self._noise_losses(noisy, noise.matches, targets, names)
        return found

    def _noise(self, encoded: Encoded, targets: Targets, transformer: Any) -> Denoising:
        from detkernel_detectors.transformers import denoising

        draws = denoising.draw(targets, transformer.label_embedding.num_embeddings, self.denoising)
        return denoising.noisy(targets, encoded.scale, draws, self.denoising, self.label_noise, self.box_noise)

    def _noise_losses(
        self, noisy: Queries, matches: Matches, targets: Targets, names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Those of all layers, of which each has the same matches."""
        every = Matches(*(value.repeat(1, len(names)) for value in matches[:3]))
        return self.set_losses(noisy, every, targets, [f"{name}dn_" for name in names])

    # Inference: the best pairs of query and class of the last layer.

    def predicted(self, encoded: Encoded, heads: Any) -> Queries:
        transformer = heads.transformer
        first = transformer.chosen(transformer.proposed(encoded), encoded.scale)
        queries: Queries = transformer.decode(encoded, first)[1]
        return queries
