"""The reference, generated from the code: a plugin's options, and the events."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

import attrs

from detkernel import hookspecs
from detkernel.bus import Bus
from detkernel.catalog import Catalog, Entry
from detkernel.config.dump import inline, plain
from detkernel.config.types import default_of, is_base, members, option_fields, option_type, short
from detkernel.errors import CatalogError
from detkernel.listing import words
from detkernel.local import source_of
from detkernel.plugin import PROJECT, Part, declared, is_plugin, published
from detkernel.terminal import reflowed, styled, wrapped


def plugin_page(name: str, cls: type[Any], entry: Entry | None = None) -> str:
    """One plugin: what it does, its options below each other, the events it answers and publishes."""
    owner = f", {entry.distribution} {entry.version}" if entry else ""
    parts = [
        wrapped(f"{name} ({source_of(cls.__module__)}:{cls.__qualname__}{owner})", "  ", ""),
        reflowed(inspect.getdoc(cls) or ""),
        wrapped(usage(name, cls), "  ", ""),
        "\n".join(_option(*row) for row in option_rows(cls)) or "It has no options.",
    ]
    events = _answered(cls)
    if events:
        order = [event for event in Bus({}).event_names() if event in events]
        order += sorted(events.difference(order))
        parts.append(wrapped(f"answers: {', '.join(order)} (priority {declared(cls).priority})", "  ", ""))
    parts += [f"requires the plugin '{needed}'" for needed in declared(cls).requires]
    parts += [f"publishes {_entry(spec)}".rstrip() for spec in published(cls).values()]
    return "\n\n".join(parts) + "\n"


def _option(name: str, kind: str, default: str, meaning: str) -> str:
    """`name: type = default` (or `, required`), and the meaning below it."""
    given = ", required" if default == "required" else f" = {default}"
    head = wrapped(f"{name}: {kind}{given}", "      ", "  ")
    return f"{head.replace(name, styled(name, bold=True), 1)}\n{wrapped(meaning, '      ')}"


def _answered(cls: type[Any]) -> set[str]:
    """The events that a class answers: a method may have a name of its own and give the event's to `specname`."""
    found = ((key, getattr(inspect.getattr_static(cls, key), f"{PROJECT}_impl", None)) for key in dir(cls))
    return {options["specname"] or key for key, options in found if options is not None}


def usage(name: str, cls: type[Any]) -> str:
    """How a config names it, with the options that it must give: `in a config: max_time: {limit: ...}`.

    What takes the place of others has their key: `in a config: optimizer: {use: adam, lr: ...}`.
    """
    given = [f"{option}: ..." for option, field in option_fields(cls).items() if field.default is attrs.NOTHING]
    used = f"{{{', '.join([f'use: {name}', *given])}}}"
    kinds = [base.__name__ for base in cls.__mro__ if is_base(base) and base is not Part]
    if kinds:
        kind = words(kinds[-1])
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}; in a config, where one is expected: {used}"
    key = declared(cls).key
    if not isinstance(key, str):
        key = name if name.isidentifier() else "mine"
    return f"in a config: {key}: {{{', '.join(given)}}}" if key == name else f"in a config: {key}: {used}"


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
    return inline(plain(default_of(field), _use))


@cache  # to look through everything that is installed takes hundredths of a second, and a page has dozens of parts
def _use(cls: type[Any]) -> str:
    """The name that a config gives a part; its class's where it is not installed."""
    try:
        return Catalog().name_of(cls)
    except CatalogError:
        return cls.__name__


def loop_text(event: str = "") -> str:
    """The loop as pseudo-code, every event in its place; an arrow points to one of them."""
    lines = textwrap.dedent((inspect.getdoc(hookspecs) or "").split("\n\n")[1]).splitlines()
    return "".join(f"{'-> ' if event and line.strip().startswith(f'{event}(') else '   '}{line}\n" for line in lines)


def event_list(bus: Bus, *, with_plugins: bool) -> str:
    """Every event in the order in which it fires: either what it is, or who runs at it, in which order."""
    if with_plugins:
        return "".join(_answers(bus, event) for event in bus.event_names())
    return loop_text() + "".join(f"\n{_entry(bus.spec(event))}" for event in bus.event_names())


def event_page(event: str, bus: Bus | None = None) -> str:
    """One event: its place in the loop if it is the kernel's, its arguments and result, what it is for, an example.

    With the bus of a config, who answers the event there.
    """
    known = bus or Bus({})
    place = f"{loop_text(event)}\n" if event in vars(hookspecs.Events) else ""
    return f"{place}{_entry(known.spec(event))}" + (f"\n{_answers(bus, event)}" if bus else "")


def published_page(event: str, publishers: Mapping[str, type[Any]]) -> str:
    """An event of plugins: its arguments and result, what it is for, and which installed plugins publish it."""
    spec = published(next(iter(publishers.values())))[event]
    return f"{_entry(spec)}\npublished by: {', '.join(publishers)}\n"


def signature(spec: Any) -> str:
    """`build_loader(run: Run, mode: Mode) -> Loader | None`, with a note where only the first result counts."""
    found = inspect.signature(spec)
    named = [parameter for name, parameter in found.parameters.items() if name != "self"]
    text = ", ".join(f"{item.name}: {_annotation(item.annotation)}" for item in named)
    only = ", the first that is not None" if getattr(spec, f"{PROJECT}_spec")["firstresult"] else ""
    return f"{spec.__name__}({text}) -> {_annotation(found.return_annotation)}{only}"


def _annotation(annotation: Any) -> str:
    if annotation is inspect.Signature.empty:
        return "Any"
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _entry(spec: Any) -> str:
    """An event: its arguments and result, and below them what it is for."""
    text = reflowed(inspect.getdoc(spec) or "", "    ")
    return f"{wrapped(signature(spec), '        ', '')}\n{text}\n"


def _answers(bus: Bus, event: str) -> str:
    """An event and who runs at it: name, priority, package and class."""
    arguments = ", ".join(name for name in inspect.signature(bus.spec(event)).parameters if name != "self")
    lines = [f"{event}({arguments})"]
    width = max(map(len, bus.plugins), default=0)
    found = bus.implementations(event)
    places = [f"{impl.priority}, {impl.kind}" if impl.kind else impl.priority for impl in found]
    column = max((18, *map(len, places)))
    for number, (impl, place) in enumerate(zip(found, places, strict=True), start=1):
        cls = type(bus[impl.name])
        source = source_of(cls.__module__)
        package = source.partition(".")[0] if source == cls.__module__ else source
        row = f"{number:>2}. {impl.name:<{width}}  {place:<{column}}  {package}:{cls.__qualname__}"
        lines.append(wrapped(row, "      ", "  "))
    return "\n".join(lines if len(lines) > 1 else [*lines, "   -"]) + "\n"


def _bounds(metadata: Any) -> str:
    words = {"at_least": "at least", "at_most": "at most", "above": "more than", "below": "less than"}
    found = [f"{text} {metadata[key]}" for key, text in words.items() if metadata.get(key) is not None]
    if metadata.get("choices"):
        found.append("one of " + ", ".join(json.dumps(choice) for choice in metadata["choices"]))
    return f" ({', '.join(found)})" if found else ""
