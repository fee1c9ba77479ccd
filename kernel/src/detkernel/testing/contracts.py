"""What each kind of plugin promises, as classes to subclass: pytest runs their tests against your plugin.

    class TestMyModel(ModelContract):
        def plugin(self):
            return MyModel(width=8)

A failure says what the contract wants and why.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from detkernel.detection import Batch, Dataset, Detections, Sample, Target, Transform
from detkernel.plugin import hookimpl, option, plugin, state
from detkernel.run import Run
from detkernel.testing.tiny import TinyData, TinyDataset, TinyLoader, make_batch, tiny_kernel


class ModelContract:
    """A model trains, overfits two pictures, is deterministic, saves and restores."""

    steps = 40
    """Iterations in which the loss on two pictures must halve."""

    def plugin(self) -> Any:
        """The model plugin; called anew for every run. Small, please: it is trained on 32 x 32 pictures."""
        raise NotImplementedError("return your model plugin")

    def dataset(self) -> Dataset:
        """What it is trained on: two pictures."""
        return TinyDataset(size=2)

    def test_gives_losses_that_reach_its_parameters(self, tmp_path: Path) -> None:
        run, losses = self._train(tmp_path, 1)
        assert any("loss" in name for name in losses[0]), (
            f"train_step returned {sorted(losses[0])}: at least one name must contain 'loss', since the sum of those "
            "is what the stepping plugin minimises"
        )
        grads = [p.grad is not None for p in run.bare_model.parameters() if p.requires_grad]
        assert any(grads), "no parameter has a gradient after a step: train_step must return attached tensors"

    def test_overfits_two_pictures(self, tmp_path: Path) -> None:
        first, *_, last = (sum(step.values()) for step in self._train(tmp_path, self.steps)[1])
        assert last < first / 2, (
            f"the loss went from {first:.3f} to {last:.3f} in {self.steps} iterations on two pictures; a model that "
            "cannot learn two pictures by heart has a wrong target, sign or label somewhere"
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
        assert self._detect(trained) == self._detect(fresh), (
            "a model with another's state_dict detects differently: something it learns or counts is neither a "
            "parameter nor a buffer, and would be lost in a checkpoint"
        )

    def _train(self, folder: Path, steps: int) -> tuple[Run, list[dict[str, float]]]:
        import_module("torch").manual_seed(0)
        keeper = _Losses()
        plugins = {"model": self.plugin(), "data": TinyData(dataset=self.dataset()), "losses": keeper}
        return tiny_kernel(plugins, until=f"{steps} iters", work_dir=folder).run(), keeper.kept

    @staticmethod
    def _detect(run: Run) -> Any:
        run.model.eval()
        batch = next(iter(run.loaders["train"].batches(0)))
        with import_module("torch").no_grad():
            found = run.hook.val_step(run=run, batch=batch)
        return [(d.boxes.tolist(), d.scores.tolist(), d.labels.tolist()) for d in found]


@plugin
class _Losses:
    """Keeps every loss."""

    kept: list[dict[str, float]] = state(factory=list)

    @hookimpl(tryfirst=True)
    def after_train_iter(self, losses: Mapping[str, Any]) -> None:
        self.kept.append({name: float(value.detach()) for name, value in losses.items()})


class DatasetContract:
    """A data set has sound boxes and matching classes, and is the same in every worker."""

    def dataset(self) -> Dataset:
        """The data set, not loaded; called anew for every test."""
        raise NotImplementedError("return your data set")

    def test_boxes_are_sound(self) -> None:
        dataset = self._loaded()
        for index in range(len(dataset)):
            notes = dataset.annotations(index)
            x1, y1, x2, y2 = notes.boxes.reshape(-1, 4).T
            inside = (x1 >= 0) & (y1 >= 0) & (x2 <= notes.width) & (y2 <= notes.height)
            assert inside.all(), f"picture {index}: a box lies outside; boxes are xyxy in pixels of the file"
            assert ((x2 > x1) & (y2 > y1)).all(), f"picture {index}: a box has no area; leave it out, with a note"
            sizes = {len(notes.boxes), len(notes.labels), len(notes.area), len(notes.crowd), len(notes.difficult)}
            assert len(sizes) == 1, f"picture {index}: the arrays of its annotations differ in length: {sizes}"

    def test_labels_are_positions_in_classes(self) -> None:
        dataset = self._loaded()
        assert dataset.classes, "classes must be known after load(): the model's class count comes from them"
        assert len(set(dataset.classes)) == len(dataset.classes), "a class name stands twice in classes"
        for index in range(len(dataset)):
            labels = dataset.annotations(index).labels
            assert ((labels >= 0) & (labels < len(dataset.classes))).all(), (
                f"picture {index}: labels are 0-based positions in classes, got {labels.tolist()}"
            )

    def test_pictures_match_their_annotations(self) -> None:
        dataset = self._loaded()
        torch = import_module("torch")
        for index in range(min(len(dataset), 8)):
            notes, image = dataset.annotations(index), dataset.image(index)
            assert image.dtype == torch.uint8, f"picture {index}: uint8 is expected, got {image.dtype}"
            assert tuple(image.shape) == (3, notes.height, notes.width), (
                f"picture {index}: expected [3, {notes.height}, {notes.width}] as annotated, got {list(image.shape)}"
            )

    def test_is_the_same_in_every_worker(self) -> None:
        dataset = self._loaded()
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            there = pool.apply(_content, (pickle.dumps(dataset),))
            pool.close()
            pool.join()
        assert there == _content(pickle.dumps(dataset)), (
            "a worker process sees other pictures or annotations: nothing may depend on the process, the order of "
            "calls, or an unseeded random number"
        )

    def _loaded(self) -> Dataset:
        dataset = self.dataset()
        dataset.load()
        assert len(dataset) > 0, "the data set is empty after load()"
        return dataset


def _content(pickled: bytes) -> tuple[str, list[int]]:
    dataset = pickle.loads(pickled)  # made by the test itself
    sums = [int(dataset.image(index).long().sum()) for index in reversed(range(min(len(dataset), 8)))]
    return dataset.fingerprint(), sums


class TransformContract:
    """A transform keeps boxes with their objects, and its random numbers are the seeded ones."""

    def transform(self) -> Transform:
        """The transform."""
        raise NotImplementedError("return your transform")

    def test_keeps_the_sample_sound(self) -> None:
        for index in range(8):
            sample = self.transform()(self._sample(index))
            height, width = sample.size
            boxes = sample.target.boxes
            assert len(boxes) == len(sample.target.labels), "as many labels as boxes"
            assert bool((boxes[:, 2:] >= boxes[:, :2]).all()), "boxes stay xyxy: x2 >= x1 and y2 >= y1"
            inside = (boxes >= 0).all() and (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
            assert bool(inside), f"boxes must be clipped to the changed picture of {height} x {width}"

    def test_draws_from_the_seeded_generators(self) -> None:
        torch = import_module("torch")
        results = []
        for _ in range(2):
            torch.manual_seed(7)
            import_module("random").seed(7)
            sample = self.transform()(self._sample(0))
            results.append((sample.image.float().sum().item(), sample.target.boxes.tolist()))
        assert results[0] == results[1], (
            "the same seed gave two results; draw from torch's, NumPy's or Python's global generator, which the loader "
            "seeds by (seed, epoch, index)"
        )

    @staticmethod
    def _sample(index: int) -> Sample:
        dataset = TinyDataset()
        dataset.load()
        batch = make_batch(dataset, [index])
        target = Target(batch.targets[0].boxes, batch.targets[0].labels)
        return Sample(batch.images[0], target, index, index, batch.sizes[0])


class EvaluatorContract:
    """An evaluator gives its best for perfect detections, and merges over processes."""

    metric: str
    """The figure to look at, such as `coco/bbox_mAP`."""
    best = 1.0

    def plugin(self) -> Any:
        """The evaluator; called anew for every run."""
        raise NotImplementedError("return your evaluator plugin")

    def test_perfect_detections_are_best(self) -> None:
        figure = _evaluate(self.plugin(), self.metric, [0, 1, 2, 3], wrong=())
        assert abs(figure - self.best) < 1e-6, f"perfect detections gave {self.metric} {figure}, not {self.best}"

    def test_wrong_detections_are_worse(self) -> None:
        figure = _evaluate(self.plugin(), self.metric, [0, 1, 2, 3], wrong=(0, 1))
        assert figure != self.best, f"{self.metric} is as good with two pictures of four wrong"

    def test_merges_over_processes(self) -> None:
        alone = _evaluate(self.plugin(), self.metric, [0, 1, 2, 3], wrong=(1,))
        with tempfile.TemporaryDirectory() as folder:
            context = multiprocessing.get_context("spawn")
            jobs = [(pickle.dumps(self.plugin()), self.metric, rank, folder) for rank in range(2)]
            with context.Pool(2) as pool:
                figures = pool.starmap(_evaluate_rank, jobs, chunksize=1)
                pool.close()
                pool.join()
        assert figures == [alone, alone], (
            f"{self.metric} is {alone} on one process but {figures} on two; gather what every process saw before "
            "computing, and give the result to all"
        )


def _evaluate_rank(pickled: bytes, metric: str, rank: int, folder: str) -> float:
    distributed = import_module("torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        return _evaluate(pickle.loads(pickled), metric, [rank, rank + 2], wrong=(1,), rank=rank)
    finally:
        distributed.destroy_process_group()


def _evaluate(evaluator: Any, metric: str, indices: Sequence[int], wrong: Sequence[int], rank: int = 0) -> float:
    torch = import_module("torch")
    with tempfile.TemporaryDirectory() as folder:
        dataset = TinyDataset(size=4)
        dataset.load()
        kernel = tiny_kernel({"evaluator": evaluator}, work_dir=folder)
        run = kernel.state
        run.mode, run.rank, run.world_size = "val", rank, 4 // len(indices)
        run.loaders["val"] = TinyLoader(dataset, 1, 0, shuffle=False)
        run.hook.before_val_epoch(run=run)
        for index in indices:
            batch: Batch = make_batch(dataset, [index])
            target = batch.targets[0]
            boxes = target.boxes + (40 if index in wrong else 0)
            found = Detections(index, index, boxes, torch.ones(len(boxes)), target.labels)
            run.hook.after_val_iter(run=run, batch=batch, detections=[found])
        run.hook.after_val_epoch(run=run)
    assert metric in run.metrics, f"{metric} is not in run.metrics after after_val_epoch: {sorted(run.metrics)}"
    return float(run.metrics[metric])


class HookContract:
    """A hook leaves exact resume exact."""

    name = "mine"
    """Its key in the config: `optimizer`, `data` or `model` where it takes the place of the tiny one."""

    def plugin(self) -> Any:
        """The plugin; called anew for every run."""
        raise NotImplementedError("return your plugin")

    def test_resumes_exactly(self, tmp_path: Path) -> None:
        through = self._run(tmp_path / "through", None)
        for position in range(1, 6):
            resumed = self._run(tmp_path / str(position), through.kept[position])
            for name, value in through.kept[6].items():
                assert _equal(value, resumed.kept[6][name]), (
                    f"resumed at iteration {position}, the run ends with another {name} than the undisturbed one; what "
                    "a plugin remembers between iterations must be in its state_dict() and load_state_dict()"
                )

    def _run(self, folder: Path, resume: dict[str, Any] | None) -> _Keeper:
        import_module("torch").manual_seed(0)
        keeper = _Keeper(resume=resume)
        tiny_kernel(
            {self.name: self.plugin(), "keeper": keeper}, until="6 iters", validate="every 4 iters", work_dir=folder
        ).run()
        return keeper


@plugin
class _Keeper:
    """Keeps the whole state after every iteration, in memory."""

    priority = "lowest"
    resume: Any = option(default=None, help="the state to start from")
    kept: dict[int, dict[str, Any]] = state(factory=dict)

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        if self.resume is None:
            return
        kept = copy.deepcopy(self.resume)
        run.load_state_dict(kept["position"])
        run.model.load_state_dict(kept["model"])
        for name, part in run.bus.stateful():
            part.load_state_dict(kept[f"plugin {name}"])
        import_module("torch").set_rng_state(kept["random numbers"])

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        kept: dict[str, Any] = {"position": run.state_dict(), "model": run.model.state_dict()}
        kept |= {f"plugin {name}": part.state_dict() for name, part in run.bus.stateful()}
        kept["random numbers"] = import_module("torch").get_rng_state()
        self.kept[run.iter] = copy.deepcopy(kept)


def _equal(one: Any, other: Any) -> bool:
    if hasattr(one, "equal") and hasattr(one, "dtype"):
        return bool(one.equal(other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
