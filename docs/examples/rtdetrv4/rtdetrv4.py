"""RT-DETRv4 (Liao et al. 2025, https://arxiv.org/abs/2510.25257): a frozen vision model teaches RT-DETR's encoder.

Only in training: what is deployed is the same RT-DETR, D-FINE or DEIM, with the same parameters. `coco_rtdetrv4_s.yaml`
is a recipe.
"""

from __future__ import annotations

from typing import Any

from detkernel import Run, Span, hookimpl, option, plugin, state, wrong
from detkernel_detection import Backbone, Batch, Losses


@plugin
class SemanticDistill:
    """Draw the deepest map of the encoder, behind its attention, to the last map of a frozen teacher (RT-DETRv4).

    A projection of each place of the one is to point where the place of the other does (deep semantic injector). How
    much that counts is set by the gradients, at the end of each epoch, so that a constant share of them falls on the
    attention (gradient-guided adaptive modulation).
    """

    teacher: Backbone = option(
        help="a backbone with weights, such as {use: timm, name: vit_base_patch16_dinov3, strides: [16], ...}"
    )
    module: str = option(default="neck.attention", help="the module whose map is drawn, by its name in the model")
    weight: float = option(default=5.0, above=0, help="factor of the loss in the first epoch")
    share: float = option(
        default=0.11, above=0, below=1, help="of all gradients, by their absolute values, that the module is to have"
    )
    tolerance: float = option(default=0.01, at_least=0, below=1, help="how far from it the weight is left as it is")
    last_weight: float = option(default=20.0, above=0, help="factor from `last` on")
    last: Span | None = option(default=None, help="when augmentation ends, such as '120 epochs'; null: never")
    image_mean: tuple[float, float, float] = option(
        default=(123.675, 116.28, 103.53), help="of R, G and B on 0..255, as the teacher is given them"
    )
    image_std: tuple[float, float, float] = option(
        default=(58.395, 57.12, 57.375), above=0, help="of R, G and B on 0..255, as the teacher is given them"
    )

    factors: list[float] = state(factory=list)
    """The weight of each epoch so far, and of the one to come."""
    _seen: Any = state(default=None)
    """The module's map of this iteration."""
    _sums: Any = state(default=None)
    """On the device: the sum of the module's share over `_steps`."""
    _steps: int = state(default=0)

    def __attrs_post_init__(self) -> None:
        self.factors = [self.weight]
        if not self.tolerance < min(self.share, 1 - self.share):
            raise ValueError(f"tolerance: expected less than the share and the rest, got {self.tolerance}")

    # The deep semantic injector.

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        if not run.trains:
            return
        from torch import nn

        teacher: Any = self.teacher.build()
        module = dict(run.bare_model.named_modules()).get(self.module)
        if module is None:
            raise wrong(self, "module", f"the model has no module '{self.module}'; RT-DETR has neck.attention")
        channels = getattr(run.bare_model.neck, "channels", None)
        if not isinstance(channels, int):
            raise wrong(self, "module", "expected a model whose neck says its channels, such as rtdetr or dfine")
        run.add_module("teacher", teacher, trained=False, saved=False)
        run.add_module("projector", nn.Conv2d(channels, teacher.channels[-1], 1), trained=True, saved=True)
        module.register_forward_hook(self._see)

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        self._seen = output if module.training else None

    @hookimpl
    def after_forward(self, run: Run, batch: Batch) -> Losses:
        import torch
        from detkernel_detection.normalize import Normalize
        from torch.nn import functional

        given, self._seen = self._seen, None
        normalize = Normalize(self.image_mean, self.image_std, run.bare_model.normalize.size_divisible)
        with torch.no_grad():
            taught = list(run.modules["teacher"](normalize(batch.images, batch.image_sizes)).values())[-1]
            taught = functional.interpolate(taught, size=given.shape[-2:], mode="bilinear")
        learned = run.modules["projector"](given)
        alike = functional.cosine_similarity(learned.float(), taught.float(), dim=1)
        return {"loss_distill": self.factors[-1] * (1 - alike).mean()}

    # Gradient-guided adaptive modulation. Nothing is asked of the device before the end of an epoch.

    @hookimpl
    def before_optimizer_step(self, run: Run) -> None:
        import torch

        own, others = [], []
        for name, parameter in run.bare_model.named_parameters():
            if parameter.grad is not None:
                (own if name.startswith(f"{self.module}.") else others).append(parameter.grad)
        others += [one.grad for one in run.modules["projector"].parameters() if one.grad is not None]
        inside, outside = (
            torch.stack(torch._foreach_norm(grads, 1)).sum() if grads else torch.zeros((), device=run.device)
            for grads in (own, others)
        )
        share = (inside / (inside + outside)).nan_to_num(0.0)
        self._sums = share if self._sums is None else self._sums + share
        self._steps += 1

    @hookimpl
    def after_train_epoch(self, run: Run) -> None:
        if not self._steps:
            return
        share, before = float(self._sums) / self._steps, self.factors[-1]
        self._sums, self._steps = None, 0
        last = self.last is not None and run.iter >= self.last.iters(run.epoch_length)
        lost = last or share < 1e-8
        self.factors.append(self.last_weight if lost else modulated(before, share, self.share, self.tolerance))
        run.log.info(
            "rtdetrv4: %s has %.1f%% of the gradients; the weight of its loss goes from %.4g to %.4g",
            *(self.module, 100 * share, before, self.factors[-1]),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"factors": self.factors, "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        self.factors, self._steps = list(kept["factors"]), kept["steps"]
        self._sums = kept["sums"]


def modulated(weight: float, share: float, wanted: float, tolerance: float) -> float:
    """The weight of a loss whose module had such a share of the gradients: what brings it to the far edge of the range
    around the wanted one, if the gradients of the others stay as they are; at most ten times more or less."""
    if abs(share - wanted) <= tolerance:
        return weight
    goal = wanted + tolerance if share < wanted else wanted - tolerance
    return weight * min(max(goal * (1 - share) / (share * (1 - goal)), 0.1), 10.0)
