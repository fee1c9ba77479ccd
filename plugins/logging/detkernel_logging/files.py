"""Sinks that are files in the work dir: `log.txt` to read, `log.jsonl` to plot."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from detkernel import Run, plugin
from detkernel.errors import relative
from detkernel.files import open_to_write, refuse_links, write_atomic

from detkernel_logging.sink import Entry, Metrics, Sink

if TYPE_CHECKING:
    from detkernel_logging.progress import Progress


@plugin
class TextLog(Sink):
    """Every line of the log in `<work_dir>/log.txt`, which is only ever appended to."""

    def start(self, run: Run, progress: Progress) -> None:
        """Raises UserError for a link, before the run has begun."""
        refuse_links(run.work_dir / "log.txt", run.work_dir)

    def write(self, run: Run, entry: Entry) -> None:
        append(run.work_dir / "log.txt", _line(entry.text), run.work_dir)


@plugin
class JsonLines(Sink):
    """Every line of metrics as a JSON object in `<work_dir>/log.jsonl`."""

    def start(self, run: Run, progress: Progress) -> None:
        """What a killed run wrote beyond the position that this one resumes is removed; another run's file is kept
        under another name."""
        path = run.work_dir / "log.jsonl"
        refuse_links(path, run.work_dir)
        if run.mode != "train" or not path.is_file() or not path.stat().st_size:
            return
        if run.iter == 0:
            aside = _free_name(path)
            path.rename(aside)
            run.log.info("%s of an earlier run is now %s", relative(path), aside.name)
            return
        lines = path.read_bytes().splitlines()
        kept = [line for line in lines if _is_past(line, run)]
        if len(kept) < len(lines):
            write_atomic(path, b"".join(line + b"\n" for line in kept), within=run.work_dir)

    def write(self, run: Run, entry: Entry) -> None:
        if entry.metrics is not None:
            line = json.dumps(_plain(entry.metrics), allow_nan=False)
            append(run.work_dir / "log.jsonl", _line(line), run.work_dir)


def append(path: Path, data: bytes, within: Path, head: bytes = b"") -> None:
    """Append to a file, all or nothing; a new one begins with `head`.

    Raises OSError, and UserError for a link below the folder `within`. The file is opened each time, which costs some
    50 us: a folder that was moved away is noticed, and nothing is left open or unwritten, however the run ends.
    """
    with os.fdopen(open_to_write(path, within), "ab", buffering=0) as file:
        end = file.tell()
        data = data if end else head + data
        if file.write(data) < len(data):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _line(text: str) -> bytes:
    return f"{text}\n".encode(errors="backslashreplace")


def _plain(metrics: Metrics) -> dict[str, Any]:
    """What JSON can say: it has no NaN and no infinity. A value with the name of a field has its mode in front."""
    head = attrs.asdict(metrics, filter=lambda field, _: field.name != "values")
    named = {f"{metrics.mode}/{name}" if name in head else name: value for name, value in metrics.values.items()}
    return head | {name: value if math.isfinite(value) else None for name, value in named.items()}


def _is_past(line: bytes, run: Run) -> bool:
    """Whether a line is of what the run has behind it; one that was torn is not."""
    try:
        entry = json.loads(line)
        return bool(entry["step"] <= (run.iter if entry["mode"] == "train" else run.validated))
    except (ValueError, KeyError, TypeError):
        return False


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_stem(f"{path.stem}_{number}")).exists():
        number += 1
    return aside
