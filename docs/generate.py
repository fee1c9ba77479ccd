"""mkdocs hook: the reference pages, generated from the installed plugins, so that they cannot fall behind the code."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detkernel.bus import Bus
from detkernel.catalog import Catalog
from detkernel.plugin import Part
from detkernel.reference import option_rows, usage


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, lines in (
        ("reference/events.md", events()),
        ("reference/plugins.md", catalog_page(parts=False)),
        ("reference/parts.md", catalog_page(parts=True)),
        ("reference/detection.md", library_page("detkernel_detection")),
        ("reference/detectors.md", library_page("detkernel_detectors")),
    ):
        files.append(File.generated(config, path, content="\n".join(lines) + "\n"))
    return files


def events() -> Iterator[str]:
    """The loop as pseudo-code, then every event with its arguments."""
    import detkernel.hookspecs

    text = inspect.getdoc(detkernel.hookspecs) or ""
    yield "# The loop and its events\n"
    head, _, rest = text.partition("\n\n")
    loop, _, notes = rest.partition("\n\nLoaders come")
    yield f"{head}\n\n```text\n{inspect.cleandoc(loop)}\n```\n\nLoaders come{notes}\n"
    bus = Bus({})
    for event in bus.event_names():
        spec = bus.spec(event)
        arguments = ", ".join(name for name in inspect.signature(spec).parameters if name != "self")
        yield f"## {event}\n\n`{event}({arguments})`\n\n{inspect.getdoc(spec)}\n"


def catalog_page(*, parts: bool) -> Iterator[str]:
    """Every installed plugin (or part) with its options."""
    yield "# Parts\n" if parts else "# Plugins\n"
    catalog = Catalog()
    for name in catalog.entries:
        cls = catalog.load(name)
        if issubclass(cls, Part) != parts:
            continue
        what, _, example = usage(name, cls).partition(": ")
        yield f"## {name}\n\n{inspect.getdoc(cls)}\n\n{what[0].upper()}{what[1:]}: `{example}`\n"
        rows = [[_cell(text) for text in row] for row in option_rows(cls)]
        if rows:
            yield "| option | type | default | meaning |\n|---|---|---|---|"
            for option, kind, default, meaning in rows:
                yield f"| `{option}` | `{kind}` | `{default}` | {meaning} |"
            yield ""
        yield f"From `{catalog.find(name).distribution}`.\n"


def library_page(package: str) -> Iterator[str]:
    """The public classes, functions and constants of every module of a package, read from its source."""
    yield f"# The library `{package}`\n"
    yield "What plugins import beside the kernel. Names that begin with an underscore may change without notice.\n"
    for name in sorted(module.name for module in pkgutil.walk_packages(_paths(package), f"{package}.")):
        found = find_spec(name)
        tree = ast.parse(Path(str(found and found.origin)).read_text(encoding="utf-8"))
        entries = [line for node, doc in _documented(tree.body) for line in _entry(node, doc)]
        if entries:
            yield f"## {name}\n\n{inspect.cleandoc(ast.get_docstring(tree) or '')}\n"
            yield from entries


def _paths(package: str) -> list[str]:
    found = find_spec(package)
    return list(found.submodule_search_locations or []) if found else []


def _documented(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """The public definitions of a module or class, each with its docstring; for a value, the string below it."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            name, doc = node.name, ast.get_docstring(node) or ""
        elif isinstance(node, ast.AnnAssign) or (isinstance(node, ast.Assign) and len(node.targets) == 1):
            name = ast.unparse(_target(node))
            below = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            doc = inspect.cleandoc(below) if isinstance(below, str) else _help(node.value)
        else:
            continue
        if not name.startswith("_") and doc:
            yield node, doc


def _help(value: ast.expr | None) -> str:
    """What an `option(help=...)` says."""
    given = value.keywords if isinstance(value, ast.Call) else []
    return next((ast.literal_eval(word.value) for word in given if word.arg == "help"), "")


def _entry(node: ast.stmt, doc: str) -> Iterator[str]:
    """A class with its members, a function or a value, under a heading of its own."""
    if isinstance(node, ast.ClassDef):
        yield f"### class {node.name}\n"
        if node.bases:
            yield f"A `{', '.join(ast.unparse(base) for base in node.bases)}`.\n"
        yield f"{doc}\n"
        yield from (f"- {_shown(member)}: {' '.join(text.split())}" for member, text in _documented(node.body))
        yield ""
    else:
        heading = f"def {node.name}" if isinstance(node, ast.FunctionDef) else ast.unparse(_target(node))
        yield f"### {heading}\n\n{_shown(node)}\n\n{doc}\n"


def _target(node: Any) -> ast.expr:
    """What a value is assigned to."""
    target: ast.expr = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    return target


def _shown(node: ast.stmt) -> str:
    """A signature, or a name with its type or value."""
    if isinstance(node, ast.FunctionDef):
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"`{node.name}({ast.unparse(node.args)}){returned}`"
    if isinstance(node, ast.ClassDef):
        return f"`class {node.name}`"
    if isinstance(node, ast.AnnAssign):
        return f"`{ast.unparse(node.target)}: {ast.unparse(node.annotation)}`"
    return f"`{ast.unparse(node)}`"


def _cell(text: str) -> str:
    """Markdown shows the backslash that would keep a bar from ending the cell."""
    return text.replace(" | ", " or ").replace("|", "/").replace("\n", " ")
