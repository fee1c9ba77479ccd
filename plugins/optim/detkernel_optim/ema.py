"""Averages of the weights, which detect better than the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import Run, UserError, hookimpl, option, plugin, state

from detkernel_optim.stepping import OptimizerEvents

if TYPE_CHECKING:
    from detkernel_optim._averages import Averages


@plugin
class Ema:
    """Keep an exponential moving average of the weights; validate with it, and save it to detect with.

    The decay ramps up as decay * (1 - exp(-steps / ramp)), so that the first weights, which know nothing, are soon
    forgotten (as in YOLOv5 and MMDetection's ExpMomentumEMA).
    """

    events: ClassVar[type] = OptimizerEvents

    decay: float = option(default=0.9998, above=0, below=1, help="share of the old average that a step keeps")
    ramp: float = option(
        default=2000, at_least=0, help="steps in which the decay rises to two thirds of it; 0: at once"
    )
    every: int = option(default=1, at_least=1, help="steps between updates")

    _averages: Averages | None = state(default=None)
    _steps: int = state(default=0)
    _swapped: bool = state(default=False)

    @hookimpl
    def before_run(self, run: Run) -> None:
        from detkernel_optim._averages import Averages

        steppers = [
            p for p in run.bus.plugins.values() if getattr(type(p), "events", None) is OptimizerEvents and p is not self
        ]
        if not steppers and run.mode == "train":
            raise UserError(
                "ema: no active plugin fires after_optimizer_step; step with sgd, adam, adamw or torch_optimizer"
            )
        self._averages, self._steps, self._swapped = Averages(run.bare_model), 0, False

    @hookimpl
    def after_optimizer_step(self) -> None:
        self._steps += 1
        if self._averages is not None and self._steps % self.every == 0:
            ramped = 1.0 if self.ramp == 0 else 1 - math.exp(-self._steps / self.ramp)
            self._averages.update(self.decay * ramped)

    @hookimpl
    def before_val_epoch(self, run: Run) -> None:
        if run.mode != "test":  # a test has loaded the averages
            self._swap()

    @hookimpl(tryfirst=True)
    def after_val_epoch(self) -> None:
        if self._swapped:
            self._swap()

    @hookimpl
    def on_error(self) -> None:
        if self._swapped:
            self._swap()

    def model_state_dict(self) -> dict[str, Any] | None:
        """The averaged weights: what a checkpoint offers to detect with."""
        return None if self._averages is None else self._averages.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "averages": self.model_state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        if not 0 <= self._steps < 2**53:
            raise ValueError(f"it counts {state['steps']} steps")
        if self._averages is not None:
            self._averages.load_state_dict(state["averages"])

    def _swap(self) -> None:
        if self._averages is not None:
            self._averages.swap()
            self._swapped = not self._swapped
