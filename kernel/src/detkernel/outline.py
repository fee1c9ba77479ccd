"""What a class or a function is, read from its source: nothing is imported, so that listing stays fast and safe.

Only the head of a definition, down to the end of its docstring, is parsed: a whole file takes twenty times as long.
"""

from __future__ import annotations

import ast
import re
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
_START = re.compile(r"^(?:class|def) +(\w+)", re.MULTILINE)
_HEAD = re.compile(
    r"""[^"'\#]*?:[ \t]*(?:\#[^\n]*)?\n\s+
    [rR]?(?:\"\"\"(?:.|\n)*?\"\"\" | '''(?:.|\n)*?''' | "[^"\n]*" | '[^'\n]*')""",
    re.VERBOSE,
)
_KEY = re.compile(r"""\bkey=["'](\w+)["']""")
_IMPORT = re.compile(r"^from[ ]+[.\w]+[ ]+import[ ]+(?:\([^)]*\)|[^\n(]+)", re.MULTILINE)


def outline(target: str) -> tuple[str, str]:
    """(kind, first paragraph of the docstring) of `module:name`; empty where the source does not tell.

    The kind of a part is the name of the base class that derives from `Part` (`Dataset`, `Transform`, ...), that of a
    plugin which takes the place of others their key (`model`, `optimizer`): both are found by following base classes
    through the imports of their modules.
    """
    module, _, name = target.partition(":")
    node = _definition(module, name)
    if node is None:
        return "", ""
    return _kind(module, name), " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


@cache
def _kind(module: str, name: str, depth: int = 0) -> str:
    node = _definition(module, name)
    if depth > _DEEPEST or isinstance(node, ast.FunctionDef):
        return ""
    if node is None:
        owner = _imports(module).get(name)
        return _kind(*owner, depth + 1) if owner else ""
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    if "Part" in bases:
        return name
    key = _KEY.search(_decorators(module, name))
    if key:
        return key[1]
    return next((kind for base in bases if (kind := _kind(module, base, depth + 1))), "")


@cache
def _definition(module: str, name: str) -> Definition | None:
    source = _source(module)
    start = _starts(module).get(name)
    if start is None:
        return None
    head = _HEAD.match(source, start)
    return (_find(head[0], name) if head else None) or _find(source, name)


def _decorators(module: str, name: str) -> str:
    """The text from `@plugin(` to the class below it."""
    source, start = _source(module), _starts(module)[name]
    above = source[max(source.rfind("\n@plugin(", 0, start), 0) : start]
    return above if above.startswith("\n@plugin(") and not _START.search(above) else ""


@cache
def _starts(module: str) -> dict[str, int]:
    return {match[1]: match.start() for match in _START.finditer(_source(module))}


def _find(source: str, name: str) -> Definition | None:
    with suppress(SyntaxError, ValueError):  # importing it will say so
        found = (node for node in ast.parse(source).body if isinstance(node, Definition))
        return next((node for node in found if node.name == name), None)
    return None


@cache
def _imports(module: str) -> dict[str, tuple[str, str]]:
    """Name -> the module and the name there that it was imported from."""
    found: dict[str, tuple[str, str]] = {}
    spec = _spec(module)
    package = spec.parent if spec else None
    for match in _IMPORT.finditer(_source(module)):
        with suppress(SyntaxError, ImportError):  # ImportError: a relative one that leads out of its package
            node = ast.parse(match[0]).body[0]
            assert isinstance(node, ast.ImportFrom)
            source = resolve_name("." * node.level + (node.module or ""), package)
            found |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return found


@cache
def _source(module: str) -> str:
    """The text of a module; empty where there is none."""
    spec = _spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    try:
        return Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


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
