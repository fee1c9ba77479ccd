"""The kit for plugin authors, on the kernel's own tiny parts; each contract fails where it should, and there alone.

The contracts of transforms and data sets are tested in test_contracts.py.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import Run, hookimpl, option, plugin, state
from detkernel.testing import Recorder
from detkernel_detection import Batch, Dataset, Detections, Losses, Sample, Transform
from detkernel_detection.testing import (
    DatasetContract,
    EvaluatorContract,
    HookContract,
    ModelContract,
    TinyDataset,
    TinyDetector,
    TransformContract,
    tiny_run,
)
from torch import distributed

HERE = Path(__file__).parents[1]


@plugin
class Darken(Transform):
    """Halves the brightness of some images."""

    def __call__(self, sample: Sample) -> Sample:
        if torch.rand(()) < 0.5:
            sample.image = sample.image // 2
        return sample


class TestModel(ModelContract):
    def plugin(self) -> Any:
        return TinyDetector(dropout=0.0)


class TestDataset(DatasetContract):
    def dataset(self) -> Dataset:
        return TinyDataset()


class TestTransform(TransformContract):
    def transform(self) -> Transform:
        return Darken()


def run_all(contract: object, folder: Path, leave_out: str = "") -> None:
    """Every test of a contract."""
    for name in dir(contract):
        if name.startswith("test_") and name != leave_out:
            test = getattr(contract, name)
            test(*[folder / name for parameter in inspect.signature(test).parameters])


@plugin
class CountsAndSaves:
    """Adds its count to a weight, and saves the count."""

    _count: int = state(default=0)

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        self._count += 1
        with torch.no_grad():
            next(run.model.parameters()).add_(self.amount())

    def amount(self) -> float:
        return self._count * 1e-3

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]


@plugin
class DrawsFromNumpy(CountsAndSaves):
    """Adds what NumPy draws."""

    def amount(self) -> float:
        return float(np.random.rand()) * 1e-3


@plugin
class DrawsFromPython(CountsAndSaves):
    """Adds what Python draws."""

    def amount(self) -> float:
        return random.random() * 1e-3


@plugin
class DrawsFromItsOwn(CountsAndSaves):
    """Adds what a generator of its own draws, and does not save that."""

    _own: random.Random = state(factory=lambda: random.Random(0))

    def amount(self) -> float:
        return self._own.random() * 1e-3


@plugin
class Forgets(CountsAndSaves):
    """Saves, and does not load."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@plugin
class SavesAs(CountsAndSaves):
    """Saves something else beside the count."""

    extra: Any = option(help="what")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "extra": [self.extra]}


@plugin
class Stops(CountsAndSaves):
    """Stops the run after three iterations."""

    @hookimpl(specname="after_train_iter")
    def stop(self, run: Run) -> None:
        if run.iter == 3:
            run.stop("it is enough")


EXACT, PLAIN = "test_resumes_exactly", "test_saves_what_a_checkpoint_can_hold"


@pytest.mark.parametrize(
    ("hook", "options", "test", "message"),
    [
        (Forgets, {}, EXACT, r"must be in its state_dict\(\) and load"),
        (DrawsFromItsOwn, {}, EXACT, "random numbers must come from torch's, NumPy's or Python's"),
        (Stops, {}, EXACT, r"ended at iteration 3 \(it is enough\), but the contract resumes from each of 6"),
        (SavesAs, {"extra": {1, 2}}, PLAIN, r"state_dict\(\)\['extra'\]\[0\] is set: a checkpoint holds only"),
        (
            SavesAs,
            {"extra": Path},
            PLAIN,
            "is type: a checkpoint holds only arrays and plain values",
        ),
        (SavesAs, {"extra": {(1, 2): 3}}, PLAIN, r"the key \(1, 2\) of .* is tuple"),
    ],
)
def test_a_broken_hook_fails(hook: Any, options: Any, test: str, message: str, tmp_path: Path) -> None:
    contract = HookContract()
    contract.plugin = lambda: hook(**options)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=message):
        getattr(contract, test)(tmp_path)


