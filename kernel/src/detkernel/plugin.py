"""What a plugin is: an attrs class whose fields are its options and whose `@hookimpl` methods are its behaviour.

    @plugin
    class CheckInvalidLoss:
        '''Stop the run when the loss is NaN or infinite.'''

        interval: int = option(default=50, at_least=1, help="iterations between checks")

        @hookimpl
        def after_train_iter(self, run, losses): ...

The class is the schema, the documentation and the object on the bus at once. Nested parts (a backbone, a data set, a
transform) are the same thing without events: a `@plugin` class that derives from a `Part` base class.

What a class says of itself are arguments, such as `@plugin(priority="low", resume_neutral=("*",))`: see `Declared`. An
attribute of the class, `priority = "low"`, says the same. A subclass has what its base declared, unless it declares it
anew.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, dataclass_transform, overload

import attrs
import pluggy

from detkernel.errors import ConfigError, DefinitionError, Problem, Where, did_you_mean
from detkernel.span import Span

PROJECT = "detkernel"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

PRIORITIES: dict[str, int] = {
    "highest": 0,
    "very_high": 10,
    "high": 30,
    "above_normal": 40,
    "normal": 50,
    "below_normal": 60,
    "low": 70,
    "very_low": 90,
    "lowest": 100,
}
"""Names of priorities, MMDetection's scale: the lower number runs first."""

RESERVED = ("use", "priority")
"""Keys of a config that are not options."""

C = TypeVar("C", bound=type)


@attrs.frozen
class Declared:
    """What a class says of itself, in `@plugin(...)`."""

    priority: str = "normal"
    """When it is called among others: one of `PRIORITIES`."""
    key: str | None = None
    """Under which name configs have it, where it takes the place of others: "optimizer" for `optimizer: {use: ...}`."""
    requires: tuple[str, ...] = ()
    """The installed names of plugins that must be active beside it."""
    needs: tuple[str, ...] = ()
    """What it needs of the training samples, of what another plugin `provides`."""
    provides: tuple[str, ...] = ()
    """What it can give of a sample, and gives where a plugin needs it."""
    loaders: tuple[str, ...] = ()
    """The names of further loaders that are made for it (`Run.next_batch`)."""
    events: type | None = None
    """Events that it publishes: a class of `@hookspec` methods, added to the bus before any plugin is registered, so
    that every plugin may answer them."""
    resume_neutral: tuple[str, ...] = ()
    """Options from which no result follows, so that a resume may change them; "*": all."""
    state_per_rank: bool = False
    """Whether every process has a state of its own, which the checkpoint keeps for each."""


class Declaration(TypedDict, total=False):
    """The arguments of `@plugin(...)`, for type checkers."""

    priority: str
    key: str | None
    requires: tuple[str, ...]
    needs: tuple[str, ...]
    provides: tuple[str, ...]
    loaders: tuple[str, ...]
    events: type | None
    resume_neutral: tuple[str, ...]
    state_per_rank: bool


def declared(part: object) -> Declared:
    """What a plugin, or its class, declared; the defaults where it is not a `@plugin`."""
    found: Declared = getattr(part if isinstance(part, type) else type(part), "__detkernel_declared__", _NOTHING)
    return found


_NOTHING = Declared()
_SAID = tuple(field.name for field in attrs.fields(Declared))


class Part:
    """Base of the base classes of nested parts.

    A direct subclass (`Backbone`, `Dataset`, `Transform`) names a kind. An option of that type takes
    `{use: name, ...}`, where `name` is an installed plugin whose class derives from it.
    """


def option(
    *,
    default: Any = attrs.NOTHING,
    help: str,  # noqa: A002 - the word that users of click and argparse look for
    factory: Callable[[], Any] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[Any] | None = None,
    output: bool = False,
    was: str | None = None,
) -> Any:
    """A field that a config can set. Bounds and choices hold for the value, or for each element of a list of them.

    `output`: it says where something is written, relative to the work dir. A config that comes out of a checkpoint may
    then only name a place below that (a user may name any).

    `was`: its name in earlier versions. A config may still have that one, and is told the new one in a warning.

    `None` passes every bound: whether it is allowed at all is said by the type. Everything is given by keyword, since
    that is how type checkers tell a field with a default from one without (PEP 681).
    """
    if factory is not None and (default is not attrs.NOTHING or not callable(factory)):
        raise DefinitionError("option(): give either a `default` or a `factory`, a function that makes one")
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    metadata = {"help": help, "choices": choices, "output": output, "was": was, **bounds}
    if factory is not None:
        return attrs.field(factory=factory, validator=_check_bounds, metadata=metadata)
    return attrs.field(default=default, validator=_check_bounds, metadata=metadata)


