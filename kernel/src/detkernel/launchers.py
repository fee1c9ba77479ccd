"""Who starts a run in several processes: no business of the kernel's, but an extension point of its command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any, Protocol

import click

from detkernel.catalog import Catalog
from detkernel.errors import CatalogError, UserError
from detkernel.processes import Launch

_GIVEN = "detkernel.launchers"
_STANDARD = "detkernel-runtime"
_OPTIONS = ("--nproc-per-node", "--max-restarts", "--nnodes", "--node-rank", "--rdzv-endpoint", "--rdzv-timeout")
"""Of the standard launcher, for who does not have it."""


class Launcher(Protocol):
    """An entry point of `detkernel.launchers`: an object (a module will do) that starts a run in several processes.

    It is loaded for the help of `run` and `test`, too, and should import nothing heavy then.
    """

    def options(self, command: str) -> Sequence[click.Option]:
        """What it adds to the options of the command `run` or `test`."""

    def take_over(self, given: Mapping[str, Any], arguments: Sequence[str]) -> int | None:
        """Run `detkernel ARGUMENTS` in several processes and return the exit status of the run; None: go on in this
        process, for which nothing else was asked, or which is one of the several.

        Called when the config has been found valid and nothing has been built. `given`: the values of its options, by
        the name of the parameter. Raises `UserError` for what cannot be had.
        """

    def launch(self) -> Launch:
        """How this process was started."""

    def report(self, status: int, error: BaseException | None, text: str) -> bool:
        """Take word of how this process ends: its exit status, what was raised, and what it would print. False where
        nobody reads it: then the process prints it itself."""


@cache
def installed() -> tuple[Launcher, ...]:
    """The launchers of all installed distributions. Raises `CatalogError` for one that cannot be imported."""
    catalog = Catalog("launcher")
    return tuple(catalog.load_object(name) for name in catalog.entries)


class LaunchedCommand(click.Command):
    """A command that launchers add options to, and may take over."""

    @cached_property
    def _added(self) -> list[tuple[Launcher, Sequence[click.Option]]]:
        return [(launcher, launcher.options(self.name or "")) for launcher in installed()]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, last = super().get_params(ctx)  # the last one is --help
        return [*own, *(option for _, options in self._added for option in options), last]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in _OPTIONS or installed():
                raise
            raise UserError(
                f"{error.option_name}: what starts several processes comes with {_STANDARD}, which is not installed: "
                f"pip install {_STANDARD}"
            ) from None

    def invoke(self, ctx: click.Context) -> Any:
        ctx.meta[_GIVEN] = [
            (launcher, {option.name: ctx.params.pop(option.name) for option in options if option.name})
            for launcher, options in self._added
        ]
        return super().invoke(ctx)


def take_over() -> Launch:
    """Let a launcher start this very command in several processes and end as they do, if that was asked for; else how
    this process was started."""
    found = Launch()
    for launcher, given in click.get_current_context().meta[_GIVEN]:
        status = launcher.take_over(given, sys.argv[1:])
        if status is not None:
            sys.exit(status)
        found = launcher.launch() if found == Launch() else found
    return found


def report(status: int, error: BaseException | None = None, text: str = "") -> bool:
    """Leave word of how this process ends. False where nobody reads it: then the process prints it itself."""
    try:
        launchers = installed()
    except CatalogError:  # it is the mistake to tell, perhaps
        return False
    return any(launcher.report(status, error, text) for launcher in launchers)
