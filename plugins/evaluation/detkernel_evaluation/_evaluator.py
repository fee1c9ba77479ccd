"""What the evaluators have in common: they collect, merge over processes, and publish."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
from detkernel import Run, hookimpl
from detkernel_detection import Detections

if TYPE_CHECKING:
    from detkernel_evaluation._found import Found, Picture

Kind = Literal["bbox", "segm", "keypoints"]


@attrs.define(kw_only=True, eq=False, slots=False)
class Evaluator(ABC):
    """Collects what every process detects; the first one computes, and every process has the metrics."""

    key = "evaluation"
    priority = "high"

    _found: dict[int, Found] = attrs.field(init=False, factory=dict, repr=False)
    """By position in the data set."""
    _explained: set[str] = attrs.field(init=False, factory=set, repr=False)
    """The modes for which it was said why metrics are nan."""

    @abstractmethod
    def _compact(self, run: Run, detections: Detections) -> Found:
        """What to keep of the detections of one picture."""

    @abstractmethod
    def _evaluate(self, run: Run, pictures: Sequence[Picture]) -> Mapping[str, float]:
        """The metrics, by name; all get better as they rise. Called on the first process only."""

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

        found = merged(run.processes.gathered(self._found))
        self._found = {}
        metrics = run.processes.from_main(lambda: self._measured(run, pictures(run, found)))
        for name, value in metrics.items():
            run.metrics.publish(name, value, better="higher")

    def _measured(self, run: Run, pictures: Sequence[Picture]) -> dict[str, float]:
        metrics = dict(self._evaluate(run, pictures))
        if run.mode not in self._explained and not run.checking:  # a check sees one batch
            self._explained.add(run.mode)
            self._explain(run, metrics, pictures)
        return metrics

    def _explain(self, run: Run, metrics: Mapping[str, float], pictures: Sequence[Picture]) -> None:
        """Say why metrics are nan, as they will be in every validation: it depends on the data alone."""
        name = self._name(run)
        unknown = [metric for metric, value in metrics.items() if math.isnan(value)]
        if not any(len(notes) for notes, _ in pictures):
            run.log.warning(
                "%s: none of the %d images of the %s data has an annotation: there is nothing to measure, its metrics "
                "are nan; name a data set with annotations in the loader's `%s`%s",
                name, len(pictures), run.mode, run.mode, self._without_annotations(),
            )  # fmt: skip
        elif unknown:
            run.log.info(
                "%s: %d of %d metrics are nan: the %s data has no object of their class or size (%s%s)",
                name, len(unknown), len(metrics), run.mode, ", ".join(unknown[:3]), ", ..." if unknown[3:] else "",
            )  # fmt: skip

    def _name(self, run: Run) -> str:
        """Its key in the config."""
        return next(name for name, part in run.bus.plugins.items() if part is self)

    def _without_annotations(self) -> str:
        """What else can be done about data without annotations."""
        return ""
