"""Who imports whom, how many lines each package has, and which modules are public: `python docs/house.py`.

`tests/test_house.py` holds what is found here against the rules of `docs/architecture.md`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import attrs

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchvision", "numpy", "PIL")
"""What the kernel does not know, in whatever spelling."""
_NAMED = re.compile(rf"({'|'.join(HEAVY)})(\.\w+)*")


def packages() -> dict[str, Path]:
    """Name -> folder, of the kernel and of each plugin."""
    plugins = sorted(path for path in ROOT.glob("plugins/*/detkernel_*") if path.is_dir())
    return {"detkernel": ROOT / "kernel/src/detkernel", **{path.name: path for path in plugins}}


@attrs.frozen
class Import:
    """One import in a module: the dotted name, the line, and whether it happens when the module is imported."""

    name: str
    line: int
    at_import: bool


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name -> file, of a package."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, also inside functions, and those spelt as text for `import_module`."""
    return _imports(path.read_text(encoding="utf-8"))


@cache  # several questions are asked of the same files
def _imports(source: str) -> tuple[Import, ...]:
    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inner = False
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, inner) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
                yield from (Import(f"{child.module}.{alias.name}", child.lineno, inner) for alias in child.names)
            elif isinstance(child, ast.Constant) and isinstance(child.value, str) and _NAMED.fullmatch(child.value):
                yield Import(child.value, child.lineno, inner)
            else:
                yield from walk(child, inner)

    return tuple(walk(ast.parse(source), True))


def cycles(folder: Path) -> list[list[str]]:
    """Modules of a package that import each other in a circle while they are imported."""
    files = modules(folder)
    edges = {
        name: {target for made in imports(path) if made.at_import and (target := _module(made.name, files)) != name}
        for name, path in files.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(filter(None, edges[name])):
                visit(target, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    return found


def _module(name: str, files: dict[str, Path]) -> str:
    """The module of the package that an import names, or nothing."""
    return next((found for found in (name, name.rpartition(".")[0]) if found in files), "")


def lines_of_code(source: str) -> int:
    """The lines that are neither blank nor a comment nor of a docstring."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(1 for number, line in lines if number not in texts and line.strip() and line.strip()[0] != "#")


def main() -> None:
    for package, folder in packages().items():
        files = modules(folder)
        sources = [path.read_text(encoding="utf-8") for path in files.values()]
        lines, code = sum(len(source.splitlines()) for source in sources), sum(map(lines_of_code, sources))
        public = [name for name in files if not any(part.startswith("_") for part in name.split("."))]
        size = f"{code} lines of code ({lines} with docstrings, comments and blank ones)"
        print(f"{package}: {size}, {len(files)} modules, {len(public)} of them public")
        for name in public:
            print(f"    {name}")


if __name__ == "__main__":
    main()
