"""Backbones: from an image to feature maps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from detkernel import option, plugin
from detkernel_detection import Backbone

if TYPE_CHECKING:
    from torch import nn

    from detkernel_detectors.backbones.hgnetv2 import Size


@plugin
class Resnet(Backbone):
    """A ResNet (He et al. 2016) or ResNeXt: maps at strides 4, 8, 16 and 32, one a stage.

    Without weights, everything is trained and batch norm is ordinary; with weights, the stem and the first stage are
    frozen, with their statistics, and so is batch norm, as in every published recipe.
    """

    depth: Literal[18, 34, 50, 101, 152] = option(default=50, help="number of layers")
    groups: int = option(default=1, at_least=1, help="groups of the 3x3 convolutions: 32 makes a ResNeXt (50 and more)")
    width_per_group: int = option(default=64, at_least=1, help="channels of a group in the first stage: 4 for ResNeXt")
    channels: int = option(default=64, at_least=1, help="channels of the stem and of the first stage")
    style: Literal["pytorch", "caffe"] = option(
        default="pytorch", help="which convolution of a bottleneck has the stride: the 3x3, or the 1x1 before (caffe)"
    )
    variant: Literal["original", "vd"] = option(
        default="original",
        help="vd: three 3x3 convolutions in the stem, and shortcuts that average before their convolution (He et al. "
        "2019), of which each stage has one, as in PaddlePaddle and RT-DETR",
    )
    deformable: Literal["v1", "v2"] | None = option(
        default=None,
        help="deformable convolutions in place of the 3x3 (50 and more): v1 (Dai et al. 2017) learns where each looks, "
        "v2 (Zhu et al. 2019) also how much of it counts; null: none",
    )
    deformable_stages: list[Literal[1, 2, 3, 4]] = option(
        factory=lambda: [2, 3, 4], help="the stages that have them: c3-c5 in MMDetection's names"
    )
    deformable_groups: int = option(default=1, at_least=1, help="groups of channels with offsets of their own")
    stages: Literal[1, 2, 3, 4] = option(default=4, help="stages kept: with 3, a quarter faster")
    weights: str | None = option(
        default=None, help="torchvision's by name, such as IMAGENET1K_V1 or DEFAULT; a file; null: random"
    )
    trainable_layers: int | None = option(
        default=None, at_least=0, at_most=5, help="stages trained, from the last one; null: 3 with weights, else 5"
    )
    norm: Literal["frozen", "eval", "batch", "group"] | None = option(
        default=None,
        help="frozen: constants; eval: constant statistics, trained scale; batch; group; null: frozen with weights, "
        "else batch",
    )

    norm_eps: float = option(
        default=1e-5, at_least=0, help="what a norm adds to the variance; 0 in torchvision's first detectors"
    )

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import resnet

        return resnet.build(self)


@plugin
class Regnet(Backbone):
    """A RegNet (Radosavovic et al. 2020), simple and regular: maps at strides 4, 8, 16 and 32, one a stage.

    https://arxiv.org/abs/2003.13678. Of what is trained and of norms, the same as for `resnet`.
    """

    size: Literal[
        "x_400mf", "x_800mf", "x_1.6gf", "x_3.2gf", "x_4.0gf", "x_6.4gf", "x_8.0gf", "x_12gf", "x_16gf", "x_32gf",
        "y_400mf", "y_800mf", "y_1.6gf", "y_3.2gf", "y_8.0gf", "y_16gf", "y_32gf", "x_400mf_torchvision",
    ] = option(
        default="x_3.2gf",
        help="FLOPs of an image of 224x224, and the kind: y has attention to channels, x has not; torchvision's "
        "x_400mf is a little wider than the paper's, which MMDetection has",
    )  # fmt: skip
    weights: str | None = option(
        default=None,
        help="torchvision's by name, such as IMAGENET1K_V2 or DEFAULT; a file, ours or MMDetection's; null: random",
    )
    trainable_layers: int | None = option(
        default=None, at_least=0, at_most=5, help="stages trained, from the last one; null: 3 with weights, else 5"
    )
    norm: Literal["frozen", "eval", "batch", "group"] | None = option(
        default=None,
        help="frozen: constants; eval: constant statistics, trained scale; batch; group; null: frozen with weights, "
        "else batch",
    )

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import regnet

        return regnet.build(self)


@plugin
class Res2net(Backbone):
    """A Res2Net (Gao et al. 2019), whose blocks see several scales: maps at strides 4, 8, 16 and 32, one a stage.

    https://arxiv.org/abs/1904.01169. Of what is trained and of norms, the same as for `resnet`.
    """

    depth: Literal[50, 101, 152] = option(default=101, help="number of layers of the ResNet that it follows")
    scales: int = option(default=4, at_least=2, help="parts that the channels of a block are split into")
    width: int = option(default=26, at_least=1, help="channels of a part in the first stage")
    variant: Literal["original", "vd"] = option(
        default="vd",
        help="vd: three 3x3 convolutions in the stem, and shortcuts that average before their convolution, as all that "
        "MMDetection has published (its authors' v1b); original: the stem and shortcuts of a ResNet",
    )
    smooth_first: bool = option(
        default=False,
        help="average the last part in the first block of the first stage, too, as in its authors' networks; "
        "MMDetection's do not",
    )
    weights: str | None = option(default=None, help="a file, ours, MMDetection's or its authors'; null: random")
    trainable_layers: int | None = option(
        default=None, at_least=0, at_most=5, help="stages trained, from the last one; null: 3 with weights, else 5"
    )
    norm: Literal["frozen", "eval", "batch", "group"] | None = option(
        default=None,
        help="frozen: constants; eval: constant statistics, trained scale; batch; group; null: frozen with weights, "
        "else batch",
    )

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import res2net

        return res2net.build(self)


@plugin
class Hrnet(Backbone):
    """An HRNet (Wang et al. 2019), fine maps throughout: maps at strides 4, 8, 16 and 32, each the sum of all.

    https://arxiv.org/abs/1908.07919. Its neck is `hrfpn`.
    """

    width: int = option(default=32, at_least=1, help="channels of the finest map: 18, 32, 40 or 48 are published")
    weights: str | None = option(default=None, help="a file, ours, MMDetection's or its authors'; null: random")
    trainable_layers: int = option(
        default=5, at_least=0, at_most=5, help="stages trained, from the last one; 5: and the stem"
    )
    norm: Literal["frozen", "eval", "batch", "group"] = option(
        default="batch", help="frozen: constants; eval: constant statistics, trained scale; batch; group"
    )

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import hrnet

        return hrnet.build(self)


@plugin
class Darknet(Backbone):
    """Darknet-53 (Redmon and Farhadi 2018), the backbone of YOLOv3: maps at strides 8, 16 and 32.

    https://arxiv.org/abs/1804.02767: 3x3 convolutions of stride 2, each before residual blocks of a 1x1 and a 3x3.
    """

    channels: int = option(default=32, at_least=1, help="of the first convolution; every stage has twice as many")
    weights: str | None = option(
        default=None, help="a file, ours or MMDetection's, such as its darknet53-a628ea1b.pth of ImageNet; null: random"
    )
    trainable_layers: int = option(
        default=5, at_least=0, at_most=5, help="stages trained, from the last one; 5: and the first convolution"
    )
    norm: Literal["frozen", "eval", "batch", "group"] | None = option(
        default=None,
        help="frozen: constants; eval: constant statistics, trained scale; batch; group; null: eval with weights, "
        "else batch",
    )

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import darknet

        return darknet.build(self)


@plugin
class CspDarknet(Backbone):
    """CSPDarknet (Bochkovskiy et al. 2020) as YOLOX has it (Ge et al. 2021): maps at strides 8, 16 and 32."""

    depth: float = option(default=1.0, above=0, help="factor of the blocks of each stage: 0.33 for s and tiny")
    width: float = option(default=1.0, above=0, help="factor of the channels: 0.5 for s, 0.375 for tiny")
    norm_eps: float = option(default=1e-3, above=0, help="what a batch norm adds to the variance")
    norm_momentum: float = option(default=0.03, above=0, at_most=1, help="share of a batch in its running statistics")
    weights: str | None = option(default=None, help="a file, ours or MMDetection's; null: random")

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import csp

        return csp.csp_darknet(self)


@plugin
class Cspnext(Backbone):
    """CSPNeXt (Lyu et al. 2022), the backbone of RTMDet: maps at strides 8, 16 and 32.

    https://arxiv.org/abs/2212.07784: blocks with a depthwise 5x5, and channel attention.
    """

    depth: float = option(default=1.0, above=0, help="factor of the blocks of each stage: 0.33 for s, 0.167 for tiny")
    width: float = option(default=1.0, above=0, help="factor of the channels: 0.5 for s, 0.375 for tiny")
    norm_eps: float = option(default=1e-5, above=0, help="what a batch norm adds to the variance")
    norm_momentum: float = option(default=0.1, above=0, at_most=1, help="share of a batch in its running statistics")
    weights: str | None = option(default=None, help="a file, ours or MMPretrain's of ImageNet; null: random")

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import csp

        return csp.cspnext(self)


@plugin
class Hgnetv2(Backbone):
    """PP-HGNetV2 (PaddlePaddle 2023), the backbone of D-FINE: maps at strides 4, 8, 16 and 32, one a stage.

    The names of its parameters are those of the files that D-FINE has published.
    """

    size: Literal["b0", "b2", "b4", "b5"] = option(default="b4", help="how large: b0, b2, b4 and b5 for D-FINE S to X")
    weights: str | None = option(default=None, help="a file of weights, such as D-FINE's of ImageNet; null: random")
    trainable_layers: int = option(
        default=5, at_least=0, at_most=5, help="stages trained, from the last one; 5: and the stem"
    )
    norm: Literal["frozen", "eval", "batch", "group"] = option(
        default="batch", help="frozen: constants; eval: constant statistics, trained scale; batch; group"
    )

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import hgnetv2

        return hgnetv2.build(self)

    @property
    def table(self) -> Size:
        """What a network of this size consists of."""
        from detkernel_detectors.backbones.hgnetv2 import SIZES

        return SIZES[self.size]


@plugin
class Vgg(Backbone):
    """VGG-16 (Simonyan and Zisserman 2015) as SSD has it (Liu et al. 2016): maps at strides 8 and 16.

    https://arxiv.org/abs/1512.02325: of the fully connected layers, conv6, 3x3 with holes of 6 pixels, and conv7, 1x1.
    The maps are those of conv4_3 and conv7.
    """

    channels: int = option(
        default=64, at_least=1, help="of the first stage; conv4_3 has 8 times, conv7 16 times as many"
    )
    weights: str | None = option(
        default=None,
        help="torchvision's by name, such as IMAGENET1K_FEATURES, which are Caffe's, made for SSD's normalisation; a "
        "file; null: random. conv6 and conv7 begin at random where the weights have none",
    )
    trainable_layers: int = option(
        default=5, at_least=0, at_most=5, help="stages trained, from the last one; conv6 and conv7 are of the last"
    )

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import vgg

        return vgg.build(self)


@plugin
class Timm(Backbone):
    """Any model of timm that gives feature maps, by name: those of the strides asked for.

    Needs timm, which is installed with `pip install 'detkernel-detectors[timm]'`. Batch norm is
    as timm has it, and trained.
    """

    name: str = option(help="timm's, such as resnet50, convnext_tiny or efficientnet_b0")
    strides: list[int] = option(
        factory=lambda: [8, 16, 32], at_least=1, help="strides of the maps, fine to coarse; of each, the last map"
    )
    weights: str | None = option(
        default=None,
        help="pretrained: timm's, downloaded; a file of such a model, with or without its classifier; null: random",
    )
    frozen: list[str] = option(
        factory=list, help="prefixes of the parameters that are not trained, such as layer1; statistics are"
    )
    args: dict[str, Any] = option(factory=dict, help="further arguments of timm.create_model, by name")

    def build(self) -> nn.Module:
        from detkernel_detectors.backbones import timm_features

        return timm_features.build(self)
