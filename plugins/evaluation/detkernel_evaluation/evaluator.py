"""What the evaluators have in common: they collect, merge over processes, and publish."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
from detkernel import Run, hookimpl, option, plugin, wrong
from detkernel.errors import did_you_mean
from detkernel_detection import Detections

if TYPE_CHECKING:
    from detkernel_evaluation.found import Found, ImageResult

Kind = Literal["bbox", "segm", "keypoints"]


@plugin(key="evaluation", priority="high")
class Evaluator(ABC):
    """Collects what every process detects; the first one computes, and every process has the metrics."""

    sets: tuple[str, ...] | None = option(
        default=None,
        help="which validation sets are measured: `val` (in `detkernel test`, `test`) and names in the loader's "
        "`further_val`; null: all of them",
    )
    prefix: str = option(default="", help="what the names of its metrics begin with, before a slash")

    _found: dict[int, Found] = attrs.field(init=False, factory=dict, repr=False)
    """By position in the data set."""
    _explained: set[str] = attrs.field(init=False, factory=set, repr=False)
    """The sets for which it was said why metrics are nan."""

    @abstractmethod
    def _compact(self, run: Run, detections: Detections) -> Found:
        """What to keep of the detections of one image."""

    @abstractmethod
    def _evaluate(self, run: Run, images: Sequence[ImageResult]) -> Mapping[str, float]:
        """The metrics, by name without the prefix; all get better as they rise. Called on the first process only."""

    @hookimpl(trylast=True)
    def setup(self, run: Run) -> None:
        """Behind the loader, who says which sets there are."""
        known = ("val", *run.val_sets)
        for name in self.sets or ():
            if name not in known:
                raise wrong(self, "sets", f"no validation set is named '{name}'{did_you_mean(name, known)}")
        self._check_prefix(run)
        for name in run.val_sets:
            if not any(part.measures(name) for _, part in run.bus.find(Evaluator)):
                raise wrong(
                    self, "sets", f"no evaluator measures the validation set '{name}'; add it here, or remove the set"
                )

    def measures(self, val_set: str) -> bool:
        """Whether a set is measured here; the empty text is `val`."""
        return self.sets is None or (val_set or "val") in self.sets

    def _check_prefix(self, run: Run) -> None:
        """Raise ConfigError where an evaluator before this one gives its metrics the same names."""
        for name, other in run.bus.find(Evaluator):
            if other is self:
                return
            shared = [one for one in ("", *run.val_sets) if self.measures(one) and other.measures(one)]
            if other.prefix == self.prefix and shared:
                raise wrong(
                    self,
                    "prefix",
                    f"'{name}' names its metrics of {shared[0] or 'val'} '{self.prefix}/...' too; give one of them "
                    "another `prefix`, or other `sets`",
                )

    @hookimpl
    def before_val_set(self, run: Run) -> None:
        self._found = {}

    @hookimpl
    def after_val_iter(self, run: Run, detections: Sequence[Detections]) -> None:
        if self.measures(run.val_set):
            for one in detections:
                self._found[one.index] = self._compact(run, one)

    @hookimpl
    def after_val_set(self, run: Run) -> None:
        if not self.measures(run.val_set):
            return
        from detkernel_evaluation.found import merged, results_by_image

        found = merged(run.processes.gathered(self._found))
        self._found = {}
        metrics = run.processes.from_main(lambda: self._measured(run, results_by_image(run, found)))
        for name, value in metrics.items():
            run.metrics.publish(name, value, better="higher")

    def _measured(self, run: Run, images: Sequence[ImageResult]) -> dict[str, float]:
        metrics = {f"{self.prefix}/{name}": value for name, value in self._evaluate(run, images).items()}
        if self._set(run) not in self._explained and not run.checking:  # a check sees one batch
            self._explained.add(self._set(run))
            self._explain(run, metrics, images)
        return metrics

    def _explain(self, run: Run, metrics: Mapping[str, float], images: Sequence[ImageResult]) -> None:
        """Say why metrics are nan, as they will be in every validation: it depends on the data alone."""
        name = self._name(run)
        unknown = [metric for metric, value in metrics.items() if math.isnan(value)]
        if not any(len(notes) for notes, _ in images):
            run.log.warning(
                "%s: none of the %d images of the %s data has an annotation: there is nothing to measure, its metrics "
                "are nan; name a data set with annotations in the loader's `%s`%s",
                name, len(images), self._set(run), self._set(run), self._without_annotations(),
            )  # fmt: skip
        elif unknown:
            examples = ", ".join(unknown[:3]) + ", ..." * bool(unknown[3:])
            run.log.info(
                "%s: %d of %d metrics are nan: the %s data has no object of their class or size (%s)",
                name, len(unknown), len(metrics), self._set(run), examples,
            )  # fmt: skip

    def _set(self, run: Run) -> str:
        """What the set that is validated is called."""
        return run.val_set or run.mode

    def _title(self, run: Run, name: str) -> str:
        """What a metric without its own name is called: `night/coco/bbox`."""
        return "/".join(filter(None, (run.val_set, self.prefix, name)))

    def _name(self, run: Run) -> str:
        """Its key in the config."""
        return next(name for name, part in run.bus.plugins.items() if part is self)

    def _without_annotations(self) -> str:
        """What else can be done about data without annotations."""
        return ""
