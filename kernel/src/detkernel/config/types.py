"""The types that options may have, seen without importing what the options are for."""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

import attrs

from detkernel.errors import DefinitionError
from detkernel.local import source_of
from detkernel.plugin import Part, is_plugin
from detkernel.span import Span


def option_fields(cls: type[Any]) -> dict[str, attrs.Attribute[Any]]:
    """The options of a plugin class, by name."""
    return {field.name: field for field in attrs.fields(cls) if field.init}


def default_of(field: attrs.Attribute[Any]) -> Any:
    """An option's default, made anew where it has a factory."""
    factory = isinstance(field.default, attrs.Factory)  # type: ignore[arg-type]
    return field.default.factory() if factory else field.default  # type: ignore[union-attr]


def option_type(cls: type[Any], name: str) -> Any:
    """An option's type, resolved where its class was written. Raises `DefinitionError` for one that cannot be.

    Only this one annotation is resolved: private fields may well be annotated with types of libraries that the
    module imports for type checkers only.
    """
    owner, annotation = next(
        (base, field.type)
        for base in cls.__mro__
        if attrs.has(base) and (field := option_fields(base).get(name)) and not getattr(field, "inherited", False)
    )
    text = getattr(annotation, "__forward_arg__", annotation)
    if not isinstance(text, str):
        return annotation
    names = {**vars(typing), **vars(sys.modules[owner.__module__])}
    try:
        return eval(text, names, dict(vars(owner)))  # the plugin author's own source, already imported
    except Exception as error:
        raise DefinitionError(
            f"{source_of(owner.__module__)}:{owner.__qualname__}.{name} is annotated with `{text}`, which gives "
            f"'{error}'; what an option's type names must be imported, and not for type checkers only"
        ) from None


def has_origin(*origins: Any) -> Callable[[Any], bool]:
    """A test for generic types: `has_origin(list)` holds for `list[int]`."""
    return lambda kind: typing.get_origin(kind) in origins


def is_base(kind: Any) -> bool:
    """Whether this is a base class of nested parts, which takes `{use: name, ...}`."""
    return isinstance(kind, type) and issubclass(kind, Part) and not is_plugin(kind)


def members(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    Span: "a length such as '12 epochs' or '500 iters'",
    type(None): "null",
    Any: "any value",
}


def expected(kind: Any) -> str:
    """What a user is asked to write for a type: `a whole number`, `a list of paths`, `null or a number`."""
    if kind in _NAMES:
        return _NAMES[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(f"'{choice}'" if isinstance(choice, str) else str(choice) for choice in args)
    if len(members(kind)) > 1:
        return " or ".join(expected(member) for member in members(kind))
    if origin in (list, tuple) and (len(args) == 1 or args[1:] == (...,)):
        return f"a list, each {expected(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(expected(arg) for arg in args)}"
    if origin is dict:
        return f"a map to {expected(args[1])}"
    if is_base(kind):
        return f"{with_article(words(kind))}, such as {{use: NAME, ...}}"
    if is_plugin(kind):
        return f"a map of {', '.join(option_fields(kind))}"
    return getattr(kind, "__name__", str(kind))


def words(cls: type[Any]) -> str:
    """The name of a class as words: `batch sampler` of BatchSampler."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()


def with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def short(kind: Any) -> str:
    """A type as a table shows it: `int`, `list[Transform]`, `float | None`."""
    if len(members(kind)) > 1:
        return " | ".join(short(member) for member in members(kind))
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(str(choice) for choice in args)
    if origin is not None:
        inner = ", ".join("..." if arg is ... else short(arg) for arg in args)
        return f"{origin.__name__}[{inner}]"
    if kind is type(None):
        return "null"
    return getattr(kind, "__name__", str(kind))
