"""What an evaluator promises: the best value for perfect detections, and one value over all processes."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from detkernel.run import Run

from detkernel_detection import Batch, Detections
from detkernel_detection.processes import TorchProcesses
from detkernel_detection.testing.tiny import TinyDataset, TinyLoader, make_batch, tiny_kernel

IMAGES = 6
"""The last one shows nothing."""
PARTS = ((0, 3, 4, 5), (1, 2))
"""The images of each of two processes: not as many, so that the mean of their values is not the value of all."""


@attrs.frozen
class _Faults:
    """The images in which the detections are wrong, and how."""

    moved: Sequence[int] = ()
    renamed: Sequence[int] = ()
    missed: Sequence[int] = ()


class EvaluatorContract:
    """An evaluator gives its best for perfect detections only, starts anew each time, and merges over processes."""

    metric: str
    """The value to look at, such as `coco/bbox_mAP`."""
    best = 1.0
    labels_matter = True
    """False for a value that asks where objects are and not what they are, such as the recall of proposals."""

    def plugin(self) -> Any:
        """The evaluator; called anew for every run."""
        raise NotImplementedError("return your evaluator plugin")

    def test_perfect_detections_are_best(self, tmp_path: Path) -> None:
        value = self._value(tmp_path, _Faults())
        assert abs(value - self.best) < 1e-6, f"perfect detections gave {self.metric} {value}, not {self.best}"

    def test_wrong_detections_are_worse(self, tmp_path: Path) -> None:
        value = self._value(tmp_path, _Faults(moved=(0, 1)))
        assert value != self.best, f"{self.metric} is as good with the boxes of two images at wrong places"

    def test_wrong_labels_are_worse(self, tmp_path: Path) -> None:
        if self.labels_matter:
            value = self._value(tmp_path, _Faults(renamed=(0, 1)))
            assert value != self.best, (
                f"{self.metric} is as good with wrong labels in two images: compare detections.labels with those of "
                "the annotations (or set labels_matter = False for a value that is meant to ignore them)"
            )

    def test_images_without_detections_count(self, tmp_path: Path) -> None:
        for missed in ((0,), range(IMAGES)):
            try:
                value = self._value(tmp_path, _Faults(missed=missed))
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(
                    f"without detections in images {list(missed)} it raised {type(error).__name__}: {error}; a model "
                    "finds nothing in many images, above all when training begins"
                ) from error
            assert value != self.best, f"{self.metric} is as good without detections in images {list(missed)}"

    def test_every_validation_starts_anew(self, tmp_path: Path) -> None:
        run = _run(self.plugin(), tmp_path)
        for faults in (_Faults(moved=(1,)), _Faults(), _Faults(moved=(1,))):
            value, alone = _validate(run, self.metric, range(IMAGES), {"": faults}), self._value(tmp_path, faults)
            assert value == alone, (
                f"{self.metric} is {value} after another validation, but {alone} on its own: forget what was "
                "collected in before_val_set"
            )

    def test_each_validation_set_is_measured_for_itself(self, tmp_path: Path) -> None:
        run = _run(self.plugin(), tmp_path)
        run.val_sets, run.loaders["further"] = ("further",), run.loaders["val"]
        sets = {"": _Faults(), "further": _Faults(moved=(1,))}
        _validate(run, self.metric, range(IMAGES), sets)
        for name, faults in sets.items():
            full, alone = f"{name}/{self.metric}".lstrip("/"), self._value(tmp_path, faults)
            assert run.metrics.get(full) == alone, (
                f"{full} is {run.metrics.get(full)} in a validation of two sets, but {alone} on its own: forget what "
                "was collected in before_val_set, and publish in after_val_set"
            )

    def test_merges_over_processes(self, tmp_path: Path) -> None:
        alone = self._value(tmp_path, _Faults(moved=(1,)))
        jobs = [(pickle.dumps(self.plugin()), self.metric, rank, tmp_path) for rank in range(2)]
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            values = pool.starmap(_evaluate_rank, jobs, chunksize=1)
            pool.close()
            pool.join()
        assert values == [alone, alone], (
            f"{self.metric} is {alone} on one process but {values} on two, which saw {len(PARTS[0])} and "
            f"{len(PARTS[1])} images; gather what every process saw before computing (the mean of their values is "
            "not the value of all), and give the result to all"
        )

    def _value(self, folder: Path, faults: _Faults) -> float:
        return _validate(_run(self.plugin(), folder), self.metric, range(IMAGES), {"": faults})


def _evaluate_rank(pickled: bytes, metric: str, rank: int, folder: Path) -> float:
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        run = _run(pickle.loads(pickled), folder)
        run.rank, run.world_size, run.processes = rank, 2, TorchProcesses()
        return _validate(run, metric, PARTS[rank], {"": _Faults(moved=(1,))})
    finally:
        distributed.destroy_process_group()


def _run(evaluator: Any, folder: Path) -> Run:
    """A run in the middle of a validation, of which the evaluator sees the events."""
    dataset = TinyDataset(size=IMAGES, empty=1)
    dataset.load()
    run = tiny_kernel({"evaluator": evaluator}, work_dir=folder).state
    run.mode = "val"
    run.loaders["val"] = TinyLoader(dataset, 1, 0, shuffle=False)
    return run


def _validate(run: Run, metric: str, indices: Sequence[int], sets: Mapping[str, _Faults]) -> float:
    run.metrics.clear()
    run.hook.before_val_epoch(run=run)
    for run.val_set, faults in sets.items():
        run.hook.before_val_set(run=run)
        for index in indices:
            batch = make_batch(run.loader.dataset, [index])
            run.hook.after_val_iter(run=run, batch=batch, detections=[_detections(batch, index, faults)])
        run.hook.after_val_set(run=run)
    run.val_set = ""
    run.hook.after_val_epoch(run=run)
    assert metric in run.metrics, f"{metric} is not in run.metrics after after_val_epoch: {sorted(run.metrics)}"
    for name, value in run.metrics.items():
        assert isinstance(value, (int, float)), (
            f"run.metrics['{name}'] is {type(value).__name__}, expected a float: metrics are compared, logged as JSON "
            "and kept in checkpoints; float(...) makes one of a tensor"
        )
    return float(run.metrics[metric])


def _detections(batch: Batch, index: int, faults: _Faults) -> Detections:
    """What is annotated, with the faults."""
    target = batch.target(0)
    boxes = target.boxes + (40 if index in faults.moved else 0)
    labels = (target.labels + 1) % 3 if index in faults.renamed else target.labels
    found = Detections(batch.image_ids[0], index, boxes, torch.ones(len(boxes)), labels)
    return found.keep(labels < 0) if index in faults.missed else found
