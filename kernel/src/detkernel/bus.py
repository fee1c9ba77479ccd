"""One pluggy manager per run: it registers, orders, attributes failures, and can time every call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from traceback import walk_tb
from types import CodeType
from typing import Any, cast

import attrs
import pluggy

from detkernel.errors import CatalogError, Problem, UserError, did_you_mean
from detkernel.hookspecs import Events
from detkernel.local import source_of
from detkernel.plugin import PRIORITIES, PROJECT, declared, is_plugin, published

ONE_PROVIDER = "build_model"
NEEDED = ("build_model", "build_loader", "train_step")


EACH = ("on_error", "after_run")
"""Events that reach every plugin, even when one of them fails."""


class _Manager(pluggy.PluginManager):
    """Looks for implementations on the class, so that registering evaluates no property of the instance, and returns
    the failures of the events in `EACH` in place of their results."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self._multicall = self._inner_hookexec
        self._inner_hookexec = self._execute

    def _execute(
        self,
        hook_name: str,
        hook_impls: Sequence[pluggy.HookImpl],
        caller_kwargs: Mapping[str, object],
        firstresult: bool,
    ) -> object:
        if hook_name not in EACH:
            if hook_impls and (hook_impls[-1].wrapper or hook_impls[-1].hookwrapper):  # they come last
                return self._multicall(hook_name, hook_impls, caller_kwargs, firstresult)
            return _call_each(hook_impls, caller_kwargs, firstresult)
        failures: list[BaseException] = []
        for impl in reversed(hook_impls):
            try:
                self._multicall(hook_name, [impl], caller_kwargs, False)
            except BaseException as error:
                failures.append(error)
        return failures

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if not inspect.isroutine(inspect.getattr_static(type(plugin), name, None)):
            return None
        return super().parse_hookimpl_opts(plugin, name)


def _call_each(hook_impls: Sequence[pluggy.HookImpl], arguments: Mapping[str, object], firstresult: bool) -> object:
    """What pluggy does, where no implementation is a wrapper, without what wrappers need: with ten plugins the loop
    takes 9.7 us an iteration in place of 16.2."""
    results: list[object] = []
    names, values = tuple(arguments), tuple(arguments.values())
    for impl in reversed(hook_impls):
        if impl.argnames == names:
            result = impl.function(*values)
        else:
            try:
                given = [arguments[name] for name in impl.argnames]
            except KeyError as error:
                raise pluggy.HookCallError(f"hook call must provide argument {error}") from None
            result = impl.function(*given)
        if result is not None:
            if firstresult:
                return result
            results.append(result)
    return None if firstresult else results


@attrs.frozen
class Implementation:
    """One plugin's answer to one event."""

    name: str
    """The plugin's key in the config."""
    event: str
    priority: str
    kind: str
    """"", "first", "last" or "wrapper"."""


