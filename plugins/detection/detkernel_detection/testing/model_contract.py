"""What a model promises: it learns what is annotated, and says so in the coordinates of the file."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from detkernel.plugin import hookimpl, option, plugin, state
from detkernel.run import Run

from detkernel_detection import Batch, Dataset, Detections, Target
from detkernel_detection.batching import make_batch
from detkernel_detection.testing import tiny
from detkernel_detection.testing.boxes import iou, rounded
from detkernel_detection.testing.generators import restore_all, seed_all, states_of_all
from detkernel_detection.testing.tiny import TinyData, TinyDataset, TinySgd, tiny_kernel


class ModelContract:
    """A model trains, learns two images by heart and finds their objects, is deterministic, saves and restores."""

    steps = 40
    """Iterations in which the loss on two images must halve; in ten times as many it must find their objects."""
    lr = 0.05
    """The learning rate of the SGD with momentum that trains it; lower it for a model that this makes diverge."""

    def plugin(self) -> Any:
        """The model plugin; called anew for every run. Small, please: it is trained on 32 x 32 images."""
        raise NotImplementedError("return your model plugin")

    def dataset(self) -> Dataset:
        """What it is trained on: two images."""
        return TinyDataset(size=2)

    def test_gives_losses_that_reach_its_parameters(self, tmp_path: Path) -> None:
        run, _ = self._train(tmp_path, 1)
        grads = [p.grad is not None for p in run.bare_model.parameters() if p.requires_grad]
        assert any(grads), "no parameter has a gradient after a step: train_step must return attached tensors"

    def test_overfits_two_images(self, tmp_path: Path) -> None:
        first, *_, last = (_minimised(step) for step in self._trained(tmp_path)[1])
        assert last < first / 2, (
            f"the loss went from {first:.3f} to {last:.3f} in {self.steps} iterations on two images; a model that "
            "cannot learn two images by heart has a wrong target, sign or label somewhere"
        )

    def test_finds_what_it_learned(self, tmp_path: Path) -> None:
        learned = _Learned(interval=max(1, self.steps // 4))
        run, _ = self._train(tmp_path, 10 * self.steps, learned)
        assert not learned.problem, f"after {run.iter} iterations on two images, {learned.problem}"

    def test_detects_in_the_coordinates_of_the_file(self, tmp_path: Path) -> None:
        run, _ = self._trained(tmp_path)
        batch = _images(run)
        before = _detect(run, batch)
        batch.scales = [(2.0, 0.5)] * len(batch)
        batch.original_sizes = [(height // 2, 2 * width) for height, width in batch.sizes]
        for one, other in zip(before, _detect(run, batch), strict=True):
            if len(one):
                _check_scaled(one, other)

    def test_losses_follow_the_targets(self, tmp_path: Path) -> None:
        run, _ = self._train(tmp_path, 1)
        targets = _images(run).each_target()
        count = len(run.classes)
        smaller = [attrs.evolve(target, boxes=0.75 * target.boxes) for target in targets]
        renamed = [attrs.evolve(target, labels=(target.labels + 1) % count) for target in targets]
        losses = _losses_for(run, targets)
        assert losses != _losses_for(run, smaller), (
            f"other boxes in batch.targets gave the same losses {losses}: the model must learn from the targets of "
            "the batch that it is given"
        )
        assert count == 1 or losses != _losses_for(run, renamed), (
            f"other labels in batch.targets gave the same losses {losses}: the model must learn the classes of the "
            "batch that it is given"
        )

    def test_trains_on_images_without_objects(self, tmp_path: Path) -> None:
        run, _ = self._train(tmp_path, 1)
        targets = _images(run).each_target()
        empty = [target.keep(target.labels < 0) for target in targets]
        for given, what in ((empty, "without any object"), ([*empty[:1], *targets[1:]], "with one empty image")):
            try:
                losses = _train_step(run, given)
            except Exception as error:
                raise AssertionError(
                    f"train_step on a batch {what} raised {type(error).__name__}: {error}; data has empty images, "
                    "and a run must not end at the first of them"
                ) from error
            _check_losses(losses)
            assert _minimised(losses).requires_grad, (
                f"train_step on a batch {what} gave losses without a gradient: the stepping plugin goes backward from "
                "every batch; multiply an output by 0 where there is nothing to learn"
            )

    def test_is_deterministic(self, tmp_path: Path) -> None:
        first, second = (self._train(tmp_path / name, 3)[1] for name in "ab")
        assert first == second, (
            "two runs of one seed gave different losses; draw random numbers from torch's, NumPy's or Python's global "
            "generator only, since those are what a resume restores"
        )

    def test_saves_and_restores(self, tmp_path: Path) -> None:
        trained, _ = self._train(tmp_path / "a", 2)
        fresh, _ = self._train(tmp_path / "b", 1)
        fresh.bare_model.load_state_dict(copy.deepcopy(trained.bare_model.state_dict()))
        assert self._found(trained) == self._found(fresh), (
            "a model with another's state_dict detects differently: something it learns or counts is neither a "
            "parameter nor a buffer, and would be lost in a checkpoint"
        )

    def _trained(self, folder: Path) -> tuple[Run, list[dict[str, float]]]:
        """After `steps` iterations; trained once for all tests of the class, which leave it as it is."""
        keeper: Any = self if vars(self) else type(self)  # one whose instance was changed is another contract
        if "_after_steps" not in vars(keeper):
            keeper._after_steps = self._train(folder, self.steps)
        found: tuple[Run, list[dict[str, float]]] = vars(keeper)["_after_steps"]
        return found

    def _train(self, folder: Path, steps: int, watch: Any = None) -> tuple[Run, list[dict[str, float]]]:
        seed_all(0)
        keeper = _Losses()
        plugins = {"model": self.plugin(), "data": TinyData(dataset=self.dataset()), "losses": keeper}
        plugins["optimizer"] = TinySgd(lr=self.lr)
        if watch is not None:
            plugins["watch"] = watch
        return tiny_kernel(plugins, until=f"{steps} iters", work_dir=folder).run(), keeper.kept

    @staticmethod
    def _found(run: Run) -> Any:
        return [(d.boxes.tolist(), d.scores.tolist(), d.labels.tolist()) for d in _detect(run, _images(run))]


@plugin(priority="highest")
class _Losses:
    """Checks and keeps every loss, before the stepping plugin uses it."""

    kept: list[dict[str, float]] = state(factory=list)

    @hookimpl(tryfirst=True)
    def after_train_iter(self, losses: Mapping[str, Any]) -> None:
        _check_losses(losses)
        self.kept.append({name: float(value.detach()) for name, value in losses.items()})


@plugin(priority="lowest")
class _Learned:
    """Stops the run once the model finds the objects that it is trained on; until then, holds what is wrong."""

    interval: int = option(default=10, at_least=1, help="iterations between looks")
    problem: str = state(default="the model was never asked to detect")

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        if run.iter % self.interval:
            return
        states, batch = states_of_all(), _images(run)
        found = _detect(run, batch)
        _check_detections(found, batch, len(run.classes))
        pairs = zip(found, batch.each_target(), strict=True)
        self.problem = next((problem for one, target in pairs if (problem := _missed(one, target))), "")
        restore_all(states)
        if not self.problem:
            run.stop("it finds what it learned")


def _images(run: Run) -> Batch:
    """The images that it is trained on, in their order."""
    dataset = run.loaders["train"].dataset
    return tiny.make_batch(dataset, range(len(dataset)))


def _detect(run: Run, batch: Batch) -> Sequence[Detections]:
    run.model.eval()
    with torch.no_grad():
        found: Sequence[Detections] = run.hook.val_step(run=run, model=run.model, batch=batch) or []
    run.model.train()
    assert len(found) == len(batch), (
        f"val_step returned {len(found)} Detections for {len(batch)} images: it returns one an image, in their "
        "order, also where nothing was found"
    )
    return found


def _train_step(run: Run, targets: list[Target]) -> Mapping[str, Any]:
    """The losses of the images with other targets; random numbers, weights and counts are as before each time."""
    kept = copy.deepcopy(run.bare_model.state_dict())
    given = _images(run)
    batch = make_batch(given.images, targets, indices=given.indices, image_ids=given.image_ids)
    seed_all(1)
    run.model.train()
    losses: Mapping[str, Any] = run.hook.train_step(run=run, model=run.model, batch=batch)
    run.bare_model.load_state_dict(kept)
    return losses


def _losses_for(run: Run, targets: list[Target]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in _train_step(run, targets).items() if "loss" in name}


def _check_losses(losses: Mapping[str, Any]) -> None:
    assert isinstance(losses, Mapping), f"train_step returned {type(losses).__name__}, not a dict of named losses"
    assert any("loss" in name for name in losses), (
        f"train_step returned {sorted(losses)}: at least one name must contain 'loss', since the sum of those is what "
        "the stepping plugin minimises"
    )
    for name, value in losses.items():
        assert getattr(value, "shape", None) == (), f"'{name}' is {value!r}: a loss is a tensor of one number"
        number = float(value.detach())
        assert math.isfinite(number), (
            f"'{name}' is {number}: a loss that is not finite makes every weight NaN; where it grew bit by bit, "
            "lower the contract's `lr`"
        )


def _minimised(losses: Mapping[str, Any]) -> Any:
    return sum(value for name, value in losses.items() if "loss" in name)


def _check_detections(found: Sequence[Detections], batch: Batch, classes: int) -> None:
    """The form of detections, whatever was found."""
    for number, one in enumerate(found):
        ids = (one.image_id, one.index)
        assert ids == (batch.image_ids[number], batch.indices[number]), (
            f"image {number}: its Detections have (image_id, index) {ids}, expected those of the batch, "
            f"{(batch.image_ids[number], batch.indices[number])}: evaluators match detections with truth by them"
        )
        shapes = tuple(one.boxes.shape), tuple(one.scores.shape), tuple(one.labels.shape)
        assert shapes == ((len(one), 4), (len(one),), (len(one),)), (
            f"image {number}: boxes, scores and labels have the shapes {shapes}; expected [N, 4], [N] and [N]"
        )
        assert bool(((one.scores >= 0) & (one.scores <= 1)).all()), (
            f"image {number}: scores are {one.scores.tolist()[:5]}, expected 0..1: put a sigmoid or softmax before"
        )
        assert not one.labels.is_floating_point(), f"image {number}: labels are {one.labels.dtype}, expected int64"
        assert bool(((one.labels >= 0) & (one.labels < classes)).all()), (
            f"image {number}: labels are {one.labels.tolist()[:5]}, expected 0-based positions in {classes} classes; "
            "a background class is not among them"
        )


def _missed(found: Detections, target: Target) -> str:
    """What is wrong with the best detection of an image with an object, or nothing."""
    if not len(target):
        return ""
    if not len(found):
        return "val_step finds nothing in an image that it was trained on"
    best = int(found.scores.argmax())
    box, label = found.boxes[best].detach().cpu(), int(found.labels[best])
    truth = [(true.tolist(), int(name)) for true, name in zip(target.boxes, target.labels, strict=True)]
    if any(name == label and iou(box.tolist(), true) > 0.5 for true, name in truth):
        return ""
    return (
        f"the best detection of image {found.index} is {rounded(box.tolist())} of class {label}, "
        f"but its objects are {truth}; expected the right class and an IoU over 0.5: boxes are xyxy in pixels, labels "
        "those of the data set, and each image gets its own detections"
    )


def _check_scaled(one: Detections, other: Detections) -> None:
    """The best box of an image (1) as it is and (2) said to be resized by 2 down and by 0.5 across."""
    assert len(other), "val_step finds nothing any more when batch.scales are not 1"
    before, after = (found.boxes[int(found.scores.argmax())].tolist() for found in (one, other))
    expected = [side / scale for side, scale in zip(before, (0.5, 2.0, 0.5, 2.0), strict=True)]
    assert all(abs(a - b) < 1 for a, b in zip(expected, after, strict=True)), (
        f"with scales (y, x) = (2, 0.5) the box {before} became {after}, expected {expected}: detections are in the "
        "coordinates of the file, so divide them by batch.scales, which are (y, x)"
    )
