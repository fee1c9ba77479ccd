"""The `voc_map` plugin: the Pascal VOC challenge's metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from detkernel import Run, option, plugin
from detkernel_detection import Detections

from detkernel_evaluation.evaluator import Evaluator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from detkernel_evaluation.found import Found, ImageResult


@plugin
class VocMap(Evaluator):
    """Pascal VOC average precision of boxes: 11 points as in 2007, or the area as from 2010 on."""

    prefix: str = option(default="pascal_voc", help="what the names of its metrics begin with, before a slash")
    iou: float | list[float] = option(
        default=0.5, above=0, at_most=1, help="the overlap that makes a hit; of a list, mAP is the mean"
    )
    metric: Literal["11points", "area"] = option(default="11points", help="'11points': VOC 2007; 'area': VOC 2010 on")
    legacy_widths: bool = option(
        default=True, help="add 1 to widths and heights, as VOC does: its corners are pixels that belong to the box"
    )
    per_class: bool = option(default=True, help="also the AP of every class: a table in the log, and in the metrics")

    def __attrs_post_init__(self) -> None:
        if self.iou == [] or len(set(self.thresholds)) < len(self.thresholds):
            raise ValueError(f"iou: expected one or more numbers, each once, got {self.iou}")

    @property
    def thresholds(self) -> list[float]:
        return self.iou if isinstance(self.iou, list) else [self.iou]

    def _compact(self, run: Run, detections: Detections) -> Found:
        from detkernel_evaluation.found import compact

        return compact(detections, masks=False, keypoints=False)

    def _evaluate(self, run: Run, images: Sequence[ImageResult]) -> Mapping[str, float]:
        import numpy as np

        from detkernel_evaluation.table import shown
        from detkernel_evaluation.voc_ap import average_precision, match

        classes = shown(run.loader.dataset.classes)
        matches = [match(images, label, self.legacy_widths) for label in range(len(classes))]
        aps = np.array([[average_precision(one, iou, self.metric) for iou in self.thresholds] for one in matches])
        there = np.array([one.positives > 0 for one in matches])
        means = aps[there].mean(0) if there.any() else np.full(len(self.thresholds), np.nan)
        metrics = {"mAP": float(means.mean())}
        metrics |= {name: float(mean) for name, mean in zip(self._columns(), means, strict=True)}
        if self.per_class:
            self._log(run, classes, [one.positives for one in matches], aps)
            metrics |= {f"AP/{name}": float(row.mean()) for name, row in zip(classes, aps, strict=True)}
        return metrics

    def _columns(self) -> list[str]:
        return [f"AP{100 * iou:g}" for iou in self.thresholds]

    def _log(self, run: Run, classes: Sequence[str], counts: Sequence[int], aps: NDArray[np.float64]) -> None:
        from detkernel_evaluation.table import table

        rows = list(zip(classes, counts, aps.tolist(), strict=True))
        run.log.info("%s", table(f"{self._title(run, '')} by class", self._columns(), rows))
