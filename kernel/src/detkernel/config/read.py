"""Strict YAML 1.2, with positions.

PyYAML parses, but its YAML 1.1 scalar rules (`1e-3` a string, `on` true, `010` eight) and its "last of two equal keys
wins" are not used: scalars follow the 1.2 core schema, a duplicate key is an error, and so is every tag, so that
reading a file can only ever give maps, lists, text, numbers, booleans and null. Text holds no NUL and no half of a
surrogate pair, since no path and no file can.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from detkernel.config.tree import Node, Scalar
from detkernel.errors import ConfigError, Problem, UserError, Where, as_typed, printable, relative
from detkernel.files import read_regular

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 50
LONGEST_NUMBER = 250
"""A longer one is text, so that every whole number fits a float and can be printed."""
_INT = re.compile(r"[-+]?[0-9]+")
_HEX_OCT = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}


UNUSABLE = re.compile("[\0\ud800-\udfff]")


class _Tagged(yaml.YAMLError):
    """A value with a tag, and where it stands."""

    def __init__(self, tag: str, mark: Any) -> None:
        name = tag.replace("tag:yaml.org,2002:", "!!")
        super().__init__(f"tags such as {name} are not allowed; write the value itself")
        self.mark = mark


class _TooManyError(Exception):
    """More values than any honest config has."""


class _Loader(yaml.SafeLoader):
    """Resolves nothing: every plain scalar arrives as a string. A tag on anything, a key too, raises `_Tagged`."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._count += 1
        if self._count > 2 * MAX_NODES:  # keys count here: more cannot pass the check that aliases must pass, too
            raise _TooManyError
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _Tagged(tag, event.start_mark)
        return super().compose_node(parent, index)


def scalar(text: str) -> Scalar:
    """The value of a plain (unquoted) scalar by the YAML 1.2 core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > LONGEST_NUMBER:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _HEX_OCT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def read_file(path: Path) -> Node:
    """Read a config file. Raises `ConfigError` with the place, or `UserError` when there is no such file."""
    return parse_file(path, file_text(path))


def file_text(path: Path) -> str:
    """The text of a config file. Raises `UserError` when it cannot be read, or is far too large."""
    try:
        return read_regular(path, MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{relative(path)}: no such file{_neighbours(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{relative(path)}: is a folder, expected a config file{_neighbours(path / 'x')}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{relative(path)}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{relative(path)}: cannot be read: {error.strerror}") from None


def parse_file(path: Path, text: str) -> Node:
    """The config in the text of a file."""
    root = read_text(text, as_typed(path))
    if root.value is None:
        raise root.error("the config is empty")
    return root


def read_text(text: str, name: str) -> Node:
    """Read YAML text, null if there is nothing in it; `name` is what messages call the file."""
    lines = text.splitlines()
    try:
        root = yaml.compose(text, Loader=_Loader)
        return Node(None, Where(name, 1, 1)) if root is None else _Converter(name, lines).convert(root)
    except _Tagged as error:
        raise ConfigError([Problem(_where(name, lines, error.mark), "", str(error))]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _where(name, lines, mark) if mark else Where(name)
        message = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([Problem(where, "", f"not valid YAML: {message}{_yaml_hint(message, where.text)}")]) from None
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: the character U+{error.character:04X} may not stand in a config"
        raise ConfigError([Problem(_place(name, text, error.position), "", message)]) from None
    except _TooManyError:
        raise ConfigError([Problem(Where(name), "", f"more than {MAX_NODES} values")]) from None
    except RecursionError:
        raise ConfigError([Problem(Where(name), "", "nested too deeply")]) from None


class _Converter:
    """PyYAML's nodes into ours, with limits that no honest config meets."""

    def __init__(self, name: str, lines: list[str]) -> None:
        self.name, self.lines = name, lines
        self.count = 0

    def convert(self, node: yaml.Node, depth: int = 0) -> Node:
        self.count += 1
        where = _where(self.name, self.lines, node.start_mark)
        if self.count > MAX_NODES:
            raise ConfigError([Problem(where, "", f"more than {MAX_NODES} values (aliases count each time)")])
        if depth > MAX_DEPTH:
            raise ConfigError([Problem(where, "", f"nested more than {MAX_DEPTH} deep")])
        if isinstance(node, yaml.ScalarNode):
            self._check_text(node, where)
            plain = node.style is None
            return Node(scalar(node.value) if plain else node.value, where, quoted=not plain)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(item, depth + 1) for item in node.value], where)
        return self._map(node, where, depth)

    def _map(self, node: yaml.Node, where: Where, depth: int) -> Node:
        values: dict[str, Node] = {}
        keys: dict[str, Where] = {}
        for key_node, value_node in node.value:
            key, place = self._key(key_node)
            if key in values:
                message = f"'{printable(key)}' is given twice (first in line {keys[key].line})"
                raise ConfigError([Problem(place, "", message)])
            keys[key] = place
            values[key] = self.convert(value_node, depth + 1)
        return Node(values, where, keys)

    def _key(self, node: yaml.Node) -> tuple[str, Where]:
        place = _where(self.name, self.lines, node.start_mark)
        if not isinstance(node, yaml.ScalarNode) or (node.style is None and not isinstance(scalar(node.value), str)):
            raise ConfigError([Problem(place, "", "a key must be text; put it in quotes if it is meant as one")])
        if node.value == "<<" and node.style is None:
            raise ConfigError([Problem(place, "", "merge keys (<<) are not YAML 1.2; use `base:` to build on a file")])
        self._check_text(node, place)
        return node.value, place

    @staticmethod
    def _check_text(node: yaml.ScalarNode, where: Where) -> None:
        found = UNUSABLE.search(node.value)
        if found:
            hint = "" if found[0] == "\0" else "; a character past U+FFFF is written as in \\U0001F600"
            raise ConfigError([Problem(where, "", f"text may not hold the character U+{ord(found[0]):04X}{hint}")])


def _place(name: str, text: str, position: int) -> Where:
    """The place of a character that ends the reading; its line is not shown, since it cannot be printed."""
    lines = f"{text[:position]}^".splitlines()
    return Where(name, len(lines), len(lines[-1]))


def _where(name: str, lines: list[str], mark: yaml.Mark) -> Where:
    text = lines[mark.line].rstrip() if mark.line < len(lines) else ""
    return Where(name, mark.line + 1, mark.column + 1, text)


def _yaml_hint(message: str, line: str) -> str:
    if "got '{'" in message and "${" in line:
        return " (between { } or [ ], YAML takes no ${...}; give this option a line of its own)"
    if "\\t" in message or "'\t'" in message:
        return " (indent with spaces, not tabs)"
    if "mapping values are not allowed" in message:
        return " (wrong indentation, or a second ': ' in one line: put its text in quotes)"
    return ""


def _neighbours(path: Path) -> str:
    """`, did you mean 'configs/b.yaml'?`, `; its folder has a.yaml, b.yaml`, or what of the path does not exist."""
    import difflib  # here, since only a mistake needs it

    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {relative(folder)})"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    near = difflib.get_close_matches(path.stem, {Path(name).stem: name for name in names}, n=1)
    if near:
        meant = next(name for name in names if Path(name).stem == near[0])
        return f", did you mean '{relative(folder / meant)}'?"
    shown = sorted(map(printable, names))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; its folder has {', '.join(shown[:8])}{more}" if names else ""
