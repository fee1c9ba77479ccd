"""What backbones share that consist of a stem and four stages: which of these are trained, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from detkernel import wrong
from detkernel_detection import torchvision_weights
from detkernel_detection.weights import load_into, read_weights
from torch import nn

if TYPE_CHECKING:
    from detkernel_detection import Backbone


class Options(Protocol):
    """The options that these backbones have alike."""

    @property
    def weights(self) -> str | None: ...

    @property
    def trainable_layers(self) -> int | None: ...

    @property
    def norm(self) -> str | None: ...


class Freezable(nn.Module):
    """A network of a stem and at most four stages, of which the first ones may be frozen."""

    sections: Sequence[Sequence[str]]
    """The names of the modules of the stem, and of those of each stage."""
    frozen: tuple[str, ...] = ()

    def freeze(self, trained: int) -> None:
        """Train only so many sections, from the last of five: others get no gradient and keep their statistics."""
        self.frozen = tuple(name for section in self.sections[: 5 - trained] for name in section)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self


def kind_of_norm(options: Options) -> str:
    """Frozen with weights, else batch, unless the option says."""
    return options.norm or ("batch" if options.weights is None else "frozen")


def freeze(model: Freezable, options: Options) -> None:
    """As many stages as the option says: three with weights, else all and the stem, unless it does."""
    default = 5 if options.weights is None else 3
    model.freeze(default if options.trainable_layers is None else options.trainable_layers)


def begin(model: nn.Module, last_norms: Sequence[nn.Module] = ()) -> None:
    """Kaiming's weights for convolutions. The last norm of a block begins at 0: a block begins as its shortcut."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in last_norms:
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]


def load_weights(
    model: nn.Module, part: Backbone, name: str, builders: Sequence[str] = (), left_out: tuple[str, ...] = ()
) -> None:
    """torchvision's weights of one of its `builders` by name, or a file's; what classifies an image is left out.

    `left_out`: how further names begin that are. Raises `ConfigError` and `CheckpointError`.
    """
    if builders and not Path(name).suffix and "/" not in name:
        torchvision_weights.load_backbone(model, part, builders, name)
        return
    path = Path(name).expanduser()
    if not path.is_file():
        raise wrong(part, "weights", f"there is no file '{name}'")
    load_into(model, read_weights(path), ignore=(*torchvision_weights.CLASSIFIERS, *left_out))
