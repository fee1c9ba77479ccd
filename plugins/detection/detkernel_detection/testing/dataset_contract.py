"""What a data set promises: valid annotations, and the same images whenever and wherever they are asked for."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detkernel_detection import Annotations, Dataset, ImageId
from detkernel_detection.testing.generators import seed_all

LOOKED_AT = 8
"""Images that are decoded: the first ones."""


class DatasetContract:
    """A data set has valid boxes and matching classes, and is the same in every process and order."""

    def dataset(self) -> Dataset:
        """The data set, not loaded; called anew for every test."""
        raise NotImplementedError("return your data set")

    def test_boxes_are_valid(self) -> None:
        dataset = self._loaded()
        for index in range(len(dataset)):
            _check_boxes(index, _annotations(dataset, index))

    def test_labels_are_positions_in_classes(self) -> None:
        dataset = self._loaded()
        assert dataset.classes, "classes must be known after load(): the model's class count comes from them"
        assert len(set(dataset.classes)) == len(dataset.classes), "a class name stands twice in classes"
        for index in range(len(dataset)):
            labels = _annotations(dataset, index).labels
            assert labels.dtype.kind in "iu", (
                f"image {index}: labels are {labels.dtype}, expected integers (int64): they index the classes; an "
                "empty array needs its dtype too"
            )
            assert ((labels >= 0) & (labels < len(dataset.classes))).all(), (
                f"image {index}: labels are 0-based positions in classes, got {labels.tolist()}"
            )

    def test_every_image_has_its_own_id(self) -> None:
        dataset = self._loaded()
        paths: dict[ImageId, str] = {}
        for index in range(len(dataset)):
            notes = dataset.annotations(index)
            assert isinstance(notes.image_id, (int, str)), (
                f"image {index}: image_id is {type(notes.image_id).__name__}, expected int or str"
            )
            other = paths.setdefault(notes.image_id, notes.path)
            assert other == notes.path, (
                f"{other} and {notes.path} have the same image_id {notes.image_id!r}: evaluators would take the "
                "detections of one for those of the other"
            )

    def test_images_match_their_annotations(self) -> None:
        dataset = self._loaded()
        for index in range(min(len(dataset), LOOKED_AT)):
            notes, image = dataset.annotations(index), dataset.image(index)
            assert isinstance(image, torch.Tensor), f"image {index} is {type(image).__name__}, expected a torch tensor"
            assert image.dtype == torch.uint8, f"image {index}: uint8 is expected, got {image.dtype}"
            assert tuple(image.shape) == (3, notes.height, notes.width), (
                f"image {index}: expected [3, {notes.height}, {notes.width}] as annotated, got {list(image.shape)}"
            )

    def test_images_do_not_depend_on_order_or_chance(self) -> None:
        dataset = self._loaded()
        indices = list(range(min(len(dataset), LOOKED_AT)))
        first = [_hash(dataset, index) for index in indices]
        for seed in range(4):
            seed_all(seed)
            indices.reverse()
            for index in indices:
                assert _hash(dataset, index) == first[index], (
                    f"image {index} or its annotations differ when asked for again, in another order: a data set "
                    "draws no random numbers (that is what transforms are for) and remembers nothing between calls"
                )

    def test_loads_the_same_twice(self) -> None:
        dataset = self._loaded()
        before = len(dataset), dataset.classes, dataset.fingerprint()
        dataset.load()
        after = len(dataset), dataset.classes, dataset.fingerprint()
        assert before == after, (
            f"a second load() made of {before[0]} images, classes {before[1]}, {after[0]} images, classes "
            f"{after[1]}, or changed annotations: load() starts afresh, since two loaders may share one data set"
        )

    def test_is_the_same_in_every_process(self) -> None:
        fresh, loaded = self.dataset(), self._loaded()
        try:
            sent = pickle.dumps(fresh), pickle.dumps(loaded)
        except Exception as error:
            raise AssertionError(
                f"the data set cannot be pickled ({error}): it travels to the loader's workers, so keep paths and "
                "arrays, and open files, connections and the like in each call"
            ) from error
        here = loaded.classes, _content(loaded)
        from_fresh, from_loaded = _other_process(_other_order(loaded.classes)).contents(sent)
        assert from_fresh == here, (
            f"loaded in another process, its classes are {from_fresh[0]} and here {here[0]}, or its images or "
            "annotations differ: a set's order changes from process to process; sort what came out of one"
        )
        assert from_loaded == here, (
            "a worker process sees other images or annotations: everything that load() finds must be in attributes "
            "of the data set, since it is pickled on its way to a worker"
        )

    def _loaded(self) -> Dataset:
        dataset = self.dataset()
        dataset.load()
        assert len(dataset) > 0, "the data set is empty after load()"
        return dataset


def _annotations(dataset: Dataset, index: int) -> Annotations:
    """Of an image, with all the arrays there."""
    notes = dataset.annotations(index)
    assert isinstance(notes, Annotations), f"image {index}: annotations() returned {type(notes).__name__}"
    for name in ("boxes", "labels", "area", "crowd", "difficult"):
        value = getattr(notes, name)
        assert isinstance(value, np.ndarray), (
            f"image {index}: {name} is {type(value).__name__}, expected a NumPy array, also if nothing is there"
        )
    return notes


def _check_boxes(index: int, notes: Annotations) -> None:
    boxes = notes.boxes
    assert boxes.shape == (len(boxes), 4), (
        f"image {index}: boxes have the shape {boxes.shape}, expected [N, 4] (and [0, 4] where nothing is)"
    )
    sizes = {len(boxes), len(notes.labels), len(notes.area), len(notes.crowd), len(notes.difficult)}
    assert len(sizes) == 1, f"image {index}: the arrays of its annotations differ in length: {sizes}"
    assert (abs(boxes) < float("inf")).all(), (
        f"image {index}: a box is not finite: {boxes.tolist()}; one NaN makes every weight NaN, so leave such a box "
        "out, with a note, or raise DataError"
    )
    x1, y1, x2, y2 = boxes.T
    inside = (x1 >= 0) & (y1 >= 0) & (x2 <= notes.width) & (y2 <= notes.height)
    assert inside.all(), (
        f"image {index}: a box lies outside of the {notes.width} x {notes.height} pixels: {boxes.tolist()}; boxes "
        "are xyxy in pixels of the file"
    )
    assert ((x2 > x1) & (y2 > y1)).all(), (
        f"image {index}: a box has no area: {boxes.tolist()}; boxes are xyxy, and one without area is left out, with "
        "a note"
    )


def _hash(dataset: Dataset, index: int) -> str:
    """Of the whole image and of what is known of it."""
    notes = dataset.annotations(index)
    known = notes.image_id, notes.path, notes.boxes.tolist(), notes.labels.tolist()
    digest = hashlib.sha256(repr(known).encode())
    digest.update(dataset.image(index).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _content(dataset: Dataset) -> tuple[str, list[str]]:
    return dataset.fingerprint(), [_hash(dataset, index) for index in range(min(len(dataset), LOOKED_AT))]


class _Process:
    """Another Python with a hash seed of its own, for as long as this one lives: its imports take seconds."""

    def __init__(self, seed: int) -> None:
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        atexit.register(self._process.communicate)

    def contents(self, pickled: Sequence[bytes]) -> Any:
        """What is in the data set when it is loaded there, and when it came loaded."""
        pipe = self._process
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        pickle.dump((str(Path.cwd()), pickled), pipe.stdin)
        pipe.stdin.flush()
        answer = pickle.load(pipe.stdout)  # of a process that this one started
        assert not isinstance(answer, str), f"in another process the data set failed:\n{answer}"
        return answer


_other_process = functools.cache(_Process)


def serve() -> None:
    """What the other process does: load each data set that it is sent, and answer with its content or a traceback."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            folder, pickled = pickle.load(sys.stdin.buffer)
        except EOFError:  # the first process has ended
            return
        os.chdir(folder)
        try:
            fresh, loaded = map(pickle.loads, pickled)
            fresh.load()
            answer: Any = [(dataset.classes, _content(dataset)) for dataset in (fresh, loaded)]
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


def _other_order(names: tuple[str, ...]) -> int:
    """A PYTHONHASHSEED with which a set of these names is in another order than theirs."""
    for seed in range(1, 20):
        code = f"import os; os._exit(list(set({names!r})) == {list(names)!r})"
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        if subprocess.run([sys.executable, "-S", "-c", code], env=environment, check=False).returncode == 0:
            return seed
    return 1  # a single class has one order
