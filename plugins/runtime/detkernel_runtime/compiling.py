"""`torch.compile`, of the model or of modules: whether it pays off, how often, how long it takes, where its results are
kept, and what happens when the run is told to stop meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from detkernel import Run, wrong
from detkernel.errors import did_you_mean, printable
from torch import nn

if TYPE_CHECKING:
    from detkernel_runtime.device import Compile, Device

_MANY = 10_000
SECONDS = 60.0
"""What the compilation for a shape takes, where nothing is cached: a detector on a ResNet-50, on an H200."""
SAVED = 0.03
"""Seconds that an iteration of it is faster then, of 16 images of 800x800 (docs/performance.md)."""
CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""torch's environment variable for where Inductor keeps what it has compiled."""


class _GivenUpError(BaseException):
    """Raised inside a compiler, by whoever tells the run to stop."""


def chosen(device: Device, run: Run) -> Compile | None:
    """How to compile, or None: what the option says, and for `auto` whether it pays off, which a line tells."""
    from detkernel_runtime.device import Compile

    if device.compile != "auto":
        return device.compile
    if not run.trains:
        return None
    shapes: int | None = getattr(run.loaders["train"], "shape_count", None)
    reason = why_not(run.device.type, run.max_iters, shapes)
    run.log.info("device.compile: auto %s", reason or f"compiles the model, for {shapes} shapes of batches at most")
    return Compile(limit=max(8, 2 * (shapes or 1))) if reason is None else None


def why_not(device: str, iterations: int, shapes: int | None) -> str | None:
    """Why `auto` leaves the model uncompiled; None: it compiles it. It goes by the config alone, so that a resumed run
    is compiled if it was before.

    `shapes`: how many the batches of the training can have; None: not known.
    """
    if device != "cuda":
        return "leaves the model uncompiled: a CPU compiles for minutes, and is hardly faster then"
    if not torch.utils._triton.has_triton():
        return "leaves the model uncompiled: Triton, which Inductor compiles with, is not there or knows no such GPU"
    if shapes is None:
        return (
            "leaves the model uncompiled: each batch may have a shape of its own, and each would be compiled for; make "
            "them few with the loader's `batch_shapes`"
        )
    needed = round(shapes * SECONDS / SAVED)
    if iterations < needed:
        several = f"{shapes} shapes" if shapes > 1 else "one shape"
        return (
            f"leaves the model uncompiled: the run has {iterations:,} iterations, and the compilation for {several} of "
            f"batches pays off after about {needed:,}"
        )
    return None


