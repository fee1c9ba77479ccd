"""Necks: from the maps of a backbone to a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from detkernel import option, plugin, wrong
from detkernel_detection import Neck

if TYPE_CHECKING:
    from torch import nn


@plugin
class Fpn(Neck):
    """Feature pyramid network (Lin et al. 2017): coarse maps are enlarged and added to finer ones."""

    channels: int = option(default=256, at_least=1, help="of each map")
    finest: int = option(default=8, at_least=1, help="stride of the finest map that is used")
    extra: int = option(default=2, at_least=0, help="further levels, each of twice the stride of the one before")
    extra_from: Literal["input", "output", "pool"] = option(
        default="input",
        help="what makes the first further level: a convolution of the backbone's coarsest map, or of the pyramid's; "
        "every other pixel of the pyramid's (R-CNN)",
    )
    extra_relu: bool = option(default=False, help="a ReLU before the convolutions of the second further level and on")

    norm: Literal["batch", "group"] | None = option(
        default=None, help="normalisation of the maps of the backbone's levels, in place of biases; null: none"
    )

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.fpn import Pyramid

        if not any(stride >= self.finest for stride in strides):
            raise wrong(self, "finest", f"the backbone has maps of strides {list(strides)}, none of {self.finest}")
        return Pyramid(self, channels, strides)


@plugin
class Hrfpn(Neck):
    """HRFPN (Sun et al. 2019), the neck of HRNet: all maps joined at the finest stride, and each level pooled of that.

    https://arxiv.org/abs/1904.04514
    """

    channels: int = option(default=256, at_least=1, help="of each map")
    levels: int = option(default=5, at_least=1, help="maps that it gives, each of twice the stride of the one before")
    stride: int = option(
        default=1, at_least=1, help="of the convolution that gives each map: 2 for dense detectors, which begin at 8"
    )
    pool: Literal["mean", "max"] = option(default="mean", help="what a pixel of a level is of those of the finest")

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.hrfpn import HighResolutionPyramid

        return HighResolutionPyramid(self, channels, strides)


@plugin
class CspPafpn(Neck):
    """Path aggregation (Liu et al. 2018) with CSP layers: coarse maps into finer ones, and these back into coarser.

    Maps are joined by concatenation, as in YOLOX and RTMDet.
    """

    channels: int = option(default=256, at_least=1, help="of each map that it gives")
    blocks: int = option(default=3, at_least=1, help="blocks of each CSP layer: 1 for tiny and s, 2 for m, 4 for x")
    block: Literal["cspnext", "darknet"] = option(default="cspnext", help="kind of blocks: RTMDet's or YOLOX's")
    last_size: Literal[1, 3] = option(
        default=3, help="height and width of the convolution that gives each map: 1 in YOLOX"
    )
    norm_eps: float = option(default=1e-5, above=0, help="what a batch norm adds to the variance")
    norm_momentum: float = option(default=0.1, above=0, at_most=1, help="share of a batch in its running statistics")

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.pafpn import PathAggregation

        return PathAggregation(self, channels, strides)


@plugin
class ChannelMapper(Neck):
    """Maps of equal channels, each of one map of the backbone alone (Zhu et al. 2021)."""

    channels: int = option(default=256, at_least=1, help="of each map")
    finest: int = option(default=8, at_least=1, help="stride of the finest map that is used")
    extra: int = option(default=1, at_least=0, help="further levels, each of twice the stride of the one before")
    groups: int | None = option(
        default=32, at_least=1, help="of the group norm after each convolution; channels are a multiple; null: none"
    )

    def __attrs_post_init__(self) -> None:
        if self.groups is not None and self.channels % self.groups:
            raise ValueError(f"channels: expected a multiple of the {self.groups} groups, got {self.channels}")

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.channel_mapper import Mapper

        if not any(stride >= self.finest for stride in strides):
            raise wrong(self, "finest", f"the backbone has maps of strides {list(strides)}, none of {self.finest}")
        return Mapper(self, channels, strides)


@plugin
class DilatedEncoder(Neck):
    """YOLOF's encoder (Chen et al. 2021): one map, the coarsest, in which objects of all sizes are to be found.

    https://arxiv.org/abs/2103.09460, section 4.2. After the two layers of an FPN, residual blocks add what dilated
    convolutions see farther and farther away, so that small objects are seen still, and large ones as a whole.
    """

    channels: int = option(default=512, at_least=1, help="of the map")
    block_channels: int = option(default=128, at_least=1, help="of the convolutions inside of the blocks")
    dilations: list[int] = option(
        factory=lambda: [2, 4, 6, 8], at_least=1, help="a residual block for each: how far apart its 3x3 pixels are"
    )

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.dilated import Encoder

        return Encoder(self, channels, strides)


@plugin
class YoloNeck(Neck):
    """YOLOv3's neck (Redmon and Farhadi 2018): five convolutions, then up to the next finer map and again.

    https://arxiv.org/abs/1804.02767, section 2.3. It gives a map for each that it uses, of channels of its own.
    """

    channels: list[int] = option(
        factory=lambda: [128, 256, 512],
        at_least=1,
        help="of each map that it gives, fine to coarse; as many of the backbone's coarsest maps are used",
    )
    norm_eps: float = option(default=1e-5, above=0, help="what a batch norm adds to the variance")
    norm_momentum: float = option(default=0.1, above=0, at_most=1, help="share of a batch in its running statistics")

    def __attrs_post_init__(self) -> None:
        if not self.channels:
            raise ValueError("channels: expected at least one, got none")

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.yolo import CoarseToFine

        if len(self.channels) > len(channels):
            most = f"at most {len(channels)}, as many as the backbone has maps"
            raise wrong(self, "channels", f"expected {most}, got {self.channels}")
        return CoarseToFine(self, channels, strides)


@plugin
class HybridEncoder(Neck):
    """RT-DETR's encoder (Zhao et al. 2024): attention in the coarsest map, then fusion from coarse to fine and back.

    https://arxiv.org/abs/2304.08069. With `fusion: elan`, that of D-FINE (Peng et al. 2024).
    """

    channels: int = option(default=256, at_least=4, help="of each map; a multiple of 4")
    finest: int = option(default=8, at_least=1, help="stride of the finest map that is used")
    attention_heads: int = option(default=8, at_least=1, help="of the attention; the channels are a multiple of it")
    ffn_channels: int = option(default=1024, at_least=1, help="between the two layers that follow the attention")
    fusion: Literal["csp", "elan"] = option(
        default="csp", help="what joins two maps: a CSP block of RepVGG layers (RT-DETR), or a GELAN of these (D-FINE)"
    )
    expansion: float = option(default=1.0, above=0, help="width of the joining blocks, to that of the maps")
    depth: float = option(default=1.0, above=0, help="three times this many RepVGG layers a block, rounded")

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.hybrid import Encoder

        if not any(stride >= self.finest for stride in strides):
            raise wrong(self, "finest", f"the backbone has maps of strides {list(strides)}, none of {self.finest}")
        if self.channels % 4 or self.channels % self.attention_heads:
            raise wrong(
                self, "channels", f"expected a multiple of 4 and of {self.attention_heads} heads, got {self.channels}"
            )
        return Encoder(self, channels, strides)


@plugin
class DeconvNeck(Neck):
    """Transposed convolutions that double the coarsest map until it is fine (Xiao et al. 2018), as in CenterNet.

    https://arxiv.org/abs/1804.06208. It gives one map: of stride 4 where the backbone's coarsest has 32.
    """

    channels: list[int] = option(
        factory=lambda: [256, 128, 64],
        at_least=1,
        help="after each doubling: of a 3x3 and a 4x4 transposed convolution",
    )

    def __attrs_post_init__(self) -> None:
        if not self.channels:
            raise ValueError("channels: expected at least one, got none")

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.deconv import Deconvolutions

        if strides[-1] % 2 ** len(self.channels):
            message = f"{len(self.channels)} doublings of the backbone's map of stride {strides[-1]} are too many"
            raise wrong(self, "channels", message)
        return Deconvolutions(self, channels, strides)


@plugin
class SsdNeck(Neck):
    """SSD's levels (Liu et al. 2016): the backbone's maps, and further ones, each of the one before by 1x1 and 3x3.

    The first map is divided by the length of its vector of channels at each pixel, times a learned factor of each
    channel (L2 normalisation, Liu et al. 2015, https://arxiv.org/abs/1506.04579). Maps keep their own channels.
    """

    finest: int = option(default=8, at_least=1, help="stride of the finest map that is used")
    extra: list[int] = option(
        factory=lambda: [512, 256, 256, 256], above=0, help="channels of each further level; its 1x1 has half of them"
    )
    extra_strides: list[Literal[1, 2]] = option(factory=lambda: [2, 2, 1, 1], help="of the 3x3 of each further level")
    extra_paddings: list[Literal[0, 1]] = option(
        factory=lambda: [1, 1, 0, 0], help="pixels of zeros around the map, for the same"
    )
    last_size: int = option(
        default=3, at_least=1, help="height and width of the last one's convolution, in place of 3: 4 in SSD512"
    )
    scale: float | None = option(
        default=20.0, above=0, help="what the factors of the first map begin with; null: it is not normalised"
    )

    def __attrs_post_init__(self) -> None:
        for name in ("extra_strides", "extra_paddings"):
            if len(getattr(self, name)) != len(self.extra):
                raise ValueError(
                    f"{name}: expected one for each of the {len(self.extra)} further levels, got {getattr(self, name)}"
                )

    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        from detkernel_detectors.necks.ssd import Levels

        if not any(stride >= self.finest for stride in strides):
            raise wrong(self, "finest", f"the backbone has maps of strides {list(strides)}, none of {self.finest}")
        return Levels(self, channels, strides)