@pytest.mark.parametrize("hook", [CountsAndSaves, DrawsFromNumpy, DrawsFromPython])
def test_a_right_hook_passes(hook: Any, tmp_path: Path) -> None:
    contract = HookContract()
    contract.plugin = hook  # type: ignore[method-assign]
    run_all(contract, tmp_path)


@plugin
class Detector(TinyDetector):
    """The tiny detector, with one thing changed."""

    fault: str = option(default="", help="what")

    @hookimpl
    def train_step(self, run: Run, model: Any, batch: Batch) -> Losses:
        first = batch.target(0)
        if self.fault == "needs objects":
            first.boxes[0]
        losses: Any = dict(super().train_step(run, model, batch))
        if self.fault == "draws" and run.model.training:
            losses["loss_cls"] = losses["loss_cls"] * (1 + 0.01 * np.random.rand() + 0.01 * random.random())
            losses["accuracy"] = torch.tensor(100.0)
        elif self.fault == "ignores boxes":
            losses["loss_bbox"] = 0 * losses["loss_bbox"]
        elif self.fault == "ignores labels":
            losses["loss_cls"] = 0 * losses["loss_cls"]
        elif self.fault == "no gradient" and not len(first):
            return {"loss": torch.zeros(())}
        elif self.fault == "other names":
            return {"cls": losses["loss_cls"]}
        elif self.fault == "nan":
            losses["loss_bbox"] = losses["loss_bbox"] * float("nan")
        elif self.fault == "no number":
            losses["loss_bbox"] = 0.5
        return losses

    @hookimpl
    def val_step(self, run: Run, batch: Batch) -> Sequence[Detections]:
        if self.fault == "ignores scales":
            batch.scales = [(1.0, 1.0)] * len(batch)
        found = list(super().val_step(run, batch))
        if self.fault == "nothing":
            return []
        if self.fault == "swapped":
            found[0].boxes, found[1].boxes = found[1].boxes, found[0].boxes
            found[0].labels, found[1].labels = found[1].labels, found[0].labels
        return [self._changed(one) for one in found]

    def _changed(self, one: Detections) -> Detections:
        if self.fault == "empty":
            return one.keep(one.labels < 0)
        if self.fault == "next label":
            one.labels = (one.labels + 1) % 3
        elif self.fault == "background":
            one.labels = one.labels + 3
        elif self.fault == "xywh":
            one.boxes = torch.cat([one.boxes[:, :2], one.boxes[:, 2:] - one.boxes[:, :2]], 1)
        elif self.fault == "percent":
            one.scores = 100 * one.scores
        elif self.fault == "other index":
            one.index += 1
        return one


FINDS, LEARNS = "test_finds_what_it_learned", "test_losses_follow_the_targets"
LOSSES, EMPTY = "test_gives_losses_that_reach_its_parameters", "test_trains_on_images_without_objects"


@pytest.mark.parametrize(
    ("fault", "test", "message"),
    [
        ("ignores boxes", LEARNS, "other boxes in batch.targets gave the same losses"),
        ("ignores labels", LEARNS, "other labels in batch.targets gave the same losses"),
        ("needs objects", EMPTY, "a batch without any object raised IndexError.*data has empty images"),
        ("no gradient", EMPTY, "gave losses without a gradient.*multiply an output by 0"),
        ("other names", LOSSES, r"returned \['cls'\]: at least one name must contain 'loss'"),
        ("nan", LOSSES, "'loss_bbox' is nan: a loss that is not finite"),
        ("no number", LOSSES, "'loss_bbox' is 0.5: a loss is a tensor of one number"),
        ("nothing", FINDS, "returned 0 Detections for 2 images"),
        ("empty", FINDS, "after 200 iterations .* val_step finds nothing"),
        ("next label", FINDS, "the best detection of image 0 .* expected the right class and an IoU over 0.5"),
        ("background", FINDS, "a background class is not among them"),
        ("xywh", FINDS, "boxes are xyxy in pixels"),
        ("swapped", FINDS, "each image gets its own detections"),
        ("percent", FINDS, r"expected 0\.\.1"),
        ("other index", FINDS, r"\(image_id, index\) \(0, 1\), expected those of the batch, \(0, 0\)"),
        ("ignores scales", "test_detects_in_the_coordinates_of_the_file", "divide them by batch.scales"),
    ],
)
def test_a_broken_model_fails(fault: str, test: str, message: str, tmp_path: Path) -> None:
    contract = ModelContract()
    contract.steps = 20
    contract.plugin = lambda: Detector(dropout=0.0, fault=fault)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=message):
        getattr(contract, test)(tmp_path)


