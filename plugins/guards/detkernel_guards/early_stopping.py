"""Ends a run that no longer gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from detkernel import Run, hookimpl, option, plugin, state, wrong
from detkernel.metrics import NAN, Better


@plugin(priority="low")
class EarlyStopping:
    """Stop when a metric has not improved for some validations."""

    metric: str = option(help="name of the metric, such as coco/bbox_mAP")
    patience: int = option(default=5, at_least=1, help="validations without improvement that are waited for")
    min_delta: float = option(default=0.0, at_least=0, help="what counts as an improvement must be more than this")
    rule: Better | None = option(default=None, help="which is better; null: what the metric's evaluator says")

    _best: float | None = state(default=None)
    _waited: int = state(default=0)
    _told_nan: bool = state(default=False)
    _run: Any = state(default=None)

    @hookimpl
    def setup(self, run: Run) -> None:
        if run.mode == "train" and run.options.validate is None:
            raise wrong(self, "metric", "there are no validations to look at; set run.validate, to 'every 1 epoch' say")
        self._run = run

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        if not run.trains:
            return
        value, better = run.metrics.pick(self, "metric", self.rule)
        if run.checking:
            return
        if math.isnan(value) and run.is_main and not self._told_nan:
            run.log.warning("early stopping counts a validation without improvement of %s: %s", self.metric, NAN)
            self._told_nan = True
        gain = 0.0 if self._best is None else value - self._best
        if better == "lower":
            gain = -gain
        if not math.isnan(value) and (self._best is None or gain > self.min_delta):
            self._best, self._waited = value, 0
            return
        self._waited += 1
        self._stop_if_due(run)

    def _stop_if_due(self, run: Run) -> None:
        if self._waited >= self.patience:
            best = "none yet" if self._best is None else f"{self._best:.4f}"
            run.stop(f"{self.metric} has not improved for {self._waited} validations (best: {best})")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best = state["best"]
        self._best, self._waited = None if best is None else float(best), int(state["waited"])
        if self._run is not None:
            self._stop_if_due(self._run)  # a run that had stopped for good is not trained on
