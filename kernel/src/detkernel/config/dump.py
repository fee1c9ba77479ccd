"""From plugin objects back to text: YAML 1.2 that reads back as the same config."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detkernel.config.read import scalar
from detkernel.config.tree import Plain
from detkernel.config.types import option_fields
from detkernel.plugin import Part, is_plugin
from detkernel.span import Span

_PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./~+-][A-Za-z0-9_./+@ -]*(:[A-Za-z0-9_./+-]+)*")
WIDTH = 76


def plain(value: Any, name_of: Callable[[type], str]) -> Plain:
    """The plain values that a config would give for this object, every default filled in.

    `name_of` gives the plugin name of a class, for parts that are a default and so were named by no config.
    """
    if is_plugin(type(value)):
        origin = getattr(value, "__detkernel_origin__", None)
        use = origin.use if origin else name_of(type(value)) if isinstance(value, Part) else ""
        options = {name: plain(getattr(value, name), name_of) for name in option_fields(type(value))}
        return {"use": use, **options} if use else options
    if isinstance(value, (Path, Span)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, name_of) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, name_of) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"an option holds {value!r}, which no config can say")


def dump(value: Plain, note: Callable[[str], str] = lambda _path: "") -> str:
    """YAML text, block style, short lists and maps in one line. `note(path)` is put behind a line as a comment."""
    if not isinstance(value, dict):
        return inline(value) + "\n"
    rows = [row for key, item in value.items() for row in _rows(key, item, 0, key, note)]
    width = min(max((len(text) for text, _ in rows), default=0), 44)
    return "".join(_line(text, comment, width) for text, comment in rows)


def _line(text: str, comment: str, width: int) -> str:
    """A line with its comment behind it, or above it where both do not fit."""
    line = f"{text:<{width}}  # {comment}" if comment else text
    above = f"{text[: len(text) - len(text.lstrip())]}# {comment}\n{text}"
    return f"{line if len(line) <= WIDTH + 4 or not comment else above}\n"


def _rows(head: str, value: Plain, indent: int, path: str, note: Callable[[str], str]) -> list[tuple[str, str]]:
    pad = "  " * indent
    label = f"{pad}{_text(head)}:"
    if not isinstance(value, (dict, list)) or not value:
        return [(f"{label} {inline(value)}", note(path))]
    if isinstance(value, list):
        flat = all(not isinstance(item, (dict, list)) for item in value)
        nested = all(isinstance(item, list) and not any(isinstance(i, (dict, list)) for i in item) for item in value)
        if (flat or nested) and len(label) + len(inline(value)) < WIDTH:
            return [(f"{label} {inline(value)}", note(path))]
        return [
            (label, note(path)),
            *(row for i, item in enumerate(value) for row in _item(item, indent, f"{path}.{i}", note)),
        ]
    inner = [row for key, item in value.items() for row in _rows(key, item, indent + 1, f"{path}.{key}", note)]
    return [(label, ""), *inner]


def _item(value: Plain, indent: int, path: str, note: Callable[[str], str]) -> list[tuple[str, str]]:
    pad = "  " * indent
    if not isinstance(value, dict) or not value:
        return [(f"{pad}  - {inline(value)}", note(path))]
    rows = [row for key, item in value.items() for row in _rows(key, item, indent + 2, f"{path}.{key}", note)]
    return [(f"{pad}  - {rows[0][0].lstrip()}", rows[0][1]), *rows[1:]]


def inline(value: Plain) -> str:
    """A value in one line, flow style."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)}: {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(inline(item) for item in value) + "]"
    if isinstance(value, str):
        return _text(value.replace("${", "$${"))
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return repr(value)


def _text(value: str) -> str:
    """Text without quotes where it would read back as the same text, else as a JSON string."""
    safe = _PLAIN_TEXT.fullmatch(value) and scalar(value) == value and not value.endswith(" ") and value[0] not in "-~"
    if safe:
        return value
    # JSON leaves what YAML takes for a line break or refuses, and what a terminal obeys; YAML knows \u and \U
    return "".join(char if char.isprintable() else _escaped(char) for char in json.dumps(value, ensure_ascii=False))


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if char <= "\uffff" else f"\\U{ord(char):08x}"
