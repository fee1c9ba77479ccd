"""What the evaluators have in common: they collect, merge over processes, and publish."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
from detkernel import Run, hookimpl
from detkernel.detection import Detections
from detkernel.processes import from_main, gathered

if TYPE_CHECKING:
    from detkernel_evaluation._found import Found, Picture


@attrs.define(kw_only=True, eq=False, slots=False)
class Evaluator(ABC):
    """Collects what every process detects; the first one computes, and every process has the figures."""

    key = "evaluation"
    priority = "high"

    _found: dict[int, Found] = attrs.field(init=False, factory=dict, repr=False)
    """By position in the data set."""

    @abstractmethod
    def _compact(self, run: Run, detections: Detections) -> Found:
        """What to keep of the detections of one picture."""

    @abstractmethod
    def _evaluate(self, run: Run, pictures: Sequence[Picture]) -> Mapping[str, float]:
        """The figures for `run.metrics`. Called on the first process only."""

    @hookimpl
    def before_val_epoch(self, run: Run) -> None:
        self._found = {}

    @hookimpl
    def after_val_iter(self, run: Run, detections: Sequence[Detections]) -> None:
        for one in detections:
            self._found[one.index] = self._compact(run, one)

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        from detkernel_evaluation._found import merged, pictures

        found = merged(gathered(run, self._found))
        self._found = {}
        metrics = from_main(run, lambda: dict(self._evaluate(run, pictures(run, found))))
        for name, value in metrics.items():
            run.metrics.publish(name, value, better="higher")
