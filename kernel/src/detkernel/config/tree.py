"""A config as read: values with the places where they were written."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import attrs

from detkernel.errors import ConfigError, Problem, Where, printable

LONGEST = 80
"""Characters of a text that a message repeats."""
Scalar: TypeAlias = "bool | int | float | str | None"
Plain: TypeAlias = "Scalar | list[Plain] | dict[str, Plain]"


@attrs.frozen(eq=False)
class Node:
    """A scalar, a list or a map. `keys` holds where each key of a map was written."""

    value: Scalar | list[Node] | dict[str, Node]
    where: Where
    keys: dict[str, Where] = attrs.field(factory=dict)
    quoted: bool = False
    """A string in quotes stays a string, whatever is interpolated into it."""
    over: Node | None = None
    """The text that this map was merged over: the `use` of a part that was written as only its name."""

    def plain(self) -> Plain:
        """The value without its places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def child(self, key: str) -> Node | None:
        """The value of a key, if this is a map that has it."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def error(self, message: str, path: str = "") -> ConfigError:
        """A mistake at this place."""
        return ConfigError([Problem(self.where, path, printable(message))])


def kind(node: Node) -> str:
    """What a user calls this value, for messages: `the number 3`, `a map`."""
    value = node.value
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= LONGEST else value[: LONGEST - 3] + '...'}'"
    return "a list" if isinstance(value, list) else "a map"


def folder_of(where: Where) -> Path:
    """The folder that paths at this place are relative to: that of their file, else the current one."""
    file = Path(where.file)
    return file.resolve().parent if file.is_file() else Path.cwd()
