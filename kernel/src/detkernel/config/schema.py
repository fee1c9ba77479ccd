"""JSON Schema (draft 7) of a config, from the installed plugin classes, for completion and checks in editors."""

from __future__ import annotations

import math
import typing
from pathlib import Path
from typing import Any, Literal

import attrs

from detkernel.catalog import Catalog
from detkernel.config.dump import plain
from detkernel.config.types import is_base, members, option_fields, option_type
from detkernel.errors import DefinitionError
from detkernel.plugin import PRIORITIES, Part, is_plugin
from detkernel.run import RunOptions
from detkernel.span import PATTERN, Span

Schema = dict[str, Any]
_REFERENCE = {"type": "string", "pattern": r"\$\{"}
_LOCAL = {"type": "string", "pattern": r"\.py:[A-Za-z_]\w*$"}
_SPAN = {"type": "string", "pattern": PATTERN, "examples": ["12 epochs"]}


def config_schema(catalog: Catalog) -> Schema:
    """The schema of a whole config. Plugins that cannot be loaded are left out, and named in its `$comment`."""
    return _Builder(catalog).build()


class _Builder:
    def __init__(self, catalog: Catalog) -> None:
        self.classes, self.left_out = catalog.load_all()
        for name, problem in [(name, _untyped(cls)) for name, cls in self.classes.items()]:
            if problem:
                self.left_out.append(f"plugin '{name}' of {catalog.find(name)}: {problem}")
                del self.classes[name]
        self.definitions: dict[str, Schema] = {}

    def build(self) -> Schema:
        tops = {name: cls for name, cls in self.classes.items() if not issubclass(cls, Part)}
        for name, cls in tops.items():
            self.definitions[f"plugin:{name}"] = self._object(cls, use=name, top=True)
        by_use = [
            {
                "if": {"properties": {"use": {"const": name}}, "required": ["use"]},
                "then": {"$ref": f"#/definitions/plugin:{name}"},
            }
            for name in tops
        ]
        self.definitions["plugin"] = {
            "anyOf": [{"type": "null"}, {"type": "object", "allOf": by_use}],
            "properties": {"use": {"anyOf": [{"enum": sorted(tops)}, _LOCAL]}},
        }
        top = {"$ref": "#/definitions/plugin"}
        named = {name: {"if": _has_use(), "then": top, "else": self._key(name)} for name in tops}
        files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
        return {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "detkernel config",
            **({"$comment": "left out: " + "; ".join(self.left_out)} if self.left_out else {}),
            "type": "object",
            "properties": {
                "base": {**files, "description": "file or files that this config builds on"},
                "run": self._object(RunOptions),
                **named,
            },
            "additionalProperties": top,
            "definitions": self.definitions,
        }

    def _key(self, name: str) -> Schema:
        """A key that is a plugin's name and has no `use`: its options, some of which a base file may give."""
        return {"anyOf": [{"type": "null"}, {"$ref": f"#/definitions/plugin:{name}"}]}

    def _object(self, cls: type[Any], use: str = "", top: bool = False) -> Schema:
        properties: Schema = {}
        for name, field in option_fields(cls).items():
            properties[name] = {"description": field.metadata["help"], **self._option(cls, name, field)}
            was = field.metadata.get("was")
            if was:
                properties[was] = {**properties[name], "deprecated": True, "description": f"now called {name}"}
        if use:
            properties["use"] = {"const": use}
        if top:
            properties["priority"] = {"enum": list(PRIORITIES), "description": "runs before or after other plugins"}
        summary = (cls.__doc__ or "").partition("\n")[0]
        # Nothing is required: what is missing here may be given by a base file or the command line.
        return {"type": "object", "description": summary, "properties": properties, "additionalProperties": False}

    def _option(self, cls: type[Any], name: str, field: attrs.Attribute[Any]) -> Schema:
        schema: Schema = {"anyOf": [self._type(option_type(cls, name), field.metadata), _REFERENCE]}
        if field.default is not attrs.NOTHING and not isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
            default = plain(field.default, lambda kind: kind.__name__)
            if not isinstance(default, float) or math.isfinite(default):
                schema["default"] = default
        return schema

    def _type(self, kind: Any, metadata: Any) -> Schema:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if len(members(kind)) > 1:
            return {"anyOf": [self._type(member, metadata) for member in members(kind)]}
        if origin is Literal:
            return {"enum": list(args)}
        if origin is list or (origin is tuple and args[1:] == (...,)):
            return {"type": "array", "items": self._type(args[0], metadata)}
        if origin is tuple:
            items = [self._type(arg, metadata) for arg in args]
            return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
        if origin is dict:
            return {"type": "object", "additionalProperties": self._type(args[1], metadata)}
        if is_base(kind):
            return self._part(kind)
        if is_plugin(kind):
            return self._object(kind)
        return self._scalar(kind, metadata)

    def _scalar(self, kind: Any, metadata: Any) -> Schema:
        if kind is Span:
            return _SPAN
        names = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null"}
        if kind not in names:
            return {}
        if metadata.get("choices"):
            return {"enum": list(metadata["choices"])}
        schema: Schema = {"type": names[kind]}
        if kind in (int, float):
            keys = {
                "at_least": "minimum",
                "at_most": "maximum",
                "above": "exclusiveMinimum",
                "below": "exclusiveMaximum",
            }
            schema |= {key: metadata[bound] for bound, key in keys.items() if metadata.get(bound) is not None}
        return schema

    def _part(self, base: type[Any]) -> Schema:
        """Any installed part of a kind; defined once, since parts nest in themselves."""
        name = base.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # met again inside itself
            parts = {use: cls for use, cls in self.classes.items() if issubclass(cls, base)}
            cases = [
                {"if": {"properties": {"use": {"const": use}}, "required": ["use"]}, "then": self._object(cls, use=use)}
                for use, cls in parts.items()
            ]
            use = {"anyOf": [{"enum": sorted(parts)}, _LOCAL]}
            part = {"type": "object", "properties": {"use": use}, "allOf": cases}
            self.definitions[name] = {"anyOf": [part, use]}
        return {"$ref": f"#/definitions/{name}"}


def _untyped(cls: type[Any]) -> str:
    """The first option of a class with a type that its module does not know, if any."""
    for name in option_fields(cls):
        try:
            option_type(cls, name)
        except DefinitionError as error:
            return str(error)
    return ""


def _has_use() -> Schema:
    return {"type": "object", "required": ["use"]}
