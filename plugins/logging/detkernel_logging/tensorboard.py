"""The sink for TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkernel import Run, plugin, state
from detkernel.errors import printable
from detkernel.files import refuse_links

from detkernel_logging.files import append
from detkernel_logging.sink import Entry, Sink, needed

if TYPE_CHECKING:
    from detkernel_logging.progress import Progress


@plugin
class TensorBoard(Sink):
    """Metrics for TensorBoard in `<work_dir>/tensorboard`: `train/loss`, `val/coco/bbox_mAP`, ...

    Written line by line and not by a `SummaryWriter`: its thread keeps back what a killed run would lose, ends with a
    traceback on a full disk, and writes to a file that was removed without noticing.
    """

    _path: Path | None = state(default=None)
    _head: bytes = state(default=b"")
    """What the file begins with."""

    def check(self) -> None:
        needed(self, "tensorboard", "tensorboard")

    def start(self, run: Run, progress: Progress) -> None:
        """What a killed run wrote beyond the position that this one resumes is hidden, by a start at the next step."""
        now = time.time()
        folder = run.work_dir / "tensorboard"
        refuse_links(folder, run.work_dir)
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        self._path = next(path for number in count() if not (path := folder / f"{name}.{number}").exists())
        self._head = _record(wall_time=now, file_version="brain.Event:2")
        if run.mode == "train":
            self._head += _record(wall_time=now, step=run.iter + 1, session_log={"status": 1})  # START

    def write(self, run: Run, entry: Entry) -> None:
        if self._path is None or entry.metrics is None:
            return
        mode, step = entry.metrics.mode, entry.metrics.step
        values = [
            {"tag": f"{mode}/{printable(name)}", "simple_value": value} for name, value in entry.metrics.values.items()
        ]
        record = _record(wall_time=time.time(), step=step, summary={"value": values})
        append(self._path, record, run.work_dir, head=self._head)

    def stop(self) -> None:
        self._path = None


def _record(**fields: Any) -> bytes:
    """An event as TensorBoard's files have it."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = BytesIO()
    RecordWriter(file).write(Event(**fields).SerializeToString())
    return file.getvalue()
