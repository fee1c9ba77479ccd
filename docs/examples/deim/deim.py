"""DEIM (Huang et al. 2024, https://arxiv.org/abs/2412.04234): D-FINE in half of the epochs.

More objects an image (mosaic and mixup) give more queries an object, each still with a single one of its own; a loss
that does not give up on poor matches makes use of them. `coco_deim_dfine_l.yaml` is the recipe.
"""

import math

import torch
from detkernel import Run, Span, option, plugin, wrong
from detkernel_detection import ClassLoss
from detkernel_optim.schedules import Schedule
from torch.nn import functional


@plugin
class MatchabilityAware(ClassLoss):
    """Matchability-aware loss: a score is to be a power of the quality of its box, and poor boxes count as much as good
    ones (equation 3).

    MAL(p) = -q^gamma ln p - (1 - q^gamma) ln(1 - p) for the object's class, where q is the quality (IoU); for every
    other class -p^gamma ln(1 - p), where p^gamma has no gradient.
    """

    gamma: float = option(default=1.5, at_least=0, help="power of the quality, and of the probability elsewhere")

    def __call__(self, logits, labels, quality=None):
        own = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
        wanted = own.to(logits.dtype) if quality is None else torch.where(own, quality.pow(self.gamma)[..., None], 0.0)
        factor = torch.where(own, 1.0, logits.detach().sigmoid().pow(self.gamma))
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return self.weight * (factor * entropy).sum(-1)


@plugin
class FlatCosine(Schedule):
    """The full learning rate, then half a cosine down to `end` of it, then that rate: of RTMDet and DEIM."""

    flat: Span = option(help="how long it is full, warmup included, such as '29 epochs'")
    last: Span | None = option(
        default=None, help="how long it is `end` of that at the end of the run; null: not at all"
    )
    end: float = option(default=0.5, at_least=0, at_most=1, help="factor at the end")

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        start, stop = self._bounds(max_iters, epoch_length)
        share = min(max((iteration - start) / (stop - start), 0.0), 1.0)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * share)) / 2

    def _check(self, run: Run, max_iters: int) -> None:
        start, stop = self._bounds(max_iters, run.epoch_length)
        if start >= stop:
            found = f"it would fall between iterations {start} and {stop} of {max_iters}"
            raise wrong(self, "flat", f"nothing is left between `flat` and `last`: {found}")

    def _bounds(self, max_iters: int, epoch_length: int) -> tuple[int, int]:
        last = 0 if self.last is None else self.last.iters(epoch_length)
        return self.flat.iters(epoch_length), max_iters - last
