"""timm's models as backbones, through its `features_only`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkernel import UserError, wrong
from detkernel.errors import did_you_mean, printable
from detkernel_detection.weights import Weights, are_replaced, load_into, read_weights
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detectors.backbones import Timm


class TimmFeatures(nn.Module):
    """Some of the maps of a model, as [B, C, H, W]."""

    def __init__(self, body: Any, strides: list[int]) -> None:
        super().__init__()
        self.body = body
        self.strides = strides
        self.channels: list[int] = body.feature_info.channels()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {
            str(number): x if x.shape[1] == channels else x.permute(0, 3, 1, 2)  # swin has its channels last
            for number, (x, channels) in enumerate(zip(self.body(images), self.channels, strict=True))
        }


def build(options: Timm) -> TimmFeatures:
    try:
        import timm
    except ModuleNotFoundError:
        raise UserError("the backbone `timm` needs timm: pip install 'detkernel-detectors[timm]'") from None
    if not timm.is_model(options.name):
        raise wrong(
            options, "name", f"timm has no model '{options.name}'{did_you_mean(options.name, timm.list_models())}"
        )
    found = _created(options).feature_info
    last = dict(zip(found.reduction(), found.out_indices, strict=True))
    unknown = [stride for stride in options.strides if stride not in last]
    if unknown or options.strides != sorted(set(options.strides)) or not options.strides:
        raise wrong(
            options,
            "strides",
            f"expected some of those of {options.name}, {sorted(last)}, fine to coarse, got {options.strides}",
        )
    # Made anew for these maps: of what lies behind the last of them, nothing is there.
    body = _created(
        options,
        out_indices=tuple(last[stride] for stride in options.strides),
        pretrained=options.weights == "pretrained" and not are_replaced(),
    )
    if options.weights not in (None, "pretrained") and not are_replaced():
        path = Path(options.weights).expanduser()
        if not path.is_file():
            raise wrong(options, "weights", f"expected 'pretrained' or a file; there is no file '{options.weights}'")
        load_into(body, _in_names_of(body, read_weights(path)))
    named = list(body.named_parameters())
    for prefix in options.frozen:
        if not any(name.startswith(prefix) for name, _ in named):
            raise wrong(options, "frozen", f"no parameter of {options.name} begins with '{prefix}'")
    for name, parameter in named:
        if name.startswith(tuple(options.frozen)):
            parameter.requires_grad_(False)
    return TimmFeatures(body, list(options.strides))


def _created(options: Timm, pretrained: bool = False, **arguments: Any) -> Any:
    import timm

    try:
        return timm.create_model(
            options.name, features_only=True, pretrained=pretrained, **{**options.args, **arguments}
        )
    except Exception as error:
        if pretrained:
            raise UserError(
                f"timm's weights of {options.name} cannot be had ({printable(str(error))}); where there is no network, "
                "give a file as `weights`"
            ) from None
        raise wrong(options, "name", f"{options.name} cannot be made: {printable(str(error))}") from None


def _in_names_of(body: nn.Module, weights: Weights) -> Weights:
    """What the maps need of a whole model's weights: timm writes the dots between stages as lines in those of maps."""
    own = {name.removeprefix("model.").replace(".", "_"): name for name in body.state_dict()}
    flat = {name.removeprefix("model.").replace(".", "_"): value for name, value in weights.tensors.items()}
    return Weights({own[name]: value for name, value in flat.items() if name in own}, weights.source)
