"""The `checkpoint` plugin: the last to be called, it saves what all the others have become, and puts it back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from detkernel import CheckpointError, Run, Span, hookimpl, option, plugin, state, wrong
from detkernel.errors import did_you_mean, relative
from detkernel.launch import identity, restarts
from detkernel.processes import from_main, gathered

if TYPE_CHECKING:
    from detkernel_checkpoint._folder import Folder, Lock
    from detkernel_checkpoint._resume import Found
    from detkernel_checkpoint._writer import Writer

_LESS = re.compile(r"loss|error|rmse|mae\b|time|miss", re.IGNORECASE)
_GREATER = re.compile(r"m?ap(_|\b|\d)|ar(_|\b|@)|acc|recall|precision|f1|iou", re.IGNORECASE)


@plugin
class Checkpoint:
    """Save checkpoints that survive, and resume from them bit for bit."""

    priority = "lowest"
    resume_neutral: ClassVar[tuple[str, ...]] = ("*",)

    every: Span | None = option(
        default=Span(1, "epochs"), help="how often to save: 'every 1 epoch', '500 iters'; the end is always saved"
    )
    keep: int | None = option(default=None, at_least=1, help="keep only the newest N (and the best); null keeps all")
    best: str | None = option(default=None, help="also keep the best by this metric, such as coco/bbox_mAP")
    rule: Literal["auto", "greater", "less"] = option(
        default="auto", help="which `best` is better; auto goes by the metric's name"
    )
    resume: str = option(
        default="auto",
        help="'auto': go on from the newest sound checkpoint in the work dir, if any; 'never'; or a checkpoint's path",
    )
    accept_changes: bool = option(
        default=False, help="resume though the config, data, plugins or number of processes differ"
    )
    load_from: Path | None = option(
        default=None, help="start with the weights in this file: a checkpoint, or any state dict"
    )
    allow_mismatch: bool = option(default=False, help="load what fits of `load_from`, and list what does not")
    asynchronous: bool = option(default=True, help="write in the background while training goes on")

    _writer: Writer | None = state(default=None)
    _lock: Lock | None = state(default=None)
    _found: Found | None = state(default=None)
    _origin: dict[str, Any] = state(factory=dict)
    _saved: dict[str, Any] | None = state(default=None)
    """The position of the last checkpoint."""
    _best_value: float | None = state(default=None)

    def __attrs_post_init__(self) -> None:
        if self.every is not None and self.every.count < 1:
            raise ValueError(f"every: expected at least 1 epoch or iteration, or null, got '{self.every}'")
        if self.best is not None and self.rule == "auto" and _rule_of(self.best) is None:
            raise ValueError(f"rule: '{self.best}' does not tell whether greater or less is better; give one of them")

    @hookimpl
    def prepare_model(self, run: Run) -> None:
        """Find what to resume and see that it fits, before anything costly happens; else load the weights asked for."""
        from detkernel_checkpoint import _origin, _resume

        if self.best is not None and run.mode == "train" and run.options.validate is None:
            run.log.warning("no checkpoint will be the best by %s: there are no validations (run.validate)", self.best)
        training = run.mode == "train" and not run.checking
        if training:
            self._origin = from_main(run, lambda: _origin.origin(run))
        own = training and from_main(run, lambda: self._hold(run))
        if training or (run.mode == "test" and self.load_from is None):
            self._found = from_main(run, lambda: _resume.find(run, self._folder(run), self, own))
        if self._found is None:
            self._load_weights(run)
        elif training:
            _resume.compare(run, self._found, self._origin, self._key(run), self.accept_changes)
            _resume.compare_states(run, self._found, self._origin, self.accept_changes)
        else:
            from detkernel_checkpoint._weights import check_classes, fit

            check_classes(self._found.content, self._found.path, run.classes)
            fit(run.bare_model, self._found.content["model"], self._found.path, self.allow_mismatch)
            run.log.info("testing the weights of %s", relative(self._found.path))

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        if run.mode == "test" or run.checking:
            return
        from detkernel_checkpoint import _resume
        from detkernel_checkpoint._writer import Writer

        from_main(run, self._folder(run).prepare)
        found, self._found = self._found, None
        if found is not None:
            _resume.apply(run, found, self.accept_changes)
            self._saved = run.state_dict()
        folder, safe = self._folder(run), found.entry() if found is not None else None
        self._writer = Writer(folder, self.keep, run.log, safe=safe, step_back=self.asynchronous)
        if found is None or found.path.resolve().parent != folder.path.resolve():
            from_main(run, lambda: self._take_over(run, after=-1))
        if found is not None and found.iteration != run.iter:  # counted in other epochs: what is older may have more
            self._save(run)
            self._writer.settle(wait=True)
        from_main(run, lambda: self._take_over(run, after=run.iter))

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        if self._writer is None:
            return
        self._writer.settle()
        if self.every is not None and self.every.unit == "iters" and run.iter % self.every.count == 0:
            self._save(run)

    @hookimpl
    def after_train_epoch(self, run: Run) -> None:
        if self._writer is None:
            return
        if self.every is not None and self.every.unit == "epochs" and run.epoch % self.every.count == 0:
            self._save(run)

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        if run.checking and self.best is not None:
            self._metric(run)
        if self._writer is None or self.best is None:
            return
        better, self._best_value = from_main(run, lambda: self._judge(run))
        if better:
            self._save(run, best=True)

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
            self._writer.settle(wait=True, then="and the run has failed")
            self._writer.close()
            return
        self._writer.settle(wait=True, then=None)  # what could not be written is tried once more
        here = self._saved == run.state_dict() and self._writer.failure is None
        if not from_main(run, lambda: here):
            self._save(run)
        # Everybody waits: a launcher takes down what still runs when the first process has left.
        from_main(run, lambda: self._finish(run))

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        often = f"every {self.every} and at the end" if self.every else "at the end"
        return {"checkpoints": f"{often}, in {relative(self._folder(run).path)}"}

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self._best_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best = state["best_value"]
        self._best_value = None if best is None else float(best)

    def _save(self, run: Run, best: bool = False) -> None:
        """All processes take part; the first one writes."""
        from detkernel_checkpoint._content import content, own_states
        from detkernel_checkpoint._folder import Entry

        ranks = gathered(run, own_states(run))
        if not best:
            self._saved = run.state_dict()
        if run.is_main and self._writer is not None:
            path = self._folder(run).name(run.iter, best)
            self._writer.start(Entry(path, run.iter, best), content(run, ranks, self._origin))
            if not self.asynchronous:
                self._writer.settle(wait=True, then=None if run.done else "training goes on")

    def _finish(self, run: Run) -> None:
        """See that the last checkpoint is written."""
        assert self._writer is not None
        self._writer.close()
        if self._writer.failure is not None:
            raise CheckpointError(
                f"the run ended at iteration {run.iter}, but {self._writer.failure}. {self._writer.safety()}: "
                "make room, and run again to go on from there"
            )

    def _judge(self, run: Run) -> tuple[bool, float | None]:
        """Whether this validation is the best so far, and the best figure including it."""
        assert self.best is not None
        value, rule = self._metric(run), _rule_of(self.best) if self.rule == "auto" else self.rule
        old = self._best_value
        if math.isnan(value):
            return False, old
        better = old is None or (value > old if rule == "greater" else value < old)
        return better, value if better else old

    def _metric(self, run: Run) -> float:
        assert self.best is not None
        if self.best not in run.metrics:
            raise wrong(self, "best", f"no metric is named '{self.best}'{did_you_mean(self.best, run.metrics)}")
        return float(run.metrics[self.best])

    def _hold(self, run: Run) -> bool:
        """Keep other runs out of the folder; whether it is this run's own already, from before it was started again."""
        self._lock = self._folder(run).hold()
        if self._lock is None:
            return restarts() > 0
        before = self._lock.read()[1]
        self._lock.write(before)
        return restarts() > 0 and before == identity()

    def _take_over(self, run: Run, after: int) -> None:
        """Make the folder this run's own: what lies beyond an iteration is of another."""
        aside = self._folder(run).set_aside(after)
        if aside is not None:
            run.log.warning(
                "%d checkpoints that are not of this run's past were moved to %s", aside[0], relative(aside[1])
            )
        if self._lock is not None:
            self._lock.write(identity())

    def _load_weights(self, run: Run) -> None:
        from detkernel_checkpoint._weights import load_weights

        if self.load_from is not None:
            what = run.bare_model, self.load_from, self.allow_mismatch, run.classes
            run.log.info("loaded %s", load_weights(*what))
        elif run.mode == "test":
            run.log.warning("no checkpoint in %s: testing the model as it was built", relative(self._folder(run).path))

    def _folder(self, run: Run) -> Folder:
        from detkernel_checkpoint._folder import Folder

        return Folder(run.work_dir / "checkpoints")

    def _key(self, run: Run) -> str:
        return next(name for name, plugin in run.bus.plugins.items() if plugin is self)


def _rule_of(metric: str) -> str | None:
    name = metric.rsplit("/", 1)[-1]
    return "less" if _LESS.search(name) else "greater" if _GREATER.search(name) else None
