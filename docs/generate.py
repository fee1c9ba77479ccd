"""mkdocs hook: the reference and the pages of the roles, made of what is installed and of the recipes,
so that they cannot fall behind the code."""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import yaml
from detkernel.bus import Bus
from detkernel.catalog import Catalog
from detkernel.cli import cli
from detkernel.listing import words
from detkernel.plugin import Part
from detkernel.reference import option_rows, usage
from detkernel.run import RunOptions

ROOT = Path(__file__).parent.parent
ROLES = {
    "hook": "A hook answers events of the loop: it logs, stops, changes weights, or does anything at its time.",
    "model": "A model plugin builds a `torch.nn.Module` and says what a step of training and of validation is.",
    "dataset": "A data set says how many images there are, and has the pixels and annotations of each.",
    "transform": "A transform changes a sample (image, boxes, masks, keypoints) in the loader's workers.",
    "evaluator": "An evaluator hears detections, and publishes metrics, each with the direction that is better.",
    "command": "A command is a click command that `detkernel NAME` runs. It is imported only when it is called.",
}
STATUSES = {
    0: "all went well",
    1: "a bug: a traceback that names the plugin, the event and the iteration",
    2: "a mistake that you can fix: one message that says where, what was found, what was expected, and what to do",
    75: "the run was told to stop (a signal, `max_time`) and is saved: the same command goes on",
    130: "interrupted at once, by a second Ctrl-C or where nothing was running",
    141: "who read the output went away, such as `head`",
}
"""What `detkernel` ends with."""
API = [
    "run",
    "loop",
    "plugin",
    "span",
    "metrics",
    "errors",
    "processes",
    "files",
    "launchers",
    "scaffold",
    "testing",
    "terminal",
]
"""The kernel's modules that plugins and programs use."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    pages = {
        "reference/events.md": events(),
        "reference/cli.md": cli_page(),
        "reference/run.md": run_page(),
        "reference/plugins.md": catalog_page(parts=False),
        "reference/parts.md": catalog_page(parts=True),
        "reference/api.md": library_page("detkernel", API),
        "reference/detection.md": library_page("detkernel_detection"),
        "reference/detectors.md": library_page("detkernel_detectors"),
        "catalogue.md": catalogue_page(),
        **{f"extend/{kind}.md": role_page(kind, what) for kind, what in ROLES.items()},
        **{f"packages/{path.parent.name}.md": [readme(path)] for path in sorted(ROOT.glob("plugins/*/README.md"))},
    }
    for path, lines in pages.items():
        files.append(File.generated(config, path, content="\n".join(lines) + "\n"))
    return files


def on_config(config: Any) -> Any:
    """Where the repository is published, the pages link to it."""
    config.extra["version"] = version("detkernel-kernel")
    if address := os.environ.get("DETKERNEL_REPOSITORY"):
        config.repo_url = address
    return config


def cli_page() -> Iterator[str]:
    """The help of every command, and what the exit statuses mean."""
    yield "# The command line\n\n| exit status | what it means |\n|---|---|"
    yield from (f"| `{status}` | {what} |" for status, what in STATUSES.items())
    yield "\nOutput has 80 columns, or the terminal's; `COLUMNS=120` sets them, `NO_COLOR=1` takes colours off.\n"
    width = {"max_content_width": 80, "terminal_width": 80}
    top = click.Context(cli, info_name="detkernel", **{**cli.context_settings, **width})
    yield f"```text\n{cli.get_help(top)}\n```\n"
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        assert command is not None
        page = click.Context(command, parent=top, info_name=name, **width)
        yield f"## detkernel {name}\n\n```text\n{command.get_help(page)}\n```\n"


def run_page() -> Iterator[str]:
    """The options of `run:`."""
    yield "# The options of `run:`\n\nThe only key of a config that is not a plugin, beside `base`.\n"
    yield from _options(RunOptions)
    yield "How a config is written, and what may stand in it: [the config language](../config.md).\n"


def catalogue_page() -> Iterator[str]:
    """Plugins outside of the tree, from `catalogue.yaml`."""
    known = yaml.safe_load((ROOT / "docs/catalogue.yaml").read_text(encoding="utf-8"))
    yield "# Plugins outside of the tree\n"
    yield (
        "Distributions that others maintain, and the [examples](examples.md) of the documentation, which are "
        "distributions as yours would be. The status says which contracts of `detkernel.testing` its tests run, "
        "and with which version they passed last. To be listed, add three lines to `docs/catalogue.yaml`; how a plugin "
        "is tested and given away is in [Ship a plugin](shipping.md).\n"
    )
    yield "| distribution | what it does | contract status |\n|---|---|---|"
    for entry in known:
        name = f"[`{entry['name']}`]({entry['link']})" if entry.get("link") else f"`{entry['name']}`"
        yield f"| {name} | {_cell(entry['what'])} | {_cell(entry['status'])} |"
    yield ""


def role_page(kind: str, what: str) -> Iterator[str]:
    """A plugin of a kind and its test, as `detkernel new-plugin` writes them; the tests install and run each."""
    template = Catalog("template").load_object(kind)
    module, test = template.files()
    title = {"dataset": "a data set", "evaluator": "an evaluator"}.get(kind, f"a {kind}")
    yield f"# Write {title}\n\n{what}\n"
    yield f"```sh\ndetkernel new-plugin my-plugin --kind {kind}\n```\n"
    yield "writes a project that is complete, with this module:\n"
    yield f'```python title="my_plugin.py"\n{module.rstrip()}\n```\n\nand this test:\n'
    yield f'```python title="test_my_plugin.py"\n{test.rstrip()}\n```\n'
    if template.config:
        yield f"In a config:\n\n```yaml\n{template.config}\n```\n"
    yield (
        "`cd my-plugin && pip install -e .[test] && pytest` installs it and runs the test. What all plugins share "
        "(options, events, state, several processes) is in [Write a plugin](../plugins.md), how to give it away in "
        "[Ship a plugin](../shipping.md).\n"
    )


def readme(path: Path) -> str:
    """The README of a package, and where its options are; links to other files of the repository become plain text."""
    text = re.sub(r"\]\((?:\.\./)+docs/([\w/]+\.md(?:#[\w-]+)?)\)", r"](<../\1>)", path.read_text(encoding="utf-8"))
    text = re.sub(r"\[([^\]]+)\]\((?!https?:|#|<)[^)]+\)", r"\1", text)
    return (
        f"{text}\nEvery option is in the reference: [plugins](../reference/plugins.md), "
        "[parts](../reference/parts.md), [commands](../reference/cli.md).\n"
    )


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
    """Every installed plugin (or part) with its options, by kind."""
    yield "# Parts\n" if parts else "# Plugins\n"
    catalog = Catalog()
    kinds: dict[str, list[str]] = {}
    for name in catalog.entries:
        if issubclass(catalog.load(name), Part) == parts:
            kinds.setdefault(words(catalog.find(name).describe()[0]), []).append(name)
    yield " · ".join(f"[{kind}](#{kind.replace(' ', '-')})" for kind in sorted(kinds)) + "\n"
    for kind, names in sorted(kinds.items()):
        yield f"## {kind}\n"
        for name in names:
            cls = catalog.load(name)
            what, _, example = usage(name, cls).partition(": ")
            yield f"### {name}\n\n{_linked(inspect.getdoc(cls) or '')}\n\n{what[0].upper()}{what[1:]}: `{example}`\n"
            yield from _options(cls)
            yield f"From `{catalog.find(name).distribution}`.\n"


def _options(cls: type[Any]) -> Iterator[str]:
    """A table of options, where there are any."""
    rows = [[_cell(text) for text in row] for row in option_rows(cls)]
    if rows:
        yield "| option | type | default | meaning |\n|---|---|---|---|"
        yield from (f"| `{option}` | `{kind}` | `{default}` | {meaning} |" for option, kind, default, meaning in rows)
        yield ""


def library_page(package: str, only: list[str] | None = None) -> Iterator[str]:
    """The public classes, functions and constants of every module of a package, or of some, read from its source."""
    yield f"# The library `{package}`\n"
    users = "and programs use of the kernel" if only else "import beside the kernel"
    yield f"What plugins {users}. Names that begin with an underscore may change without notice.\n"
    for name in sorted(module.name for module in pkgutil.walk_packages(_paths(package), f"{package}.")):
        if only is not None and name.removeprefix(f"{package}.").partition(".")[0] not in only:
            continue
        found = find_spec(name)
        tree = ast.parse(Path(str(found and found.origin)).read_text(encoding="utf-8"))
        entries = [line for node, doc in _documented(tree.body) for line in _entry(node, doc)]
        if entries:
            paragraphs = inspect.cleandoc(ast.get_docstring(tree) or "").split("\n\n")
            drawn = [
                f"```text\n{text}\n```" if "└──" in text else text for text in paragraphs
            ]  # a tree keeps its lines
            yield f"## {name}\n\n" + _linked("\n\n".join(drawn)) + "\n"
            yield from entries


def _linked(text: str) -> str:
    """Addresses in sentences are links."""
    return re.sub(r"(?<![<(\[`\"'])https?://[^\s,;)`>]*[^\s,;).:`>]", r"<\g<0>>", text)


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
            yield f"Based on {' and '.join(f'`{ast.unparse(base)}`' for base in node.bases)}.\n"
        yield f"{_linked(doc)}\n"
        yield from (f"- {_shown(member)}: {' '.join(text.split())}" for member, text in _documented(node.body))
        yield ""
    else:
        heading = f"def {node.name}" if isinstance(node, ast.FunctionDef) else ast.unparse(_target(node))
        yield f"### {heading}\n\n{_shown(node)}\n\n{_linked(doc)}\n"


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
