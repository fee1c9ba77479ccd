"""The reference, generated from the code: a plugin's options, and the events."""

from __future__ import annotations

import inspect
import json
from typing import Any

import attrs

from detkernel.bus import Bus
from detkernel.catalog import Catalog
from detkernel.config.dump import inline, plain
from detkernel.config.types import is_base, members, option_fields, option_type, short
from detkernel.errors import CatalogError
from detkernel.listing import table
from detkernel.local import source_of
from detkernel.plugin import is_plugin


def plugin_page(name: str, cls: type[Any]) -> str:
    """One plugin: what it does, its options as a table, the events it answers."""
    parts = [f"{name} ({source_of(cls.__module__)}:{cls.__qualname__})\n\n{inspect.getdoc(cls)}\n\n"]
    rows = list(option_rows(cls))
    if rows:
        parts.append(table(("option", "type", "default", "meaning"), rows, wrap=3))
    else:
        parts.append("It has no options.\n")
    answers = {key: getattr(inspect.getattr_static(cls, key), "detkernel_impl", None) for key in dir(cls)}
    events = {impl["specname"] or key for key, impl in answers.items() if impl is not None}
    if events:
        order = [event for event in Bus({}).event_names() if event in events]
        order += sorted(events - set(order))
        parts.append(f"\nanswers: {', '.join(order)} (priority {getattr(cls, 'priority', 'normal')})\n")
    return "".join(parts)


def option_rows(cls: type[Any], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of each option; those of nested groups follow, indented by their name."""
    rows: list[tuple[str, str, str, str]] = []
    for name, field in option_fields(cls).items():
        kind = option_type(cls, name)
        rows.append((prefix + name, short(kind), default_text(field), field.metadata["help"] + _bounds(field.metadata)))
        group = next((member for member in members(kind) if is_plugin(member) and not is_base(member)), None)
        if group is not None:
            rows.extend(option_rows(group, f"{prefix}{name}."))
    return rows


def default_text(field: attrs.Attribute[Any]) -> str:
    """An option's default as a config would write it; `required` where there is none."""
    if field.default is attrs.NOTHING:
        return "required"
    factory = isinstance(field.default, attrs.Factory)  # type: ignore[arg-type]
    value = field.default.factory() if factory else field.default  # type: ignore[union-attr]
    return inline(plain(value, _use))


def _use(cls: type[Any]) -> str:
    """The name that a config gives a part; its class's where it is not installed."""
    try:
        return Catalog().name_of(cls)
    except CatalogError:
        return cls.__name__


def event_list(bus: Bus, *, with_plugins: bool) -> str:
    """Every event in the order in which it fires: arguments, meaning, and who runs at it, in which order."""
    lines: list[str] = []
    for event in bus.event_names():
        spec = bus.spec(event)
        arguments = ", ".join(name for name in inspect.signature(spec).parameters if name != "self")
        lines.append(f"{event}({arguments})")
        implementations = bus.implementations(event)
        if not with_plugins:
            lines.extend(f"    {line}" for line in (inspect.getdoc(spec) or "").splitlines())
        elif not implementations:
            lines.append("    -")
        for number, impl in enumerate(implementations if with_plugins else (), start=1):
            cls = type(bus[impl.name])
            place = f"{impl.priority}, {impl.kind}" if impl.kind else impl.priority
            lines.append(f"    {number}. {impl.name:<20} {place:<20} {source_of(cls.__module__)}:{cls.__qualname__}")
    return "\n".join(lines) + "\n"


def _bounds(metadata: Any) -> str:
    words = {"at_least": "at least", "at_most": "at most", "above": "more than", "below": "less than"}
    found = [f"{text} {metadata[key]}" for key, text in words.items() if metadata.get(key) is not None]
    if metadata.get("choices"):
        found.append("one of " + ", ".join(json.dumps(choice) for choice in metadata["choices"]))
    return f" ({', '.join(found)})" if found else ""
