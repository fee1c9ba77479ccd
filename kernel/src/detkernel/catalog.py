"""What is installed: the entry points of `detkernel.plugins`, `.commands`, `.configs`, `.templates`, `.launchers`
and `.recipes`.

Listing imports no plugin: the one line about each is read from its source. A plugin is loaded only when a config names
it. Two distributions that offer one name, and one that needs another version of the kernel or of another plugin's
distribution than is installed, are errors that name both.
"""

from __future__ import annotations

import importlib
import operator
import os
import re
import sys
import traceback
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, entry_points, requires
from pathlib import Path
from typing import Any, Literal

import attrs

from detkernel.errors import CatalogError, DefinitionError, did_you_mean, relative
from detkernel.outline import outline
from detkernel.plugin import is_plugin, option, published

_LOCAL = re.compile(r"(.+\.py):([A-Za-z_][A-Za-z0-9_]*)")
_MAKERS = re.compile(r"(option|state|plugin|(Hookimpl|Hookspec)Marker\.__call__)\(\) ")
_TARGET = re.compile(r"[\w.]+:[\w.]+")


@attrs.frozen
class Entry:
    """An installed plugin or command: its name, where it lies (`module:Class`), and the distribution it came with."""

    name: str
    target: str
    distribution: str
    version: str

    def describe(self) -> tuple[str, str]:
        """(kind, first paragraph of the docstring), read from the source without importing it.

        The kind is the name of a part's base class (`Dataset`, `Transform`, ...), the key of a plugin that takes the
        place of others (`model`, `optimizer`), or empty for what is neither.
        """
        return outline(self.target)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.target})"


class Catalog:
    """The installed plugins (or commands, readers of configs in files of other kinds, templates), by name."""

    def __init__(
        self, kind: Literal["plugin", "command", "config", "template", "launcher", "recipe"] = "plugin"
    ) -> None:
        self.kind = kind
        self.group = f"detkernel.{kind}s"

    @cached_property
    def entries(self) -> dict[str, list[Entry]]:
        """Name -> the distributions that offer it (more than one is a conflict)."""
        found: dict[str, list[Entry]] = {}
        owners: dict[int, tuple[str, str]] = {}  # both are parsed anew whenever they are asked for
        for point in sorted(entry_points(group=self.group), key=lambda point: point.name):
            if id(point.dist) not in owners:
                owners[id(point.dist)] = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
            target = point.value.partition("[")[0].strip()  # what follows are extras
            entry = Entry(point.name, target, *owners[id(point.dist)])
            if entry not in found.setdefault(point.name, []):  # one distribution can be found twice on sys.path
                found[point.name].append(entry)
        return found

    @cached_property
    def misfits(self) -> dict[str, str]:
        """Distribution -> what it needs and does not get, such as `needs detkernel-kernel>=9, but 0.1.0 is installed`.

        Only the kernel and the distributions in this catalogue are looked at: what else is missing, pip has said.
        """
        from detkernel import __version__

        versions = {entry.distribution: entry.version for offers in self.entries.values() for entry in offers}
        there = {_canonical(name): version for name, version in versions.items()}
        there["detkernel-kernel"] = __version__
        return {name: problem for name in versions if (problem := _misfit(name, there))}

    def find(self, name: str) -> Entry:
        """The one entry of a name. Raises `CatalogError` with a suggestion, or with both providers."""
        offers = self.entries.get(name)
        if not offers:
            raise CatalogError(
                f"there is no {self.kind} '{name}'{did_you_mean(name, self.entries)}; "
                "`detkernel plugins` lists what is installed"
            )
        if len(offers) > 1:
            raise CatalogError(f"'{name}' is offered by {' and '.join(map(str, offers))}; uninstall one of them")
        return offers[0]

    def load(self, name: str, folder: Path | None = None) -> type[Any]:
        """The class of an installed name, or of `./file.py:Class` (relative to `folder`)."""
        local = _LOCAL.fullmatch(name)
        if local:
            return _load_local((folder or Path.cwd()) / local[1], local[2])
        return _checked(self.load_object(name), self._owner(self.find(name)))

    def load_all(self) -> tuple[dict[str, type[Any]], list[str]]:
        """Every class that can be loaded, by name, and what is wrong with each that cannot, of whatever kind."""
        classes: dict[str, type[Any]] = {}
        problems: list[str] = []
        for name in self.entries:
            try:
                classes[name] = self.load(name)
            except CatalogError as error:
                problems.append(str(error))
            except Exception as error:
                problems.append(f"{self._owner(self.find(name))} cannot be imported: {error!r}")
        return classes, problems

    def publishers(self) -> dict[str, dict[str, type[Any]]]:
        """Event -> the installed plugins that publish it, by name. Imports them all: for messages about mistakes."""
        found: dict[str, dict[str, type[Any]]] = {}
        for name, cls in self.load_all()[0].items():
            for event in published(cls):
                found.setdefault(event, {})[name] = cls
        return found

    def load_object(self, name: str) -> Any:
        """What an installed name stands for, whatever it is."""
        entry = self.find(name)
        owner = self._owner(entry)
        misfit = self.misfits.get(entry.distribution)
        if misfit:
            raise CatalogError(f"{owner} {misfit}; install versions that fit each other")
        if not _TARGET.fullmatch(entry.target):
            raise CatalogError(f"{owner}: its entry point is '{entry.target}', expected module:Class")
        return _imported(entry.target, owner)

    @staticmethod
    def is_local(name: str) -> bool:
        """Whether a name is that of a class in a file: loading it runs the file."""
        return _LOCAL.fullmatch(name) is not None

    def absolute(self, name: str, folder: Path) -> str:
        """The name as any config may write it: a local file's path made absolute."""
        local = _LOCAL.fullmatch(name)
        return f"{os.path.realpath(folder / local[1])}:{local[2]}" if local else name

    def name_of(self, cls: type[Any]) -> str:
        """The name that a config may use for a class. Raises `CatalogError` if there is none."""
        entry = self.entry_of(cls)
        if entry is not None:
            return entry.name
        file = _local_file(cls.__module__)
        if file:
            return f"{file}:{cls.__qualname__}"
        target = _target(cls)
        raise CatalogError(f"{target} is not installed under any name; offer it as an entry point of {self.group}")

    def entry_of(self, cls: type[Any]) -> Entry | None:
        """What offers a class."""
        offers = (entry for offers in self.entries.values() for entry in offers)
        return next((entry for entry in offers if entry.target == _target(cls) or _loaded(entry.target) is cls), None)

    def _owner(self, entry: Entry) -> str:
        return f"{self.kind} '{entry.name}' of {entry.distribution} {entry.version}"


