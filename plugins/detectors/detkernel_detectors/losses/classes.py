"""Losses of class logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from detkernel import option, plugin
from detkernel_detection import ClassLoss, HeatmapLoss

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch


@plugin
class Focal(ClassLoss):
    """Focal loss (Lin et al. 2017): cross-entropy that easy examples hardly add to.

    FL(p) = -alpha_t (1 - p_t)^gamma ln p_t, where p_t is the probability given to the truth: p, or 1 - p.
    """

    alpha: float = option(default=0.25, at_least=0, at_most=1, help="weight of yes; that of no is 1 - alpha")
    gamma: float = option(default=2.0, at_least=0, help="power of how wrong a probability is: 0 is cross-entropy")

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        # First as if all were background, then put right for the one class of each object: the logits are a hundred
        # times as many as the priors, and each pass over them counts.
        classes = logits.shape[-1]
        own = logits.gather(-1, labels.clamp(max=classes - 1)[..., None])[..., 0]
        found = self._of(logits, 1 - self.alpha).sum(-1)
        put_right = self._of(-own, self.alpha) - self._of(own, 1 - self.alpha)
        return self.weight * (found + torch.where(labels < classes, put_right, 0.0))

    def _of(self, wrong: Tensor, factor: float) -> Tensor:
        """`wrong`: the logit of the untrue answer, so that 1 - p_t is its sigmoid and -ln p_t its softplus."""
        return factor * wrong.sigmoid().pow(self.gamma) * torch.nn.functional.softplus(wrong)


@plugin
class CrossEntropy(ClassLoss):
    """Cross-entropy of each class: -y ln p - (1 - y) ln(1 - p), where y is the quality for the object's class."""

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        wanted = one_hot(labels, logits.shape[-1]).to(logits.dtype)
        if quality is not None:
            wanted = wanted * quality[..., None]
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return self.weight * entropy.sum(-1)


@plugin
class Softmax(ClassLoss):
    """Cross-entropy of one choice among all classes and no object, whose logit is the last: -ln p of the truth."""

    of_one_choice: ClassVar[bool] = True

    background: float = option(default=0.1, at_least=0, help="weight of what is no object, since most queries are not")

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        entropy = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return self.weight * entropy * torch.where(labels == logits.shape[-1] - 1, self.background, 1.0)


@plugin
class QualityFocal(ClassLoss):
    """Quality focal loss (Li et al. 2020): the score of the object's class is to be the quality of its box.

    QFL(p) = -|y - p|^beta ((1 - y) ln(1 - p) + y ln p), where y is the quality for the object's class, else 0.
    """

    beta: float = option(default=2.0, at_least=0, help="power of the distance between score and quality")

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        wanted = one_hot(labels, logits.shape[-1]).to(logits.dtype)
        if quality is not None:
            wanted = wanted * quality[..., None]
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return self.weight * ((wanted - logits.sigmoid()).abs().pow(self.beta) * entropy).sum(-1)


@plugin
class Varifocal(ClassLoss):
    """Varifocal loss (Zhang et al. 2021): an object counts as much as the quality of its box.

    VFL(p) = -q (q ln p + (1 - q) ln(1 - p)) for the object's class, where q is the quality; for every other class
    -alpha p^gamma ln(1 - p).
    """

    alpha: float = option(default=0.75, at_least=0, help="weight of no")
    gamma: float = option(default=2.0, at_least=0, help="power of the probability where the class is not there")
    differentiable: bool = option(
        default=False, help="whether alpha p^gamma has a gradient, as in VFNet; false: as in RT-DETR"
    )

    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        own = one_hot(labels, logits.shape[-1])
        wanted = own.to(logits.dtype) if quality is None else torch.where(own, quality[..., None], 0.0)
        probability = (logits if self.differentiable else logits.detach()).sigmoid()
        factor = torch.where(own, wanted, self.alpha * probability.pow(self.gamma))
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return self.weight * (factor * entropy).sum(-1)


@plugin
class GaussianFocal(HeatmapLoss):
    """Focal loss of maps of centres (Law and Deng 2018): places beside a centre are hardly told that they are none.

    -(1 - p)^alpha ln p at a centre, and -(1 - y)^beta p^alpha ln(1 - p) everywhere, where y is how near a centre is: 1
    at one. Equation 1 of https://arxiv.org/abs/1904.07850 (Zhou et al. 2019).
    """

    alpha: float = option(default=2.0, at_least=0, help="power of how wrong a probability is: 0 is cross-entropy")
    beta: float = option(default=4.0, at_least=0, help="power of how far a place is from a centre, 1 - y")
    yes: float = option(default=1.0, at_least=0, help="weight of what is said at centres")
    no: float = option(default=1.0, at_least=0, help="weight of what is said elsewhere")
    least: float = option(
        default=0.0, at_least=0, below=0.5, help="probabilities nearer to 0 or 1 count as this near, without a gradient"
    )

    def __call__(self, logits: Tensor, wanted: Tensor, positive: Tensor) -> Tensor:
        if self.least:
            most = math.log(1 / self.least - 1)
            logits = logits.clamp(-most, most)
        scores = logits.sigmoid()
        there = self.yes * positive * self._of(scores, 1 - scores)
        return self.weight * (there + self.no * (1 - wanted).pow(self.beta) * self._of(1 - scores, scores)).sum(-1)

    def _of(self, true: Tensor, wrong: Tensor) -> Tensor:
        """What is given to the true answer, and to the other. A loss is 28 at most, as MMDetection's: it adds 1e-12."""
        return -wrong.pow(self.alpha) * (true + 1e-12).log()


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """[...] -> bool [..., C]; a label outside of 0..C-1 gives no class."""
    return labels[..., None] == torch.arange(classes, device=labels.device)
