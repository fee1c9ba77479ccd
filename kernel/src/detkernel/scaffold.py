"""`detkernel new-plugin NAME`: a small, complete, tested project to start from."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from detkernel.catalog import Catalog
from detkernel.errors import UserError, relative
from detkernel.files import write_atomic
from detkernel.plugin import RESERVED

Kind = Literal["model", "dataset", "transform", "evaluator", "hook", "command"]

_NEEDS: dict[Kind, tuple[str, ...]] = {
    "model": (
        "detkernel-detection>=0.1,<0.2",
        "torch>=2.9",
    ),
    "dataset": ("detkernel-detection>=0.1,<0.2", "torch>=2.9", "numpy>=2", "pillow>=11"),
    "transform": (
        "detkernel-detection>=0.1,<0.2",
        "torch>=2.9",
    ),
    "evaluator": ("detkernel-detection>=0.1,<0.2", "torch>=2.9", "torchvision>=0.24"),
    "hook": (
        "detkernel-detection>=0.1,<0.2",
        "torch>=2.9",
    ),
    "command": ("click>=8.1",),
}
_USAGE: dict[Kind, str] = {
    "model": "In a config:\n\n```yaml\nmodel: {use: my_plugin, width: 32}\n```",
    "dataset": "In a config:\n\n```yaml\ndata:\n  use: loader\n  train: {use: my_plugin, csv: boxes.csv}\n```",
    "transform": "In a config:\n\n```yaml\ndata:\n  train_transforms: [{use: my_plugin, prob: 0.3}]\n```",
    "evaluator": "In a config:\n\n```yaml\nrecall: {use: my_plugin, iou: 0.7}\n```",
    "hook": "In a config:\n\n```yaml\nmy_plugin: {threshold: 0.2}\n```",
    "command": "Then `detkernel my-plugin runs/mine` lists the checkpoints of a run.",
}


def new_plugin(name: str, kind: Kind, folder: Path) -> list[Path]:
    """Write the project into `folder/NAME`; return its files. Raises `UserError` for a name or a folder in use."""
    words = [word for word in re.split(r"[-_ .]+", name.lower()) if word]
    module = "_".join(words)
    if not re.fullmatch("[a-z][a-z0-9_]*", module):
        raise UserError(f"'{name}': expected a name of letters, digits and dashes, such as my-plugin")
    reason = _unusable(module, "".join(map(str.capitalize, words)), kind)
    if reason:
        raise UserError(f"'{name}': {reason}; choose another name")
    _check_free(module, kind)
    root = folder / "-".join(words)
    if root.is_file():
        raise UserError(f"{relative(root)} is a file; choose another name, or remove it")
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{relative(root)} exists and is not empty; choose another name, or remove it")
    names = {"my_plugin": module, "my-plugin": "-".join(words), "MyPlugin": "".join(map(str.capitalize, words))}
    needs = "".join(f', "{need}"' for need in _NEEDS[kind])
    command = kind == "command"
    fields = {
        "@needs@": needs,
        "@group@": "commands" if command else "plugins",
        "@object@": "my_plugin" if command else "MyPlugin",
        "@kind@": kind,
        "@listed@": "--help" if command else "plugins",
        "@usage@": _USAGE[kind],
    }
    written = []
    for template, target in (
        ("pyproject.toml", "pyproject.toml"),
        ("README.md", "README.md"),
        (f"{kind}.py", "my_plugin.py"),
        (f"{kind}_test.py", "test_my_plugin.py"),
    ):
        text = _template(template)
        for mark, value in {**fields, **names}.items():
            text = text.replace(mark, value)
        if command and template == "pyproject.toml":
            text = text.replace(f"\n{module} = ", f"\n{'-'.join(words)} = ")  # commands are written with dashes
        path = root / target.replace("my_plugin", module)
        write_atomic(path, text)
        written.append(path)
    return written


def _template(name: str) -> str:
    return (files("detkernel") / "templates" / f"{name}.txt").read_text(encoding="utf-8")


def _unusable(module: str, cls: str, kind: Kind) -> str:
    """Why a project of this name would not work, if so."""
    from detkernel.cli import cli

    made = module if kind == "command" else cls
    if keyword.iskeyword(module):
        return f"{module} is a Python keyword"
    if kind == "command" and module.replace("_", "-") in cli.commands:
        return "the kernel has a command of this name"
    if kind != "command" and module in (*RESERVED, "run", "base", "null", "true", "false", "none"):
        return "a config gives this word a meaning of its own"
    if module.startswith("test_") or cls.startswith("Test"):
        return "pytest takes what begins with 'test' for tests"
    if hasattr(builtins, made):
        return f"{made} is a name of Python's own"
    if {module, made} & {*_names(f"{kind}.py"), *_names(f"{kind}_test.py")}:
        return "the project would use this name for something else"
    return ""


def _names(template: str) -> Iterator[str]:
    """What a template imports and defines, beside the plugin."""
    for node in ast.walk(ast.parse(_template(template))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ({alias.asname or alias.name for alias in node.names} - {"MyPlugin"})
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in ("my_plugin", "MyPlugin"):
            yield node.name


def _check_free(module: str, kind: Kind) -> None:
    """A module, or a plugin, that hides another one breaks both."""
    spec = find_spec(module)
    if spec is not None and spec.origin is not None:
        raise UserError(f"there is a Python module '{module}' ({spec.origin}); choose another name")
    name = module.replace("_", "-") if kind == "command" else module
    offers = Catalog("command" if kind == "command" else "plugin").entries.get(name)
    if offers:
        raise UserError(f"{offers[0].distribution} {offers[0].version} offers '{name}'; choose another name")
