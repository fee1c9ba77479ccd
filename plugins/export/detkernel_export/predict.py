"""The command `detkernel predict`: images in, drawings and files of detections out."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from detkernel import DataError, UserError
from detkernel.errors import printable, relative

if TYPE_CHECKING:
    from torch import Tensor

    from detkernel_export.model import Model
    from detkernel_export.results import Result
    from detkernel_export.sources import Source
    from detkernel_export.ways import Ways

_READERS = 2
"""Threads that decode images while the model is busy."""
_SHOWN = 10
"""Images that cannot be read, of which the message says why."""


@click.command(epilog="\b\nFor example:\n  detkernel predict runs/shapes/checkpoints/best.pt photos/ --save coco")
@click.argument("checkpoint")
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="predictions", show_default=True, help="folder"
)
@click.option(
    "--save", multiple=True, type=click.Choice(["coco", "yolo", "voc", "csv"]), help="also write this form; repeatable"
)
@click.option("--draw/--no-draw", default=True, help="write a drawing of each image (the default)")
@click.option("--score", type=click.FloatRange(0, 1), help="leave out what is below; default: best at validation")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="images at once")
@click.option("--tiles", type=click.IntRange(min=32), help="cut larger images into tiles of this side, in pixels")
@click.option("--overlap", type=click.FloatRange(0, 0.9), default=0.2, show_default=True, help="share of neighbours")
@click.option("--flip", multiple=True, type=click.Choice(["horizontal", "vertical"]), help="look at it mirrored, too")
@click.option("--scale", multiple=True, type=click.FloatRange(0.1, 10), help="look at it in this size; 1: as trained")
@click.option("--frames", type=click.IntRange(min=1), help="stop a video or a camera after so many")
@click.option("--device", help="cpu, cuda, cuda:1; by default as in the config")
@click.option("--config", help="that of weights without one, such as others publish")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the config; repeatable")
def predict(
    checkpoint: str,
    sources: tuple[str, ...],
    output: Path,
    save: tuple[str, ...],
    draw: bool,
    score: float | None,
    batch_size: int,
    tiles: int | None,
    overlap: float,
    flip: tuple[str, ...],
    scale: tuple[float, ...],
    frames: int | None,
    device: str | None,
    config: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Detect in images: files, folders, "globs", videos, camera:0.

    CHECKPOINT is a run's best.pt, the folder of a run, or an exported file. Drawings go to OUTPUT/drawn, and with
    --save: coco.json; data.yaml and labels/ (yolo); Annotations/ (voc); detections.csv.
    """
    if not sources:
        raise UserError(_incomplete(checkpoint))
    from detkernel_export.sources import sources as expanded
    from detkernel_export.video import opencv

    found = expanded(sources)
    _check_output(output, found)
    for source in found:
        if source.video:
            opencv(source)
    from detkernel_export.model import load
    from detkernel_export.ways import Ways

    ways = Ways(tiles=tiles, overlap=overlap, flips=flip, scales=scale or (1.0,))
    with load(checkpoint, config=config, device=device, overrides=overrides) as model:
        job = _Job(model, ways, output, draw, frozenset(save), score, batch_size, frames)
        job.predict(found)
        job.finish()


def _incomplete(given: str) -> str:
    """What to type, where one thing alone was given: the detector, or the images."""
    if (Path(given) / "checkpoints").is_dir() or Path(given).suffix in (".pt", ".pth", ".onnx", ".pt2"):
        return f"on which images? detkernel predict {relative(given)} IMAGES"
    runs = sorted(Path("runs").glob("*/checkpoints/best.pt"), key=lambda path: path.lstat().st_mtime)
    detector = printable(str(runs[-1])) if runs else "CHECKPOINT"
    return f"with which detector, and on which images? detkernel predict {detector} {relative(given)}"


