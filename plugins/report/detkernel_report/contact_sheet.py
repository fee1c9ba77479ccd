"""The sheets of a validation and of training samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from detkernel import Run
from detkernel.errors import printable
from detkernel_detection import Batch, Dataset, Detections
from detkernel_detection.drawing import Tile, draw, jpeg, sheet

if TYPE_CHECKING:
    from torch import Tensor

    from detkernel_report.draw_predictions import DrawPredictions

_SHOWN_METRICS = 2


def prediction_sheet(options: DrawPredictions, run: Run, kept: Sequence[Detections]) -> bytes:
    """A JPEG of some images of the set that is being validated, with a header and a legend."""
    dataset = run.loader.dataset
    tiles = [prediction_tile(options, dataset, found) for found in kept]
    labels = sorted({label for found in kept for label in _drawn(options, found).labels.tolist()})
    where = f"the {run.val_set or {'val': 'validation', 'test': 'test'}[run.mode]} data"
    notes = [
        f"Detections with a score of {options.score:g} or more, {len(kept)} of {len(dataset)} images of {where}"
        f"{'; annotations are dashed in white' * options.annotations}"
    ]
    alerts = []
    if not labels:
        best = max((float(found.scores.max()) for found in kept if len(found)), default=None)
        said = "there is no detection at all" if best is None else f"the best has {best:.3f}"
        alerts = [f"No detection on these images has a score of {options.score:g} or more: {said}"]
    made = sheet(
        tiles,
        options.columns,
        title=": ".join(filter(None, (_when(run), ", ".join(_metrics(run))))),
        notes=notes,
        alerts=alerts,
        classes=[(label, dataset.classes[label]) for label in labels],
        truth=options.annotations,
    )
    return jpeg(made)


def prediction_tile(options: DrawPredictions, dataset: Dataset, found: Detections) -> Tile:
    """One image with its annotations and detections."""
    notes = dataset.annotations(found.index)
    drawn = _drawn(options, found)
    image = draw(
        dataset.image(found.index),
        drawn,
        dataset.classes,
        truth=notes if options.annotations else None,
        longest=options.side,
        keypoint_names=getattr(dataset, "keypoint_names", ()),
    )
    name = printable(str(found.image_id))
    annotated = f", {len(notes)} annotated" * options.annotations
    if len(drawn) or not len(found):
        return Tile(image, f"{name}: {len(drawn)} found{annotated}", alert=not len(drawn) and bool(len(notes)))
    return Tile(image, f"{name}: none found{annotated}; best score {float(found.scores.max()):.3f}", alert=True)


def sample_tiles(batch: Batch, classes: Sequence[str], side: int, count: int) -> list[Tile]:
    """The first images of a training batch, with their targets, as the model gets them."""
    batch = batch.keep(range(min(count, len(batch))))
    batch.move("cpu")
    tiles = []
    for number, (height, width) in enumerate(batch.sizes):
        target = batch.target(number)
        image = draw(
            _levels(batch.images[number, :, :height, :width]), _cropped(target, height, width), classes, longest=side
        )
        objects = f"{len(target)} object{'s' * (len(target) != 1)}"
        tiles.append(Tile(image, f"{printable(str(batch.image_ids[number]))}: {objects}"))
    return tiles


def sample_sheet(tiles: Sequence[Tile], columns: int) -> bytes:
    """A JPEG of training samples."""
    return jpeg(sheet(tiles, columns, title="Training samples", notes=["Augmented, as the model gets them"]))


def _cropped(target: Any, height: int, width: int) -> Any:
    if target.masks is not None:
        target.masks = target.masks[:, :height, :width]
    return target


def _levels(image: Tensor) -> Tensor:
    """uint8; an image that a transform has normalised is spread over all levels."""
    if not image.is_floating_point():
        return image
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-6) * 255).byte()


def _drawn(options: DrawPredictions, found: Detections) -> Detections:
    return found.keep((found.scores >= options.score) & found.boxes.isfinite().all(1))


def _when(run: Run) -> str:
    return "Test" if run.mode == "test" else f"Iteration {run.iter}"


def _metrics(run: Run) -> list[str]:
    """The first metrics of the set being validated that are better when they are higher: an evaluator's main ones."""
    own = f"{run.val_set}/" if run.val_set else ""
    others = tuple(f"{name}/" for name in run.val_sets if name != run.val_set)
    names = [
        name
        for name in run.metrics
        if name.startswith(own) and not name.startswith(others) and run.metrics.better(name) is not None
    ]
    return [f"{printable(name)} {run.metrics[name]:.3f}" for name in names[:_SHOWN_METRICS]]
