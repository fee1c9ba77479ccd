"""The whole way: from a file and overrides to the plugins of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from detkernel.catalog import Catalog
from detkernel.config.compose import compose
from detkernel.config.dump import plain
from detkernel.config.foreign import work_dir_problem
from detkernel.config.structure import Structurer
from detkernel.config.tree import Node, Plain, kind
from detkernel.errors import ConfigError, Problem, did_you_mean
from detkernel.plugin import PRIORITIES, Part, declared
from detkernel.run import RunOptions


@attrs.frozen
class Config:
    """A config, composed and structured."""

    plugins: Mapping[str, Any]
    """Config key -> plugin, in config order."""
    options: RunOptions
    priorities: Mapping[str, str]
    versions: Mapping[str, str]
    """Distribution -> version of every active plugin and part."""
    plain: dict[str, Any]
    """Every value, defaults filled in; running it gives the same run."""
    root: Node
    """The composed tree, with the places."""


def load(
    source: str | Path, overrides: Sequence[str] = (), catalog: Catalog | None = None, *, writes: bool = True
) -> Config:
    """Read, compose and structure a config. Raises `ConfigError` with every problem, each with its place.

    `source`: a file, or the folder of a run. `writes`: whether it is to be run, so that where a config from inside a
    checkpoint would write is looked at.
    """
    if (Path(source) / "config.yaml").is_file():  # the folder of a run
        overrides = (f"run.work_dir={json.dumps(str(source))}", *overrides)
        source = Path(source) / "config.yaml"
    root = compose(source, overrides)
    assert isinstance(root.value, dict)
    catalog = catalog or Catalog()
    structurer = Structurer(catalog, writes=writes)
    problems: list[Problem] = []
    plugins: dict[str, Any] = {}
    priorities: dict[str, str] = {}
    options = None
    for name, node in root.value.items():
        try:
            if name == "run":
                options = structurer.structure(node, RunOptions, "run")
                continue
            plugins[name] = structurer.plugin(name, node)
            if isinstance(plugins[name], Part):
                raise root.value[name].error(f"'{name}' is a part, not a plugin: it belongs inside another one", name)
            priority = node.child("priority")
            if priority is not None:
                priorities[name] = _priority(name, priority)
        except ConfigError as error:
            problems.extend(error.problems)
    if "run" not in root.value:
        message = "missing: how long to train, such as `run: {until: 12 epochs}`"
        problems.append(Problem(root.where, "run", message))
    if writes and options is not None:
        problem = work_dir_problem(root, options.work_dir)
        problems += [problem] if problem else []
    problems.extend(_unmet(plugins, root, catalog))
    if problems:
        raise ConfigError(problems)
    assert options is not None
    values: dict[str, Any] = {"run": plain(options, catalog.name_of)}
    for name, plugin in plugins.items():
        values[name] = plain(plugin, catalog.name_of)
        if name in priorities:
            values[name] |= {"priority": priorities[name]}
    return Config(plugins, options, priorities, _versions(catalog, values), values, root)


def _unmet(plugins: Mapping[str, Any], root: Node, catalog: Catalog) -> Iterator[Problem]:
    """A plugin may require others to be active, by their installed names, and need what others provide."""
    assert isinstance(root.value, dict)
    active = {plugin.__detkernel_origin__.use for plugin in plugins.values()}
    for name, plugin in plugins.items():
        for needed in declared(plugin).requires:
            if needed not in active:
                here = f"add `{needed}: {{}}` to the config"
                what = (
                    here if needed in catalog.entries else f"install it, and {here}; no installed plugin has that name"
                )
                yield Problem(root.value[name].where, name, f"requires the plugin '{needed}': {what}")
    provided = sorted({word for plugin in plugins.values() for word in declared(plugin).provides})
    for name, plugin in plugins.items():
        for needed in declared(plugin).needs if provided else ():
            if needed not in provided:
                message = f"needs '{needed}', which no active plugin provides{did_you_mean(needed, provided)}"
                yield Problem(root.value[name].where, name, message)


def _priority(name: str, node: Node) -> str:
    if not isinstance(node.value, str) or node.value not in PRIORITIES:
        near = did_you_mean(node.value, PRIORITIES) if isinstance(node.value, str) else ""
        message = f"expected one of {', '.join(PRIORITIES)}, got {kind(node)}{near if '?' in near else ''}"
        raise node.error(message, f"{name}.priority")
    return node.value


def _versions(catalog: Catalog, values: Plain) -> dict[str, str]:
    from detkernel import __version__

    found = {"detkernel-kernel": __version__}
    for name in _used(values):
        for entry in catalog.entries.get(name, []):
            found[entry.distribution] = entry.version
    return dict(sorted(found.items()))


def _used(values: Plain) -> Iterator[str]:
    """Every name after a `use`."""
    if isinstance(values, dict):
        if "use" in values:
            yield str(values["use"])
        for item in values.values():
            yield from _used(item)
    elif isinstance(values, list):
        for item in values:
            yield from _used(item)
