"""The `device` plugin: the first to be called, it gives everybody else a device, seeds and peers."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from detkernel import Run, hookimpl, option, plugin, state
from detkernel_detection import Batch, Detections, Losses
from detkernel_detection.processes import TorchProcesses

if TYPE_CHECKING:
    from detkernel_runtime.compiling import CompileClock
    from detkernel_runtime.estimate import Clock
    from detkernel_runtime.parallel.ddp import Trained
    from detkernel_runtime.parallel.group import Group

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@plugin
class Compile:
    """How `torch.compile` compiles the model."""

    modules: list[str] = option(
        factory=list,
        help="the modules to compile, each for itself, by name with * and ?, such as `backbone`; none: the whole model",
    )
    limit: int = option(
        default=8,
        at_least=1,
        help="how often a module is compiled: for every shape of its inputs, in training and in evaluation, if not "
        "`dynamic`. What needs another compilation runs uncompiled, which is said",
    )
    dynamic: bool = option(default=False, help="compile for any shape, into slower code")
    backend: str = option(default="inductor", help="a compiler that torch knows, such as `aot_eager` or `cudagraphs`")


@plugin(priority="highest", state_per_rank=True, resume_neutral=("timeout",))
class Device:
    """Where the run happens: device, seeds, threads, precision of matrix products, process group."""

    device: str = option(default="auto", help="'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:1'")
    deterministic: bool = option(
        default=False, help="only algorithms whose results repeat bit for bit; an operation that has none is an error"
    )
    threads: int | None = option(default=None, at_least=1, help="CPU threads of one operation; null: torch decides")
    tf32: bool = option(default=True, help="let GPUs multiply float32 matrices as TF32: faster, 10 bits of mantissa")
    precision: Literal["fp32", "bf16", "fp16"] = option(
        default="fp32",
        help="what the steps of training, validation and test compute in where that is safe (autocast); the optimizer "
        "scales the loss for fp16",
    )
    channels_last: bool = option(
        default=True,
        help="keep the weights of convolutions, and so what they give, channels-last in memory, which is faster; a "
        "module that says `channels_last = False` keeps its own as they are",
    )
    compile: Compile | Literal["auto"] | None = option(
        default=None,
        help="compile the model with torch.compile; auto: where the run is long enough for that to pay off, which a "
        "line says; null: do not",
    )
    sync_batchnorm: bool = option(default=False, help="batch norm over the images of all processes")
    find_unused_parameters: bool = option(
        default=False, help="several processes: some parameters get no gradient in some iterations"
    )
    static_graph: bool = option(
        default=False, help="several processes: the same parameters are used in every iteration; faster"
    )
    timeout: float = option(default=30, above=0, help="minutes that a process waits for the others before it fails")

    _undo: ExitStack | None = state(default=None)
    _group: Group | None = state(default=None)
    _wrapped: Any = state(default=None)
    _trained: Trained | None = state(default=None)
    """With several processes: which parameters the wrapper knows."""
    _compiling: CompileClock | None = state(default=None)
    """Where the model is compiled: of the time that it takes."""
    _run: Any = state(default=None)
    _cuda: bool = state(default=False)
    _clock: Clock | None = state(default=None)
    """Under `detkernel check`."""

    def __attrs_post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device: expected 'auto', 'cpu', 'cuda' or such as 'cuda:1', got '{self.device}'")

    @hookimpl
    def setup(self, run: Run) -> None:
        from detkernel_runtime import estimate, settings
        from detkernel_runtime.parallel import ddp, group
        from detkernel_runtime.parallel.launch import launched

        places = group.Places.from_environment()
        run.device = settings.choose(self, places)
        self._cuda = run.device.type == "cuda"
        run.precision = self.precision
        run.rank, run.world_size = places.rank, places.world_size
        run.unwrap, run.launch = ddp.bare, launched()
        self._undo = settings.apply(self, run.device)
        settings.seed(run.seed)
        self._clock = estimate.Clock() if run.checking else None
        hint = estimate.starving(run) if self.threads is None and run.rank == 0 else ""
        if hint:
            run.log.warning("%s", hint)
        if places.world_size > 1:
            self._group = group.Group.start(run, places, minutes=self.timeout)
            run.processes = TorchProcesses()
            if places.several_machines:
                group.require_shared_work_dir(run)

    @hookimpl(trylast=True)
    def prepare_model(self, run: Run) -> None:
        """Behind all others, who may load or freeze weights: both must be done before the model is wrapped."""
        from detkernel_runtime import compiling
        from detkernel_runtime.parallel import ddp

        self._run, model = run, ddp.placed(self, run, self._group, run.model)
        how = compiling.chosen(self, run)
        if how is not None:
            self._compiling = compiling.compile_modules(how, run, model, self._undo or ExitStack())
        run.model = ddp.wrapped(self, run, model)
        ddp.place_modules(self, run, self._group)
        many = self._group is not None and run.mode == "train"
        self._trained = ddp.Trained(run.model) if many else None

    @hookimpl
    def before_run(self, run: Run) -> None:
        """Models are built alike everywhere; from here on, each process draws numbers of its own."""
        from detkernel_runtime import settings

        settings.seed(run.seed + run.rank)
        self._training(run, run.trains)
        run.scalars["memory"] = self._memory
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(run.device)

    @hookimpl
    def before_train_iter(self, run: Run, batch: Batch) -> None:
        if self._clock is not None:
            self._clock.start()
        self._receive(run, batch)

    @hookimpl(trylast=True, specname="before_train_iter")
    def _rewrap(self, run: Run) -> None:
        """Behind all others, who may freeze or thaw: the step is given the model that is there then."""
        if self._trained is not None and self._trained.has_changed():
            from detkernel_runtime.parallel import ddp

            run.model = ddp.rewrapped(self, run)

    @hookimpl
    def before_val_iter(self, run: Run, batch: Batch) -> None:
        if self._clock is not None:
            self._clock.start()
        self._receive(run, batch)

    @hookimpl(trylast=True)
    def after_val_iter(self, run: Run) -> None:
        if self._clock is not None:
            self._clock.stop(run)

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, batch: Batch) -> Generator[None, Losses, Losses]:
        from detkernel_detection import small_maps

        with self._explaining(run, batch), small_maps.explained(run, batch):
            return (yield)

    @hookimpl(wrapper=True, trylast=True, specname="train_step")
    def _cast_training(self, run: Run) -> Generator[None, Losses, Losses]:
        """Innermost: what others make of the losses is not cast."""
        with self._autocast(run):
            return (yield)

    @hookimpl(wrapper=True, trylast=True, specname="val_step")
    def _cast_validation(self, run: Run) -> Generator[None, Sequence[Detections], Sequence[Detections]]:
        with self._autocast(run):
            return (yield)

    @hookimpl(wrapper=True, specname="after_train_iter")
    def _backward(self, run: Run, batch: Batch) -> Generator[None, None, None]:
        """Around the stepping plugin, whose backward pass is where memory is at its peak."""
        with self._explaining(run, batch):
            yield

    @hookimpl
    def after_backward(self) -> None:
        """Behind the backward pass, which is compiled when it is first run, and before the line of the log."""
        if self._compiling is not None:
            self._compiling.say("training on")

    @hookimpl(wrapper=True)
    def val_step(self, run: Run, batch: Batch) -> Generator[None, Sequence[Detections], Sequence[Detections]]:
        # Not inference_mode: a tensor made there and kept (a cached anchor, say) could not be trained with.
        import torch
        from detkernel_detection import small_maps

        if run.mode == "predict":
            self._receive(run, batch)
        with torch.no_grad(), self._explaining(run, batch), small_maps.explained(run, batch):
            found = yield
        if self._compiling is not None:
            self._compiling.say("detecting on")
        return found

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        if self._group is not None:
            self._group.agree_soon(run)
        if self._clock is not None:
            self._clock.stop(run)

    @hookimpl(trylast=True)
    def before_val_epoch(self, run: Run) -> None:
        """Behind all others, who may swap weights in: every process detects with the first one's buffers.

        A validation uses the bare model: processes may have different numbers of batches, and the wrapper would wait
        for the others in every forward.
        """
        self._training(run, False)
        if self._group is not None:
            from detkernel_runtime.parallel import ddp

            self._wrapped, run.model = run.model, ddp.unwrapped(run.model)
            ddp.share_buffers(run.model)

    @hookimpl(wrapper=True)
    def after_val_epoch(self, run: Run) -> Generator[None, None, None]:
        """Before all others, the model is back in training; behind them, everybody stops if one wants to."""
        if self._wrapped is not None:
            run.model, self._wrapped = self._wrapped, None
        if run.trains:
            self._training(run, True)
        yield
        if self._group is not None:
            self._group.agree_now(run)

    @hookimpl(trylast=True)
    def after_train_epoch(self, run: Run) -> None:
        if self._group is not None:
            self._group.agree_now(run)

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Leave the process group, so that the others fail at once and do not wait for this process."""
        if self._group is not None:
            self._group.fail(run, error)

    @hookimpl(trylast=True)
    def after_run(self, run: Run) -> None:
        """Behind all others: the wrapper goes too, since the threads of a group live as long as something holds it."""
        if self._group is not None:
            from detkernel_runtime.parallel import ddp

            run.model, self._wrapped = ddp.unwrapped(run.model), None
            run.modules = {name: ddp.unwrapped(module) for name, module in run.modules.items()}
            self._group.close()
            self._group = None
        if self._undo is not None:
            self._undo.close()
        self._compiling = None

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        from detkernel_runtime import settings

        lines = {"device": settings.described(run), "memory": f"{self._memory():,.0f} MB at its peak"}
        return lines | ({"time": self._clock.estimate(run)} if self._clock is not None and self._clock.train else {})

    def state_dict(self) -> dict[str, Any]:
        """The generators of Python, NumPy, torch and the GPU, of this process, and its buffers where the checkpoint has
        the first one's."""
        from detkernel_runtime import generators
        from detkernel_runtime.parallel import ddp

        state = generators.state_dict(self._cuda)
        if self._run is None or self._run.is_main:
            return state
        return {**state, "buffers": ddp.own_buffers(self._run)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from detkernel_runtime import generators
        from detkernel_runtime.parallel import ddp

        generators.load_state_dict(state, self._cuda)
        if "buffers" in state:
            ddp.load_own_buffers(self._run, state["buffers"])

    @contextmanager
    def _explaining(self, run: Run, batch: Batch) -> Iterator[None]:
        """Turn torch's errors that a user can fix into messages that say how."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            from detkernel_runtime import explain

            explained = explain.explained(self, run, batch, error)
            if explained is None:
                raise
            raise explained from None

    def _autocast(self, run: Run) -> AbstractContextManager[None]:
        if self.precision == "fp32":
            return nullcontext()
        import torch

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        context: AbstractContextManager[None] = torch.autocast(run.device.type, dtype=dtype)
        return context

    def _training(self, run: Run, mode: bool) -> None:
        """The model and the modules that are trained with it, in training or evaluation mode."""
        for network in (run.model, *(run.modules[name] for name in sorted(run.trained_modules))):
            network.train(mode)

    def _receive(self, run: Run, batch: Batch) -> None:
        batch.move(run.device, non_blocking=True)
        if not self.channels_last:
            batch.images = batch.images.contiguous()
        if self._compiling is not None:
            self._compiling.shape = batch.images.shape
        if self._group is not None:
            self._group.watch.beats += 1

    def _memory(self) -> float:
        from detkernel_runtime import settings

        return settings.peak_memory(self._cuda)
