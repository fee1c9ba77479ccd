"""The `lvis_map` plugin: the metrics of LVIS, whose images are annotated for some of the classes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from detkernel import DataError, Run, option, plugin, wrong
from detkernel.errors import printable

from detkernel_evaluation.coco import CocoForm
from detkernel_evaluation.evaluator import Kind

if TYPE_CHECKING:
    from detkernel_detection import Dataset
    from detkernel_detection.federated import Federated

    from detkernel_evaluation.coco_evaluation import Evaluation, Rules
    from detkernel_evaluation.found import ImageResult

FREQUENCIES: dict[Literal["r", "c", "f"], str] = {"r": "rare", "c": "common", "f": "frequent"}


@plugin(resume_neutral=("save", "backend"))
class LvisMap(CocoForm):
    """LVIS average precision and recall of boxes and masks, by the official rules; also of rare, common and frequent
    classes.

    A class is measured in the images where it was looked for: where it has an object, or is verified to be absent. What
    is found beside the objects of a class that was not annotated exhaustively is neither right nor wrong. Source: Gupta
    et al., LVIS (CVPR 2019), and its `lvis` package.
    """

    prefix: str = option(default="lvis", help="what the names of its metrics begin with, before a slash")
    max_dets: int = option(
        default=300,
        at_least=1,
        help="how many detections of an image count, those of the highest scores of all classes",
    )

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if "keypoints" in self.kinds:
            raise ValueError("kinds: LVIS measures bbox and segm; leave 'keypoints' out")

    def _limits(self) -> Sequence[int]:
        return [self.max_dets]

    def _check_data(self, dataset: Dataset) -> None:
        super()._check_data(dataset)
        self._federated(dataset)

    def _federated(self, dataset: Dataset) -> Federated:
        """Raises ConfigError, or DataError for a class without a frequency."""
        found = dataset.federated
        if found is None:
            raise wrong(
                self,
                "",
                "lvis_map needs `neg_category_ids` and `not_exhaustive_category_ids` of each image, as LVIS's files "
                "have them, and this data has none; measure it with coco_map",
            )
        for name in dataset.classes:
            if name not in found.frequency:
                raise DataError(
                    f"lvis_map: category '{printable(name)}' has neither `frequency` nor `image_count`: whether it is "
                    "rare, common or frequent is not known; add one of them to the annotations"
                )
        return found

    def _rules(self) -> Rules:
        from detkernel_evaluation.coco_evaluation import Rules

        return Rules(self.iou_thresholds, self.area_ranges, [self.max_dets], None)

    def _counted(
        self, run: Run, images: Sequence[ImageResult], kind: Kind
    ) -> tuple[Sequence[ImageResult], list[set[int]] | None]:
        from detkernel_evaluation.lvis_rules import federated

        assert kind != "keypoints"
        dataset = run.loader.dataset
        return federated(images, dataset.classes, self._federated(dataset), self.max_dets, kind)

    def _further(self, run: Run, evaluation: Evaluation) -> Mapping[str, float]:
        """AP of the rare, the common and the frequent classes."""
        from detkernel_evaluation.coco_metrics import ap_of

        dataset = run.loader.dataset
        frequency = self._federated(dataset).frequency
        of = [frequency[dataset.classes[label]] for label in evaluation.labels]
        groups = {key: [k for k, value in enumerate(of) if value == key] for key in FREQUENCIES}
        return {f"{evaluation.kind}_mAP_{key}": ap_of(evaluation, group) for key, group in groups.items()}
