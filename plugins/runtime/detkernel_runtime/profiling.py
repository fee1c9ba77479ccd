"""Measures where an iteration goes: a plugin beside those of a config, for `detkernel profile`."""

from __future__ import annotations

import functools
import inspect
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from detkernel import Run, hookimpl, option, plugin, state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

QUESTIONS = {
    "aten::_local_scalar_dense": "reads a number",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "boolean indexing",
    "aten::equal": "torch.equal",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
}
"""Operations for whose answer the host waits, where the tensor is on a GPU."""


def convolution_backward(
    gradient: Any, images: Any, weight: Any, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, transposed: bool,
    _output_padding: Any, _groups: int, wanted: Any, **_: Any,
) -> int:  # fmt: skip
    """FLOPs of a convolution's gradients, from shapes: each, that of the input and that of the weight, takes as many as
    going forward. torch's own count (2.9 to 2.15) takes grouped ones for dense: a hundred times too many for MobileNet.
    """
    forward: int = conv_flop_count(images, weight, gradient, transposed=transposed)
    return forward * sum(map(bool, wanted[:2]))


FLOPS = {torch.ops.aten.convolution_backward: convolution_backward}
LOADER_SECONDS = 10.0
"""How long each pass over the data alone takes at most."""
TRACED = 2
"""Iterations in a trace file."""


@attrs.define
class Frame:
    """A call that is not over yet."""

    key: tuple[str, str]
    start: float
    nested: float = 0.0
    backward: float | None = None


@attrs.define(eq=False)
class Costs:
    """Seconds by event and plugin over the measured iterations, each without what is nested in it."""

    exclusive: dict[tuple[str, str], float] = attrs.field(factory=lambda: defaultdict(float))
    top: float = 0.0
    """All events that were not fired by others."""
    forward: float = 0.0
    backward: float = 0.0
    step: float = 0.0
    stepping: str = ""
    """The plugin that goes backward and steps."""
    clock: Callable[[], float] = time.perf_counter
    """Stands still for what happens once (`run.aside`)."""
    open: list[Frame] = attrs.field(factory=list)

    @contextmanager
    def timed(self, event: str, name: str) -> Iterator[None]:
        if event == "after_backward" and not name and self.open:
            around = self.open[-1]  # of the plugin that fired it: so far, it went backward
            around.backward = self.clock() - around.start - around.nested
        frame = Frame((event, name), self.clock())
        self.open.append(frame)
        try:
            yield
        finally:
            self._close(frame)

    def _close(self, frame: Frame) -> None:
        seconds = self.clock() - frame.start
        self.open.pop()
        if self.open:
            self.open[-1].nested += seconds
        else:
            self.top += seconds
        own = seconds - frame.nested
        if frame.backward is not None:
            self.backward += frame.backward
            self.step += own - frame.backward
            self.stepping = frame.key[1]
            return
        if frame.key == ("train_step", ""):
            self.forward += seconds
        self.exclusive[frame.key] += own


