"""Images too small for a normalisation: maps in which a channel, or a group of them, has a single value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from detkernel import Run, UserError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detkernel_detection.structures import Batch

_TORCHS = "Expected more than 1 value per channel"
_ADVICE = (
    "Give the model larger images; a backbone or pyramid of finer strides (`levels`); for a norm of groups, more "
    "neck_channels; for batch norm, norm: frozen or eval, or a loader with drop_last: true or another batch_size"
)


@contextmanager
def explained(run: Run, batch: Batch) -> Iterator[None]:
    """Around a forward pass: torch's error becomes one that says what to do.

    Under `detkernel check`, what would fail in another batch is found too: in a group of one value, which becomes 0
    whatever is seen, and in batch norm where the training data makes a batch of a single image. Batch norm over several
    processes sees the images of all.
    """
    found: list[str] = []
    with ExitStack() as stack:
        if run.checking:
            smallest = getattr(run.loaders.get(run.val_set or run.mode), "smallest_batch", None) or len(batch)
            smallest *= run.world_size
            for name, module in run.bare_model.named_modules():
                if isinstance(module, (nn.GroupNorm, _BatchNorm)):
                    stack.callback(module.register_forward_pre_hook(_look(name, smallest, found)).remove)
        try:
            yield
        except ValueError as error:
            if _TORCHS not in str(error):
                raise
            count = "one image" if len(batch) == 1 else f"{len(batch)} images"
            found.append(
                f"in iteration {run.iter + 1}, a normalisation gets a single value a channel, in a batch of {count}"
            )
    if found:
        height, width = batch.images.shape[-2:]
        raise UserError(
            f"the model cannot take {'one image' if 'one image' in found[0] else 'images'} of {width}x{height}: "
            f"{found[0]}. {_ADVICE}"
        )


def _look(name: str, smallest: int, found: list[str]) -> Any:
    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _, channels, *sides = inputs[0].shape
        area = 1
        for side in sides:
            area *= side
        shape = "x".join(map(str, sides)) or "1"
        if isinstance(module, nn.GroupNorm):
            if area * channels // module.num_groups < 2:
                found.append(f"{name} gets maps of {shape}, one value in each of its {module.num_groups} groups")
        elif module.training and area * smallest < 2:
            found.append(f"{name}, a batch norm, gets maps of {shape}, and the data makes a batch of one image")

    return look
