"""A trained detector, loaded from a checkpoint or an exported file: images in, results out."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, overload

import attrs
import numpy as np
import torch
from detkernel import Run, UserError, declared, hookimpl, plugin, state
from detkernel import config as configs
from detkernel.bus import Bus
from detkernel.errors import relative
from detkernel.loop import Kernel
from detkernel_detection import Batch, Detections, Sample, Transform
from detkernel_detection.batching import pack_samples
from detkernel_detection.predictor import SCORE_THRESHOLD, Image, make_sample
from detkernel_detection.weights import without_pretrained

from detkernel_export.results import Result
from detkernel_export.ways import Ways

_DEFAULT_SCORE = 0.5
_KEPT = ("build_model", "prepare_model", "val_step")
"""Whoever answers one of these has a say in what is found; all others stay out."""


def load(
    file: str | PathLike[str],
    *,
    config: str | PathLike[str] | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> Model:
    """The detector in a file: a checkpoint of a run, or what `detkernel export` wrote; of a run's folder, its best.

    `config`: that of weights which hold none, such as others publish. `device`: "cpu", "cuda", "cuda:1"; None: what its
    config says, by default a GPU if there is one. `overrides`: `KEY=VALUE` of its config. A file from anywhere can be
    loaded: nothing in it is run, and nothing is written. Raises `UserError`.
    """
    given = list(overrides)
    file = checkpoint_of(file)
    source = file
    if config is not None:
        if not Path(file).is_file():
            raise UserError(f"{relative(str(file))}: there is no such file of weights")
        source, given = str(config), [*given, f"checkpoint.load_from={json.dumps(str(file))}"]
    elif not Path(file).exists():
        raise UserError(f"{relative(str(file))}: there is no such checkpoint")
    elif Path(file).is_dir():
        raise UserError(f"{relative(str(file))}: is a folder; give a checkpoint in it{_checkpoint_in(Path(file))}")
    if device is not None:
        given.append(f"device.device={device}")
    return Model(configs.load(source, [*given, f"run.work_dir={json.dumps(str(_nowhere()))}"]), str(file))


def checkpoint_of(file: str | PathLike[str]) -> str:
    """The checkpoint that the folder of a run stands for, its best or else its newest; anything else is itself."""
    named = (Path(file) / "checkpoints" / name for name in ("best.pt", "last.pt"))
    return next((str(path) for path in named if path.is_file()), str(file))


def _checkpoint_in(folder: Path) -> str:
    found = sorted(
        (path for path in folder.glob("**/*.pt") if path.is_file()),
        key=lambda path: (path.name.startswith("best"), path.stat().st_mtime),
    )
    return f", such as {relative(found[-1])}" if found else ""


def _nowhere() -> Path:
    """A folder that there is not, for what a plugin would write; it is removed if one does."""
    return Path(tempfile.gettempdir()) / f"detkernel-{uuid.uuid4().hex}"


@plugin
class _Images:
    """Makes the loader that is handed images by hand."""

    waiting: list[Batch] = state(factory=list)

    @hookimpl
    def build_loader(self, run: Run, mode: str) -> Any:
        return _Waiting(self.waiting) if mode == "predict" else None


@attrs.define
class _Waiting:
    """Batches that are put into a list, one at a time."""

    waiting: list[Batch]
    classes: tuple[str, ...] = ()

    @property
    def dataset(self) -> Any:
        return self

    def __len__(self) -> int:
        return 1

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        while True:
            yield self.waiting.pop()


class Model:
    """A detector ready to predict; `load` makes one. `with load(...) as model:` gives its memory back in the end."""

    def __init__(self, config: Any, name: str) -> None:
        self.name, self.config = name, config
        self._work_dir = config.options.work_dir
        data = next((part for part in config.plugins.values() if declared(part).key == "data"), None)
        self.data: Any = data
        """The plugin with its data sets, if there is one; they are not loaded."""
        self.transforms: list[Transform] = list(getattr(data, "val_transforms", ()))
        """Those of the validation that it was measured with."""
        moving = [type(transform).__name__ for transform in self.transforms if not transform.scales_only]
        if moving:
            raise UserError(
                f"{name}: its val_transforms have {moving[0]}, which moves objects; remove it by an override"
            )
        self.bits: int | None = next(
            (bits for one in ("val", "train") if (bits := getattr(getattr(data, one, None), "bit_depth", None))), None
        )
        """Significant bits of images with 16 bits a channel, where its data says so."""
        self._bus = Bus(config.plugins)
        names = {name for event in _KEPT for name in self.answering(event)}
        plugins: dict[str, Any] = {key: part for key, part in config.plugins.items() if key in names}
        self._images = _Images()
        self._kernel = Kernel(
            {**plugins, "images": self._images}, config.options, config=config.plain, versions=config.versions
        )
        with _own_random_numbers(), without_pretrained():
            self._stream = self._kernel.predict()
            self._start()

    def _start(self) -> None:
        """Build the model and load its weights, by predicting on one grey image of no interest."""
        grey = torch.full((3, 256, 256), 128, dtype=torch.uint8)
        self._run_batch([make_sample(grey, 0, self.transforms)])

    def answering(self, event: str) -> list[str]:
        """The keys of all plugins of the config that answer an event, also of those that stay out of a prediction."""
        return [impl.name for impl in self._bus.implementations(event)]

    @property
    def run(self) -> Run:
        """The run that holds the model, its device, and its classes."""
        return self._kernel.state

    @property
    def module(self) -> Any:
        """The network itself, in evaluation mode."""
        return self.run.bare_model

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order."""
        return self.run.classes

    @property
    def keypoint_names(self) -> tuple[str, ...]:
        return tuple(getattr(self.module, "keypoint_names", ()))

    @property
    def best_score(self) -> float | None:
        """From which score on the detections of its last validation had the best F1; None where its file has no such
        number: plugin `report` measures it."""
        score = self.run.metrics.get(SCORE_THRESHOLD, -1.0)
        return score if 0 <= score <= 1 else None  # nan, where nothing was found, is in neither

    def threshold(self, score: float | None = None) -> float:
        """The score below which nothing is kept: the one that is asked for, else `best_score`, else 0.5."""
        if score is not None:
            return score
        return _DEFAULT_SCORE if self.best_score is None else self.best_score

    @property
    def device(self) -> str:
        return str(self.run.device)

    @overload
    def predict(self, images: Image, **ways: Any) -> Result: ...

    @overload
    def predict(self, images: Sequence[Image], **ways: Any) -> list[Result]: ...

    def predict(self, images: Image | Sequence[Image], **ways: Any) -> Result | list[Result]:
        """What is found in an image, or in each of several: files, arrays [H, W, 3] or tensors [3, H, W], uint8 RGB.

        By keyword: `score` below which nothing is kept (`best_score`, else 0.5), `batch_size` (1), and `tiles`,
        `overlap`, `flips`, `scales` (see `Ways`). Raises `UserError`, `DataError` for what is not an image.
        """
        one = not isinstance(images, (list, tuple))
        given: Sequence[Image] = [images] if one else images  # type: ignore[list-item, assignment]
        score, batch_size = ways.pop("score", None), ways.pop("batch_size", 1)
        way = Ways(**ways)
        pairs = ((image, way.pixels(image, self.bits)) for image in given)
        found = list(self.results(pairs, way, score=score, batch_size=batch_size))
        return found[0] if one else [result.release() for result in found]

    def results(
        self, images: Iterable[tuple[Image, torch.Tensor]], way: Ways, *, score: float | None, batch_size: int = 1
    ) -> Iterator[Result]:
        """The same of images with their pixels, one after the other: no more than four batches are in memory."""
        least = self.threshold(score)
        most = 1 if way.tiles or batch_size == 1 else 4 * batch_size
        several: list[tuple[Image, torch.Tensor]] = []
        for pair in images:
            several.append(pair)
            if len(several) == most:
                yield from self._results(several, way, least, batch_size)
                several = []
        yield from self._results(several, way, least, batch_size)

    def _results(
        self, images: Sequence[tuple[Image, torch.Tensor]], way: Ways, score: float, batch_size: int
    ) -> Iterator[Result]:
        pixels = [one for _, one in images]
        for (image, one), found in zip(images, way.detect(self, pixels, batch_size, score), strict=True):
            yield Result(image, one, found, self.classes, self.keypoint_names)

    def detect(self, samples: Sequence[Sample], batch_size: int) -> list[Detections]:
        """What is found in each sample, in the pixels of its image before its transforms, on the host.

        Images of one size go through the model together, so that what is found in one depends on no other.
        """
        places: dict[tuple[int, int], list[int]] = {}
        for number, sample in enumerate(samples):
            places.setdefault(sample.size, []).append(number)
        found: list[Detections | None] = [None] * len(samples)
        for numbers in places.values():
            for start in range(0, len(numbers), batch_size):
                some = numbers[start : start + batch_size]
                for number, one in zip(some, self._run_batch([samples[number] for number in some]), strict=True):
                    found[number] = one
        return [one for one in found if one is not None]

    def _run_batch(self, samples: Sequence[Sample]) -> list[Detections]:
        self._images.waiting.append(pack_samples(samples).unpack())
        try:
            _, found = next(self._stream)
        except StopIteration:
            raise UserError(f"{self.name}: it is closed, or a prediction failed before; load it again") from None
        return [one.to("cpu") for one in found]

    def close(self) -> None:
        """Give the memory back; it cannot predict any more."""
        self._stream.close()
        shutil.rmtree(self._work_dir, ignore_errors=True)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Loading a model seeds generators; the caller's go on as if it had not."""
    python, numbers, states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.random.set_rng_state(states)
