"""What the pages name in passing is there: commands and their options, plugins and theirs, extras, files, modules."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import click
import pytest
import yaml
from detkernel.catalog import Catalog
from detkernel.cli import cli
from detkernel.config.types import option_fields
from detkernel.listing import kinds
from detkernel.run import Run, RunOptions
from detkernel.scaffold import kinds as startable
from detkernel_data.download.published import SETS

from .pages import ROOT, blocks, commands, spans

TOP = click.Context(cli, info_name="detkernel")
STANDS_FOR = re.compile(r"[A-Z][A-Z_.]+\d?(=.*)?|\.\.\.|NAME|KEY=VALUE")
"""A word that the reader is to replace: CONFIG, RUN_DIR."""


def each(check: Callable[[str], str | None]) -> None:
    """Put every piece of code within sentences to a check, which says what is wrong with it."""
    wrong = [f"{place}: `{code}`: {said}" for place, code in spans() if (said := check(code))]
    assert not wrong, "\n".join(wrong)


def test_every_command_and_its_options_exist() -> None:
    each(lambda code: next((said for words in _detkernel(code) if (said := _unknown(words))), None))


def _detkernel(code: str) -> Iterator[list[str]]:
    """The words behind each `detkernel` of a line, whatever starts it."""
    if not re.search(r"\bdetkernel +[a-z]", code):
        return
    for words in commands(code):
        for place, word in enumerate(words[:-1]):
            if word in ("detkernel", ".venv/bin/detkernel") and (place == 0 or words[0] in ("srun", "torchrun")):
                yield words[place + 1 :]
                break


def _unknown(words: list[str]) -> str | None:
    name, *rest = words
    if STANDS_FOR.fullmatch(name) or name == "my-plugin":
        return None
    command = cli.get_command(TOP, name)
    if command is None:
        return f"there is no command {name}"
    context = click.Context(command, parent=TOP, info_name=name)
    try:
        given, _, _ = command.make_parser(context).parse_args([*rest])
    except click.UsageError as error:
        return error.format_message()
    for parameter in command.get_params(context):
        value = given.get(parameter.name or "")
        if isinstance(parameter.type, click.Choice) and value is not None:
            for one in value if isinstance(value, list) else [value]:
                if one not in parameter.type.choices and not STANDS_FOR.fullmatch(one):
                    return f"{one} is not one of {parameter.type.choices}"
    if name == "new-plugin" and given["kind"] not in (None, *startable()):
        return f"{given['kind']} is not one of {startable()}"
    arguments = [word for word in rest if not word.startswith("-") and not STANDS_FOR.fullmatch(word)]
    known = {"plugins": {"show", *kinds(), *_plugins()}, "download": {*SETS}}.get(name)
    if known is not None and {*arguments} - known:
        return f"does not know {arguments}"
    if name == "recipes" and arguments and not (ROOT / "configs" / f"{arguments[0]}.yaml").is_file():
        return f"there is no recipe {arguments[0]}"
    return None


@cache
def _plugins() -> dict[str, type[Any] | None]:
    """All that are installed, and those of the examples, which are not."""
    catalog = Catalog()
    examples: dict[str, None] = {path.parent.name: None for path in ROOT.glob("docs/examples/*/pyproject.toml")}
    for path in ROOT.glob("docs/examples/*/pyproject.toml"):
        examples |= dict.fromkeys(tomllib.loads(path.read_text())["project"]["entry-points"]["detkernel.plugins"])
    return {**examples, **{name: catalog.load(name) for name in catalog.entries}}


def test_every_config_within_a_sentence_names_plugins_and_options_that_exist() -> None:
    def check(code: str) -> str | None:
        if "{" not in code or code.startswith(("detkernel", "${", ".venv", "pip", "python")):
            return None
        try:
            value = yaml.safe_load(code)
        except yaml.YAMLError:
            return None
        return next(_wrong(value, ""), None) if isinstance(value, dict) else None

    each(check)


def _wrong(value: object, key: str) -> Iterator[str]:
    """What a part of a config, under a key, has that its plugin does not."""
    if isinstance(value, list):
        for one in value:
            yield from _wrong(one, "")
        return
    if not isinstance(value, dict):
        return
    name = value.get("use", key)
    known = _plugins()
    if isinstance(name, str) and re.fullmatch(r"[a-z_0-9]+", name):
        if "use" in value and name not in known:
            yield f"there is no plugin {name}"
        cls = RunOptions if name == "run" else known.get(name) if "use" in value or key else None
        if cls is not None:
            yield from (f"{name} has no option {option}" for option in value if not _takes(cls, option))
    for option, part in value.items():
        yield from _wrong(part, str(option))


def _takes(cls: type[Any], option: str) -> bool:
    return option in option_fields(cls) or option in ("use", "priority")


def test_every_dotted_option_exists() -> None:
    """`run.until`, `data.train.use`: of the keys whose plugin is always the same one, and groups below."""
    roots = {"run": RunOptions, "data": _plugins()["loader"], "checkpoint": _plugins()["checkpoint"]}
    roots |= {"device": _plugins()["device"], "log": _plugins()["log"]}

    def check(code: str) -> str | None:
        for root, option in re.findall(r"(?<![\w./])(run|data|checkpoint|device|log)\.(\w+)(?=[.=:]|$)", code):
            if option not in option_fields(roots[root]) and not _field(root, option):
                return f"{root} has no option {option}"
        return None

    each(check)


def _field(root: str, name: str) -> bool:
    """What is a file (`log.txt`) or an attribute of `Run` (`run.model`)."""
    known = {*dir(Run), *inspect.get_annotations(Run)} if root == "run" else set()
    return name in {*known, "py", "txt", "json", "jsonl", "yaml", "pt", "pth"}


def test_every_extra_environment_file_and_module_exists() -> None:
    extras = {}
    for path in ROOT.glob("*/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        extras[project["name"]] = {*project.get("optional-dependencies", {})}
    tox = (ROOT / "tox.ini").read_text()

    def check(code: str) -> str | None:
        for name, extra in re.findall(r"(detkernel-\w+)\[(\w+)\]", code):
            if extra not in extras[name]:
                return f"{name} has no extra {extra}"
        for name in re.findall(r"tox -e ([a-z]+)", code):
            if f"[testenv:{name}]" not in tox:
                return f"there is no environment {name}"
        file = re.fullmatch(r"(kernel|plugins|docs|tests|benchmarks|configs)/[\w./-]+", code)
        if file and not (ROOT / file[0]).exists():
            return "there is no such file"
        if match := re.fullmatch(r"(detkernel(?:_\w+)?(?:\.\w+)+)(\(.*\))?", code):
            return _unimportable(match[1])
        return None

    each(check)


def _unimportable(name: str) -> str | None:
    if name.rpartition(".")[2] in ("plugins", "commands", "configs", "recipes", "templates", "launchers"):
        return None  # groups of entry points
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return f"{value.__name__} has no {part}"
            value = getattr(value, part)
        return None
    return "there is no such module"


@pytest.mark.parametrize("text", blocks("toml"))
def test_entry_points_are_those_of_real_projects(text: str) -> None:
    """Each group is known; the class is in a block of the page, or the project is an example."""
    for group, points in tomllib.loads(text)["project"]["entry-points"].items():
        assert group in {"detkernel.plugins", "detkernel.commands", "detkernel.recipes", "detkernel.configs"}
        for name, target in points.items():
            module, _, cls = target.partition(":")
            sources = [path.read_text() for path in (ROOT / "docs/examples").glob(f"*/{module}.py")]
            sources += [str(param.values[0]) for param in blocks("python")]  # type: ignore[attr-defined]
            assert any(f"class {cls}" in source for source in sources), f"{name} = {target}"


@pytest.mark.parametrize("text", blocks("text", "json"))
def test_nothing_that_could_run_is_shown_as_text(text: str) -> None:
    """Such a block has what is printed: commands, code and configs have their language, and run."""
    for line in text.splitlines():
        runs = re.match(r"(\$ |\.venv/|(detkernel|pip|python3?|srun|git) \w|from \w+ import|import \w+$)", line)
        assert not runs, line
        assert not re.match(r"\w+: *\{", line), line
