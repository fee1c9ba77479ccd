"""The loop: everything that happens in a run, in the order in which it happens.

The events are described in `hookspecs.py`; to put a line of your own anywhere here, write a plugin that answers the
event at that place.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import attrs

from detkernel.bus import NEEDED, Bus
from detkernel.errors import UserError, relative
from detkernel.files import remove_leftovers, write_atomic
from detkernel.hookspecs import Batch, Detections
from detkernel.run import Loader, Mode, Run, RunOptions


class Kernel:
    """A run, from its plugins: `Kernel({"model": FasterRcnn(), ...}, RunOptions(until=Span(4, "epochs"))).run()`."""

    def __init__(
        self,
        plugins: Mapping[str, object],
        options: RunOptions,
        *,
        priorities: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        bus = Bus(plugins, priorities)
        bus.require_providers([*NEEDED, "val_step"] if options.validate else NEEDED)
        self.state = Run(options=options, bus=bus, config=config or {}, versions=versions or {})

    def run(self) -> Run:
        """Train, with validations where they are due."""
        with self._session("train") as run:
            self._look_for_end(run)
            train(run)
            run.results |= {"best": best} if (best := run.metrics.best()) else {}
        return self.state

    @staticmethod
    def _look_for_end(run: Run) -> None:
        """Say of a run that is complete already what can be done with it."""
        if run.iter >= run.max_iters and not run.validation_due:
            until = run.options.until
            run.results["complete"] = (
                f"this run had its {until} before, and nothing was trained. To train longer: "
                f'run.until="{attrs.evolve(until, count=2 * until.count)}"; to train anew: run.work_dir=FOLDER'
            )

    def test(self) -> Run:
        """Evaluate the model on the test data."""
        self.state.bus.require_providers(["val_step"])
        with self._session("test") as run:
            evaluate(run, "test", run.val_sets)
        return self.state

    def predict(self) -> Generator[tuple[Batch, Sequence[Detections]], None, None]:
        """Predict without annotations: each batch of the loader for "predict", and what is found in it.

        One that is left early is ended in order when it is closed.
        """
        self.state.bus.require_providers(["val_step"])
        with self._session("predict") as run:
            for batch in run.loader.batches(epoch=0):
                detections = run.hook.val_step(run=run, model=run.model, batch=batch)
                try:
                    yield batch, detections
                except GeneratorExit:
                    return

    def check(self, *, fast: bool = False) -> dict[str, str]:
        """Everything but training, on all the data there is; returns what the run will cost.

        A batch of the largest samples and one of the fewest go forward and backward, and two of each other split are
        predicted on. The work dir is an empty folder meanwhile, which is removed. `fast` does not read all the data.
        """
        run, options = self.state, self.state.options
        run.checking, run.check_data = True, not fast
        with TemporaryDirectory(prefix="detkernel-check-") as folder:
            elsewhere = run.options = attrs.evolve(options, work_dir=Path(folder))  # type: ignore[misc]
            try:
                with self._session("train"):
                    train_epoch(run, limit=min(2, run.epoch_length))
                    self._check_evaluation()
                    run.options = options
                    parts = run.hook.summary(run=run)
                    run.options = elsewhere
            finally:
                run.options = options
        return {name: text for part in parts for name, text in part.items()}

    def _check_evaluation(self) -> None:
        """Detect in two batches of each split; what an untrained model's metrics are is not reported."""
        run = self.state
        if not any(impl.kind != "wrapper" for impl in run.bus.implementations("val_step")):
            return
        level = run.log.level
        run.log.setLevel("WARNING")
        try:
            if "val" in run.loaders:
                evaluate(run, "val", run.val_sets, limit=2)
            if "test" in run.loaders:
                evaluate(run, "test", limit=2)
        finally:
            run.log.setLevel(level)

    @contextmanager
    def loading(self) -> Iterator[Run]:
        """A run that has been set up, and that `load` makes the loaders of, without a model: to look at data.

        The work dir is an empty folder meanwhile, which is removed.
        """
        run, options = self.state, self.state.options
        with TemporaryDirectory(prefix="detkernel-data-") as folder:
            run.options = attrs.evolve(options, work_dir=Path(folder))  # type: ignore[misc]
            try:
                with self._session("train", lambda run: run.hook.setup(run=run)):
                    yield run
            finally:
                run.options = options

    @contextmanager
    def _session(
        self, mode: Literal["train", "test", "predict"], begin: Callable[[Run], object] | None = None
    ) -> Iterator[Run]:
        run = self.state
        run.mode = mode
        try:
            (begin or prepare)(run)
            yield run
        except BaseException as error:
            run.error = error
            run.bus.attribute(error, f", iteration {run.iter}")
            _note(error, "on_error", run.bus.each("on_error", run=run, error=error))
            raise
        finally:
            failures = [*run.bus.each("after_run", run=run), *_close(run.loaders.values())]
            if run.error is not None:
                _note(run.error, "after_run", failures)
            elif failures:
                _note(failures[0], "after_run", failures[1:])
                raise failures[0]


def _note(error: BaseException, event: str, failures: Sequence[BaseException]) -> None:
    """Keep what else went wrong while the run was ended, so that nothing that fails is silent."""
    for failure in failures:
        lines = traceback.format_exception(failure) if not isinstance(failure, UserError) else [str(failure)]
        error.add_note(f"and then, in {event}: {''.join(lines).rstrip()}")