class Bus:
    """The active plugins of one run, by their config key, and the events between them.

    Raises `CatalogError` for a method that answers no known event, for one that is called like an event but answers
    none, for an event that two plugins publish, for a config in which not exactly one plugin
    builds the model, and for arguments that an event does not have.
    """

    def __init__(self, plugins: Mapping[str, object], priorities: Mapping[str, str] | None = None) -> None:
        self.plugins = dict(plugins)
        self._priorities = {
            name: (priorities or {}).get(name) or declared(plugin).priority for name, plugin in self.plugins.items()
        }
        self._manager = _Manager()
        self._layers: list[Callable[[str, str, Callable[..., Any]], Callable[..., Any]]] = []
        self._originals: dict[pluggy.HookImpl, Callable[..., Any]] = {}
        # As an instance: registering the class makes pluggy warn at every call, at 30 us each.
        self._manager.add_hookspecs(cast(type, Events()))
        self._add_published()
        ordered = sorted(self.plugins, key=lambda name: PRIORITIES[self._priorities[name]])
        for name in reversed(ordered):  # pluggy calls the last registered first
            self._register(name)
        for event in self.event_names():
            self._sort(event, ordered)
        self._check_events()
        self._check_bare()
        self.events = cast(Events, self._manager.hook)

    def __getitem__(self, name: str) -> object:
        return self.plugins[name]

    def publish(self, event: str, **arguments: Any) -> Any:
        """Fire an event that a plugin published (`@plugin(events=...)`), by name."""
        return getattr(self._manager.hook, event)(**arguments)

    def answers(self, event: str, **arguments: Any) -> dict[str, Any]:
        """What each plugin gives that is not None, by config key, at an event of which one result is taken."""
        providers = dict.fromkeys(impl.name for impl in self.implementations(event) if impl.kind != "wrapper")
        found = {}
        for name in providers:
            others = [self.plugins[other] for other in providers if other != name]
            result = self._manager.subset_hook_caller(event, others)(**arguments)
            if result is not None:
                found[name] = result
        return found

    def conflict(self, names: Sequence[str], what: str, advice: str) -> CatalogError:
        """The error to raise where several plugins do what one may do."""
        first, last = names[0], names[-1]
        listed = " and ".join(self._described(name) for name in names)
        return self._wrong(
            last, f"{listed} both {what}; keep one of them, with `{first}: null` or `{last}: null`, {advice}"
        )

    def find(self, kind: type) -> Iterator[tuple[str, Any]]:
        """The active plugins of a class (or that have the methods of a runtime protocol), by config key."""
        return ((name, plugin) for name, plugin in self.plugins.items() if isinstance(plugin, kind))

    def loaders(self) -> list[str]:
        """The names of the further loaders that plugins ask for (`@plugin(loaders=("unlabelled",))`), each once."""
        return list(dict.fromkeys(name for part in self.plugins.values() for name in declared(part).loaders))

    def stateful(self) -> Iterator[tuple[str, Any]]:
        """The plugins with state that a checkpoint keeps, by config key."""
        for name, plugin in self.plugins.items():
            if hasattr(plugin, "state_dict") and hasattr(plugin, "load_state_dict"):
                yield name, plugin

    def implementations(self, event: str) -> list[Implementation]:
        """Who answers an event, in the order in which they are called."""
        found = []
        for impl in reversed(self._caller(event).get_hookimpls()):
            kind = (
                "wrapper"
                if impl.wrapper or impl.hookwrapper
                else "first"
                if impl.tryfirst
                else "last"
                if impl.trylast
                else ""
            )
            found.append(Implementation(impl.plugin_name, event, self._priorities[impl.plugin_name], kind))
        return found

    def is_answered(self, event: str) -> bool:
        """Whether any active plugin answers an event: what leads up to it costs nothing where none does."""
        return bool(self._caller(event).get_hookimpls())

    def event_names(self) -> list[str]:
        """All known events: the kernel's in the order in which they fire, then those that plugins publish."""
        own = [name for name in vars(Events) if not name.startswith("_")]
        return own + sorted(name for name in vars(self._manager.hook) if name not in own and not name.startswith("_"))

    def spec(self, event: str) -> Any:
        """The function that declares an event (its arguments and docstring)."""
        specification = self._caller(event).spec
        assert specification is not None
        return specification.function

    def require_providers(self, events: Iterable[str] = NEEDED) -> None:
        """Check that each of these events has a plugin that answers it, and that one alone builds the model."""
        for event in events:
            providers = [impl.name for impl in self.implementations(event) if impl.kind != "wrapper"]
            if not providers:
                raise CatalogError(
                    f"no active plugin provides {event}; active are {', '.join(self.plugins) or 'none'}. "
                    f"Add one to the config, such as {_EXAMPLES[event]}; `detkernel plugins` lists what is installed"
                )
            if event == ONE_PROVIDER and len(providers) > 1:
                raise self._wrong(
                    providers[-1],
                    f"{len(providers)} plugins build the model: {' and '.join(repr(name) for name in providers)}; "
                    f"keep one and remove the other with `{providers[-1]}: null`",
                )

    def each(self, event: str, **arguments: Any) -> list[BaseException]:
        """Fire an event of `EACH`; return what was raised, attributed."""
        failures: list[BaseException] = getattr(self._manager.hook, event)(**arguments)
        for error in failures:
            self.attribute(error)
        return failures

    def intercept(
        self,
        event: Callable[[str, Mapping[str, Any]], AbstractContextManager[None]],
        implementation: Callable[[str, Callable[..., Any]], Callable[..., Any]],
    ) -> Callable[[], None]:
        """Put `event(name, arguments)` around every event, and `implementation(plugin, function)` in place of every
        function; a wrapper's is a generator function, and so must be what takes its place. Returns what undoes it."""
        calls: list[AbstractContextManager[None]] = []

        def before(name: str, _impls: Any, arguments: Mapping[str, Any]) -> None:
            calls.append(event(name, arguments))
            calls[-1].__enter__()

        def after(_outcome: Any, _name: str, _impls: Any, _arguments: Any) -> None:
            calls.pop().__exit__(None, None, None)

        undo_monitoring = self._manager.add_hookcall_monitoring(before, after)
        unwrap = self.wrap(lambda plugin, _event, function: implementation(plugin, function))

        def undo() -> None:
            undo_monitoring()
            unwrap()

        return undo

    def wrap(self, wrapped: Callable[[str, str, Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
        """Put `wrapped(plugin, event, function)` in place of every function, around what others have put there; a
        wrapper's is a generator function, and so must be what takes its place. Returns what undoes it, in any order."""
        self._layers.append(wrapped)
        self._rewrap()

        def undo() -> None:
            if wrapped in self._layers:
                self._layers.remove(wrapped)
                self._rewrap()

        return undo

    def _rewrap(self) -> None:
        for event in self.event_names():
            for impl in self._caller(event).get_hookimpls():
                function = self._originals.setdefault(impl, impl.function)
                for wrapped in self._layers:
                    function = wrapped(impl.plugin_name, event, function)
                _replace(impl, function)

    def attribute(self, error: BaseException, place: str = "") -> None:
        """Note on an exception which plugin raised it, in which event. Costs nothing until something fails."""
        notes = getattr(error, "__notes__", [])
        if isinstance(error, UserError) or any(note.startswith("raised in plugin") for note in notes):
            return
        codes: dict[CodeType, list[Any]] = {}
        for event in self.event_names():
            for impl in self._caller(event).get_hookimpls():
                codes.setdefault(inspect.unwrap(impl.function).__code__, []).append(impl)
        for frame, _ in reversed(list(walk_tb(error.__traceback__))):  # innermost first: wrappers only passed it on
            for impl in codes.get(frame.f_code, []):
                if frame.f_locals.get("self", impl.plugin) is impl.plugin:
                    cls = type(impl.plugin)
                    error.add_note(
                        f"raised in plugin '{impl.plugin_name}' ({source_of(cls.__module__)}:{cls.__qualname__}), "
                        f"event {impl.function.__name__}{place}"
                    )
                    return
        if place:
            error.add_note(f"raised outside of any plugin's event{place}")

    def _caller(self, event: str) -> pluggy.HookCaller:
        return cast(pluggy.HookCaller, getattr(self._manager.hook, event))

    def _add_published(self) -> None:
        """The events that plugins publish, each class of them once."""
        owners = dict.fromkeys(self.event_names(), "")
        seen: set[type] = set()
        for name, plugin in self.plugins.items():
            source = declared(plugin).events
            if source is None or source in seen:
                continue
            seen.add(source)
            for event in published(type(plugin)):
                if event in owners:
                    raise self._wrong(name, self._published_twice(event, owners[event], name))
                owners[event] = name
            self._manager.add_hookspecs(source())

    def _published_twice(self, event: str, first: str, second: str) -> str:
        said = f"{self._described(second)} publishes '{event}', an event of"
        if not first:
            return f"{said} the kernel; rename it, or remove the plugin with `{second}: null`"
        return (
            f"{said} {self._described(first)}; rename one of them, or remove one of the two plugins from the config, "
            f"with `{first}: null` or `{second}: null`"
        )

    def _described(self, name: str) -> str:
        """A plugin as a message names it: its key, what it came with, and its class."""
        from detkernel.catalog import Catalog  # here, since only a mistake needs it

        cls = type(self.plugins[name])
        entry = Catalog().entry_of(cls)
        owner = f" of {entry.distribution} {entry.version}" if entry else ""
        return f"plugin '{name}'{owner} ({source_of(cls.__module__)}:{cls.__qualname__})"

    def _wrong(self, name: str, message: str) -> CatalogError:
        """An error that a plugin is the cause of, with the place where the config names it."""
        origin = getattr(self.plugins[name], "__detkernel_origin__", None)
        return CatalogError(message if origin is None else str(Problem(origin.places[""], "", message)))

    def _register(self, name: str) -> None:
        plugin = self.plugins[name]
        try:
            self._manager.register(plugin, name)
        except pluggy.PluginValidationError as error:
            problem = self._unknown_argument(plugin) or " ".join(str(error).split())
            raise self._wrong(name, f"{self._described(name)}: {problem}") from None

    def _sort(self, event: str, ordered: Sequence[str]) -> None:
        """Let plugins of one kind (`trylast`, say) run by priority: pluggy has its `trylast`s in reverse."""
        impls: list[pluggy.HookImpl] = self._caller(event)._hookimpls
        rank = {name: -place for place, name in enumerate(ordered)}
        impls.sort(
            key=lambda impl: (impl.wrapper or impl.hookwrapper, impl.tryfirst - impl.trylast, rank[impl.plugin_name])
        )

    def _unknown_argument(self, plugin: object) -> str:
        for event in self.event_names():
            method = getattr(type(plugin), event, None)
            if method is None or not self._caller(event).has_spec():
                continue
            known = [name for name in inspect.signature(self.spec(event)).parameters if name != "self"]
            for argument in list(inspect.signature(method).parameters)[1:]:
                if argument not in known:
                    near = did_you_mean(argument, known)
                    return f"{event} takes '{argument}', which this event does not give{near}"
        return ""

    def _check_events(self) -> None:
        known = self.event_names()
        for event in known:
            caller = self._caller(event)
            if not caller.has_spec():
                for impl in caller.get_hookimpls():
                    if not impl.optionalhook:
                        said = f"{self._described(impl.plugin_name)} implements '{event}'"
                        declared = [name for name in known if self._caller(name).has_spec()]
                        raise self._wrong(impl.plugin_name, f"{said}, which is {no_event(event, declared)}")

    def _check_bare(self) -> None:
        """A method that is called like an event, and that its author forgot to decorate, would never be called."""
        declared = [event for event in self.event_names() if self._caller(event).has_spec()]
        for name, plugin in self.plugins.items():
            for event in declared:
                owner = next((base for base in type(plugin).__mro__ if event in vars(base)), None)
                if owner is None or not is_plugin(owner):  # a base class of another library may well have a `setup`
                    continue
                method = vars(owner)[event]
                if inspect.isroutine(method) and not hasattr(method, f"{PROJECT}_impl"):
                    said = f"{self._described(name)}: `{event}` is an event"
                    raise self._wrong(name, f"{said}; decorate it with @hookimpl, or rename it")


_EXAMPLES = {
    "build_model": "`model: {use: NAME}`",
    "build_loader": "`data: {use: loader, train: {use: shapes}}`",
    "train_step": "`model: {use: NAME}`",
    "val_step": "`model: {use: NAME}`",
}


def no_event(event: str, declared: Sequence[str]) -> str:
    """What to say of a name that is not an event of a run: an installed plugin that is not active may publish it."""
    from detkernel.catalog import Catalog

    publishers = Catalog().publishers().get(event)
    if publishers:
        return f"an event that no active plugin publishes; add one of these to the config: {', '.join(publishers)}"
    return f"not an event{did_you_mean(event, declared)}; `detkernel hooks` lists them all"


def _replace(impl: Any, function: Callable[..., Any]) -> None:
    setattr(impl, "function", function)  # noqa: B010 - final to type checkers only
