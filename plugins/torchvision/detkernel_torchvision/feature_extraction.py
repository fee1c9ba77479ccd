"""Any classification model as a backbone, through torchvision's feature extraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torchvision.models
from detkernel import wrong
from detkernel.errors import did_you_mean
from detkernel_detection import torchvision_weights
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from detkernel_torchvision.bodies import freeze

if TYPE_CHECKING:
    from detkernel_torchvision.backbones import TorchvisionBackbone

PROBE = (224, 448)
"""Height and width of the image that is sent through to find the strides: their ratio tells NCHW from NHWC."""


class Features(nn.Module):
    """Maps of some nodes, as [B, C, H, W]; `channels` and `strides` say what they are."""

    def __init__(self, model: nn.Module, nodes: Sequence[str], shapes: Sequence[tuple[int, int, bool]]) -> None:
        super().__init__()
        self.body = create_feature_extractor(model, {node: str(number) for number, node in enumerate(nodes)})
        self.strides = [stride for stride, _, _ in shapes]
        self.channels = [channels for _, channels, _ in shapes]
        self._last = [last for _, _, last in shapes]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images)
        return {
            name: item.permute(0, 3, 1, 2) if last else item
            for (name, item), last in zip(maps.items(), self._last, strict=True)
        }


def extract(options: TorchvisionBackbone) -> nn.Module:
    known = torchvision.models.list_models(torchvision.models)
    if options.name not in known:
        raise wrong(
            options,
            "name",
            f"torchvision has no classification model '{options.name}'{did_you_mean(options.name, known)}",
        )
    try:
        model = torchvision.models.get_model(options.name, weights=None, **options.args)
    except (TypeError, ValueError) as error:
        raise wrong(options, "args", f"{options.name}: {error}") from None
    if options.weights is not None:
        torchvision_weights.load_backbone(model, options, [options.name], options.weights)
    named = list(model.named_parameters())
    for prefix in options.frozen:
        if not any(name.startswith(prefix) for name, _ in named):
            raise wrong(options, "frozen", f"no parameter of {options.name} begins with '{prefix}'")
    freeze(parameter for name, parameter in named if name.startswith(tuple(options.frozen)))
    shapes = _shapes(model, options.nodes or get_graph_node_names(model)[1], options)
    nodes = options.nodes or _last_of_each_stride(shapes)
    for node in nodes:
        if node not in shapes:
            raise wrong(options, "nodes", f"'{node}' gives no feature map")
    return Features(model, nodes, [shapes[node] for node in nodes])


def _shapes(model: nn.Module, nodes: Sequence[str], options: TorchvisionBackbone) -> dict[str, tuple[int, int, bool]]:
    """Of each node that gives a feature map: its stride, its channels, and whether they come last."""
    try:
        probe = create_feature_extractor(model.eval(), list(nodes))
    except ValueError as error:
        raise wrong(options, "nodes", str(error).splitlines()[0]) from None
    with torch.no_grad():
        outputs = probe(torch.zeros(1, 3, *PROBE))
    model.train()
    shapes = {}
    for node, output in outputs.items():
        if isinstance(output, Tensor) and output.ndim == 4:
            _, a, b, c = output.shape
            if c == 2 * b:
                shapes[node] = (PROBE[0] // b, a, False)
            elif b == 2 * a:
                shapes[node] = (PROBE[0] // a, c, True)
    return shapes


def _last_of_each_stride(shapes: dict[str, tuple[int, int, bool]]) -> list[str]:
    last = {stride: node for node, (stride, _, _) in shapes.items() if stride in (4, 8, 16, 32)}
    return [last[stride] for stride in sorted(last)]
