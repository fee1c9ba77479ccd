"""Backbones: what turns an image into feature maps, for every detector with a pyramid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from detkernel import option, plugin
from detkernel_detection import Backbone

if TYPE_CHECKING:
    from torch import nn

Norm = Literal["frozen", "eval", "batch", "group"]


@plugin
class Resnet(Backbone):
    """A ResNet (He et al. 2016) from torchvision: maps at strides 4, 8, 16 and 32, one a stage.

    Without weights, everything is trained and batch norm is ordinary; with weights, the stem and the first stage are
    frozen and so is batch norm, as in every published recipe.
    """

    depth: Literal[18, 34, 50, 101, 152] = option(default=50, help="number of layers")
    groups: int = option(default=1, at_least=1, help="groups of the 3x3 convolutions: 32 makes a ResNeXt (50 and more)")
    width_per_group: int = option(default=64, at_least=1, help="channels of a group in the first stage: 4 for ResNeXt")
    stages: Literal[1, 2, 3, 4] = option(default=4, help="stages kept: with 3, a quarter faster")
    weights: str | None = option(
        default=None, help="torchvision's by name, such as IMAGENET1K_V1 or DEFAULT; a file; null: random"
    )
    trainable_layers: int | None = option(
        default=None, at_least=0, at_most=5, help="stages trained, from the last one; null: 3 with weights, else 5"
    )
    norm: Norm | None = option(
        default=None,
        help="frozen: constants; eval: constant statistics, trained scale; batch; group; null: frozen with weights, "
        "else batch",
    )

    def build(self) -> nn.Module:
        from detkernel_torchvision import bodies

        return bodies.resnet(self)


@plugin
class MobilenetV3(Backbone):
    """A MobileNetV3 (Howard et al. 2019) from torchvision: the last map of each stride from 4 to 32."""

    size: Literal["large", "small"] = option(default="large", help="which of the two")
    weights: str | None = option(default=None, help="torchvision's by name, such as DEFAULT; a file; null: random")
    trainable_layers: int | None = option(
        default=None, at_least=0, at_most=6, help="stages trained, from the last one; null: 3 with weights, else all"
    )
    norm: Norm | None = option(default=None, help="as in resnet; null: frozen with weights, else batch")
    layers: list[int] | None = option(
        default=None, at_least=0, help="numbers of the blocks whose maps are used; null: the last of each stride"
    )

    def build(self) -> nn.Module:
        from detkernel_torchvision import bodies

        return bodies.mobilenet(self)


@plugin
class TorchvisionBackbone(Backbone):
    """Any classification model of torchvision, by name, through feature extraction."""

    name: str = option(help="such as efficientnet_b0, convnext_tiny, regnet_y_400mf or swin_t")
    weights: str | None = option(default=None, help="torchvision's by name, such as DEFAULT; a file; null: random")
    nodes: list[str] | None = option(
        default=None,
        help="nodes of its graph whose maps are used, fine to coarse; null: the last of each stride from 4",
    )
    frozen: list[str] = option(factory=list, help="prefixes of the parameters that are not trained, such as features.0")
    args: dict[str, Any] = option(factory=dict, help="arguments of its builder, by name")

    def build(self) -> nn.Module:
        from detkernel_torchvision import feature_extraction

        return feature_extraction.extract(self)
