"""An image of what the model sees."""

from __future__ import annotations

from collections.abc import Sequence

from detkernel import Run, hookimpl, option, plugin, state
from detkernel.errors import relative
from detkernel.files import write_atomic
from detkernel_detection import Detections


@plugin(priority="low", resume_neutral=("*",))
class DrawPredictions:
    """After each validation, draw detections of some images, beside their annotations, on one sheet.

    The sheet is `<work_dir>/predictions.png`, for a further validation set `predictions_NAME.png`. Detections are
    coloured by class, annotations are thin white lines.
    """

    count: int = option(default=12, at_least=1, help="images on the sheet, spread evenly over the data")
    columns: int = option(default=4, at_least=1, help="images in a row")
    score: float = option(default=0.3, at_least=0, at_most=1, help="detections below this score are not drawn")
    side: int = option(default=320, at_least=64, help="what the longer side of an image is scaled to, in pixels")
    annotations: bool = option(default=True, help="draw annotations too")

    _kept: dict[int, Detections] = state(factory=dict)
    _wanted: frozenset[int] = state(default=frozenset())

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
        here = {index: found.to("cpu") for index, found in self._kept.items()} if run.world_size > 1 else self._kept
        kept = {index: found for part in run.processes.gathered(here) for index, found in part.items()}
        if not run.is_main or run.checking or not kept:
            return
        from detkernel_report import contact_sheet

        dataset = run.loader.dataset
        tiles = [contact_sheet.tile(self, dataset, kept[index]) for index in sorted(kept)]
        path = run.work_dir / f"predictions{'_' * bool(run.val_set)}{run.val_set}.png"
        try:
            write_atomic(path, contact_sheet.encode(tiles, self.columns), within=run.work_dir)
        except OSError as error:
            run.log.warning("%s could not be written: %s; the run goes on", relative(path), error.strerror or error)
        self._kept.clear()
