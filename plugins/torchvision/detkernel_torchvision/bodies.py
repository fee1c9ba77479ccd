"""The backbones that torchvision's own detectors use, with the names of their parameters kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from detkernel import wrong
from detkernel_detection import torchvision_weights
from torch import nn
from torchvision.models import mobilenetv3
from torchvision.models import resnet as resnets
from torchvision.models._utils import IntermediateLayerGetter

from detkernel_torchvision.norms import norm_layer

if TYPE_CHECKING:
    from detkernel_torchvision.backbones import MobilenetV3, Resnet


class Body(IntermediateLayerGetter):  # type: ignore[misc]
    """A module up to its last used layer; its maps by number."""

    def __init__(
        self, module: nn.Module, layers: Sequence[str], channels: Sequence[int], strides: Sequence[int]
    ) -> None:
        super().__init__(module, {layer: str(number) for number, layer in enumerate(layers)})
        self.channels, self.strides = list(channels), list(strides)


def resnet(options: Resnet) -> nn.Module:
    trained = options.weights is not None
    if options.depth < 50 and (options.groups, options.width_per_group) != (1, 64):
        raise wrong(options, "groups", f"a ResNet-{options.depth} has no groups; ResNeXt begins at depth 50")
    norm = norm_layer(options.norm or ("frozen" if trained else "batch"))
    builder = f"resnet{options.depth}"
    model = getattr(resnets, builder)(
        weights=None, norm_layer=norm, groups=options.groups, width_per_group=options.width_per_group
    )
    if options.weights is not None:
        relatives = [builder, "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
        torchvision_weights.load_backbone(model, options, relatives, options.weights)
    layers = options.trainable_layers
    trainable = (5 if not trained else 3) if layers is None else layers
    names = ["layer4", "layer3", "layer2", "layer1", "conv1"][:trainable] + (["bn1"] if trainable == 5 else [])
    freeze(parameter for name, parameter in model.named_parameters() if not name.startswith(tuple(names)))
    width = model.inplanes // 8
    kept = range(options.stages)
    return Body(model, [f"layer{n + 1}" for n in kept], [width * 2**n for n in kept], [4 * 2**n for n in kept])


def mobilenet(options: MobilenetV3) -> nn.Module:
    trained = options.weights is not None
    builder = f"mobilenet_v3_{options.size}"
    norm = norm_layer(options.norm or ("frozen" if trained else "batch"))
    model = getattr(mobilenetv3, builder)(weights=None, norm_layer=norm)
    if options.weights is not None:
        torchvision_weights.load_backbone(model.features, options, [builder], options.weights)
    blocks = model.features
    stages = [0, *(number for number, block in enumerate(blocks) if getattr(block, "_is_cn", False)), len(blocks) - 1]
    trainable = options.trainable_layers
    kept = min((len(stages) if not trained else 3) if trainable is None else trainable, len(stages))
    first = len(blocks) if kept == 0 else stages[len(stages) - kept]
    freeze(parameter for block in blocks[:first] for parameter in block.parameters())
    strides = _strides(blocks)
    layers = options.layers
    if layers is None:
        layers = [max(n for n, stride in enumerate(strides) if stride == wanted) for wanted in (4, 8, 16, 32)]
    if any(layer >= len(blocks) for layer in layers) or sorted(set(layers)) != layers:
        raise wrong(options, "layers", f"expected rising numbers below {len(blocks)}, got {layers}")
    channels = [blocks[layer].out_channels for layer in layers]
    return Body(blocks, [str(layer) for layer in layers], channels, [strides[layer] for layer in layers])


def _strides(blocks: nn.Sequential) -> list[int]:
    """The stride of each block's map: the product of the strides of the convolutions up to it."""
    strides, stride = [], 1
    for block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                stride *= module.stride[0] if module.kernel_size[0] > 1 else 1
        strides.append(stride)
    return strides


def freeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