def _close(loaders: Iterable[Loader]) -> list[Exception]:
    """Let go of what the loaders hold, such as worker processes; returns what was raised."""
    failures = []
    for loader in loaders:
        try:
            getattr(loader, "close", lambda: None)()
        except Exception as error:
            failures.append(error)
    return failures


def prepare(run: Run) -> None:
    """From plugins to a model that can take a step."""
    run.hook.setup(run=run)
    modes: list[Mode] = ["train", "val"] if run.options.validate else ["train"]
    if not run.trains:
        modes = [run.mode]
    if run.checking:  # what the run itself does not need, too, where there is such data
        modes = ["train", "val", "test"]
    validated = ("val", "test", *run.val_sets)
    if run.mode == "test" or "val" in modes:
        modes += run.val_sets
    if run.mode == "train":
        modes += run.bus.loaders()
    for mode in modes:
        loader = build_loader(run, mode)
        if loader is None and mode in validated and run.checking and not (mode == "val" and run.options.validate):
            continue
        if loader is None:
            raise UserError(f"no plugin made a loader for '{mode}': give the loader a `{mode}` data set")
        if len(loader) == 0 and (mode not in (*validated, "predict") or run.world_size == 1):
            raise UserError(f"the loader for '{mode}' has no batches: its data set is empty, or smaller than one batch")
        run.loaders[mode] = loader
    run.model = run.hook.build_model(run=run)
    run.hook.prepare_model(run=run)
    run.prepared = True
    if run.is_main and run.mode == "train" and not run.checking:
        remove_leftovers(run.work_dir)
        write_config(run)  # not sooner: a plugin may refuse the run, and the folder has the config of one before
    run.hook.before_run(run=run)


def load(run: Run, mode: Mode) -> Loader | None:
    """Make the loader of a mode, and keep it with the run's; None where no plugin makes one."""
    loader = build_loader(run, mode)
    if loader is not None:
        run.loaders[mode] = loader
    return loader


def build_loader(run: Run, mode: Mode) -> Loader | None:
    """The loader that a plugin makes for a mode. Raises `CatalogError` where two plugins do."""
    made = run.bus.answers("build_loader", run=run, mode=mode)
    if len(made) > 1:
        _close(made.values())
        raise run.bus.conflict(list(made), f"make a loader for '{mode}'", f"or give only one of them data for '{mode}'")
    return next(iter(made.values()), None)


def write_config(run: Run) -> None:
    """Write the composed config to the work dir: every default filled in, and the versions of what is active.

    Raises `UserError` for a work dir that cannot be written.
    """
    from detkernel.config.dump import dump  # here, since `detkernel --help` imports this module but reads no config

    versions = "".join(f"# {name} {version}\n" for name, version in run.versions.items())
    try:
        write_atomic(run.work_dir / "config.yaml", versions + dump(dict(run.config)), run.work_dir)
    except OSError as error:
        raise UserError(f"run.work_dir: {relative(run.work_dir)} cannot be written: {error.strerror}") from None


def train(run: Run) -> None:
    """Epoch after epoch, from wherever the run stands. What is told to stop when all is done has not been stopped."""
    if run.validation_due:  # a checkpoint saved just before a validation owes it
        evaluate(run, "val", run.val_sets)
    while not run.done or run.batch == run.epoch_length:  # or one saved just before the end of the last epoch
        train_epoch(run)
    if run.iter >= run.max_iters and not run.validation_due:
        run.stop_reason, run.exit_status = None, 0


def train_epoch(run: Run, limit: int | None = None) -> None:
    """One epoch, or what is left of it."""
    hook = run.hook
    if run.batch == 0:
        hook.before_train_epoch(run=run)
    for batch in run.loaders["train"].batches(run.epoch, start=run.batch):
        hook.before_train_iter(run=run, batch=batch)
        losses = hook.train_step(run=run, model=run.model, batch=batch)
        run.advance()
        hook.after_train_iter(run=run, batch=batch, losses=losses)
        if run.batch == limit:
            return
        if run.validation_due:
            evaluate(run, "val", run.val_sets)
        if run.done:
            break
    else:
        if run.batch != run.epoch_length and run.stop_reason is None:  # a loader that waits in vain ends with the run
            raise RuntimeError(f"the train loader says it has {run.epoch_length} batches, but gave {run.batch}")
    if run.batch == run.epoch_length:
        run.end_epoch()
        hook.after_train_epoch(run=run)


def evaluate(run: Run, mode: Literal["val", "test"], further: Sequence[str] = (), limit: int | None = None) -> None:
    """One pass over the validation or test data, and over each of the further validation sets."""
    before, run.mode = run.mode, mode
    run.hook.before_val_epoch(run=run)
    for name in ("", *further):
        run.val_set = name
        evaluate_set(run, limit)
    run.val_set = ""
    run.validated = run.iter
    run.hook.after_val_epoch(run=run)
    run.mode = before


def evaluate_set(run: Run, limit: int | None = None) -> None:
    """One pass over one set."""
    hook = run.hook
    hook.before_val_set(run=run)
    for number, batch in enumerate(run.loader.batches(epoch=0), start=1):
        hook.before_val_iter(run=run, batch=batch)
        detections = hook.val_step(run=run, model=run.model, batch=batch)
        hook.after_val_iter(run=run, batch=batch, detections=detections)
        if number == limit:
            break
    hook.after_val_set(run=run)
