"""What is installed, by kind. On its own, so that `detkernel plugins` imports neither cattrs nor YAML."""

from __future__ import annotations

import re

from detkernel.catalog import Catalog
from detkernel.terminal import rows, styled

_HOOK = "hook"
"""The kind of a plugin that takes nobody's place and is no part of another."""


def plugin_list(kind: str = "") -> str:
    """What is installed, by kind and distribution, or of one kind alone: name and what it does. Imports no plugin."""
    catalog = Catalog()
    groups: dict[tuple[bool, str, str], list[tuple[str, str]]] = {}
    for name, offers in catalog.entries.items():
        for entry in offers:
            found, line = entry.describe()
            misfit = catalog.misfits.get(entry.distribution)
            line += " (CONFLICT: offered twice)" if len(offers) > 1 else ""
            line += f" (DOES NOT FIT: {misfit})" if misfit else ""
            group = (found[:1].isupper(), words(found), f"{entry.distribution} {entry.version}")
            groups.setdefault(group, []).append((name, line))
    if not groups:
        return "no plugins are installed; `pip install detkernel` brings the standard ones\n"
    listed = (
        f"{styled(found, bold=True)}, of {owner}\n{rows(plugins, '  ')}"
        for (_, found, owner), plugins in sorted(groups.items())
        if kind in ("", found)
    )
    return "\n".join(listed)


def kinds() -> set[str]:
    """Every kind that something installed is of."""
    return {words(entry.describe()[0]) for offers in Catalog().entries.values() for entry in offers}


def words(kind: str) -> str:
    """A kind as people say it: `ClassLoss` is a `class loss`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower() or _HOOK
