"""`detkernel evaluate`: metrics of saved detections, without a model."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import attrs
import click
from detkernel import Run, UserError, declared, hookimpl, option, plugin, state
from detkernel.errors import printable, relative

if TYPE_CHECKING:
    from detkernel.config import Config
    from detkernel_detection import Dataset, Detections

    from detkernel_evaluation.found import SavedDetections

CHUNK = 64
"""Images at a time."""


@click.command(epilog="\b\nFor example:\n  detkernel evaluate detections.json config.yaml")
@click.argument("results", type=click.Path(path_type=Path), metavar="RESULTS.json")
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--categories",
    type=click.Choice(["ids", "labels"]),
    default="ids",
    show_default=True,
    help="what `category_id` is: the data's own category ids (where it has none, labels from 1), or labels from 0",
)
@click.option("--json", "as_json", is_flag=True, help="print the metrics as JSON, nan as null")
def evaluate(results: Path, config: str, overrides: tuple[str, ...], categories: str, as_json: bool) -> None:
    """Measure saved detections, without a model.

    They are put to CONFIG's test data, or else its validation data, and all of its evaluators measure; nothing is
    written. RESULTS.json is in COCO's form of results, as `coco_map` with `save` writes it and other tools do: a list
    of {"image_id", "category_id", "score" and "bbox", "segmentation" or "keypoints"}.
    """
    from detkernel.config import load

    loaded = load(config, overrides, writes=False)
    metrics = measured(loaded, results, labels=categories == "labels")
    if as_json:
        plain = {name: None if math.isnan(value) else value for name, value in metrics.items()}
        click.echo(json.dumps(plain, indent=1))
        return
    for name, value in metrics.items():
        click.echo(f"{printable(name)}: {value:.4f}")


def measured(config: Config, results: Path, *, labels: bool = False) -> dict[str, float]:
    """The metrics of all evaluators of a config for a file of detections. Raises `UserError`, `DataError`."""
    from detkernel import Kernel

    from detkernel_evaluation.saved_results import read

    evaluators = {name: part for name, part in config.plugins.items() if declared(part).key == "evaluation"}
    if not evaluators:
        raise UserError("the config has no evaluator, such as `evaluation: {use: coco_map}`")
    loaders = {name: part for name, part in config.plugins.items() if hasattr(part, "build_loader")}
    for part in evaluators.values():
        if hasattr(part, "save"):
            part.save = None  # what would be written is what was read
    model = SavedModel(entries=read(results), source=relative(results), labels=labels)
    with TemporaryDirectory(prefix="detkernel-evaluate-") as folder, _messages(folder):
        options = attrs.evolve(config.options, work_dir=Path(folder))  # type: ignore[misc]
        parts = {**loaders, **evaluators, "saved detections": model}
        return dict(Kernel(parts, options, priorities=_of(config.priorities, parts)).test().metrics)


def _of(priorities: Any, parts: Any) -> dict[str, str]:
    return {name: value for name, value in priorities.items() if name in parts}


@contextmanager
def _messages(folder: str) -> Iterator[None]:
    """What evaluators and the data say, on standard error; not what was written to a folder that will be gone."""
    logger, handler = logging.getLogger("detkernel"), logging.StreamHandler(sys.stderr)
    level = logger.level
    handler.addFilter(lambda record: folder not in record.getMessage())
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@plugin(priority="lowest")
class SavedModel:
    """In the place of a model: it finds what a file says."""

    entries: Any = option(help="what the file of results has")
    source: str = option(help="that file, for messages")
    labels: bool = option(default=False, help="whether category ids are labels, from 0")
    _found: list[Any] = state(factory=list)

    @hookimpl(trylast=True)
    def setup(self, run: Run) -> None:
        """Behind evaluators, which look whether their `sets` are there: the file is of one set."""
        run.val_sets = ()

    @hookimpl
    def build_loader(self, run: Run, mode: str) -> None:
        """The config's loader makes it."""

    @hookimpl
    def build_model(self, run: Run) -> None:
        from detkernel_evaluation.coco import category_ids
        from detkernel_evaluation.saved_results import matched

        loader = run.loaders[run.mode]
        dataset: Dataset = loader.dataset
        images = [dataset.truth(index) for index in range(len(dataset))]
        ids = None if self.labels else category_ids(dataset)
        saved = matched(self.entries, self.source, images, dataset.classes, ids)
        self._found = saved.found
        run.log.info(
            "%s: %s detections (%s) in %s of %s images",
            self.source, f"{len(saved):,}", ", ".join(sorted(saved.kinds)), f"{saved.images:,}",
            f"{len(images):,}",
        )  # fmt: skip
        run.loaders[run.mode] = Positions(dataset)

    @hookimpl
    def train_step(self) -> dict[str, Any]:
        raise AssertionError("nothing is trained")

    @hookimpl
    def val_step(self, run: Run, batch: Sequence[int]) -> list[Detections]:
        images = ((index, run.loader.dataset.truth(index)) for index in batch)
        return [_detections(index, notes.image_id, self._found[index]) for index, notes in images]


@attrs.frozen
class Positions:
    """A loader that decodes no image: its batches are positions in the data set."""

    dataset: Dataset

    def __len__(self) -> int:
        return -(-len(self.dataset) // CHUNK)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Sequence[int]]:
        for first in range(start * CHUNK, len(self.dataset), CHUNK):
            yield range(first, min(first + CHUNK, len(self.dataset)))


def _detections(index: int, image_id: Any, found: Any) -> SavedDetections:
    import torch

    from detkernel_evaluation.found import SavedDetections

    points = None if found.keypoints is None else torch.from_numpy(found.keypoints)
    boxes, scores, labels = map(torch.from_numpy, (found.boxes, found.scores, found.labels))
    return SavedDetections(image_id, index, boxes, scores, labels, None, points, found=found)
