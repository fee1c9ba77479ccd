"""The sink for TensorBoard."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from detkernel import Run, plugin, state

from detkernel_logging.sink import Entry, Sink

if TYPE_CHECKING:
    from detkernel_logging.progress import Progress


@plugin
class TensorBoard(Sink):
    """Figures for TensorBoard in `<work_dir>/tensorboard`: `train/loss`, `val/coco/bbox_mAP`, ..."""

    _writer: Any = state(default=None)

    def __attrs_post_init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("tensorboard is not installed: `pip install tensorboard`, or leave this sink out")

    def start(self, run: Run, progress: Progress) -> None:
        """What a killed run wrote beyond the position that this one resumes is hidden, by `purge_step`."""
        from torch.utils.tensorboard import SummaryWriter

        purge_step = run.iter + 1 if run.mode == "train" else None
        self._writer = SummaryWriter(str(run.work_dir / "tensorboard"), purge_step=purge_step)

    def write(self, run: Run, entry: Entry) -> None:
        if self._writer is None or entry.figures is None:
            return
        for name, value in entry.figures.values.items():
            self._writer.add_scalar(f"{entry.figures.mode}/{name}", value, entry.figures.step)
        self._writer.flush()  # else a killed run would lose two minutes that a resume does not repeat

    def stop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