def test_a_model_may_draw_from_every_global_generator_and_log_more_than_losses(tmp_path: Path) -> None:
    contract = ModelContract()
    contract.plugin = lambda: Detector(dropout=0.05, fault="draws")  # type: ignore[method-assign]
    run_all(contract, tmp_path)


@plugin
class Recall:
    """The share of boxes that are found exactly."""

    fault: str = option(default="", help="what is wrong with it")
    _found: dict[int, tuple[int, int]] = state(factory=dict)

    @hookimpl
    def before_val_set(self) -> None:
        if self.fault != "keeps":
            self._found = {}

    @hookimpl
    def after_val_iter(self, run: Run, batch: Batch, detections: Sequence[Detections]) -> None:
        for one, truth in zip(detections, batch.each_target(), strict=True):
            if self.fault == "needs detections":
                one.boxes[0]
            hits = (one.boxes[None] == truth.boxes[:, None]).all(2)
            if self.fault != "ignores labels":
                hits &= one.labels[None] == truth.labels[:, None]
            key = len(self._found) if self.fault == "keeps" else one.index
            self._found[key] = int(hits.any(1).sum()), len(truth)

    @hookimpl
    def after_val_set(self, run: Run) -> None:
        parts: list[Any] = [self._found]
        if run.world_size > 1:
            parts = [None] * run.world_size
            distributed.all_gather_object(parts, self._found)
        if self.fault == "averages":
            metric = sum(recall(list(part.values())) for part in parts) / len(parts)
        else:
            metric = recall([counts for part in parts for counts in part.values()])
        if self.fault == "tensor":
            run.metrics["recall"] = torch.tensor(metric)  # type: ignore[assignment]
        elif self.fault == "assigns":
            run.metrics["recall"] = metric
        else:
            run.metrics.publish("recall", metric, better="higher")


def recall(counts: list[tuple[int, int]]) -> float:
    return sum(hits for hits, _ in counts) / max(sum(boxes for _, boxes in counts), 1)


@pytest.mark.parametrize(
    ("fault", "test", "message"),
    [
        ("ignores labels", "test_wrong_labels_are_worse", "as good with wrong labels in two images"),
        ("assigns", "test_each_validation_set_is_measured_for_itself", "and publish in after_val_set"),
        ("keeps", "test_every_validation_starts_anew", "forget what was collected in before_val_set"),
        ("needs detections", "test_images_without_detections_count", "raised IndexError.*finds nothing in many im"),
        ("tensor", "test_perfect_detections_are_best", r"run.metrics\['recall'\] is Tensor, expected a float"),
        ("averages", "test_merges_over_processes", "the mean of their values is not the value of all"),
    ],
)
def test_a_broken_evaluator_fails(
    fault: str, test: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)  # other processes import this module
    contract = EvaluatorContract()
    contract.metric = "recall"
    contract.plugin = lambda: Recall(fault=fault)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=message):
        getattr(contract, test)(tmp_path)


def test_a_right_evaluator_passes(tmp_path: Path) -> None:
    contract = EvaluatorContract()
    contract.metric = "recall"
    contract.plugin = Recall  # type: ignore[method-assign]
    run_all(contract, tmp_path, leave_out="test_merges_over_processes")  # the evaluation plugins run it on theirs


def test_the_recorder_sees_every_event_with_its_arguments(tmp_path: Path) -> None:
    recorder = Recorder()
    run = tiny_run(until="2 iters", work_dir=tmp_path, recorder=recorder)
    assert recorder.names("iter") == ["before_train_iter", "after_train_iter"] * 2
    assert recorder.of("train_step")[0].arguments["run"] is run
    assert recorder.names()[0] == "setup"
    assert recorder.names()[-1] == "after_run"
