"""The `log` plugin: collects what is to be said, and says it in time to every sink."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

from detkernel import Run, hookimpl, hookspec, option, plugin, state
from detkernel_detection import Losses

from detkernel_logging import log_lines
from detkernel_logging.console import Console
from detkernel_logging.files import JsonLines, TextLog
from detkernel_logging.progress import Progress
from detkernel_logging.sink import Metrics, Sink

if TYPE_CHECKING:
    from detkernel_logging.forward import Forward
    from detkernel_logging.meter import Meter


class LogEvents:
    """Events around the log."""

    @hookspec
    def after_log_line(self, run: Run) -> None:
        """A training line was logged. Fires on every process; the device has just been waited for."""


@plugin(priority="very_low", resume_neutral=("*",), events=LogEvents, state_per_rank=True)
class Log:
    """Log losses, metrics and messages to the console, to files, and wherever else a sink writes."""

    interval: int = option(
        default=50, at_least=1, help="iterations between two lines; counted in the epoch, unless `until` is in iters"
    )
    sinks: list[Sink] = option(
        factory=lambda: [Console(), TextLog(), JsonLines()],
        help="where the log goes: console, text_log, json_lines, tensorboard, wandb, mlflow",
    )

    _meter: Meter = state()
    _progress: Progress = state(factory=Progress)
    _forward: Forward | None = state(default=None)
    _began: bool = state(default=False)
    _epoch_length: int = state(default=0)
    _max_iters: int = state(default=0)

    @hookimpl(tryfirst=True)
    def setup(self, run: Run) -> None:
        """Before all others, so that no message of theirs is lost. A prediction logs nothing, and opens no sink."""
        from detkernel_logging.forward import Forward
        from detkernel_logging.meter import Meter

        self._meter = Meter()
        if run.mode == "predict":
            return
        for sink in self.sinks:
            sink.check()
        name = next((name for name, part in run.bus.plugins.items() if part is self), "log")
        self._forward = Forward(run, self.sinks, f"{name}.sinks")

    @hookimpl(wrapper=True)
    def before_run(self, run: Run) -> Generator[None, None, None]:
        """Behind all others: by then a resume was applied."""
        yield
        if run.checking or self._forward is None:
            return
        if run.mode == "train":
            self._epoch_length, self._max_iters = run.epoch_length, run.max_iters
            self._meter.move(run.device)
        self._progress = Progress(aside=lambda: run.aside)
        self._began = True
        if run.is_main and self._forward is not None:
            from detkernel_logging.describe import described

            self._forward.each(lambda sink: sink.start(run, self._progress))
            self._forward.begin()
            run.log.info("%s", described(run))
        self._progress.waits()

    @hookimpl(wrapper=True)
    def before_train_epoch(self) -> Generator[None, None, None]:
        yield
        self._progress.waits()

    @hookimpl(tryfirst=True)
    def before_train_iter(self) -> None:
        self._progress.arrived()

    @hookimpl
    def after_train_iter(self, run: Run, losses: Losses) -> None:
        if not self._began:
            return
        self._meter.add(losses)
        if not self._due(run):
            self._progress.stepped()
            return
        means = self._meter.take(run)  # waits for the device, so that the time of these iterations is theirs
        self._progress.stepped()
        times = self._progress.take()
        if run.is_main:
            self._say_train(run, means, times)
        run.bus.publish("after_log_line", run=run)

    @hookimpl(wrapper=True, specname="after_train_iter")
    def _after_train_iter_of_all(self) -> Generator[None, None, None]:
        """A checkpoint may have been saved since; the wait for the next batch begins behind it."""
        yield
        self._progress.waits()

    @hookimpl(tryfirst=True)
    def before_val_epoch(self) -> None:
        self._progress.validates()

    @hookimpl
    def after_val_iter(self) -> None:
        self._progress.val_batches += 1

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        if not self._began or not run.is_main:
            return
        values = {name: float(value) for name, value in run.metrics.items()}
        epoch = max(run.epoch + (run.batch > 0), 1)
        metrics = Metrics(run.mode, epoch, self._progress.val_batches, run.iter, values)
        run.log.info("%s", log_lines.val_line(run, metrics), extra={"metrics": metrics})

    @hookimpl(wrapper=True, specname="after_val_epoch")
    def _after_val_epoch_of_all(self) -> Generator[None, None, None]:
        yield
        self._progress.waits()

    @hookimpl(trylast=True)
    def after_run(self, run: Run) -> None:
        """Behind the checkpoint plugin, whose last messages belong into the log."""
        if self._forward is None:
            return
        if self._began and run.is_main:
            from detkernel_logging.describe import ending

            level, text, brief = ending(run, self._progress)
            run.log.log(level, "%s", text, extra={"brief": brief})
        self._forward.each(lambda sink: sink.stop())
        self._forward.detach()
        self._forward, self._began = None, False

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last line, so that the next one does not show where a run was resumed."""
        return {"sums": self._meter.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._meter.load_state_dict(state["sums"])

    def _due(self, run: Run) -> bool:
        """The same on every process, and in a run that was resumed: an early stop is not a reason for a line."""
        if run.iter == self._max_iters:
            return True
        if run.options.until.unit == "iters":
            return run.iter % self.interval == 0
        return run.batch % self.interval == 0 or run.batch == self._epoch_length

    def _say_train(self, run: Run, means: Mapping[str, float], times: Mapping[str, float]) -> None:
        scalars = {name: float(ask()) for name, ask in run.scalars.items()}
        position = run.batch if run.options.until.unit == "epochs" else run.iter
        metrics = Metrics("train", run.epoch + 1, position, run.iter, log_lines.ordered(means, times, scalars))
        line = log_lines.train_line(run, metrics, self._progress.left(run))
        run.log.info("%s", line, extra={"metrics": metrics})
