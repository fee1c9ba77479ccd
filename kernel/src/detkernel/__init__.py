"""detkernel: a microkernel for training object detectors. The loop emits events; plugins do everything else."""

from detkernel.errors import (
    CatalogError,
    CheckpointError,
    ConfigError,
    DataError,
    DetkernelError,
    UserError,
)
from detkernel.loop import Kernel
from detkernel.plugin import Part, declared, hookimpl, hookspec, option, plugin, state, wrong
from detkernel.run import Mode, Run, RunOptions
from detkernel.span import Span

__version__ = "0.1.0"

__all__ = [
    "CatalogError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DetkernelError",
    "Kernel",
    "Mode",
    "Part",
    "Run",
    "RunOptions",
    "Span",
    "UserError",
    "declared",
    "hookimpl",
    "hookspec",
    "option",
    "plugin",
    "state",
    "wrong",
]
