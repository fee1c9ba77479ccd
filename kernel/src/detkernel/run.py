"""What a hook sees of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import attrs

from detkernel.errors import ESCAPE, UserError
from detkernel.metrics import Metrics
from detkernel.plugin import option, plugin
from detkernel.processes import Launch, Processes
from detkernel.span import Span

if TYPE_CHECKING:
    from detkernel.bus import Bus
    from detkernel.hookspecs import Events

Mode: TypeAlias = str
"""What a loader is for: "train", "val", "test", "predict", the name of a further loader that a plugin asks for
(`loaders`), or of a further validation set (`Run.val_sets`). A run's own `mode` is one of the first four."""


class Loader(Protocol):
    """What `build_loader` returns.

    One that holds something, such as worker processes, also has a `close()`: it is called when the run ends, well or
    not, and may be called twice.
    """

    @property
    def dataset(self) -> Any:
        """What is loaded; its `classes` are the names in label order."""

    def __len__(self) -> int:
        """Batches in an epoch (on this process)."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from the one at `start` on. The order depends on (seed, epoch) only, and finding
        the start reads nothing that lies before it."""


@plugin
class RunOptions:
    """How long to train, when to validate, and where the results go."""

    until: Span = option(help="how long to train: '12 epochs' or '90000 iters'")
    validate: Span | None = option(
        default=None, help="how often to validate: 'every 1 epoch', 'every 500 iters' or null"
    )
    validate_at_end: bool = option(
        default=True, help="validate when the run is complete, where `validate` is set and not due"
    )
    validate_at_start: bool = option(
        default=False, help="also validate before the first iteration, where `validate` is set"
    )
    workflow: list[tuple[Literal["train", "val"], int]] | None = option(
        default=None, help="the form of older frameworks, [[train, 1], [val, 1]]: validate after that many epochs"
    )
    seed: int = option(default=0, at_least=0, below=2**63, help="every random number of the run follows from it")
    work_dir: Path = option(default=Path("runs/default"), help="where the config, logs and checkpoints go")

    def __attrs_post_init__(self) -> None:
        if self.until.count < 1:
            raise ValueError(f"until: expected at least 1 epoch or iteration, got '{self.until}'")
        if self.workflow is not None:
            self.validate, self.workflow = _validation_of(self.workflow, self.validate), None
        if self.validate is not None and self.validate.count < 1:
            raise ValueError(f"validate: expected at least 1 epoch or iteration, or null, got '{self.validate}'")
        if self.validate_at_start and self.validate is None:
            raise ValueError("validate_at_start: needs `validate`, such as 'every 1 epoch'")


def _validation_of(workflow: list[tuple[Literal["train", "val"], int]], validate: Span | None) -> Span | None:
    """The `validate` that a workflow stands for."""
    if validate is not None:
        raise ValueError("workflow: give either `workflow` or `validate`, not both")
    modes = [mode for mode, _ in workflow]
    if modes not in (["train"], ["train", "val"]) or any(count < 1 for _, count in workflow):
        raise ValueError("workflow: expected [[train, N]] or [[train, N], [val, 1]] with N of at least 1")
    if modes == ["train", "val"] and workflow[1][1] != 1:
        raise ValueError("workflow: a validation runs once, as in [[train, 1], [val, 1]]")
    return Span(workflow[0][1], "epochs") if len(modes) == 2 else None


def _logger() -> logging.Logger:
    """The logger of runs. What it is told may come from files, so it is escaped before any handler sees it."""
    logger = logging.getLogger("detkernel")
    logger.addFilter(ESCAPE)
    return logger


