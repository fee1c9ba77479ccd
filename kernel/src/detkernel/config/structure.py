"""From a composed tree to plugin objects, strictly: nothing is coerced but a whole number to float.

cattrs dispatches on the option's type; every hook here takes a `Node`, so that each problem knows its place. All
problems are collected: a list, a map and a class each go on past a wrong member.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import attrs
import cattrs

from detkernel.catalog import Catalog
from detkernel.config.foreign import outside
from detkernel.config.read import scalar
from detkernel.config.tree import Node, folder_of, kind
from detkernel.config.types import (
    expected,
    has_origin,
    is_base,
    members,
    option_fields,
    option_type,
    with_article,
    words,
)
from detkernel.errors import CatalogError, ConfigError, Problem, Where, did_you_mean, printable
from detkernel.plugin import RESERVED, Origin, bound_problem, is_plugin
from detkernel.span import Span

_LOG = logging.getLogger("detkernel")


class Structurer:
    """Makes objects of nodes. One per config: it remembers the path to the option at hand."""

    def __init__(self, catalog: Catalog, *, writes: bool = True) -> None:
        self.catalog = catalog
        self._writes = writes
        self._path: list[str] = []
        self._converter = converter = cattrs.Converter(detailed_validation=False)
        converter.register_structure_hook_func(lambda wanted: len(members(wanted)) > 1, self._union)
        converter.register_structure_hook_func(has_origin(Literal), self._literal)
        converter.register_structure_hook_func(has_origin(list), self._list)
        converter.register_structure_hook_func(has_origin(tuple), self._tuple)
        converter.register_structure_hook_func(has_origin(dict), self._dict)
        converter.register_structure_hook_func(is_base, self._part)
        converter.register_structure_hook_func(is_plugin, self._nested)
        for wanted in (bool, int, float, str):
            converter.register_structure_hook(wanted, self._scalar)
        converter.register_structure_hook(Path, self._from_text)
        converter.register_structure_hook(Span, self._from_text)
        converter.register_structure_hook_func(lambda wanted: wanted is type(None), self._null)
        converter.register_structure_hook_func(lambda wanted: wanted is Any, lambda node, _: node.plain())

    def structure(self, node: Node, wanted: Any, name: str) -> Any:
        """The object of a type that a node describes. Raises `ConfigError` with every problem found."""
        with self._at(name):
            return self._converter.structure(node, wanted)

    def plugin(self, name: str, node: Node) -> Any:
        """The plugin of a top-level key: `use` says which class, or the key does."""
        with self._at(name):
            if not isinstance(node.value, dict):
                raise self._problem(node, f"expected a map of options, got {kind(node)}; write `{name}: {{}}` for none")
            return self._object(node, *self._load(node, node.child("use"), name))

    def _load(self, node: Node, use: Node | None, default: str = "") -> tuple[type[Any], str]:
        """The class that `use` (or else the key) names, and the name under which any config finds it."""
        if use is not None and not isinstance(use.value, str):
            raise self._problem(use, f"expected a plugin's name, got {kind(use)}", "use")
        place = use or node
        named = str(use.value) if use is not None else default
        folder = folder_of(place.where)
        if place.where.foreign and self.catalog.is_local(named):
            use_path = ".".join([*self._path, "use"])
            raise self._problem(
                place,
                f"a config inside another file may not run code from a file, {named}; where you trust that file, "
                f"name it yourself: {use_path}={named}",
                "use" if use else "",
            )
        try:
            cls = self.catalog.load(named, folder)
            if lacking := sorted(getattr(cls, "__abstractmethods__", ())):
                raise CatalogError(f"{cls.__name__} lacks {' and '.join(lacking)}, which every one of its kind has")
            for option in option_fields(cls):
                option_type(cls, option)
            return cls, self.catalog.absolute(named, folder)
        except CatalogError as error:
            raise self._problem(place, str(error), "use" if use else "") from error

    def _object(self, node: Node, cls: type[Any], use: str = "") -> Any:
        """An instance of a plugin class from a map of its options."""
        assert isinstance(node.value, dict)
        fields = option_fields(cls)
        problems: list[Problem] = []
        values: dict[str, Any] = {}
        node = self._renamed(node, fields)

        assert isinstance(node.value, dict)
        for key, child in node.value.items():
            if key in RESERVED:
                continue
            if key not in fields:
                hint = self._namesake_with(key, use) or did_you_mean(key, fields)
                message = f"there is no option '{printable(key)}'{hint}"
                problems.append(Problem(node.keys.get(key, child.where), self._dotted(key), message))
                continue
            with self._collect(problems), self._at(key):
                values[key] = self._option(child, cls, fields[key])
        for name, field in fields.items():
            if field.default is attrs.NOTHING and name not in node.value:
                wanted = expected(option_type(cls, name))
                message = f"missing: {field.metadata['help']} ({wanted})"
                problems.append(Problem(node.where, self._dotted(name), message))
        if problems:
            raise ConfigError(problems)
        return self._build(node, cls, values, use)

    def _namesake_with(self, key: str, name: str) -> str:
        """A hint at the installed plugin that has the option, if its name is this one's behind a prefix, or empty."""
        for other in self.catalog.entries:
            if name and other.endswith(f"_{name}"):
                with suppress(CatalogError):
                    if key in option_fields(self.catalog.load(other)):
                        return f"; '{other}' has one"
        return ""

    def _renamed(self, node: Node, fields: Mapping[str, attrs.Attribute[Any]]) -> Node:
        """The map with today's names of its options; one under its earlier name (`option(was=...)`) is warned of."""
        assert isinstance(node.value, dict)
        today = {field.metadata["was"]: name for name, field in fields.items() if field.metadata.get("was")}
        for old in today.keys() & node.value.keys():
            new, where = today[old], node.keys.get(old, node.value[old].where)
            if new in node.value:
                message = f"this option is called '{new}' now, which is given as well; remove '{old}'"
                raise ConfigError([Problem(where, self._dotted(old), message)])
            _LOG.warning("%s: %s: this option is called '%s' now; rename it", where, self._dotted(old), new)
            values = {today.get(key, key): child for key, child in node.value.items()}
            node = attrs.evolve(node, value=values, keys={today.get(key, key): at for key, at in node.keys.items()})
        return node

    def _option(self, node: Node, cls: type[Any], field: attrs.Attribute[Any]) -> Any:
        value = self._converter.structure(node, option_type(cls, field.name))
        for name, place in outside(node) if self._writes and field.metadata["output"] else ():
            raise self._problem(
                place,
                f"a config inside another file may only write below the work dir, not to {place.value}; where you "
                f"trust that file, name it yourself: {self._dotted(name)}={place.value}",
                name,
            )
        problem = bound_problem(field.metadata, value)
        if problem:
            raise self._problem(node, problem)
        return value

    def _build(self, node: Node, cls: type[Any], values: dict[str, Any], use: str) -> Any:
        try:
            made = cls(**values)
        except ValueError as error:
            name, colon, message = str(error).partition(": ")
            known = colon and name in option_fields(cls)
            child = node.child(name) if known else None
            if known:
                raise self._problem(child or node, message, name) from error
            raise self._problem(node, str(error)) from error
        written = {"": node.where, **dict(places(node))}
        made.__dict__["__detkernel_origin__"] = Origin(".".join(self._path), written, use)
        return made

    def _part(self, node: Node, base: type[Any]) -> Any:
        """A nested part: `{use: name, ...}`, or only the name."""
        if isinstance(node.value, str):
            node = Node({"use": node}, node.where, {"use": node.where})
        if not isinstance(node.value, dict):
            raise self._problem(node, f"expected {expected(base)}, got {kind(node)}")
        use, priority = node.child("use") or node.over, node.child("priority")
        if use is None:
            raise self._problem(node, f"`use` is missing: which {words(base)}? Write {{use: NAME, ...}}")
        cls, name = self._load(node, use)
        if not issubclass(cls, base):
            bases = [parent.__name__ for parent in cls.__mro__ if is_base(parent)]
            found, wanted = with_article(bases[0] if bases else "plugin for events"), with_article(base.__name__)
            raise self._problem(use, f"'{use.value}' is {found}, not {wanted}", "use")
        if priority is not None:
            raise self._problem(priority, "only plugins on the top level have a priority", "priority")
        return self._object(node, cls, name)

    def _nested(self, node: Node, cls: type[Any]) -> Any:
        if not isinstance(node.value, dict):
            raise self._problem(node, f"expected {expected(cls)}, got {kind(node)}")
        for key in RESERVED:
            if key in node.value:
                raise ConfigError([Problem(node.keys[key], self._dotted(key), f"this map takes no `{key}`")])
        return self._object(node, cls)

    def _union(self, node: Node, wanted: Any) -> Any:
        """The first member that fits; where none does, the problems of the one that was plainly meant."""
        options = members(wanted)
        if node.value is None and type(None) in options:
            return None
        failures: list[ConfigError] = []
        for member in options:
            try:
                return self._converter.structure(node, member)
            except ConfigError as error:
                if member is not type(None) and _meant(member, node):
                    failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        raise self._problem(node, f"expected {expected(wanted)}, got {kind(node)}")

    def _literal(self, node: Node, wanted: Any) -> Any:
        choices = typing.get_args(wanted)
        for choice in choices:
            if node.value == choice and type(node.value) is type(choice):
                return choice
        near = did_you_mean(str(node.value), [str(choice) for choice in choices])
        raise self._problem(node, f"expected {expected(wanted)}, got {kind(node)}{near if '?' in near else ''}")

    def _list(self, node: Node, wanted: Any) -> Any:
        return self._items(node, wanted, lambda _: typing.get_args(wanted)[0])

    def _tuple(self, node: Node, wanted: Any) -> Any:
        args = typing.get_args(wanted)
        if args[1:] == (...,):
            return tuple(self._items(node, wanted, lambda _: args[0]))
        if isinstance(node.value, list) and len(node.value) != len(args):
            raise self._problem(node, f"expected {expected(wanted)}; got {len(node.value)} values")
        return tuple(self._items(node, wanted, lambda index: args[index]))

    def _items(self, node: Node, wanted: Any, item_type: Callable[[int], Any]) -> list[Any]:
        if not isinstance(node.value, list):
            raise self._problem(node, f"expected {expected(wanted)}, got {kind(node)}")
        problems: list[Problem] = []
        values = []
        for index, child in enumerate(node.value):
            with self._collect(problems), self._at(str(index)):
                values.append(self._converter.structure(child, item_type(index)))
        if problems:
            raise ConfigError(problems)
        return values

    def _dict(self, node: Node, wanted: Any) -> Any:
        if not isinstance(node.value, dict):
            raise self._problem(node, f"expected {expected(wanted)}, got {kind(node)}")
        problems: list[Problem] = []
        values = {}
        for key, child in node.value.items():
            with self._collect(problems), self._at(key):
                values[key] = self._converter.structure(child, typing.get_args(wanted)[1])
        if problems:
            raise ConfigError(problems)
        return values

    def _scalar(self, node: Node, wanted: Any) -> Any:
        value = node.value
        if type(value) is wanted:
            return value
        if wanted is float and type(value) is int:
            return float(value)
        raise self._problem(node, f"expected {expected(wanted)}, got {kind(node)}{_scalar_hint(node, wanted)}")

    def _from_text(self, node: Node, wanted: Any) -> Any:
        if not isinstance(node.value, str):
            raise self._problem(node, f"expected {expected(wanted)}, got {kind(node)}")
        try:
            return Path(node.value).expanduser() if wanted is Path else Span.parse(node.value)
        except (ValueError, RuntimeError) as error:  # RuntimeError: ~name, and there is no such user
            raise self._problem(node, str(error)) from error

    def _null(self, node: Node, _wanted: Any) -> None:
        if node.value is not None:
            raise self._problem(node, f"expected null, got {kind(node)}")

    @contextmanager
    def _at(self, name: str) -> Iterator[None]:
        self._path.append(name)
        try:
            yield
        finally:
            self._path.pop()

    @staticmethod
    @contextmanager
    def _collect(problems: list[Problem]) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            problems.extend(error.problems)

    def _dotted(self, name: str = "") -> str:
        return ".".join([*self._path, name] if name else self._path)

    def _problem(self, node: Node, message: str, name: str = "") -> ConfigError:
        return node.error(message, self._dotted(name))