def _imported(target: str, owner: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CatalogError(f"{owner} cannot be imported: {reason}; is everything it needs installed?") from error
    except DefinitionError as error:
        raise CatalogError(f"{owner}: {_defined_at(error)}: {error}") from error
    except Exception as error:
        if problem := _wrong_call(error):
            raise CatalogError(f"{owner}: {problem}") from error
        error.add_note(f"raised while {owner} was imported")
        raise
    try:
        return operator.attrgetter(attribute)(found)
    except AttributeError:
        raise CatalogError(f"{owner}: its module {module} has no '{attribute}'") from None


def _checked(cls: Any, owner: str) -> type[Any]:
    if not is_plugin(cls):
        raise CatalogError(
            f"{owner}: {getattr(cls, '__name__', cls)!s} is not a plugin class; decorate it with @plugin"
        )
    return cls  # type: ignore[no-any-return]


def _load_local(path: Path, name: str) -> type[Any]:
    from detkernel import local

    path = Path(os.path.realpath(path))
    if not os.path.isfile(path):  # noqa: PTH113 - unlike Path's, it is false for a name that no file can have
        raise CatalogError(f"{relative(path)}: no such file")
    try:
        module = local.load(path)
    except DefinitionError as error:
        raise CatalogError(f"{_defined_at(error)}: {error}") from error
    except TypeError as error:
        if problem := _wrong_call(error):
            raise CatalogError(problem) from error
        raise
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if is_plugin(value)]
        raise CatalogError(f"{relative(path)} has no class '{name}'{did_you_mean(name, known)}")
    return _checked(getattr(module, name), relative(path))


def _local_file(module: str) -> str:
    from detkernel import local

    return local.file_of(module)


def _defined_at(error: DefinitionError) -> str:
    """The line that made a plugin of an invalid class: `@plugin` itself has raised the error."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return _line(next(frame for frame in frames if frame.filename != option.__code__.co_filename))


def _wrong_call(error: Exception) -> str:
    """Where and what, if an author called what makes a plugin with arguments that it does not take; else nothing.

    Python says so itself, of `option(default=3)` say: missing 1 required keyword-only argument: 'help'.
    """
    if isinstance(error, TypeError) and _MAKERS.match(str(error)):
        return f"{_line(traceback.extract_tb(error.__traceback__)[-1])}: {error}"
    return ""


def _line(frame: traceback.FrameSummary) -> str:
    return f"{relative(frame.filename)}:{frame.lineno}"


def _target(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _loaded(target: str) -> Any:
    """What an entry point stands for, if its module has been imported."""
    module, _, attribute = target.partition(":")
    return getattr(sys.modules.get(module), attribute, None)


def _misfit(distribution: str, there: Mapping[str, str]) -> str:
    """What a distribution needs of `there` (canonical name -> version) and does not get, or nothing."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        lines = []
    for line in lines:
        try:
            need = Requirement(line)
        except InvalidRequirement:
            continue
        version = there.get(_canonical(need.name))
        applies = version is not None and (need.marker is None or need.marker.evaluate({"extra": ""}))
        if applies and version is not None and not need.specifier.contains(version, prereleases=True):
            return f"needs {need.name}{need.specifier}, but {need.name} {version} is installed"
    return ""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