def keep_cache(undo: ExitStack) -> Path:
    """Let Inductor keep what it compiles from run to run, and return where: torch's own default is a temporary folder,
    which is empty after the machine is started again."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(CACHE)
    if before in (None, default_cache_dir()):  # torch sets it to its own default when it is first asked
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        os.environ[CACHE] = str((Path(home).expanduser() / "detkernel" / "torchinductor").absolute())
        undo.callback(_put_back, before)
    return Path(os.environ[CACHE])


def _put_back(folder: str | None) -> None:
    if folder is None:
        os.environ.pop(CACHE, None)
    else:
        os.environ[CACHE] = folder


class CompileClock:
    """How long compilers took: torch says when it begins, and when it is done, the backward pass included, which is
    compiled when it is first run."""

    def __init__(self, run: Run, undo: ExitStack) -> None:
        self._run, self._began, self._unsaid = run, 0.0, 0.0
        self.shape = torch.Size()
        """Of the images of this iteration."""
        handler = torch._dynamo.callback.callback_handler
        for callbacks, callback in ((handler.start_callbacks, self._begin), (handler.end_callbacks, self._end)):
            callbacks.append(callback)
            undo.callback(_removed, callbacks, callback)

    def _begin(self, _: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        seconds = time.perf_counter() - self._began
        self._unsaid += seconds
        self._run.aside += seconds

    def say(self, what: str) -> None:
        """A line about the compilation of this iteration, if there was one."""
        if self._unsaid:
            self._run.log.info(
                "compiled the model for %s batches of %s in %.1f s; the rates and the time left are without it",
                *(what, list(self.shape), self._unsaid),
            )
            self._unsaid = 0.0


def _removed(callbacks: list[Any], callback: Any) -> None:
    with suppress(ValueError):  # torch._dynamo.reset() removes all
        callbacks.remove(callback)


def compile_modules(options: Compile, run: Run, model: nn.Module, undo: ExitStack) -> CompileClock:
    """Compile the model, or the modules of it that the patterns match, at their next calls. The clock returned runs
    whenever that is.

    Raises `ConfigError` for a pattern that matches no module, and a backend that torch does not have.
    """
    dynamo = torch._dynamo  # imported by this: it takes seconds
    backends = dynamo.list_backends(exclude_tags=())
    if options.backend not in backends:
        raise wrong(options, "backend", f"torch has no '{options.backend}'{did_you_mean(options.backend, backends)}")
    for name in ("recompile_limit", "accumulated_recompile_limit"):  # of all modules together; each has its own here
        undo.callback(setattr, dynamo.config, name, getattr(dynamo.config, name))
        setattr(dynamo.config, name, _MANY)
    for name, module in dict(_matched(options, model)).items():
        module._compiled_call_impl = Compiled(options, run, name, module)  # as module.compile() does; no copy keeps it
    if options.backend == "inductor":
        run.log.info("device.compile: what Inductor compiles is kept in %s", printable(str(keep_cache(undo))))
    return CompileClock(run, undo)


def _matched(options: Compile, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules to compile; not those inside of one that is compiled already."""
    if not options.modules:
        yield "the model", model
        return
    named = dict(model.named_modules())
    for pattern in options.modules:
        found = [name for name in named if name and fnmatchcase(name, pattern)]
        if not found:
            raise wrong(options, "modules", f"no module is called '{pattern}'{did_you_mean(pattern, named)}")
        for name in found:
            parents = [name[:place] for place, character in enumerate(name) if character == "."]
            if not any(fnmatchcase(parent, other) for parent in parents for other in options.modules):
                yield name, named[name]


class Compiled:
    """What a compiled module is called by. It counts how often the compiler was needed, and stops at the limit."""

    def __init__(self, options: Compile, run: Run, name: str, module: nn.Module) -> None:
        self._options, self._run, self._name, self._module = options, run, name, module
        self._backend: Callable[..., Any] = torch._dynamo.lookup_backend(options.backend)
        self._call = torch.compile(module._call_impl, backend=self._compile, dynamic=options.dynamic)
        self._seen: set[tuple[Any, ...]] = set()
        self._graphs = self.count = 0
        self._warned = self._given_up = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shapes = [(leaf.shape, leaf.dtype) for leaf in _tensors((args, kwargs))]
        key = (self._module.training, torch.is_grad_enabled(), *shapes)
        if key not in self._seen and self.count >= self._options.limit:
            self._warn(shapes)
            with torch.compiler.set_stance("eager_on_recompile"):
                return self._call(*args, **kwargs)
        before = self._graphs
        result = self._call(*args, **kwargs)
        self.count += self._graphs > before  # once, however many graphs it breaks into
        self._seen.add(key)
        return result

    def _warn(self, shapes: list[tuple[torch.Size, torch.dtype]]) -> None:
        if self._warned:
            return
        self._warned = True
        given = f"a tensor of {list(shapes[0][0])}" if shapes else "no tensor"
        self._run.log.warning(
            "device.compile: %s was compiled %d times, which is `limit`; what would need another compilation runs "
            "uncompiled, as now that it is given %s. Make batches of few shapes (the loader's `batch_shapes`), set "
            "`dynamic: true`, or raise `limit`",
            *(self._name, self.count, given),
        )

    def _compile(self, graph: Any, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        """The compiler of a graph, which may take minutes: once the run is told to stop, the graph runs as it is."""
        self._graphs += 1
        run = self._run
        plain: Callable[..., Any] = graph.forward
        self._given_up |= run.stop_reason is not None
        if self._given_up:
            return plain
        run.when_stopped.append(_give_up)
        try:
            made: Callable[..., Any] = self._backend(graph, inputs, **options)
        except _GivenUpError:
            self._given_up = True
            run.log.warning("the compilation of %s is given up, and the iteration runs uncompiled", self._name)
            return plain
        finally:
            run.when_stopped.remove(_give_up)
        return made


def _give_up() -> None:
    raise _GivenUpError


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