def _check_output(output: Path, found: Sequence[Source]) -> None:
    """Raise `UserError` where the results would lie in the way of something."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{relative(output)}: there is a file of this name; give another folder with --output")
    inside = [one.path for one in found if Path(one.path).resolve().is_relative_to(output.resolve())]
    if inside:
        raise UserError(
            f"{relative(inside[0])}: lies in the folder for the results, {relative(output)}, and might be overwritten; "
            "give another folder with --output"
        )


@attrs.define
class _Job:
    """What is asked for, and what was found so far."""

    model: Model
    ways: Ways
    output: Path
    draws: bool
    save: frozenset[str]
    score: float | None
    """As asked for; None: the model's own."""
    batch_size: int
    frames: int | None
    kept: list[Any] = attrs.field(factory=list)
    taken: set[str] = attrs.field(factory=set)
    """Names of images in the data set that is written."""
    counts: Counter[str] = attrs.field(factory=Counter)
    images: int = 0
    failures: list[str] = attrs.field(factory=list)
    seconds: float = 0.0

    def predict(self, found: Sequence[Source]) -> None:
        start = time.perf_counter()
        with self._writing(), _progress(len(found)) as tick:
            files = [source for source in found if not source.video]
            names = {source.path: source for source in files}
            for result in self._results(self._decoded(files, tick)):
                source = names[str(result.path)]
                if self.draws:
                    result.save(self.output / "drawn" / f"{source.name}.jpg")
                self._keep(result, source.name, source.path)
                tick(self.images, time.perf_counter() - start)
            for source in found:
                if source.video:
                    self._video(source)
                    tick(self.images, time.perf_counter() - start)
        self.seconds = time.perf_counter() - start

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the system says against writing a file is the user's to fix."""
        try:
            yield
        except OSError as error:
            place = relative(error.filename or self.output)
            raise UserError(f"{place}: cannot be written: {error.strerror or error}") from None

    def _results(self, pairs: Iterable[tuple[Any, Tensor]]) -> Iterator[Result]:
        return self.model.results(pairs, self.ways, score=self.score, batch_size=self.batch_size)

    def _decoded(self, files: Sequence[Source], tick: Any) -> Iterator[tuple[str, Tensor]]:
        """Images with their pixels; some are decoded ahead, but not where one may fill the memory."""
        ahead = 0 if self.ways.tiles else 2 * self.batch_size + _READERS
        waiting: deque[tuple[Source, Future[Tensor]]] = deque()
        with ThreadPoolExecutor(_READERS) as pool:
            try:
                for source in files:
                    waiting.append((source, pool.submit(self.ways.pixels, source.path, self.model.bits)))
                    if len(waiting) > ahead:
                        yield from self._next(waiting)
                while waiting:
                    yield from self._next(waiting)
            finally:
                pool.shutdown(cancel_futures=True)

    def _next(self, waiting: deque[tuple[Source, Future[Tensor]]]) -> Iterator[tuple[str, Tensor]]:
        source, future = waiting.popleft()
        try:
            pixels = future.result()
        except DataError as error:
            self.failures.append(str(error))
            return
        yield source.path, pixels

    def _video(self, source: Source) -> None:
        """A video with drawings; Ctrl-C ends a camera's, as its end would."""
        from detkernel_export.sources import CAMERA
        from detkernel_export.video import Frames, Writer

        writer: Writer | None = None
        camera = source.path.startswith(f"{CAMERA}:")
        try:
            frames = Frames(source)
            some = islice(frames, self.frames)
            results = self._results((frame.numpy().transpose(1, 2, 0), frame) for frame in some)
            for number, result in enumerate(results, start=1):
                if self.draws:
                    drawn = result.draw()
                    path = self.output / "drawn" / f"{source.name}.mp4"
                    writer = writer or Writer(path, source, frames.rate, drawn.size)
                    writer.write(drawn)
                self._keep(result, f"{source.name}/{number:06}", f"{source.path}#{number}")
        except KeyboardInterrupt:
            if not camera:
                if writer is not None:
                    writer.discard()
                raise
        except DataError as error:
            self.failures.append(str(error))
        except BaseException:
            if writer is not None:
                writer.discard()
            raise
        if writer is not None:
            writer.close()

    def _keep(self, result: Result, name: str, source: str) -> None:
        from detkernel_export.writers import Found, keep_image

        self.images += 1
        self.counts.update(result.names)
        if self.save:
            if self.save - {"csv"}:
                name = keep_image(self.output / "images", self._flat(name), result)
            self.kept.append(Found(name, source, result.to_dict()))

    def _flat(self, name: str) -> str:
        """A name without folders, since a reader of VOC looks into none; unique."""
        flat, number = name.replace("/", "_"), 1
        unique = flat
        while unique in self.taken:
            number += 1
            unique = f"{flat}_{number}"
        self.taken.add(unique)
        return unique

    def finish(self) -> None:
        """Write the files, and say what was done. Raises `UserError` where an image could not be read."""
        from detkernel_export.writers import WRITERS

        written = [("drawings", self.output / "drawn")] if self.draws and self.images else []
        with self._writing():
            for form in sorted(self.save) if self.images else ():
                write = WRITERS[form]
                written.append((form, write(self.output, self.kept, self.model.classes, self.model.keypoint_names)))
        if self.images or not self.failures:
            self._say(written)
        if self.failures:
            shown = "\n".join(f"  {failure}" for failure in self.failures[:_SHOWN])
            more = f"\n  and {len(self.failures) - _SHOWN} more" if len(self.failures) > _SHOWN else ""
            done = "; all others are done" if self.images else ""
            total = self.images + len(self.failures)
            raise DataError(f"{len(self.failures)} of {_counted(total, 'image')} cannot be read{done}:\n{shown}{more}")

    def _say(self, written: Sequence[tuple[str, Path]]) -> None:
        """What was found, and where it was written."""
        count = sum(self.counts.values())
        rate = f"{self.images / self.seconds:.1f} images/s" if self.seconds and self.images else ""
        least = f"{self.model.threshold(self.score):.3g}"
        click.echo(
            f"{_counted(self.images, 'image')}, {_counted(count, 'detection')} of score {least} or more, "
            f"{self.seconds:.1f} s{f' ({rate} on {self.model.device})' * bool(rate)}"
        )
        if self.score is None and self.model.best_score is not None:
            click.echo(f"  score {least} has the best F1 at its validation; --score takes another")
        if self.counts:
            click.echo("  " + ", ".join(f"{printable(name)} {number}" for name, number in self.counts.most_common(12)))
        elif self.images:
            click.echo("  nothing was found; --score 0.1 shows more")
        width = max((len(what) for what, _ in written), default=0)
        for what, path in written:
            click.echo(f"  {what:<{width}}  {relative(path)}")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A line on a terminal that says how far it is."""
    if not sys.stderr.isatty():
        yield lambda done, seconds: None
        return
    last = [0.0]

    def tick(done: int, seconds: float) -> None:
        now = time.monotonic()
        if now - last[0] > 0.1:
            last[0] = now
            click.echo(f"\r{done:,} of {total:,}  {done / max(seconds, 1e-9):.1f} images/s ", nl=False, err=True)

    try:
        yield tick
    finally:
        click.echo("\r" + " " * 50 + "\r", nl=False, err=True)