def state(*, default: Any = None, factory: Callable[[], Any] | None = None, init: Literal[False] = False) -> Any:
    """A field that no config sets: what the plugin remembers while it runs. Its name starts with an underscore."""
    if factory is not None:
        return attrs.field(init=init, factory=factory, repr=False)
    return attrs.field(init=init, default=default, repr=False)


def bound_problem(metadata: Any, value: Any) -> str | None:
    """What is wrong with a value by an option's bounds and choices, or None."""
    if value is None or (isinstance(value, (dict, str)) and not metadata.get("choices")):
        return None
    if isinstance(value, (list, tuple)):
        return next((problem for item in value if (problem := bound_problem(metadata, item))), None)
    choices = metadata.get("choices")
    if choices and value not in choices:
        return f"expected one of {', '.join(map(str, choices))}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    for key, (words, holds) in _BOUNDS.items():
        bound = metadata.get(key)
        if bound is not None and not holds(value, bound):
            return f"expected {words} {bound}, got {value!r}"
    return None


_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", operator.ge),
    "at_most": ("at most", operator.le),
    "above": ("more than", operator.gt),
    "below": ("less than", operator.lt),
}


def _check_bounds(_instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    problem = bound_problem(attribute.metadata, value)
    if problem:
        raise ValueError(f"{attribute.name}: {problem}")


@overload
def plugin(cls: C, /) -> C: ...


@overload
def plugin(**said: Unpack[Declaration]) -> Callable[[C], C]: ...


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(option, state))
def plugin(cls: type[Any] | None = None, /, **said: Any) -> Any:
    """Make a plugin of a class: `attrs.define(kw_only=True, eq=False)` and checks that its author did not slip.

    `@plugin` or `@plugin(priority="low", ...)`; the arguments are those of `Declared`.

    Instances compare by identity: pluggy refuses a second plugin that equals one it has. Raises `DefinitionError` for
    a class without a docstring (its first line is what `detkernel plugins` shows), a public field that is not an
    `option`, an option without a type, with a name that no config can set or with a default that it refuses itself, an
    argument that there is not or that is not what it should be, or one that is given twice.

    In Python, too, text will do for an option that is a `Path` or a `Span`.
    """
    if cls is None:
        return partial(_plugin, said=said)
    return _plugin(cls, said)


