"""The `coco_map` plugin: COCO's twelve figures, as pycocotools computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from detkernel import ConfigError, Run, hookimpl, option, plugin, wrong
from detkernel.detection import Annotations, Detections
from detkernel.errors import relative

from detkernel_evaluation._evaluator import Evaluator

if TYPE_CHECKING:
    from detkernel_evaluation._coco_eval import Evaluation
    from detkernel_evaluation._found import Found, Picture

PERSON_KEYPOINTS = 17
"""Those that COCO names, from the nose to the ankles."""


@plugin
class CocoMap(Evaluator):
    """COCO average precision and recall of boxes, masks and keypoints, by pycocotools."""

    resume_neutral: ClassVar[tuple[str, ...]] = ("save",)

    kinds: list[Literal["bbox", "segm", "keypoints"]] = option(
        factory=lambda: ["bbox"], help="what to evaluate; each has its own figures"
    )
    max_dets: tuple[int, ...] = option(
        default=(1, 10, 100), at_least=1, help="detections a picture and class for AR@N; AP goes by the largest"
    )
    per_class: bool = option(
        default=False, help="also AP and AP50 of every class: a table in the log, AP in the metrics"
    )
    sigmas: tuple[float, ...] | None = option(
        default=None, above=0, help="the spread of each keypoint, relative to the object's size; null: a person's 17"
    )
    save: Path | None = option(
        default=None, help="write the detections in COCO's form of results: a file in the work dir, or a full path"
    )

    def __attrs_post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds: expected one or more of bbox, segm, keypoints, each once, got {self.kinds}")
        if not self.max_dets or len(set(self.max_dets)) < len(self.max_dets):
            raise ValueError(f"max_dets: expected one or more numbers, each once, got {list(self.max_dets)}")

    @hookimpl
    def before_run(self, run: Run) -> None:
        """See that the data has what is to be evaluated, before hours are spent."""
        for mode in ("val", "test"):
            if mode in run.loaders:
                dataset = run.loaders[mode].dataset
                notes = (dataset.annotations(index) for index in range(len(dataset)))
                self._check(next((note for note in notes if len(note)), None))

    def _check(self, notes: Annotations | None) -> None:
        if notes is None:
            return
        if "segm" in self.kinds and notes.masks is None:
            raise self._lacks(f"'segm' needs masks, but the data has none ({notes.path})")
        if "keypoints" not in self.kinds:
            return
        if notes.keypoints is None:
            raise self._lacks(f"'keypoints' needs keypoints, but the data has none ({notes.path})")
        many, given = notes.keypoints.shape[1], len(self.sigmas or range(PERSON_KEYPOINTS))
        if many != given:
            raise wrong(self, "sigmas", f"the data has {many} keypoints an object, expected {many} sigmas, not {given}")

    def _lacks(self, message: str) -> ConfigError:
        return wrong(self, "kinds", f"{message}; leave it out of `kinds`")

    def _compact(self, run: Run, detections: Detections) -> Found:
        from detkernel_evaluation._found import compact

        for kind, part in ("segm", detections.masks), ("keypoints", detections.keypoints):
            if kind in self.kinds and part is None and len(detections):
                raise self._lacks(f"the model detects no {'masks' if kind == 'segm' else kind}")
        return compact(detections, masks="segm" in self.kinds, keypoints="keypoints" in self.kinds)

    def _evaluate(self, run: Run, pictures: Sequence[Picture]) -> Mapping[str, float]:
        from detkernel_evaluation._coco_eval import Evaluation, check_sizes
        from detkernel_evaluation._coco_figures import figures

        dataset = run.loaders[run.mode].dataset
        check_sizes(pictures)
        if self.save is not None and not run.checking:
            self._write(run, self.save, pictures)
        metrics: dict[str, float] = {}
        for kind in self.kinds:
            limits = (20,) if kind == "keypoints" else self.max_dets
            evaluation = Evaluation(kind, pictures, len(dataset.classes), limits, self.sigmas)
            metrics |= {f"coco/{name}": value for name, value in figures(evaluation).items()}
            if self.per_class:
                metrics |= self._classes(run, evaluation, dataset.classes)
        return metrics

    def _classes(self, run: Run, evaluation: Evaluation, classes: Sequence[str]) -> dict[str, float]:
        from detkernel_evaluation._coco_figures import by_class
        from detkernel_evaluation._table import table

        values = by_class(evaluation)
        rows = list(zip(classes, evaluation.counts(), values, strict=True))
        run.log.info("%s", table(f"coco/{evaluation.kind} by class", ("AP", "AP50"), rows))
        return {f"coco/{evaluation.kind}_AP/{name}": ap for name, (ap, _) in zip(classes, values, strict=True)}

    def _write(self, run: Run, save: Path, pictures: Sequence[Picture]) -> None:
        """One file a kind: where a file has both, pycocotools takes the area of a mask from its box."""
        from detkernel_evaluation._coco_results import write

        dataset = run.loaders[run.mode].dataset
        categories = [dataset.category_ids.get(name, label + 1) for label, name in enumerate(dataset.classes)]
        for kind in self.kinds:
            path = run.work_dir / save
            path = path if len(self.kinds) == 1 else path.with_suffix(f".{kind}{path.suffix}")
            try:
                write(path, kind, pictures, categories)
                run.log.info("wrote the detections to %s", relative(path))
            except OSError as error:
                run.log.error("%s could not be written: %s; the run goes on", relative(path), error.strerror or error)
