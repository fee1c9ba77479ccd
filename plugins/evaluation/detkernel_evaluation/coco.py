"""The `coco_map` plugin: COCO's twelve metrics, as pycocotools computes them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from detkernel import ConfigError, Run, UserError, hookimpl, option, plugin, wrong
from detkernel.errors import relative
from detkernel.files import refuse_links
from detkernel_detection import Annotations, Dataset, Detections

from detkernel_evaluation.coco_backends import Backend, chosen, installed
from detkernel_evaluation.evaluator import Evaluator, Kind

if TYPE_CHECKING:
    from detkernel_evaluation.coco_evaluation import Evaluation, Rules
    from detkernel_evaluation.found import Found, ImageResult

PERSON_KEYPOINTS = 17
"""Those that COCO names, from the nose to the ankles."""


@plugin
class CocoForm(Evaluator):
    """What evaluators by COCO's way of matching share: `coco_map` and `lvis_map`."""

    kinds: list[Kind] = option(factory=lambda: ["bbox"], help="what to evaluate; each has its own metrics")
    iou_thresholds: tuple[float, ...] | None = option(
        default=None,
        above=0,
        at_most=1,
        help="mAP is the mean over these overlaps (OKS for keypoints), each of which "
        "has a metric of its own; null: .50:.05:.95, with metrics at .50 and .75",
    )
    area_ranges: dict[str, tuple[float, float | None]] | None = option(
        default=None,
        help="metrics by size: a name and the range of areas in square pixels, as in "
        "{tiny: [0, 256], rest: [256, null]}; null: COCO's s, m and l, which meet at 32 x 32 and 96 x 96",
    )
    per_class: bool = option(
        default=False, help="also AP and AP50 of every class: a table in the log, AP in the metrics"
    )
    save: Path | None = option(
        default=None,
        output=True,
        help="write the detections in COCO's form of results: a file in the work dir, or a full path",
    )

    backend: Backend = option(
        default="auto",
        help="what computes: `hotcoco`, where it is installed, gives the arrays of pycocotools about 50 times faster; "
        "`both` runs both, and is an error where an array differs by a bit",
    )

    def __attrs_post_init__(self) -> None:
        if self.backend in ("hotcoco", "both") and not installed():
            raise ValueError(
                f"backend: '{self.backend}' needs hotcoco, which is not installed: "
                "`pip install 'detkernel-evaluation[fast]'`, or set it to auto"
            )
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds: expected one or more of bbox, segm, keypoints, each once, got {self.kinds}")
        _check_once("iou_thresholds", self.iou_thresholds)
        for name, (low, high) in (self.area_ranges or {}).items():
            if not name.isidentifier() or name == "all":
                raise ValueError(f"area_ranges: expected names of letters, digits and _, not 'all', got {name!r}")
            if not 0 <= low < (math.inf if high is None else high):
                raise ValueError(f"area_ranges: '{name}' is [{low}, {high}], expected [from, to] with 0 <= from < to")

    @hookimpl
    def before_run(self, run: Run) -> None:
        """See that the data has what is to be evaluated, and that it can be saved, before hours are spent."""
        for name in ("", *run.val_sets):
            for path in self._files(run, name).values():
                refuse_links(path, run.work_dir)
        self._compare_limits(run)
        for mode in ("val", "test", *run.val_sets):
            if mode in run.loaders and self.measures("" if mode == "test" else mode):
                self._check_data(run.loaders[mode].dataset)

    def _compare_limits(self, run: Run) -> None:
        """A model says by `max_detections`, an attribute of its module, how many detections an image it gives."""
        most = getattr(run.bare_model, "max_detections", None)
        beyond = [limit for limit in self._limits() if most is not None and limit > most]
        if beyond and run.is_main:
            run.log.warning(
                "%s.max_dets: the model gives at most %d detections an image: its metrics at %s are those at %d; "
                "raise that limit of the model (`detections_per_img` or the like), or leave %s out of `max_dets`",
                self._name(run), most, *[" and ".join(map(str, beyond)), most, "them" if beyond[1:] else "it"],
            )  # fmt: skip

    @abstractmethod
    def _limits(self) -> Sequence[int]:
        """Numbers of detections an image that metrics ask for."""

    def _check_data(self, dataset: Dataset) -> None:
        """Raises `UserError` for data that lacks what is measured."""
        notes = (dataset.truth(index) for index in range(len(dataset)))
        self._check(next((note for note in notes if len(note)), None))

    def _check(self, notes: Annotations | None) -> None:
        if notes is not None and "segm" in self.kinds and notes.masks is None:
            raise self._lacks(f"'segm' needs masks, but the data has none ({notes.path})")

    def _lacks(self, message: str) -> ConfigError:
        return wrong(self, "kinds", f"{message}; leave it out of `kinds`")

    def _compact(self, run: Run, detections: Detections) -> Found:
        from detkernel_evaluation.found import compact

        found = compact(detections, masks="segm" in self.kinds, keypoints="keypoints" in self.kinds)
        for kind, there in ("segm", bool(found.masks)), ("keypoints", found.keypoints is not None):
            if kind in self.kinds and not there and len(detections):
                raise self._lacks(f"{_finder(detections)} no {'masks' if kind == 'segm' else kind}")
        return found

    def _evaluate(self, run: Run, images: Sequence[ImageResult]) -> Mapping[str, float]:
        from detkernel_evaluation.coco_evaluation import Evaluation, check_sizes
        from detkernel_evaluation.coco_metrics import summary

        check_sizes(images)
        if not run.checking:
            self._write(run, images)
        categories = category_ids(run.loader.dataset)
        labels = sorted(range(len(categories)), key=lambda label: categories[label])
        backend, metrics = self._backend(run, images), dict[str, float]()
        for kind in self.kinds:
            counted, not_exhaustive = self._counted(run, images, kind)
            evaluation = Evaluation(kind, counted, labels, self._rules(), backend, not_exhaustive)
            metrics |= summary(evaluation)
            metrics |= self._further(run, evaluation)
            if self.per_class:
                metrics |= self._classes(run, evaluation)
        return metrics

    @abstractmethod
    def _rules(self) -> Rules:
        """What is measured."""

    def _counted(
        self, run: Run, images: Sequence[ImageResult], kind: Kind
    ) -> tuple[Sequence[ImageResult], list[set[int]] | None]:
        """What counts of the images, and the labels of which not all objects in each are annotated."""
        return images, None

    def _further(self, run: Run, evaluation: Evaluation) -> Mapping[str, float]:
        """Further metrics of a kind."""
        return {}

    def _backend(self, run: Run, images: Sequence[ImageResult]) -> Backend:
        """Which one computes here: only pycocotools has a place for nan."""
        from detkernel_evaluation.hotcoco_arrays import has_nan

        backend = chosen(self.backend)
        if backend == "pycocotools" or not has_nan(images):
            return backend
        run.log.warning(
            "%s: boxes or scores are nan, which hotcoco does not take: pycocotools computes alone, and takes longer",
            self._name(run),
        )  # fmt: skip
        return "pycocotools"

    def _without_annotations(self) -> str:
        return ", or set `save` to a file to have the detections written" if self.save is None else ""

    def _classes(self, run: Run, evaluation: Evaluation) -> dict[str, float]:
        from detkernel_evaluation.coco_metrics import by_class
        from detkernel_evaluation.table import shown, table

        values, names = by_class(evaluation), shown(run.loader.dataset.classes)
        rows = list(zip(names, evaluation.counts(), values, strict=True))
        columns = ("AP", f"AP{next(iter(evaluation.named_thresholds))}")
        run.log.info("%s", table(f"{self._title(run, evaluation.kind)} by class", columns, rows))
        return {f"{evaluation.kind}_AP/{name}": ap for name, (ap, _) in zip(names, values, strict=True)}

    def _files(self, run: Run, val_set: str) -> dict[Kind, Path]:
        """The file of each kind: where one has several, pycocotools takes the area of a mask from its box."""
        if self.save is None:
            return {}
        path = run.work_dir / self.save
        if val_set:
            path = path.with_suffix(f".{val_set}{path.suffix}")
        if len(self.kinds) == 1:
            return {self.kinds[0]: path}
        return {kind: path.with_suffix(f".{kind}{path.suffix}") for kind in self.kinds}

    def _write(self, run: Run, images: Sequence[ImageResult]) -> None:
        from detkernel_evaluation.coco_results import write

        categories = category_ids(run.loader.dataset)
        for kind, path in self._files(run, run.val_set).items():
            try:
                write(path, kind, images, categories, run.work_dir)
                run.log.info("wrote the detections to %s", relative(path))
            except (OSError, UserError) as error:
                why = getattr(error, "strerror", None) or error
                run.log.error("%s could not be written: %s; the run goes on", relative(path), why)