class Questions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that wait for the device, by the line of code that asked."""

    def __init__(self, device: str) -> None:
        """`device`: its type. What is asked of another, such as an optimizer's counters on the host, is none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.found: Counter[tuple[str, str]] = Counter()
        """By place and kind."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = QUESTIONS.get(func._schema.name)
        if func._schema.name == "aten::index.Tensor" or func._schema.name == "aten::index":
            boolean = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1])
            kind = QUESTIONS["aten::masked_select"] if boolean else None
        elif func._schema.name == "aten::_to_copy" and args[0].device.type != "cpu":
            target = (kwargs or {}).get("device")
            kind = "copies to the host" if target is not None and torch.device(target).type == "cpu" else None
        if kind is not None and args[0].device.type == self.device:
            where = place()
            if where is not None:
                self.found[where, kind] += 1
        return func(*args, **(kwargs or {}))


def place() -> str | None:
    """The innermost line of code outside of torch that led here, as `package/file.py:LINE function`.

    None inside of torch's optimizers: what they read are counters, which are on the host whatever the device.
    """
    inside = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_stack(sys._getframe(2))):
        path = Path(frame.filename)
        if inside / "optim" in path.parents:
            return None
        if inside not in path.parents and frame.filename != __file__ and not frame.filename.startswith("<"):
            return f"{'/'.join(path.parts[-2:])}:{frame.lineno} {frame.name}"
    return "in torch"


@attrs.define
class Pass:
    """A pass over the data alone."""

    images: int
    seconds: float
    first: float
    """Seconds until the first batch, workers started."""

    @property
    def rate(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0


def read_alone(loader: Any, most: int, limit: float = LOADER_SECONDS) -> Pass:
    """Batches from the beginning of the first epoch, as fast as they come."""
    images, start, first = 0, time.perf_counter(), 0.0
    stream = loader.batches(0)
    for number, batch in enumerate(stream, start=1):
        images += len(batch)
        first = first or time.perf_counter() - start
        if number >= most or time.perf_counter() - start > limit:
            break
    seconds = time.perf_counter() - start
    stream.close()
    getattr(loader, "close", lambda: None)()
    return Pass(images, seconds, first)


@plugin(priority="lowest")
class Profiler:
    """Times events and plugins, counts FLOPs and questions to the device, and ends the run."""

    warmup: int = option(help="iterations before anything is measured")
    iterations: int = option(help="iterations that are measured")
    trace: Path | None = option(default=None, help="where a trace of torch's profiler goes")

    costs: Costs = state(factory=Costs)
    seconds: list[float] = state(factory=list)
    """Of each measured iteration."""
    images: int = state(default=0)
    """In the measured iterations."""
    batch_size: int = state(default=0)
    cold: Pass | None = state(default=None)
    warm: Pass | None = state(default=None)
    flops: tuple[int, int] | None = state(default=None)
    """Of one iteration: forward, and all of it; None: the model is compiled."""
    counted_images: int = state(default=0)
    questions: dict[tuple[str, str], int] = state(factory=dict)
    parameters: tuple[int, int] = state(default=(0, 0))
    """All, and those that are trained."""
    peak: dict[str, float] = state(factory=dict)
    """Bytes, of the process and of the device."""
    facts: dict[str, Any] = state(factory=dict)
    marks: list[Any] = state(factory=list)
    """On a GPU, of each iteration: events before and behind the forward, behind the backward, and behind the step."""

    _began: float = state(default=0.0)
    _done: int = state(default=0)
    _stack: ExitStack = state(factory=ExitStack)
    _counter: Any = state(default=None)
    _asked: Any = state(default=None)
    _undo: Any = state(default=None)

    def attach(self, run: Run) -> None:
        """Put a clock around every event and every plugin of a run."""
        self.costs.clock = lambda: time.perf_counter() - run.aside
        self._undo = run.bus.intercept(self._event, self._implementation)

    @property
    def measuring(self) -> bool:
        return self.warmup <= self._done < self.warmup + self.iterations

    @contextmanager
    def _event(self, event: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        if event == "before_train_iter" and not self.costs.open:
            self._iteration_begins()
        with self._timed(event, ""):
            yield

    @contextmanager
    def _timed(self, event: str, name: str) -> Iterator[None]:
        if not self._began or not self.measuring:
            yield
            return
        with self.costs.timed(event, name):
            yield

    def _implementation(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        event = function.__name__

        @functools.wraps(function)
        def call(*arguments: Any, **optional: Any) -> Any:
            with self._timed(self._current(event), name):
                return function(*arguments, **optional)

        @functools.wraps(function)
        def wrap(*arguments: Any, **optional: Any) -> Generator[Any, Any, Any]:
            generator = function(*arguments, **optional)
            step = functools.partial(next, generator)
            while True:
                with self._timed(self._current(event), name):
                    try:
                        value = step()
                    except StopIteration as end:
                        return end.value
                try:
                    step = functools.partial(generator.send, (yield value))
                except BaseException as error:  # of another plugin; the wrapper may handle it
                    step = functools.partial(generator.throw, error)

        return wrap if inspect.isgeneratorfunction(function) else call

    def _current(self, event: str) -> str:
        """The event that is being fired: a function may have another name (`specname`)."""
        return next((frame.key[0] for frame in reversed(self.costs.open) if not frame.key[1]), event)

    def _iteration_begins(self) -> None:
        now = self.costs.clock()
        if self._began and self.measuring:
            self.seconds.append(now - self._began)
        if self._began:
            self._done += 1
        self._began = now

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        """The loader alone, twice over the same images; the first pass may have to read them from the disk."""
        loader = run.loaders["train"]
        most = min(len(loader), 8 * (self.warmup + self.iterations))
        self.cold = read_alone(loader, most)
        self.warm = read_alone(loader, most)
        parameters = [parameter for _, parameter in run.named_parameters()]
        trained = sum(one.numel() for one in parameters if one.requires_grad)
        self.parameters = sum(one.numel() for one in parameters), trained
        self.facts = {
            "device": str(run.device),
            "cuda": getattr(run.device, "type", str(run.device)) == "cuda",
            "precision": run.precision,
            "threads": torch.get_num_threads(),
            "compiled": any(type(part).__name__ == "OptimizedModule" for part in run.model.modules())
            if isinstance(run.model, torch.nn.Module)
            else False,
            "workers": getattr(loader, "workers", None),
            "epoch_length": run.epoch_length,
            "loader": run.bus.implementations("build_loader")[0].name,
        }
        if self.facts["cuda"]:
            torch.cuda.reset_peak_memory_stats(run.device)

    @hookimpl(trylast=True)
    def before_train_iter(self, run: Run, batch: Any) -> None:
        self.batch_size = len(batch)
        if self.measuring:
            self.images += len(batch)
        counted = self.warmup + self.iterations
        if self._done == counted and not self.facts["compiled"]:
            self._asked = self._stack.enter_context(Questions(self.facts["device"].partition(":")[0]))
            self._counter = self._stack.enter_context(FlopCounterMode(display=False, custom_mapping=FLOPS))
            self.counted_images = len(batch)
        if self._done == counted + 1 and self.trace is not None:
            self._stack.enter_context(self._traced(run))

    @hookimpl(wrapper=True, tryfirst=True)
    def train_step(self) -> Generator[None, Any, Any]:
        self._mark(first=True)
        losses = yield
        self._mark()
        if self._counter is not None and self.flops is None:
            self.flops = (self._counter.get_total_flops(), 0)
        return losses

    @hookimpl
    def after_backward(self) -> None:
        self._mark()

    def _mark(self, first: bool = False) -> None:
        """On a GPU: when the device, not the host, comes by here."""
        if not self.measuring or not self.facts["cuda"]:
            return
        if first:
            self.marks.append([])
        self.marks[-1].append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self.marks[-1][-1].record()

    @property
    def device_seconds(self) -> dict[str, float] | None:
        """By forward, backward and step, of all measured iterations, on the GPU; None: there is none."""
        whole = [marks for marks in self.marks if len(marks) == 4]
        if not whole:
            return None
        torch.cuda.synchronize()
        names = ("forward", "backward", "step")
        return {
            name: sum(marks[at].elapsed_time(marks[at + 1]) for marks in whole) / 1000 * len(self.marks) / len(whole)
            for at, name in enumerate(names)
        }

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        self._mark()
        if self._counter is not None and self.flops is not None:
            self.flops = (self.flops[0], self._counter.get_total_flops())
            self.questions = dict(self._asked.found)
            self._stack.close()
            self._counter = None
        last = self.warmup + self.iterations + (TRACED if self.trace is not None else 0)
        if self._done >= last:
            self._stack.close()
            self._measure_memory(run)
            run.stop("all is measured")

    @contextmanager
    def _traced(self, run: Run) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.facts["cuda"]:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            yield
        assert self.trace is not None
        profile.export_chrome_trace(str(self.trace))

    def _measure_memory(self, run: Run) -> None:
        if self.facts["cuda"]:
            self.peak["device"] = float(torch.cuda.max_memory_allocated(run.device))
            self.facts["device_memory"] = torch.cuda.get_device_properties(run.device).total_memory
        try:
            import resource
        except ImportError:  # not on Windows
            return
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak["process"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    @hookimpl
    def after_run(self) -> None:
        self._stack.close()
        if self._undo is not None:
            self._undo()
            self._undo = None