def places(node: Node, prefix: str = "") -> Iterator[tuple[str, Where]]:
    """(dotted path, where its value was written) of everything below a node."""
    children: list[tuple[str, Node]] = []
    if isinstance(node.value, dict):
        children = list(node.value.items())
    elif isinstance(node.value, list):
        children = [(str(index), child) for index, child in enumerate(node.value)]
    for key, child in children:
        yield prefix + key, child.where
        yield from places(child, f"{prefix}{key}.")


def _meant(wanted: Any, node: Node) -> bool:
    """Whether a node is written as a value of this type is: a map, a list, a scalar, or the name of a part."""
    if typing.get_origin(wanted) in (list, tuple):
        return isinstance(node.value, list)
    if is_base(wanted):
        return isinstance(node.value, (dict, str))
    if typing.get_origin(wanted) is dict or is_plugin(wanted):
        return isinstance(node.value, dict)
    return not isinstance(node.value, (dict, list))


def _scalar_hint(node: Node, wanted: Any) -> str:
    if wanted is bool and str(node.value).lower() in ("yes", "no", "on", "off"):
        return f"; write {str(str(node.value).lower() in ('yes', 'on')).lower()}"
    if wanted is str and not isinstance(node.value, (dict, list)):
        return "; put it in quotes if it is meant as text"
    if wanted in (int, float) and isinstance(node.value, str) and isinstance(scalar(node.value), (int, float)):
        return "; leave out the quotes"
    return ""
