"""The `report` plugin: keeps what the page is made of, and writes the page."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkernel import Run, UserError, hookimpl, option, plugin, state
from detkernel.clock import Clock
from detkernel.errors import as_typed, relative
from detkernel.files import read_regular, refuse_links, write_atomic
from detkernel_detection import Batch, Dataset, Detections
from detkernel_detection.findings import ExaminesData, Finding
from detkernel_detection.predictor import SCORE_THRESHOLD

if TYPE_CHECKING:
    from detkernel_report.metrics import Matches
    from detkernel_report.results import ImageResult, Results

FOLDER = "report"
PAGE = "report.html"
_MOST = 2**20
"""Bytes of what is read of an earlier process."""


@plugin(priority="very_low", resume_neutral=("*",))
class Report:
    """At the end of each run, write `report.html`: one page that shows how the run went and what to improve first.

    What it shows is kept in `<work_dir>/report` while the run goes on, so that `detkernel report` can write the page of
    a run that was killed, and `detkernel monitor` that of one that is running. Each validation has the metric
    `score_threshold`: from which score on its detections have the best F1. `detkernel predict` goes by it.
    """

    images: int = option(
        default=12, at_least=0, help="images of each validation set on the page, truth beside prediction: the worst "
        "ones, and a third of them the best"
    )  # fmt: skip
    side: int = option(default=480, at_least=64, help="what the longer side of such an image is scaled down to, pixels")
    times: bool = option(default=True, help="measure how long each plugin takes at each event")

    _clock: Clock | None = state(default=None)
    _began: str = state(default="")
    _seconds: float = state(default=0.0)
    _first: int = state(default=0)
    """The iteration that this process began at."""
    _over: bool = state(default=False)
    """Whether the run was complete before this process."""
    _found: dict[int, tuple[Any, Any, Any]] = state(factory=dict)
    """Boxes, scores and labels by position in the data set."""
    _scales: list[float] = state(factory=list)

    @hookimpl(tryfirst=True)
    def setup(self, run: Run) -> None:
        if self.times and run.is_main and not run.checking and run.mode in ("train", "test"):
            self._clock = Clock(run.bus)

    @hookimpl(wrapper=True)
    def before_run(self, run: Run) -> Generator[None, None, None]:
        """Behind a resume. What an earlier run left in the folder is removed."""
        yield
        if not run.is_main or run.checking or run.mode not in ("train", "test"):
            return
        refuse_links(run.work_dir / FOLDER / "images" / "x", run.work_dir)
        refuse_links(run.work_dir / PAGE, run.work_dir)
        self._began, self._seconds, self._first = _now(), time.perf_counter(), run.iter
        if run.mode == "train":
            if run.iter == 0:
                _clear(run.work_dir / FOLDER)
            self._over = run.done and _was_complete(run.work_dir / FOLDER / "run.json")
            self._write_state(run, "running")
            self._write(run, "data.jsonl", _statistics(run))

    @hookimpl
    def before_val_set(self) -> None:
        self._found.clear()
        self._scales.clear()

    @hookimpl
    def after_val_iter(self, run: Run, batch: Batch, detections: Sequence[Detections]) -> None:
        if run.checking or not isinstance(run.loader.dataset, Dataset):
            return
        self._scales += [(y * x) ** 0.5 for y, x in batch.scales]
        for one in detections:
            values = (each.detach().float().cpu().numpy() for each in (one.boxes, one.scores, one.labels))
            self._found[one.index] = tuple(values)  # type: ignore[assignment]

    @hookimpl
    def after_val_set(self, run: Run) -> None:
        """Keep what was found beside what there was, and the images that went worst and best."""
        parts = run.processes.gathered(self._found)
        self._found = {}
        if not run.is_main or not self._began or not (found := {at: one for part in parts for at, one in part.items()}):
            return
        from detkernel_report.metrics import best_threshold, matched
        from detkernel_report.results import rows

        results = self._results(run, found)
        self._write(run, f"images_{results.name}.jsonl", rows(results))
        matches = matched(results, thresholds=(0.5,), sizes=("all",))
        best = best_threshold(matches)
        run.metrics.publish(SCORE_THRESHOLD, best.score if best.f1 > 0 else math.nan)
        if self.images:
            self._write_images(run, results, matches, best.score)

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        if not run.is_main or not self._began:
            return
        metrics = run.metrics
        lines = [
            {"name": name, "better": metrics.better(name), "history": metrics.history(name) or [(run.iter, value)]}
            for name, value in metrics.items()
        ]
        self._write(run, "metrics.jsonl" if run.mode != "test" else "metrics_test.jsonl", lines)
        if run.mode != "test":
            self._write_state(run, "running")

    @hookimpl
    def after_run(self, run: Run) -> None:
        """Before the log's last line."""
        if self._clock is not None:
            self._clock.stop()
        if not self._began or not run.is_main:
            return
        if run.mode == "train":
            self._write_state(run, _ended(run))
            if not self._over:
                self._write(run, "times.jsonl", self._times(run))
        self._began = ""
        from detkernel_report.page import write_report

        try:
            write_report(run.work_dir)
            run.results["report"] = relative(run.work_dir / PAGE)
        except (OSError, UserError) as error:
            run.log.error("%s could not be written: %s; the run goes on", relative(run.work_dir / PAGE), _why(error))

    def _write_state(self, run: Run, condition: str) -> None:
        """How the run stands; of one that was complete and is started again, how it went is there already."""
        if not self._over:
            self._write(run, "run.json", [self._said(run, condition)])

    def _results(self, run: Run, found: Mapping[int, tuple[Any, Any, Any]]) -> Results:
        import numpy as np

        from detkernel_report.results import Results

        dataset, images, invalid = run.loader.dataset, [], 0
        for index in range(len(dataset)):
            image, left_out = _image(dataset.truth(index), index, found.get(index))
            images.append(image)
            invalid += left_out
        images.sort(key=lambda image: (isinstance(image.image_id, str), image.image_id))  # as evaluators have them
        scale = float(np.median(self._scales)) if self._scales else 1.0
        return Results(run.val_set or run.mode, run.iter, list(dataset.classes), images, scale, invalid)

    def _write_images(self, run: Run, results: Results, matches: Matches, score: float) -> None:
        """Small JPEGs of the worst and the best images, without anything drawn; those of the last time are removed."""
        from detkernel_report.mistakes import chosen, image_scores
        from detkernel_report.thumbnails import jpeg

        worst, best = chosen(image_scores(results, matches, score), self.images)
        folder = run.work_dir / FOLDER / "images"
        before = set(folder.glob(f"{results.name}_*.jpg"))
        for one in (*worst, *best):
            index = results.images[one.at].index
            path = folder / f"{results.name}_{index}.jpg"
            before.discard(path)
            self._write(run, f"images/{path.name}", jpeg(run.loader.dataset.image(index), self.side))
        for path in before:
            path.unlink(missing_ok=True)

    def _write(self, run: Run, name: str, content: bytes | Iterable[Mapping[str, Any]]) -> None:
        """A file in the folder, whole or not at all: bytes, or JSON lines."""
        path = run.work_dir / FOLDER / name
        if not isinstance(content, bytes):
            content = "".join(json.dumps(_plain(line), allow_nan=False) + "\n" for line in content).encode()
        try:
            write_atomic(path, content, within=run.work_dir)
        except (OSError, UserError) as error:
            run.log.warning("%s could not be written: %s; the run goes on", relative(path), _why(error))

    def _said(self, run: Run, condition: str) -> dict[str, Any]:
        """How the run stands."""
        error = run.error
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}" if error is not None else ""
        return {
            "state": condition, "reason": run.stop_reason or why, "began": self._began, "updated": _now(),
            "seconds": time.perf_counter() - self._seconds, "from_iter": self._first,
            "iter": run.iter, "max_iters": run.max_iters, "epoch": run.epoch, "max_epochs": run.max_epochs,
            "epoch_length": run.epoch_length, "work_dir": as_typed(run.work_dir),
            "classes": list(run.classes), "process": os.getpid(), "environment": _environment(run),
            "parameters": _parameters(run),
        }  # fmt: skip

    def _times(self, run: Run) -> list[dict[str, Any]]:
        if self._clock is None:
            return []
        head = {"seconds": self._clock.total, "iters": run.iter - self._first, "device": str(run.device)}
        clock = self._clock
        return [
            head,
            *(
                {"plugin": plugin, "event": event, "seconds": seconds, "calls": clock.calls[plugin, event]}
                for (plugin, event), seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])
            ),
        ]


