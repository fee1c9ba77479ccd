"""What is installed: the entry points of the group `detkernel.plugins`.

Listing imports no plugin: the one line about each is read from its source. A plugin is loaded only when a config names
it. Two distributions that offer one name are an error that names both.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from functools import cache, cached_property
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import attrs

from detkernel.errors import CatalogError, did_you_mean, relative
from detkernel.plugin import is_plugin

GROUP = "detkernel.plugins"
_LOCAL = re.compile(r"(.+\.py):([A-Za-z_][A-Za-z0-9_]*)")


@attrs.frozen
class Entry:
    """An installed plugin: its name, where it lies (`module:Class`), and the distribution it came with."""

    name: str
    target: str
    distribution: str
    version: str

    def describe(self) -> tuple[str, str]:
        """(kind, first line of the docstring), read from the source without importing it.

        The kind is the base class's name (`Dataset`, `Transform`, ...), or empty for a plugin that answers events.
        """
        module, _, name = self.target.partition(":")
        node = _classes(module).get(name)
        if node is None:
            return "", ""
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return (bases[0] if bases else ""), (ast.get_docstring(node) or "").partition("\n")[0]


class Catalog:
    """The installed plugins, by name."""

    @cached_property
    def entries(self) -> dict[str, list[Entry]]:
        """Name -> the distributions that offer it (more than one is a conflict)."""
        found: dict[str, list[Entry]] = {}
        for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
            entry = _entry(point)
            if entry not in found.setdefault(point.name, []):  # one distribution can be found twice on sys.path
                found[point.name].append(entry)
        return found

    def find(self, name: str) -> Entry:
        """The one entry of a name. Raises `CatalogError` with a suggestion, or with both providers."""
        offers = self.entries.get(name)
        if not offers:
            raise CatalogError(
                f"there is no plugin '{name}'{did_you_mean(name, self.entries)}; "
                "`detkernel plugins` lists what is installed"
            )
        if len(offers) > 1:
            owners = " and ".join(f"{entry.distribution} {entry.version} ({entry.target})" for entry in offers)
            raise CatalogError(f"'{name}' is offered by {owners}; uninstall one of them")
        return offers[0]

    def load(self, name: str, folder: Path | None = None) -> type[Any]:
        """The class of an installed name, or of `./file.py:Class` (relative to `folder`)."""
        local = _LOCAL.fullmatch(name)
        if local:
            return _load_local((folder or Path.cwd()) / local[1], local[2])
        entry = self.find(name)
        owner = f"plugin '{name}' of {entry.distribution} {entry.version}"
        module, _, attribute = entry.target.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise CatalogError(f"{owner} cannot be imported: {error}; is everything it needs installed?") from error
        except AttributeError:
            raise CatalogError(f"{owner}: its module {module} has no '{attribute}'") from None
        return _checked(cls, owner)

    def absolute(self, name: str, folder: Path) -> str:
        """The name as any config may write it: a local file's path made absolute."""
        local = _LOCAL.fullmatch(name)
        return f"{(folder / local[1]).resolve()}:{local[2]}" if local else name

    def name_of(self, cls: type[Any]) -> str:
        """The name under which a class is installed. Raises `CatalogError` if it is not."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        for name, offers in self.entries.items():
            if any(entry.target == target for entry in offers):
                return name
        raise CatalogError(f"{target} is not installed under any name; offer it as an entry point of {GROUP}")


def _checked(cls: Any, owner: str) -> type[Any]:
    if not is_plugin(cls):
        raise CatalogError(f"{owner}: {getattr(cls, '__name__', cls)!s} is no plugin class; decorate it with @plugin")
    return cls  # type: ignore[no-any-return]


def _load_local(path: Path, name: str) -> type[Any]:
    path = path.resolve()
    if not path.is_file():
        raise CatalogError(f"{relative(path)}: no such file")
    from detkernel import local

    module = local.load(path)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if is_plugin(value)]
        raise CatalogError(f"{relative(path)} has no class '{name}'{did_you_mean(name, known)}")
    return _checked(getattr(module, name), relative(path))


def _entry(point: EntryPoint) -> Entry:
    dist = point.dist
    return Entry(point.name, point.value, dist.name if dist else "?", dist.version if dist else "?")


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module's source, by name."""
    source = _source(module)
    body = ast.parse(source).body if source is not None else []
    return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def _source(module: str) -> str | None:
    """The source text of a module, found without importing it or its parents."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    for depth in range(module.count(".") + 1):
        name = ".".join(module.split(".")[: depth + 1])
        spec = next((found for finder in sys.meta_path if (found := finder.find_spec(name, path))), None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    assert spec is not None
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8")
