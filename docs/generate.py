"""mkdocs hook: the reference pages, generated from the installed plugins, so that they cannot fall behind the code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from detkernel.bus import Bus
from detkernel.catalog import Catalog
from detkernel.plugin import Part
from detkernel.reference import option_rows, usage


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, lines in (
        ("reference/events.md", events()),
        ("reference/plugins.md", catalog_page(parts=False)),
        ("reference/parts.md", catalog_page(parts=True)),
    ):
        files.append(File.generated(config, path, content="\n".join(lines) + "\n"))
    return files


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
    """Every installed plugin (or part) with its options."""
    yield "# Parts\n" if parts else "# Plugins\n"
    catalog = Catalog()
    for name in catalog.entries:
        cls = catalog.load(name)
        if issubclass(cls, Part) != parts:
            continue
        what, _, example = usage(name, cls).partition(": ")
        yield f"## {name}\n\n{inspect.getdoc(cls)}\n\n{what[0].upper()}{what[1:]}: `{example}`\n"
        rows = [[_cell(text) for text in row] for row in option_rows(cls)]
        if rows:
            yield "| option | type | default | meaning |\n|---|---|---|---|"
            for option, kind, default, meaning in rows:
                yield f"| `{option}` | `{kind}` | `{default}` | {meaning} |"
            yield ""
        yield f"From `{catalog.find(name).distribution}`.\n"


def _cell(text: str) -> str:
    """Markdown shows the backslash that would keep a bar from ending the cell."""
    return text.replace(" | ", " or ").replace("|", "/").replace("\n", " ")