@attrs.define(eq=False, slots=False, kw_only=True)
class Run:
    """The state of one run. Plugins read all of it and set what their event is for (`model`, `metrics`, ...)."""

    options: RunOptions
    bus: Bus
    config: Mapping[str, Any] = attrs.field(factory=dict)
    """The composed config with every default filled in: plain values, as written to the work dir."""
    versions: Mapping[str, str] = attrs.field(factory=dict)
    """Distribution -> version, of all active plugins and the kernel."""

    mode: Mode = "train"
    checking: bool = False
    """True under `detkernel check`: two batches run and nothing may be left behind."""
    known_classes: tuple[str, ...] = ()
    """In `predict`: what the weights know, in label order; set in `setup` by the plugin that loads them."""
    prepared: bool = False
    """Whether `prepare_model` is over: networks are where they stay."""
    check_data: bool = False
    """True under `detkernel check` without `--fast`: all the data of every split is read."""
    epoch: int = 0
    """Epochs complete."""
    iter: int = 0
    """Iterations complete, over all epochs."""
    batch: int = 0
    """Batches of this epoch that are complete: the position to resume from."""
    validated: int = 0
    """The iteration of the last validation."""

    val_sets: tuple[str, ...] = ()
    """Names of validation sets beside `val`, set in `setup` by the plugin that makes their loaders, which have the same
    names. Each is validated behind `val`, and tested behind `test`."""
    val_set: str = ""
    """The further set that is being validated; empty for `val` and `test`."""
    loaders: dict[str, Loader] = attrs.field(factory=dict)
    model: Any = None
    """The model as used in the steps, wrapped and compiled as plugins please."""
    _streams: dict[Mode, tuple[int, Iterator[Any]]] = attrs.field(init=False, factory=dict)
    """Of further loaders: the iteration that the next batch is for, and the batches."""
    modules: dict[str, Any] = attrs.field(factory=dict)
    """Networks beside the model, such as a teacher, by name, as used in the steps: see `add_module`."""
    trained_modules: set[str] = attrs.field(factory=set)
    saved_modules: set[str] = attrs.field(factory=set)
    unwrap: Callable[[Any], Any] = attrs.field(default=lambda model: model)
    """From `model` to the one inside of what wraps it; set by the plugin that wraps it."""
    optimizer: Any = None
    """The optimizer, set by the stepping plugin in `before_run`."""
    device: Any = "cpu"
    """What the model is on, set by the `device` plugin in `setup`."""
    precision: str = "fp32"
    """What a step computes in where that is safe, set beside `device`: "fp32", "bf16" or "fp16"."""
    rank: int = 0
    world_size: int = 1
    processes: Processes = attrs.field(factory=Processes)
    """How plugins in several processes tell each other what they found out."""
    launch: Launch = attrs.field(factory=Launch)
    """How this process was started."""
    metrics: Metrics = attrs.field(
        init=False,
        default=attrs.Factory(lambda run: Metrics(lambda: run.iter, lambda: run.val_set), takes_self=True),
    )
    """The metrics of the last validation, by name: a mapping of floats. Evaluators set them by
    `run.metrics.publish(name, value, better="higher")`. Those of a further set begin with its name:
    `night/METRIC`."""
    scalars: dict[str, Callable[[], float]] = attrs.field(factory=dict)
    """What loggers print beside the losses, by name; asked for only when a line is due (`lr`, `memory`)."""
    results: dict[str, str] = attrs.field(factory=dict)
    """What `detkernel run` says at its end, beside a name for each: the best metric, where things are, what to do next.
    Set in `after_run` at the latest."""
    aside: float = 0.0
    """Seconds of this process's iterations that went into what happens once, such as compilation. Who measures how fast
    iterations are leaves them out."""
    log: logging.Logger = attrs.field(factory=_logger)
    error: BaseException | None = None
    stop_reason: str | None = None
    exit_status: int = 0
    """What `detkernel run` ends with: 0, or what a plugin gave with its `stop`."""
    when_stopped: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when the run is told to stop, perhaps by a signal: what takes minutes, such as a compiler, may raise."""
    ends_process: bool = False
    """Whether this process ends when the run does, as under the command line."""

    @property
    def hook(self) -> Events:
        """Fires events: `run.hook.before_run(run=run)`. Arguments by keyword."""
        return self.bus.events

    @property
    def bare_model(self) -> Any:
        """The model without what wraps it for distribution or compiling."""
        return self.unwrap(self.model)

    @property
    def trains(self) -> bool:
        """Whether this is a training, with its validations; false for `test` and `predict`."""
        return self.mode not in ("test", "predict")

    @property
    def trained_networks(self) -> dict[str, Any]:
        """The model, by the empty text, and the modules that are trained, by name; all without what wraps them."""
        modules = {name: self.unwrap(module) for name, module in self.modules.items() if name in self.trained_modules}
        return {"": self.bare_model, **modules}

    @property
    def saved_networks(self) -> dict[str, Any]:
        """The modules beside the model that a checkpoint keeps, by name, without what wraps them."""
        return {name: self.unwrap(module) for name, module in self.modules.items() if name in self.saved_modules}

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Of the model, and of the modules that are trained: those as `MODULE.PARAMETER`."""
        for network, module in self.trained_networks.items():
            for name, parameter in module.named_parameters():
                yield f"{network}.{name}" if network else name, parameter

    @property
    def loader(self) -> Loader:
        """The loader that batches come from at this moment: the training's, or that of the set being validated."""
        return self.loaders[self.val_set or self.mode]

    def next_batch(self, mode: Mode) -> Any:
        """This iteration's batch of a further loader, which goes round and round beside the training data. Which batch
        that is follows from `run.iter` alone, so a resumed run goes on where the first one was. Once an iteration, in
        `before_train_iter` or `train_step`."""
        due, stream = self._streams.pop(mode, (-1, iter(())))
        if due != self.iter:
            stream = self._batches_from(mode, self.iter)
        batch = next(stream)
        self._streams[mode] = (self.iter + 1, stream)
        return batch

    def _batches_from(self, mode: Mode, position: int) -> Iterator[Any]:
        loader = self.loaders[mode]
        epoch, start = divmod(position, len(loader))
        while True:
            yield from loader.batches(epoch, start=start)
            epoch, start = epoch + 1, 0

    def add_module(self, name: str, module: Any, *, trained: bool, saved: bool) -> None:
        """Keep a network beside the model, such as a teacher: placed and cast with it, and from then on
        `run.modules[name]`. To be called in `prepare_model` at the latest.

        `trained`: its parameters are the optimizer's too, and it is in training mode when the model is; else it has no
        gradients and stays in evaluation mode. `saved`: a checkpoint keeps its weights, and a resume puts them back.
        """
        if not name.isidentifier() or name in self.modules:
            problem = "there is one already" if name in self.modules else "expected letters, digits and underscores"
            raise UserError(f"run.add_module: the name '{name}': {problem}")
        if self.prepared:
            raise UserError(f"run.add_module: '{name}' comes too late to be placed; add it in prepare_model or before")
        self.modules[name] = module
        self.trained_modules |= {name} if trained else set()
        self.saved_modules |= {name} if saved else set()

    @property
    def work_dir(self) -> Path:
        return self.options.work_dir

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order, from the data of this run; in `predict`, from its weights."""
        if self.known_classes:
            return self.known_classes
        for loader in self.loaders.values():
            if self.mode == "predict" and not loader.dataset.classes:
                raise UserError(
                    "the data to predict on has no classes, and no plugin says which ones the weights have; give a "
                    "checkpoint of detkernel's, or checkpoint.load_from with checkpoint.load_from_classes: [...]"
                )
            return tuple(loader.dataset.classes)
        raise UserError("run.classes is known once a loader is built; ask for it in build_model or later")

    @property
    def epoch_length(self) -> int:
        """Iterations in an epoch."""
        return len(self.loaders["train"])

    @property
    def max_iters(self) -> int:
        """Iterations in the whole run."""
        return self.options.until.iters(self.epoch_length)

    @property
    def max_epochs(self) -> int:
        """Epochs in the whole run; one begun counts."""
        return -(-self.max_iters // self.epoch_length)

    @property
    def done(self) -> bool:
        """Whether no further iteration will run."""
        return self.iter >= self.max_iters or self.stop_reason is not None

    @property
    def validation_due(self) -> bool:
        """Whether a validation is owed for the iterations complete."""
        every = self.options.validate
        if every is None:
            return False
        if self.iter == 0:
            return self.options.validate_at_start and not self.metrics  # a checkpoint of then has some
        if self.validated == self.iter:
            return False
        if self.iter >= self.max_iters and self.options.validate_at_end:
            return True
        return every.due(self.iter, self.epoch_length)

    def stop(self, reason: str, exit_status: int = 0) -> None:
        """End the run after this iteration. `after_run` fires as always; the first reason counts."""
        if self.stop_reason is None:
            self.stop_reason, self.exit_status = reason, exit_status
        for give_up in tuple(self.when_stopped):
            give_up()

    def advance(self) -> None:
        """Count an iteration (the loop does)."""
        self.iter += 1
        self.batch += 1

    def end_epoch(self) -> None:
        """Count an epoch (the loop does)."""
        self.epoch += 1
        self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        """The position, for a checkpoint: plain values."""
        return {
            "epoch": self.epoch,
            "iter": self.iter,
            "batch": self.batch,
            "validated": self.validated,
            **self.metrics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the position of a checkpoint; the loop goes on from there."""
        for name in ("epoch", "iter", "batch", "validated"):
            setattr(self, name, int(state[name]))
        self.metrics.load_state_dict(state)
