"""A learning rate that falls where validations no longer get better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from detkernel import Run, hookimpl, option, plugin, state, wrong
from detkernel.metrics import Better

from detkernel_optim.schedules import Schedule


@plugin(priority="below_normal")
class Plateau(Schedule):
    """Multiply the learning rate by `gamma` when a metric has stopped getting better (torch's ReduceLROnPlateau)."""

    metric: str = option(help="name of the metric, such as coco/bbox_mAP")
    gamma: float = option(default=0.1, above=0, below=1, help="factor of the learning rate each time")
    patience: int = option(
        default=5, at_least=0, help="validations without improvement that are waited for; the next lowers the rate"
    )
    min_delta: float = option(default=0.0, at_least=0, help="what counts as an improvement must be more than this")
    cooldown: int = option(default=0, at_least=0, help="validations behind a fall that do not count")
    end: float = option(default=0.0, at_least=0, at_most=1, help="lowest factor")
    rule: Better | None = option(default=None, help="which is better; null: what the metric's evaluator says")

    _level: float = state(default=1.0)
    _best: float | None = state(default=None)
    _waited: int = state(default=0)
    _cooling: int = state(default=0)

    @hookimpl
    def setup(self, run: Run) -> None:
        if run.mode == "train" and run.options.validate is None:
            raise wrong(self, "metric", "there are no validations to look at; set run.validate, to 'every 1 epoch' say")
        self._level, self._best, self._waited, self._cooling = 1.0, None, 0, 0

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        if not run.trains:
            return
        better, value = run.processes.from_main(lambda: self._judge(run))
        if run.checking:
            return
        if better:
            self._best, self._waited = value, 0
        else:
            self._waited += 1
        if self._cooling > 0:
            self._cooling, self._waited = self._cooling - 1, 0
        if self._waited > self.patience:
            self._fall(run)

    def _fall(self, run: Run) -> None:
        self._cooling, self._waited = self.cooldown, 0
        lower = max(self._level * self.gamma, self.end)
        if run.is_main and lower < self._level:
            best = "none" if self._best is None else f"{self._best:.4f}"
            run.log.info(
                "schedule: %s has not got better for %d validations (best: %s): the rate is now %.3g of the full",
                *(self.metric, self.patience + 1, best, lower),
            )
        self._level = lower

    def _judge(self, run: Run) -> tuple[bool, float]:
        """Whether this validation is the best so far, and its metric."""
        value, better = run.metrics.pick(self, "metric", self.rule)
        if math.isnan(value):
            return False, value
        if self._best is None:
            return True, value
        gain = value - self._best if better == "higher" else self._best - value
        return gain > self.min_delta, value

    def _factor(self, iteration: int, max_iters: int, epoch_length: int) -> float:
        return self._level

    def state_dict(self) -> dict[str, Any]:
        own = {"level": self._level, "best": self._best, "waited": self._waited, "cooling": self._cooling}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        level, best = float(state["level"]), state["best"]
        if not 0 <= level <= 1:
            raise ValueError(f"its factor is {level}")
        self._level, self._best = level, None if best is None else float(best)
        self._waited, self._cooling = int(state["waited"]), int(state["cooling"])
