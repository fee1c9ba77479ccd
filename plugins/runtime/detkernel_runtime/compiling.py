"""`torch.compile`, of the model or of modules: how often, and what happens when the run is told to stop meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from detkernel import Run, wrong
from detkernel.errors import did_you_mean
from torch import nn

if TYPE_CHECKING:
    from detkernel_runtime.device import Compile

_MANY = 10_000


class _GivenUpError(BaseException):
    """Raised inside a compiler, by whoever tells the run to stop."""


def compile_modules(options: Compile, run: Run, model: nn.Module, undo: ExitStack) -> None:
    """Compile the model, or the modules of it that the patterns match, at their next calls.

    Raises `ConfigError` for a pattern that matches no module, and a backend that torch does not have.
    """
    dynamo = torch._dynamo  # imported by this: it takes seconds
    backends = dynamo.list_backends(exclude_tags=())
    if options.backend not in backends:
        raise wrong(options, "backend", f"torch has no '{options.backend}'{did_you_mean(options.backend, backends)}")
    for name in ("recompile_limit", "accumulated_recompile_limit"):  # of all modules together; each has its own here
        undo.callback(setattr, dynamo.config, name, getattr(dynamo.config, name))
        setattr(dynamo.config, name, _MANY)
    for name, module in dict(_chosen(options, model)).items():
        module._compiled_call_impl = Compiled(options, run, name, module)  # as module.compile() does; no copy keeps it


def _chosen(options: Compile, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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