@plugin(resume_neutral=("save", "backend"))
class CocoMap(CocoForm):
    """COCO average precision and recall of boxes, masks and keypoints, by pycocotools."""

    prefix: str = option(default="coco", help="what the names of its metrics begin with, before a slash")
    max_dets: tuple[int, ...] | None = option(
        default=None,
        at_least=1,
        help="detections an image and class for AR@N; AP goes by the largest; "
        "null: COCO's 1, 10 and 100, for keypoints 20",
    )
    sigmas: tuple[float, ...] | None = option(
        default=None, above=0, help="the spread of each keypoint, relative to the object's size; null: a person's 17"
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check_once("max_dets", self.max_dets)

    def _limits(self) -> Sequence[int]:
        return self.max_dets or ()

    def _check(self, notes: Annotations | None) -> None:
        if notes is None:
            return
        super()._check(notes)
        if "keypoints" not in self.kinds:
            return
        if notes.keypoints is None:
            raise self._lacks(f"'keypoints' needs keypoints, but the data has none ({notes.path})")
        many, given = notes.keypoints.shape[1], len(self.sigmas or range(PERSON_KEYPOINTS))
        if many != given:
            raise wrong(self, "sigmas", f"the data has {many} keypoints an object, expected {many} sigmas, not {given}")

    def _rules(self) -> Rules:
        from detkernel_evaluation.coco_evaluation import Rules

        return Rules(self.iou_thresholds, self.area_ranges, self.max_dets, self.sigmas)


def _check_once(name: str, given: Sequence[float] | None) -> None:
    """Raise ValueError for an empty list, or one with a number twice."""
    if given is not None and (not given or len(set(given)) < len(given)):
        raise ValueError(f"{name}: expected one or more numbers, each once, got {list(given)}")


def _finder(detections: Detections) -> str:
    from detkernel_evaluation.found import SavedDetections

    return "the file of detections has" if isinstance(detections, SavedDetections) else "the model detects"


def category_ids(dataset: Dataset) -> list[int]:
    """The category id of each class: the file's own; a class that it does not know has an id that no other has."""
    free = count(1 + max(dataset.category_ids.values(), default=0))
    return [dataset.category_ids[name] if name in dataset.category_ids else next(free) for name in dataset.classes]