def _plugin(cls: type[Any], said: Mapping[str, Any]) -> type[Any]:
    made: Any = attrs.define(kw_only=True, eq=False, slots=False, field_transformer=_from_text)(cls)
    attributes = _said_by_attributes(cls)
    twice = next((f".{name}: is said twice, with @plugin({name}=...) too" for name in attributes if name in said), "")
    said = {**attributes, **said}
    problem = twice or next(_said_slips(made, said), "") or next(_slips(made), "")
    if problem:
        raise DefinitionError(f"{cls.__name__}{problem}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    made.__detkernel_declared__ = attrs.evolve(declared(made), **given)
    found: type[Any] = made
    return found


def _said_by_attributes(cls: type[Any]) -> dict[str, Any]:
    """What a class says by attributes, and its bases that are not plugins themselves, nearest first."""
    found: dict[str, Any] = {}
    for base in cls.__mro__[:-1]:
        if base is not cls and is_plugin(base):
            break
        for name in _SAID:
            if name in vars(base) and not _is_method(vars(base)[name]):
                found.setdefault(name, vars(base)[name])
    return found


def _from_text(_cls: type[Any], fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
    """Options of paths and spans take text, as they do in a config. The types are not resolved yet."""
    made = []
    for field in fields:
        written = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "") + repr(field.type)
        makers = [make for name, make in _TEXTS.items() if re.search(rf"\b{name}\b", written)]
        known = field.init and field.converter is None and not re.search(r"\bstr\b", written)
        made.append(field.evolve(converter=partial(_converted, makers[0])) if known and len(makers) == 1 else field)
    return made


def _converted(make: Callable[[str], Any], value: Any) -> Any:
    if isinstance(value, str):
        return make(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(make, item) for item in value)
    if isinstance(value, dict):
        return {key: _converted(make, item) for key, item in value.items()}
    return value


_TEXTS: dict[str, Callable[[str], Any]] = {"Path": lambda text: Path(text).expanduser(), "Span": Span.parse}


def _slips(cls: type[Any]) -> Iterator[str]:
    """What its author did wrong, each after the name of the class."""
    if not inspect.getdoc(cls) or not cls.__dict__.get("__doc__"):
        yield ": a plugin needs a docstring; its first line is what users are shown"
    for field in attrs.fields(cls):
        if field.init:
            yield from (f".{field.name}: {problem}" for problem in _field_slips(field))
    names = [field.name for field in attrs.fields(cls) if field.init]
    for field in attrs.fields(cls):
        if field.metadata.get("was") in names:
            yield f".{field.name}: was='{field.metadata['was']}' is an option today"
    yield from _misspelt(cls)


def _said_slips(cls: type[Any], said: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the arguments of `@plugin`."""
    for name in said:
        if name not in _SAID:
            yield f": @plugin has no argument '{name}'{did_you_mean(name, _SAID)}"
    priority = said.get("priority", "normal")
    if priority not in list(PRIORITIES):
        yield f": priority: expected one of {', '.join(PRIORITIES)}, got {priority!r}"
    options = ("*", *(field.name for field in attrs.fields(cls) if field.init))
    lists = dict.fromkeys(("requires", "loaders", "needs", "provides"))
    for name, choices in {**lists, "resume_neutral": options}.items():
        value = said.get(name, ())
        if not isinstance(value, (tuple, list)):
            example = f"; write ({value!r},)" if isinstance(value, str) else ""
            yield f": {name}: expected a tuple of names, got {value!r}{example}"
        elif choices is not None:
            yield from (f": {name}: there is no '{x}'{did_you_mean(x, choices)}" for x in value if x not in choices)
    kinds = {"events": (type, "a class of @hookspec methods"), "key": (str, "text")}
    for name, (kind, expected) in {**kinds, "state_per_rank": (bool, "True or False")}.items():
        if said.get(name) is not None and not isinstance(said[name], kind):
            yield f": {name}: expected {expected}, got {said[name]!r}"


def _field_slips(field: attrs.Attribute[Any]) -> Iterator[str]:
    default = field.default
    if "help" not in field.metadata:
        yield (
            "write it as option(..., help='...') so that it is documented, or as state(...) if no config should set it"
        )
    if field.type is None:
        yield f"an option needs a type, such as `{field.name}: int = option(...)`"
    if field.name in RESERVED or field.name.startswith("_"):
        yield "no option may have this name; choose another"
    if isinstance(default, (list, dict, set)):
        made = f"lambda: {default!r}" if default else type(default).__name__
        yield f"a default of {default!r} would be one {type(default).__name__} for all; write factory={made}"
    problem = bound_problem(field.metadata, None if isinstance(default, attrs.Factory) else default)  # type: ignore[arg-type]
    if default is not attrs.NOTHING and problem:
        yield f"its own default is refused: {problem}"


def _misspelt(cls: type[Any]) -> Iterator[str]:
    """Attributes of the class that nobody would read, since the name that somebody reads is another."""
    inherited = {name for base in cls.__mro__[1:-1] for name in vars(base)}
    known = [name for name in inherited if not name.startswith("_") and not callable(getattr(cls, name, len))]
    fields = {field.name for field in attrs.fields(cls)}
    for name, value in vars(cls).items():
        if name.startswith("_") or name in {*known, *fields, *inherited, *_SAID} or _is_method(value):
            continue
        import difflib  # here, since hardly a class has attributes of its own

        near = difflib.get_close_matches(name, [*known, *(set(_SAID) - {"key"})], n=1, cutoff=0.85)
        if near:
            meant = f"@plugin({near[0]}={value!r})" if near[0] in _SAID else f"`{near[0]}`"
            yield f".{name}: is {meant} meant? If not, choose a name that is less like it"


def _is_method(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, (property, classmethod, staticmethod, cached_property))


def published(cls: type[Any]) -> dict[str, Callable[..., Any]]:
    """The events that a plugin class publishes, by name."""
    source = declared(cls).events
    if source is None:
        return {}
    found = {name: getattr(source, name) for base in reversed(source.__mro__) for name in vars(base)}
    return {name: spec for name, spec in found.items() if hasattr(spec, f"{PROJECT}_spec")}


def is_plugin(cls: Any) -> bool:
    """Whether this is a class made by `@plugin` (itself, not by way of a parent that was)."""
    return isinstance(cls, type) and "__detkernel_declared__" in cls.__dict__


@attrs.frozen
class Origin:
    """Where a part's options were written: its path in the config, and a place for each option that was given."""

    path: str
    places: Mapping[str, Where]
    """Option name (dotted where nested) -> place; "" -> the part itself."""
    use: str = ""
    """The name that a config uses for its class; empty for a group of options."""


def wrong(part: object, name: str, message: str) -> ConfigError:
    """The error to raise for an option found wrong late (against the data, say): it points to where it was written.

    raise wrong(self, "milestones", f"expected milestones within {run.max_epochs} epochs, got {last}")

    `name` "": the part itself.
    """
    origin = getattr(part, "__detkernel_origin__", None)
    if origin is None:
        return ConfigError([Problem(Where(type(part).__qualname__), name, message)])
    where = origin.places.get(name) or origin.places[""]
    return ConfigError([Problem(where, ".".join(filter(None, (origin.path, name))), message)])
