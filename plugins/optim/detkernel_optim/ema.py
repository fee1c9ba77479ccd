"""Averages of the weights, which detect better than the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from detkernel import Run, UserError, hookimpl, option, plugin, state

if TYPE_CHECKING:
    from detkernel_optim.averages import Averages


@plugin
class Ema:
    """Keep an exponential moving average of the weights; validate with it, and save it to detect with.

    The decay ramps up as decay * (1 - exp(-steps / ramp)), so that the first weights, which know nothing, are soon
    forgotten (as in YOLOv5 and MMDetection's ExpMomentumEMA).
    """

    decay: float = option(default=0.9998, above=0, below=1, help="share of the old average that a step keeps")
    ramp: float = option(
        default=2000, at_least=0, help="steps in which the decay rises to two thirds of it; 0: at once"
    )
    every: int = option(default=1, at_least=1, help="steps between updates")

    _averages: Averages | None = state(default=None)
    _steps: int = state(default=0)
    _decay: float | None = state(default=None)
    """That of an average that was begun anew."""
    _swapped: bool = state(default=False)
    _versions: int | None = state(default=None)
    """Of the weights at the begin of an iteration, until a step has been heard of."""
    _heard: bool = state(default=False)

    @hookimpl
    def before_run(self, run: Run) -> None:
        from detkernel_optim.averages import Averages

        self._averages, self._steps, self._swapped = Averages(run.bare_model), 0, False
        self._decay = None
        self._heard = False

    @hookimpl
    def before_train_iter(self, run: Run) -> None:
        if not self._heard:
            self._versions = _versions(run)

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        """A stepping plugin that does not say when it steps would leave the averages at the weights of the start."""
        if not self._heard and _versions(run) != self._versions:
            raise UserError(
                "ema: the weights were stepped, but no plugin fired after_optimizer_step, so there is nothing to "
                "average; in your stepping plugin, call run.hook.after_optimizer_step(run=run) behind each step"
            )

    @hookimpl
    def after_optimizer_step(self) -> None:
        self._heard = True
        self._steps += 1
        if self._averages is not None and self._steps % self.every == 0:
            ramped = 1.0 if self.ramp == 0 else 1 - math.exp(-self._steps / self.ramp)
            self._averages.update((self.decay if self._decay is None else self._decay) * ramped)

    @hookimpl
    def before_val_epoch(self, run: Run) -> None:
        if run.trains:  # a test has loaded the averages
            self._swap()

    @hookimpl(tryfirst=True)
    def after_val_epoch(self) -> None:
        if self._swapped:
            self._swap()

    @hookimpl
    def on_error(self) -> None:
        if self._swapped:
            self._swap()

    def restart_average(self, decay: float | None = None) -> None:
        """Begin anew with the weights of now, and with another decay from here on, if one is given."""
        self._steps = 0
        if decay is not None:
            self._decay = decay
        if self._averages is not None:
            self._averages.restart()

    def model_state_dict(self) -> dict[str, Any] | None:
        """The averaged weights: what a checkpoint offers to detect with."""
        return None if self._averages is None else self._averages.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "decay": self._decay, "averages": self.model_state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
        if not 0 <= self._steps < 2**53:
            raise ValueError(f"it counts {state['steps']} steps")
        self._decay = None if state["decay"] is None else float(state["decay"])
        if self._decay is not None and not 0 < self._decay < 1:
            raise ValueError(f"its decay is {self._decay}")
        if self._averages is not None:
            self._averages.load_state_dict(state["averages"])

    def _swap(self) -> None:
        if self._averages is not None:
            self._averages.swap()
            self._swapped = not self._swapped


def _versions(run: Run) -> int:
    """Rises with every change of a parameter in place. Asks the device for nothing."""
    return sum(parameter._version for parameter in run.bare_model.parameters())
