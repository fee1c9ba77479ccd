"""What a class or a function is, read from its source: nothing is imported, so that listing stays fast and safe."""

from __future__ import annotations

import ast
import sys
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import resolve_name
from pathlib import Path
from typing import TypeAlias

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef
_DEEPEST = 10
"""How far base classes are followed: farther than any honest chain, and an end to a circle."""


def outline(target: str) -> tuple[str, str]:
    """(kind, first line of the docstring) of `module:name`; empty where the source does not tell.

    The kind of a part is the name of the base class that derives from `Part` (`Dataset`, `Transform`, ...), found by
    following base classes through the imports of their modules.
    """
    module, _, name = target.partition(":")
    node = _definitions(module).get(name)
    if node is None:
        return "", ""
    return _kind(module, name), (ast.get_docstring(node) or "").partition("\n")[0]


def _kind(module: str, name: str, depth: int = 0) -> str:
    node = _definitions(module).get(name)
    if depth > _DEEPEST or isinstance(node, ast.FunctionDef):
        return ""
    if node is None:
        owner = _imports(module).get(name)
        return _kind(*owner, depth + 1) if owner else ""
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    if "Part" in bases:
        return name
    return next((kind for base in bases if (kind := _kind(module, base, depth + 1))), "")


@cache
def _definitions(module: str) -> dict[str, Definition]:
    return {node.name: node for node in _body(module) if isinstance(node, Definition)}


@cache
def _imports(module: str) -> dict[str, tuple[str, str]]:
    """Name -> the module and the name there that it was imported from."""
    found: dict[str, tuple[str, str]] = {}
    spec = _spec(module)
    package = spec.parent if spec else None
    for node in _body(module):
        if isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # a relative one that leads out of its package
                source = resolve_name("." * node.level + (node.module or ""), package)
                found |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return found


@cache
def _body(module: str) -> list[ast.stmt]:
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return []
    try:
        return ast.parse(Path(spec.origin).read_bytes()).body
    except (SyntaxError, ValueError, OSError):  # importing it will say so
        return []


@cache
def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies, found without importing it or its parents."""
    path: list[str] | None = None
    spec: ModuleSpec | None = None
    for depth in range(module.count(".") + 1):
        name = ".".join(module.split(".")[: depth + 1])
        spec = next((found for finder in sys.meta_path if (found := finder.find_spec(name, path))), None)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec
