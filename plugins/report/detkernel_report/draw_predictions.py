"""Images of what the model sees and finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkernel import Run, hookimpl, option, plugin, state
from detkernel.errors import relative
from detkernel.files import write_atomic
from detkernel_detection import Batch, Detections, Losses

if TYPE_CHECKING:
    from detkernel_detection.drawing import Tile
    from torch import Tensor

_POINTS = 200
"""Of the loss's curve."""


@plugin(priority="low", resume_neutral=("*",))
class DrawPredictions:
    """After each validation, draw detections of some images, beside their annotations, on one sheet; and, beside these
    sheets, augmented training samples and curves.

    All are in `<work_dir>/predictions`: `iter_350.jpg` of a validation, `iter_350_NAME.jpg` of a further validation
    set, `test.jpg`, `train_samples.jpg`, `curves.png`. Detections are coloured by class, annotations dashed in white.
    """

    count: int = option(default=12, at_least=1, help="images on the sheet, spread evenly over the data")
    columns: int = option(default=3, at_least=1, help="images in a row")
    score: float = option(default=0.5, at_least=0, at_most=1, help="detections below this score are not drawn")
    side: int = option(default=640, at_least=64, help="what the longer side of an image is scaled to, in pixels")
    annotations: bool = option(default=True, help="draw annotations too")
    training: int = option(default=9, at_least=0, help="training samples, from the first batches; 0: no such sheet")
    curves: bool = option(default=True, help="draw curves of the loss and of the first metrics after each validation")

    _kept: dict[int, Detections] = state(factory=dict)
    _wanted: frozenset[int] = state(default=frozenset())
    _samples: list[Tile] | None = state(default=None)
    """None: there are enough, or none is wanted."""
    _loss: Tensor | float | None = state(default=None)
    """The sum of the losses since the last point of the curve."""
    _seen: int = state(default=0)
    """Iterations in that sum."""
    _points: list[tuple[int, Any]] = state(factory=list)
    """(iteration, mean loss since the point before): on the device until they are drawn or saved."""

    @hookimpl
    def before_run(self, run: Run) -> None:
        self._samples = [] if self.training and run.mode == "train" and run.is_main and not run.checking else None

    @hookimpl
    def before_train_iter(self, run: Run, batch: Batch) -> None:
        if self._samples is None:
            return
        from detkernel_report import contact_sheet

        start = time.perf_counter()
        missing = self.training - len(self._samples)
        self._samples += contact_sheet.sample_tiles(batch, run.classes, self.side, missing)
        if len(self._samples) >= self.training or run.iter + 1 >= run.max_iters:
            tiles, self._samples = self._samples, None
            self._write(run, "train_samples.jpg", lambda: contact_sheet.sample_sheet(tiles, self.columns))
        run.aside += time.perf_counter() - start

    @hookimpl
    def after_train_iter(self, run: Run, losses: Losses) -> None:
        if not self.curves:
            return
        for name, value in losses.items():
            if "loss" in name:
                self._loss = value.detach() if self._loss is None else self._loss + value.detach()
        self._seen += 1
        if self._loss is not None and (run.iter % max(1, run.max_iters // _POINTS) == 0 or run.done):
            self._points.append((run.iter, self._loss / self._seen))
            self._loss, self._seen = None, 0

    @hookimpl
    def before_val_set(self, run: Run) -> None:
        self._kept.clear()
        total = len(run.loader.dataset)
        count = min(self.count, total)
        self._wanted = frozenset(number * total // count for number in range(count))

    @hookimpl
    def after_val_iter(self, run: Run, detections: Sequence[Detections]) -> None:
        for found in detections:
            if found.index in self._wanted:
                self._kept[found.index] = found

    @hookimpl
    def after_val_set(self, run: Run) -> None:
        here = {index: found.to("cpu") for index, found in self._kept.items()}
        self._kept.clear()
        kept = {index: found for part in run.processes.gathered(here) for index, found in part.items()}
        if not run.is_main or run.checking or not kept:
            return
        from detkernel_report import contact_sheet

        further = f"_{run.val_set}" if run.val_set else ""
        name = f"test{further}.jpg" if run.mode == "test" else f"iter_{run.iter}{further}.jpg"
        several = [kept[index] for index in sorted(kept)]
        self._write(run, name, lambda: contact_sheet.prediction_sheet(self, run, several))

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        if not self.curves or not run.trains or not run.is_main or run.checking:
            return
        from detkernel_report.curves import curves

        metrics = {name: history for name in run.metrics if (history := run.metrics.history(name))}
        shown = {name: metrics[name] for name in list(metrics)[:2]}
        loss = {"loss": self._on_the_host()}
        self._write(run, "curves.png", lambda: curves([("Loss", loss), ("Metrics", shown)]))

    def state_dict(self) -> dict[str, Any]:
        points = [list(point) for point in self._on_the_host()]
        return {"points": points, "loss": None if self._loss is None else float(self._loss), "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._points = [(int(iteration), float(value)) for iteration, value in state["points"]]
        self._loss, self._seen = state["loss"], int(state["seen"])

    def _on_the_host(self) -> list[tuple[int, float]]:
        """The points of the loss; the device is asked for those that are new."""
        self._points = [(iteration, float(value)) for iteration, value in self._points]
        return self._points

    def _write(self, run: Run, name: str, make: Callable[[], bytes]) -> None:
        path = Path(run.work_dir) / "predictions" / name
        try:
            write_atomic(path, make(), within=run.work_dir)
        except OSError as error:
            run.log.warning("%s could not be written: %s; the run goes on", relative(path), error.strerror or error)
        else:
            run.results["drawings"] = relative(path.parent)
