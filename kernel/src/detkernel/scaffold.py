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

import attrs

from detkernel.catalog import Catalog
from detkernel.errors import UserError, did_you_mean, relative
from detkernel.files import write_atomic
from detkernel.plugin import RESERVED


@attrs.frozen
class Template:
    """What a plugin of one kind starts from; offered by an entry point of `detkernel.templates`, named as the kind.

    The files are `KIND.py.txt` and `KIND_test.py.txt`, in which `my_plugin`, `my-plugin` and `MyPlugin` stand for the
    plugin's name.
    """

    package: str
    """Where the two files lie."""
    kind: str
    config: str = ""
    """A config that uses the plugin, for the README; empty for a command."""
    needs: tuple[str, ...] = ()
    """Requirements beside the kernel."""

    @property
    def is_command(self) -> bool:
        return not self.config

    def files(self) -> tuple[str, str]:
        """The text of the module and of its test."""
        return _text(self.package, f"{self.kind}.py"), _text(self.package, f"{self.kind}_test.py")


HOOK = Template("detkernel.templates", "hook", "my_plugin: {threshold: 0.2}")
COMMAND = Template("detkernel.templates", "command", needs=("click>=8.1",))

_ELSEWHERE = dict.fromkeys(("dataset", "evaluator", "model", "transform"), "detkernel-detection")
"""Kinds of the standard distributions, for who has the kernel alone."""


def kinds() -> list[str]:
    """The kinds of plugin that `new-plugin` can start, of all installed distributions. Imports none of them."""
    return list(Catalog("template").entries)


def template(kind: str) -> Template:
    """The template of a kind. Raises `UserError` for one that is not installed, and says which distribution has it."""
    if kind not in kinds() and kind in _ELSEWHERE:
        raise UserError(
            f"--kind: '{kind}' comes with {_ELSEWHERE[kind]}, which is not installed: pip install {_ELSEWHERE[kind]}"
        )
    if kind not in kinds():
        raise UserError(f"--kind: there is no kind '{kind}'{did_you_mean(kind, kinds())}")
    found: Template = Catalog("template").load_object(kind)
    return found


def new_plugin(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the project into `folder/NAME`; return its files.

    Raises `UserError` for a kind that is not installed, and for a name or a folder in use.
    """
    source = template(kind)
    words = [word for word in re.split(r"[-_ .]+", name.lower()) if word]
    module = "_".join(words)
    if not re.fullmatch("[a-z][a-z0-9_]*", module):
        raise UserError(f"'{name}': expected a name of letters, digits and dashes, such as my-plugin")
    reason = _unusable(module, "".join(map(str.capitalize, words)), source)
    if reason:
        raise UserError(f"'{name}': {reason}; choose another name")
    _check_free(module, source)
    root = folder / "-".join(words)
    if root.is_file():
        raise UserError(f"{relative(root)} is a file; choose another name, or remove it")
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{relative(root)} exists and is not empty; choose another name, or remove it")
    names = {"my_plugin": module, "my-plugin": "-".join(words), "MyPlugin": "".join(map(str.capitalize, words))}
    needs = "".join(f', "{need}"' for need in source.needs)
    command = source.is_command
    usage = f"In a config:\n\n```yaml\n{source.config}\n```"
    fields = {
        "@needs@": needs,
        "@group@": "commands" if command else "plugins",
        "@object@": "my_plugin" if command else "MyPlugin",
        "@kind@": kind,
        "@listed@": "--help" if command else "plugins",
        "@usage@": "Then `detkernel my-plugin runs/mine` lists the checkpoints of a run." if command else usage,
    }
    code, test = source.files()
    written = []
    for target, text in (
        ("pyproject.toml", _text("detkernel.templates", "pyproject.toml")),
        ("README.md", _text("detkernel.templates", "README.md")),
        ("my_plugin.py", code),
        ("test_my_plugin.py", test),
    ):
        for mark, value in {**fields, **names}.items():
            text = text.replace(mark, value)
        if command and target == "pyproject.toml":
            text = text.replace(f"\n{module} = ", f"\n{'-'.join(words)} = ")  # commands are written with dashes
        path = root / target.replace("my_plugin", module)
        write_atomic(path, text)
        written.append(path)
    return written


def _text(package: str, name: str) -> str:
    return (files(package) / f"{name}.txt").read_text(encoding="utf-8")


def _unusable(module: str, cls: str, source: Template) -> str:
    """Why a project of this name would not work, if so."""
    from detkernel.cli import cli

    made = module if source.is_command else cls
    if keyword.iskeyword(module):
        return f"{module} is a Python keyword"
    if source.is_command and module.replace("_", "-") in cli.commands:
        return "the kernel has a command of this name"
    if not source.is_command and module in (*RESERVED, "run", "base", "null", "true", "false", "none"):
        return "a config gives this word a meaning of its own"
    if module.startswith("test_") or cls.startswith("Test"):
        return "pytest takes what begins with 'test' for tests"
    if hasattr(builtins, made):
        return f"{made} is a name of Python's own"
    if {module, made} & {name for text in source.files() for name in _names(text)}:
        return "the project would use this name for something else"
    return ""


def _names(text: str) -> Iterator[str]:
    """What a module imports and defines, beside the plugin."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ({alias.asname or alias.name for alias in node.names} - {"MyPlugin"})
        elif isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in ("my_plugin", "MyPlugin"):
            yield node.name


def _check_free(module: str, source: Template) -> None:
    """A module, or a plugin, that hides another one breaks both."""
    spec = find_spec(module)
    if spec is not None and spec.origin is not None:
        raise UserError(f"there is a Python module '{module}' ({spec.origin}); choose another name")
    name = module.replace("_", "-") if source.is_command else module
    offers = Catalog("command" if source.is_command else "plugin").entries.get(name)
    if offers:
        raise UserError(f"{offers[0].distribution} {offers[0].version} offers '{name}'; choose another name")