def _was_complete(path: Path) -> bool:
    """Whether the process before this one ended a run."""
    try:
        said = json.loads(read_regular(path, _MOST))
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("state") == "complete"


def _statistics(run: Run) -> list[dict[str, Any]]:
    """A line for each data set, with what a plugin that examines the data found in it; what is about several is told
    of the first."""
    from detkernel_report.statistics import statistics

    sets = {mode: each.dataset for mode, each in run.loaders.items() if isinstance(each.dataset, Dataset)}
    examining = [plugin for plugin in run.bus.plugins.values() if isinstance(plugin, ExaminesData)]
    if not examining:
        return [statistics(mode, dataset) for mode, dataset in sets.items()]
    found: dict[str, list[Finding]] = {mode: [] for mode in sets}
    for one in (one for each in examining for one in each.examine_data()):
        found.setdefault(one.split if one.split in found else next(iter(found), ""), []).append(one)
    return [statistics(mode, dataset, found[mode]) for mode, dataset in sets.items()]


def _image(truth: Any, index: int, found: tuple[Any, Any, Any] | None) -> tuple[ImageResult, int]:
    """An image's truth and detections, and how many of those were left out since they are not finite."""
    import numpy as np

    from detkernel_report.results import ImageResult

    boxes, scores, labels = found or (np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    boxes, scores = boxes.reshape(-1, 4).astype(np.float64), scores.astype(np.float64)
    finite = np.isfinite(boxes).all(1) & np.isfinite(scores)
    order = np.flatnonzero(finite)[np.argsort(-scores[finite], kind="stable")]
    image = ImageResult(
        index, truth.image_id, as_typed(truth.path), truth.height, truth.width, truth.boxes.reshape(-1, 4),
        truth.labels, truth.area, truth.crowd, truth.crowd | truth.difficult,
        boxes[order], scores[order], labels[order].astype(np.int64),
    )  # fmt: skip
    return image, int((~finite).sum())


def _ended(run: Run) -> str:
    if isinstance(run.error, KeyboardInterrupt):
        return "interrupted"
    if run.error is not None:
        return "failed"
    return "stopped" if run.stop_reason is not None else "complete"


def _parameters(run: Run) -> list[int] | None:
    """How many the model has, and how many of them are trained; None for a model that does not say."""
    if not hasattr(run.bare_model, "parameters"):
        return None
    parameters = list(run.bare_model.parameters())
    return [sum(one.numel() for one in parameters), sum(one.numel() for one in parameters if one.requires_grad)]


def _environment(run: Run) -> dict[str, str]:
    import torch

    device = str(run.device)
    found = {
        "machine": platform.node(), "system": platform.platform(), "processor": _processor(),
        "CPU cores": str(os.cpu_count()), "threads of torch": str(torch.get_num_threads()),
        "Python": sys.version.split()[0], "torch": torch.__version__, "device": device, "precision": run.precision,
        "processes": str(run.world_size),
    }  # fmt: skip
    if device.startswith("cuda") and torch.cuda.is_available():
        found |= {"GPU": torch.cuda.get_device_name(device), "CUDA": str(torch.version.cuda)}
    return {**found, **{name: str(version) for name, version in run.versions.items()}}


def _processor() -> str:
    """The name of the CPU, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _clear(folder: Path) -> None:
    """Remove what another run kept; nothing else, and nothing behind a link."""
    for path in [*folder.glob("*.json"), *folder.glob("*.jsonl"), *folder.glob("images/*.jpg")]:
        path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """A value that JSON has: what is not finite is null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _why(error: Exception) -> object:
    return getattr(error, "strerror", None) or error
