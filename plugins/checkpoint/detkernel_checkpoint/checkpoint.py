"""The `checkpoint` plugin: the last to be called, it saves what all the others have become, and puts it back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import CheckpointError, Run, Span, UserError, hookimpl, hookspec, option, plugin, state
from detkernel.errors import relative
from detkernel.loop import write_config
from detkernel.metrics import NAN, Better

if TYPE_CHECKING:
    from detkernel_checkpoint.folder import Folder, Lock
    from detkernel_checkpoint.resuming import Found
    from detkernel_checkpoint.writer import Writer


class CheckpointEvents:
    """Events around a checkpoint, for every plugin that wants to look at a state before it is kept."""

    @hookspec
    def before_save(self, run: Run) -> None:
        """A checkpoint is about to be saved, on every process; raise `UserError` to end the run without it."""


@plugin(priority="lowest", resume_neutral=("*",), events=CheckpointEvents)
class Checkpoint:
    """Save checkpoints that survive, and resume from them bit for bit."""

    loads_weights: ClassVar[bool] = True

    every: Span | None = option(
        default=Span(1, "epochs"), help="how often to save: 'every 1 epoch', '500 iters'; the end is always saved"
    )
    keep: int | None = option(default=None, at_least=1, help="keep only the newest N (and the best); null keeps all")
    best: str | None = option(default=None, help="also keep the best by this metric, such as coco/bbox_mAP")
    rule: Better | None = option(default=None, help="which `best` is better; null: what its evaluator says")
    resume: str = option(
        default="auto",
        help="'auto': go on from the newest valid checkpoint in the work dir, if any; 'never'; or a checkpoint's path",
    )
    accept_changes: bool = option(
        default=False, help="resume though the config, data, plugins or number of processes differ"
    )
    load_from: Path | None = option(
        default=None, help="start with the weights in this file: a checkpoint, or any state dict"
    )
    load_from_classes: Literal["same_order", "none"] | list[str] | None = option(
        default=None,
        help="classes of `load_from`, where the file does not say: a list of names in its order; same_order: as the "
        "data's; none: class outputs start at random",
    )
    allow_mismatch: bool = option(default=False, help="load what fits of `load_from`, and list what does not")
    asynchronous: bool = option(default=True, help="write in the background while training goes on")

    _writer: Writer | None = state(default=None)
    _lock: Lock | None = state(default=None)
    _found: Found | None = state(default=None)
    _provenance: dict[str, Any] = state(factory=dict)
    _saved: dict[str, Any] | None = state(default=None)
    """The position of the last checkpoint."""
    _best_value: float | None = state(default=None)
    _infinite: frozenset[str] = state(default=frozenset())
    """The buffers that may be infinite, since the model is built so."""
    _told_nan: bool = state(default=False)

    def __attrs_post_init__(self) -> None:
        if self.every is not None and self.every.count < 1:
            raise ValueError(f"every: expected at least 1 epoch or iteration, or null, got '{self.every}'")

    @hookimpl
    def setup(self, run: Run) -> None:
        """Images to predict on have no classes: the weights say them, before the model is built."""
        if run.mode == "predict":
            from detkernel_checkpoint.load_weights import classes_to_predict

            if self.load_from is None and self.resume == "auto" and not self._folder(run).entries():
                raise self._no_weights(run)
            run.known_classes = classes_to_predict(self, self._folder(run))

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        """Find what to resume and see that it fits, before anything costly happens; else load the weights asked for."""
        from detkernel_checkpoint import finite, provenance, resuming

        self._writer, self._infinite = None, finite.infinite_buffers(run.bare_model)
        if self.best is not None and run.mode == "train" and run.options.validate is None:
            run.log.warning("no checkpoint will be the best by %s: there are no validations (run.validate)", self.best)
        training = run.mode == "train" and not run.checking
        if training:
            self._provenance = run.processes.from_main(lambda: provenance.provenance(run))
        own = training and run.processes.from_main(lambda: self._hold(run))
        if training or (not run.trains and self.load_from is None):
            self._found = run.processes.from_main(
                lambda: resuming.find(run, self._folder(run), self, own, self._infinite)
            )
        if self._found is None:
            self._load_weights(run)
        elif training:
            resuming.compare_load_from(run, self._found, self, self._key(run))
            resuming.compare(run, self._found, self._provenance, self._key(run), self.accept_changes)
            resuming.compare_states(run, self._found, self._provenance, self.accept_changes)
        else:
            from detkernel_checkpoint.load_weights import load_found

            load_found(run, self, self._found)

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        if not run.trains or run.checking:
            return
        from detkernel_checkpoint import resuming
        from detkernel_checkpoint.writer import Writer

        run.processes.from_main(self._folder(run).prepare)
        found, self._found = self._found, None
        if found is not None:
            resuming.apply(run, found, self.accept_changes)
            self._saved = run.state_dict()
        folder, safe = self._folder(run), found.entry() if found is not None else None
        self._writer = Writer(folder, self.keep, run.log, safe, self._infinite, step_back=self.asynchronous)
        if found is None or found.path.resolve().parent != folder.path.resolve():
            run.processes.from_main(lambda: self._take_over(run, after=-1))
        if found is not None and found.iteration != run.iter:  # counted in other epochs: what is older may have more
            self._save(run)
            self._writer.collect(wait=True)
        run.processes.from_main(lambda: self._take_over(run, after=run.iter))

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        if self._writer is None:
            return
        self._writer.collect()
        if self.every is not None and self.every.unit == "iters" and run.iter % self.every.count == 0:
            self._save(run)

    @hookimpl
    def after_train_epoch(self, run: Run) -> None:
        if self._writer is None:
            return
        if self.every is not None and self.every.unit == "epochs" and run.epoch % self.every.count == 0:
            self._save(run)

    @hookimpl(tryfirst=True)
    def before_val_epoch(self, run: Run) -> None:
        """Save what is due before anything of a validation can fail, and otherwise keep a copy to save if it does.

        Before all others: averages are not in the place of the weights yet. A run that goes on from here owes the
        validation.
        """
        if self._writer is None or run.iter == 0:
            return
        due, here = run.processes.from_main(lambda: (self._due_before_validation(run), self._saved == run.state_dict()))
        if not here:
            self._save(run, hold=not due)

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        if run.checking and self.best is not None:
            run.metrics.pick(self, "best", self.rule)
        if self._writer is None or self.best is None:
            return
        better, self._best_value = run.processes.from_main(lambda: self._judge(run))
        if better:
            self._save(run, best=True)

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Save the state from before a validation that fails, and say from where to go on."""
        if self._writer is None:
            return
        from detkernel_checkpoint.finite import NonFiniteError

        try:
            self._writer.collect(wait=True, then="and the run has failed")
            if run.mode == "val":
                self._writer.write_held()
                self._writer.collect(wait=True, then="and the run has failed")
        except NonFiniteError as another:
            error.add_note(str(another))
        error.add_note(self._way_on(run))

    @hookimpl
    def after_run(self, run: Run) -> None:
        """However the run ends, what is being written is finished; if it ends well, its end is saved."""
        try:
            self._end(run)
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _end(self, run: Run) -> None:
        if self._writer is None:
            return
        if run.error is not None:
            self._writer.close()
            return
        try:
            self._save_end(run)
        except UserError as error:
            error.add_note(self._way_on(run))
            raise

    def _save_end(self, run: Run) -> None:
        writer = self._writer
        assert writer is not None
        run.processes.from_main(
            lambda: writer.collect(wait=True, then=None)
        )  # what could not be written is tried once more
        here = self._saved == run.state_dict() and writer.failure is None
        if not run.processes.from_main(lambda: here):
            self._save(run)
        # Everybody waits: a launcher takes down what still runs when the first process has left.
        run.processes.from_main(lambda: self._finish(run))

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        often = f"every {self.every} and at the end" if self.every else "at the end"
        return {"checkpoints": f"{often}, in {relative(self._folder(run).path)}"}

    def best_weights(self, run: Run) -> tuple[int, Mapping[str, Any]]:
        """The iteration of the best checkpoint so far, and the weights to detect with that it has.

        Called on the first process. Raises `CheckpointError` where no validation was the best yet, or its checkpoint is
        not there.
        """
        from detkernel_checkpoint import checkpoint_file

        if self._writer is not None:
            self._writer.collect(wait=True)
        folder = self._folder(run)
        entry = next((one for one in folder.entries() if one.best and one.iteration <= run.iter), None)
        if self._best_value is None or entry is None:
            none = f"no validation has given a `{self.best}` yet" if self._best_value is None else "it is gone"
            raise CheckpointError(f"{relative(folder.path)} has no best checkpoint to go on with: {none}")
        content = checkpoint_file.read(entry.path)
        if content["plugins"].get(self._key(run), {}).get("best_value") != self._best_value:
            raise CheckpointError(
                f"{relative(entry.path)} is not of the best validation so far, whose {self.best} is "
                f"{self._best_value:g}: that checkpoint could not be written, or was removed"
            )
        return entry.iteration, content["model"]

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self._best_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best = state["best_value"]
        self._best_value = None if best is None else float(best)

    def _save(self, run: Run, best: bool = False, hold: bool = False) -> None:
        """All processes take part; the first one writes, or only keeps a copy to `hold`.

        States are asked for in all of them, so that one that is spread over processes can be gathered.
        """
        from detkernel_checkpoint.content import content, own_states
        from detkernel_checkpoint.folder import Entry

        run.bus.publish("before_save", run=run)
        ranks = run.processes.gathered(own_states(run))
        states = content(run, ranks, self._provenance)
        if not best and not hold:
            self._saved = run.state_dict()
        if run.is_main and self._writer is not None:
            self._make_folder_again(run)
            entry = Entry(self._folder(run).name(run.iter, best), run.iter, best)
            (self._writer.hold if hold else self._writer.start)(entry, states)
            if not self.asynchronous and not hold:
                self._writer.collect(wait=True, then=None if run.done else "training goes on")

    def _finish(self, run: Run) -> None:
        """See that the last checkpoint is written."""
        assert self._writer is not None
        self._writer.close()
        if self._writer.failure is not None:
            raise CheckpointError(f"the run ended at iteration {run.iter}, but {self._writer.failure}")
        self._tell(run)

    def _tell(self, run: Run) -> None:
        """What the run has left, and what can be done with it, for the end of the command."""
        from detkernel.catalog import Catalog

        folder = self._folder(run).path
        names = [name for name in ("last.pt", "best.pt") if (folder / name).exists()]
        for name in names:
            key = "checkpoint" if name == "last.pt" else "best checkpoint"
            run.results[key] = f"{relative(folder)}/{name}"  # as it is named, not where a link leads
        if run.stop_reason is not None and run.exit_status:
            run.results["next"] = f"the same command goes on from iteration {run.iter}"
        elif names:
            predict = "predict" in Catalog("command").entries
            with_them = f"detkernel {'predict' if predict else 'test'} {relative(folder)}/{names[-1]}"
            run.results["next"] = f"{with_them} IMAGES" if predict else with_them

    def _judge(self, run: Run) -> tuple[bool, float | None]:
        """Whether this validation is the best so far, and the best metric including it."""
        (value, rule), old = run.metrics.pick(self, "best", self.rule), self._best_value
        if math.isnan(value):
            if not self._told_nan:
                self._told_nan = True
                run.log.warning("no checkpoint can be the best by %s: %s; see `best`", self.best, NAN)
            return False, old
        better = old is None or (value > old if rule == "higher" else value < old)
        return better, value if better else old

    def _due_before_validation(self, run: Run) -> bool:
        """Whether a save is due when this iteration ends, be it by the epoch that ends with it or by the run."""
        if run.done:
            return True
        ends_epoch = run.batch == run.epoch_length and self.every is not None and self.every.unit == "epochs"
        return ends_epoch and (run.epoch + 1) % self.every.count == 0  # type: ignore[union-attr]

    def _way_on(self, run: Run) -> str:
        """From where to go on after a failure, and what that costs."""
        assert self._writer is not None
        safe = self._writer.safe
        if safe is None:
            return f"No checkpoint of this run is in {relative(self._folder(run).path)}: running again starts afresh"
        lost = run.iter - safe.iteration
        again = f"; {lost} iteration{'s' * (lost > 1)} after it will run again" if lost > 0 else ""
        return f"To go on from {relative(safe.path)}, of iteration {safe.iteration}, run again{again}"

    def _make_folder_again(self, run: Run) -> None:
        """A work dir that somebody removed is made again, and is this run's own again."""
        folder = self._folder(run)
        if folder.path.is_dir():
            return
        run.log.warning("%s is gone, with what was saved there: it is made again", relative(folder.path))
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        with suppress(OSError, UserError):  # what is in the way is reported when the checkpoint cannot be written
            self._hold(run)
            folder.path.mkdir(parents=True, exist_ok=True)
            self._take_over(run, after=run.iter)
            write_config(run)

    def _hold(self, run: Run) -> bool:
        """Keep other runs out of the folder; whether it is this run's own already, from before it was started again."""
        self._lock = self._folder(run).hold()
        if self._lock is None:
            return run.launch.restarts > 0
        before = self._lock.read()[1]
        self._lock.write(before)
        return run.launch.restarts > 0 and before == run.launch.identity

    def _take_over(self, run: Run, after: int) -> None:
        """Make the folder this run's own: what lies beyond an iteration is of another."""
        aside = self._folder(run).set_aside(after)
        if aside is not None:
            run.log.warning(
                "%d checkpoints that are not of this run's past were moved to %s", aside[0], relative(aside[1])
            )
        if self._writer is not None:
            self._writer.name_newest()
        if self._lock is not None:
            self._lock.write(run.launch.identity)

    def _load_weights(self, run: Run) -> None:
        from detkernel_checkpoint import finite
        from detkernel_checkpoint.load_weights import load_from

        if self.load_from is not None:
            load_from(run, self)
        elif not run.trains and self.resume != "never":
            raise self._no_weights(run)
        broken = list(finite.broken_weights(run.bare_model.state_dict(), self._infinite))
        if broken:
            of = "the model as it is built" if self.load_from is None else f"{relative(self.load_from)}: it"
            raise CheckpointError(f"{of} has weights that are not finite: {finite.listed(broken)} NaN or infinite")

    def _no_weights(self, run: Run) -> CheckpointError:
        folder, key = self._folder(run).path, self._key(run)
        return CheckpointError(
            f"{relative(folder)}: {'holds no checkpoint' if folder.is_dir() else 'no such folder'}, so there are "
            f"no weights to {run.mode}. Give a checkpoint in place of the config, the run.work_dir of its run, or "
            f"{key}.load_from=FILE; {key}.resume=never takes the model as it is built"
        )

    def _folder(self, run: Run) -> Folder:
        from detkernel_checkpoint.folder import Folder

        return Folder(run.work_dir / "checkpoints")

    def _key(self, run: Run) -> str:
        return next(name for name, plugin in run.bus.plugins.items() if plugin is self)
