"""What a run is made of, and how two runs differ in what their result follows from."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from detkernel import Part, Run, declared
from detkernel.config.dump import plain
from detkernel.local import file_of
from detkernel.plugin import is_plugin

_NEUTRAL = ("run.work_dir",)
_ABSENT = "(absent)"


def provenance(run: Run) -> dict[str, Any]:
    """The config, data, processes and versions of a run: plain values, for its checkpoints."""
    return {
        "config": dict(run.config) or _described(run),
        "neutral": sorted({*_NEUTRAL, *neutral(run.bus.plugins)}),
        "classes": list(run.classes),
        "data": {mode: loader.dataset.fingerprint() for mode, loader in run.loaders.items()},
        "files": dict(_files(run)),
        "processes": run.world_size,
        "versions": {"torch": torch.__version__, **run.versions},
        "machine": _machine(run),
    }


def _files(run: Run) -> Iterator[tuple[str, str]]:
    """The local files that plugins come from, and what is in them, but for those from which no result follows."""
    for _, part in _parts(run.bus.plugins, ""):
        file = file_of(type(part).__module__)
        if file and "*" not in declared(part).resume_neutral:
            yield file, hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _machine(run: Run) -> str:
    """What rounding follows from, beside the versions."""
    device = torch.device(run.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name}), {torch.get_num_threads()} threads"


def _described(run: Run) -> dict[str, Any]:
    """The config that a run built in Python would have."""
    parts = {name: {"use": type(part).__qualname__, **_plain(part)} for name, part in run.bus.plugins.items()}
    return {"run": _plain(run.options), **parts}


def _plain(part: Any) -> dict[str, Any]:
    """A plugin's options; one that holds what no config could say counts by its type."""
    found = {}
    for field in attrs.fields(type(part)):
        if field.init:
            value = getattr(part, field.name)
            try:
                found[field.name] = plain(value, lambda cls: cls.__qualname__)
            except TypeError:
                found[field.name] = type(value).__qualname__
    return found


def neutral(plugins: Mapping[str, object]) -> Iterator[str]:
    """The paths of the options that say themselves that no result follows from them."""
    for path, part in _parts(plugins, ""):
        for name in declared(part).resume_neutral:
            yield path if name == "*" else f"{path}.{name}"


def _parts(value: Any, path: str) -> Iterator[tuple[str, object]]:
    """Every plugin, part and group of options, with its path."""
    if is_plugin(type(value)) or isinstance(value, Part):
        yield path, value
        items: Any = ((field.name, getattr(value, field.name)) for field in attrs.fields(type(value)) if field.init)
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return
    for name, item in items:
        yield from _parts(item, f"{path}.{name}" if path else str(name))


def harmless(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """The paths that may differ. A whole plugin that both runs have must be harmless in both: it may be another one."""
    one, other = set(old["neutral"]), set(new["neutral"])
    return {
        path
        for path in one | other
        if "." in path or path in one & other or path not in old["config"] or path not in new["config"]
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What makes the result of one run another's: `optimizer.lr: 0.01 -> 0.02`, one line each."""
    fine = harmless(old, new)
    before, after = _leaves(old["config"], fine), _leaves(new["config"], fine)
    lines = [
        _changed(path, _text(before, path), _text(after, path))
        for path in [*before, *(path for path in after if path not in before)]
        if path not in before or path not in after or before[path] != after[path]
    ]
    orders = [[key for key in side["config"] if key not in fine] for side in (old, new)]
    if sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]:
        lines.append(f"the order of the plugins: {', '.join(orders[0])} -> {', '.join(orders[1])}")
    if old["classes"] != new["classes"]:
        lines.append(f"classes: {_listed(old['classes'])} -> {_listed(new['classes'])}")
    lines += [
        f"the {mode} data: other images, order or annotations ({old['data'][mode]} -> {new['data'][mode]})"
        for mode in old["data"]
        if mode in new["data"] and old["data"][mode] != new["data"][mode]
    ]
    files = old.get("files", {})
    lines += [f"{file}: its code has changed" for file, code in new["files"].items() if files.get(file, code) != code]
    if old["processes"] != new["processes"]:
        lines.append(f"processes: {old['processes']} -> {new['processes']}")
    return lines


def until_line(before: object, after: object) -> str:
    """What `differences` says of another `run.until`."""
    return _changed("run.until", str(before), str(after))


def rounding(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What may change the last bits of a result, but not what it means: versions and the machine."""
    before = {**old["versions"], "machine": old["machine"]}
    after = {**new["versions"], "machine": new["machine"]}
    return [
        f"{name}: {before[name]} -> {after[name]}" for name in before if after.get(name, before[name]) != before[name]
    ]


def _leaves(config: Any, left_out: set[str], path: str = "") -> dict[str, Any]:
    """Dotted path -> value; lists of plain values are one leaf."""
    if path in left_out:
        return {}
    if isinstance(config, dict) and config:
        items: Any = config.items()
    elif isinstance(config, list) and any(isinstance(item, (dict, list)) for item in config):
        items = enumerate(config)
    else:
        return {path: config}
    return {
        leaf: value
        for name, item in items
        for leaf, value in _leaves(item, left_out, f"{path}.{name}" if path else str(name)).items()
    }


def _changed(path: str, before: str, after: str) -> str:
    return f"{path}: {before} -> {after}"


def _text(leaves: Mapping[str, Any], path: str) -> str:
    return _listed(leaves[path]) if path in leaves else _ABSENT


def _listed(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
