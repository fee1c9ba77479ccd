"""Who is called, in which order, and to whom a failure is put down."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from detkernel import CatalogError, UserError, hookimpl, hookspec, option, plugin
from detkernel.bus import Bus
from detkernel.hookspecs import Events
from detkernel.plugin import PRIORITIES

Plant = Callable[..., Path]
Write = Callable[[str, str], Path]
Detkernel = Callable[..., subprocess.CompletedProcess[str]]


@plugin
class Speaks:
    """Says its name."""

    name: str = option(default="", help="its name")
    said: Any = option(default=None, help="where it is said")

    @hookimpl
    def setup(self) -> None:
        self.said.append(self.name)


@plugin
class First(Speaks):
    """Before all others."""

    @hookimpl(tryfirst=True)
    def setup(self) -> None:
        self.said.append(self.name)


@plugin
class Last(Speaks):
    """Behind all others."""

    @hookimpl(trylast=True)
    def setup(self) -> None:
        self.said.append(self.name)


@plugin
class Wraps(Speaks):
    """Around all others."""

    @hookimpl(wrapper=True)
    def setup(self) -> Iterator[None]:
        self.said.append(f"{self.name} in")
        yield
        self.said.append(f"{self.name} out")


@plugin
class Builds:
    """Builds a model."""

    @hookimpl
    def build_model(self) -> object:
        return "model"


@plugin
class Loads:
    """Makes a loader, and a step."""

    @hookimpl
    def build_loader(self) -> object:
        return "loader"

    @hookimpl
    def train_step(self) -> dict[str, float]:
        return {"loss": 1.0}


def order(plugins: Mapping[str, tuple[type, str]]) -> list[str]:
    """What is said when plugins of these classes and priorities are set up, in this order in the config."""
    said: list[str] = []
    made = {name: cls(name=name, said=said) for name, (cls, _) in plugins.items()}
    bus = Bus(made, {name: priority for name, (_, priority) in plugins.items() if priority})
    bus.events.setup(run=None)
    return said


def refusal(plugins: Mapping[str, object]) -> str:
    with pytest.raises(CatalogError) as caught:
        Bus(plugins).require_providers()
    return str(caught.value)


def named(plugin: object) -> str:
    """A plugin's class as messages say it."""
    return f"({type(plugin).__module__}:{type(plugin).__qualname__})"


class TestOrder:
    def test_by_priority(self):
        names = list(PRIORITIES)
        shuffled = names[::2] + names[1::2]
        assert order({name: (Speaks, name) for name in shuffled}) == names

    def test_ties_in_config_order(self):
        assert order(dict.fromkeys("cab", (Speaks, ""))) == ["c", "a", "b"]
        assert order({name: (Speaks, "low" if name in "xz" else "") for name in "xcyaz"}) == ["c", "y", "a", "x", "z"]

    def test_the_config_overrides_the_class(self):
        @plugin(priority="low")
        class Late(Speaks):
            """Late by itself."""

            @hookimpl
            def setup(self) -> None:
                self.said.append(self.name)

        assert order({"late": (Late, ""), "a": (Speaks, "")}) == ["a", "late"]
        assert order({"late": (Late, "high"), "a": (Speaks, "")}) == ["late", "a"]

    def test_first_and_last_go_beyond_every_priority(self):
        plugins = {"z": (Last, "highest"), "a": (Speaks, "highest"), "b": (Speaks, "lowest"), "y": (First, "lowest")}
        assert order(plugins) == ["y", "a", "b", "z"]

    def test_of_two_firsts_the_priority_decides(self):
        assert order({"a": (First, "low"), "b": (First, "high"), "c": (First, "high")}) == ["b", "c", "a"]
        assert order({"a": (Last, "low"), "b": (Last, "high"), "c": (Last, "high")}) == ["b", "c", "a"]

    def test_a_wrapper_goes_around_all(self):
        plugins = {"a": (Speaks, "highest"), "w": (Wraps, "low"), "v": (Wraps, "high"), "b": (First, "")}
        assert order(plugins) == ["v in", "w in", "b", "a", "w out", "v out"]

    def test_it_can_be_asked_for(self):
        said: list[str] = []
        classes = {"l": Last, "s": Speaks, "w": Wraps, "f": First}
        bus = Bus({name: cls(name=name, said=said) for name, cls in classes.items()}, {"s": "low"})
        assert [(impl.name, impl.priority, impl.kind) for impl in bus.implementations("setup")] == [
            ("w", "normal", "wrapper"),
            ("f", "normal", "first"),
            ("s", "low", ""),
            ("l", "normal", "last"),
        ]

    def test_the_first_result_wins(self):
        @plugin
        class Answers:
            """Gives a loader, or not."""

            value: Any = option(default=None, help="what")

            @hookimpl
            def build_loader(self, mode: str) -> Any:
                return self.value if mode == "train" else None

        bus = Bus({"a": Answers(), "b": Answers(value=0), "c": Answers(value=1)})
        assert bus.events.build_loader(run=None, mode="train") == 0
        assert bus.events.build_loader(run=None, mode="val") is None


class TestMistakes:
    def test_a_misspelt_event(self):
        @plugin
        class Typo:
            """It has one."""

            @hookimpl
            def before_trian_iter(self) -> None: ...

        assert refusal({"mine": Typo()}) == (
            f"plugin 'mine' {named(Typo())} implements 'before_trian_iter', "
            "which is not an event, did you mean 'before_train_iter'?; `detkernel hooks` lists them all"
        )

    def test_an_event_like_no_other(self):
        @plugin
        class Typo:
            """It has one."""

            @hookimpl
            def qqqqq(self) -> None: ...

        assert refusal({"mine": Typo()}).endswith(
            "implements 'qqqqq', which is not an event; `detkernel hooks` lists them all"
        )

    def test_an_argument_that_the_event_does_not_give(self):
        @plugin
        class Typo:
            """It has one."""

            @hookimpl
            def after_train_iter(self, run: Any, bacth: Any) -> None: ...

        assert refusal({"mine": Typo()}).endswith(
            "Typo): after_train_iter takes 'bacth', which this event does not give, did you mean 'batch'?"
        )

    def test_a_wrapper_that_does_not_yield(self):
        @plugin
        class Stuck:
            """It does not yield."""

            @hookimpl(wrapper=True)
            def setup(self) -> None: ...

        message = refusal({"mine": Stuck()})
        assert message.startswith(f"plugin 'mine' {named(Stuck())}: ")
        assert "not a generator function" in message
        assert "\n" not in message

    def test_an_event_may_be_optional(self):
        @plugin
        class Optional:
            """It answers what another plugin may publish."""

            @hookimpl(optionalhook=True)
            def metrics_ready(self, metrics: Any) -> None: ...

        Bus({"mine": Optional()})

    def test_two_that_build_the_model(self):
        assert refusal({"model": Builds(), "other": Builds(), "data": Loads()}) == (
            "2 plugins build the model: 'model' and 'other'; keep one and remove the other with `other: null`"
        )

    def test_a_wrapper_builds_no_model(self):
        @plugin
        class Changes:
            """It changes a model."""

            @hookimpl(wrapper=True)
            def build_model(self) -> Iterator[None]:
                return f"changed {(yield)}"

        bus = Bus({"model": Builds(), "changes": Changes(), "data": Loads()})
        bus.require_providers()
        assert bus.events.build_model(run=None) == "changed model"
        assert "no active plugin provides build_model" in refusal({"changes": Changes(), "data": Loads()})

    @pytest.mark.parametrize(
        ("plugins", "event", "example"),
        [
            ({}, "build_model", "`model: {use: NAME}`"),
            ({"data": Loads()}, "build_model", "`model: {use: NAME}`"),
            ({"model": Builds()}, "build_loader", "`data: {use: loader, train: {use: shapes}}`"),
        ],
    )
    def test_none_that_does_what_is_needed(self, plugins: dict[str, object], event: str, example: str):
        assert refusal(plugins) == (
            f"no active plugin provides {event}; active are {', '.join(plugins) or 'none'}. "
            f"Add one to the config, such as {example}; `detkernel plugins` lists what is installed"
        )

    def test_only_the_class_is_looked_at_for_events(self):
        @plugin
        class Careful:
            """Its property must not be asked for while it is registered."""

            @property
            def setup(self) -> None:
                raise AssertionError

        Bus({"careful": Careful()})


class Ready:
    @hookspec
    def results_ready(self, metrics: Mapping[str, float]) -> None:
        """The metrics of a validation are there."""

    @hookspec(firstresult=True)
    def choose(self, name: str) -> str | None:
        """Choose one."""


@plugin(events=Ready)
class Publishes:
    """It publishes events."""


@plugin
class Hears:
    """It answers them."""

    heard: Any = option(default=None, help="what it heard")

    @hookimpl
    def results_ready(self, metrics: Mapping[str, float]) -> None:
        self.heard.append(dict(metrics))

    @hookimpl
    def choose(self, name: str) -> str:
        return name.upper()


class TestPublished:
    @pytest.mark.parametrize("reverse", [False, True])
    def test_events_of_a_plugin_reach_all_whatever_their_order(self, reverse: bool):
        heard: list[Any] = []
        plugins = {"hears": Hears(heard=heard), "publishes": Publishes()}
        bus = Bus(dict(reversed(plugins.items())) if reverse else plugins)
        bus.publish("results_ready", metrics={"ap": 0.5})
        assert heard == [{"ap": 0.5}]
        assert bus.publish("choose", name="a") == "A"

    def test_they_are_listed_behind_the_kernels(self):
        names = Bus({"publishes": Publishes()}).event_names()
        assert names[-2:] == ["choose", "results_ready"]
        assert names[:2] == ["setup", "build_loader"]
        assert Bus({"publishes": Publishes()}).spec("choose").__doc__ == "Choose one."

    def test_without_the_publisher_they_are_no_events(self):
        assert "implements 'choose', which is not an event" in refusal({"hears": Hears()})

    def test_two_plugins_of_one_class_publish_once(self):
        heard: list[Any] = []
        bus = Bus({"a": Publishes(), "b": Publishes(), "hears": Hears(heard=heard)})
        bus.publish("results_ready", metrics={})
        assert heard == [{}]

    def test_two_that_publish_one_name(self):
        class Other:
            @hookspec
            def choose(self, name: str) -> str:
                """Another one."""

        @plugin(events=Other)
        class AlsoPublishes:
            """It publishes an event of the same name."""

        first, second = Publishes(), AlsoPublishes()
        assert refusal({"first": first, "second": second}) == (
            f"plugin 'second' {named(second)} publishes 'choose', an event of plugin 'first' {named(first)}; rename "
            "one of them, or remove one of the two plugins from the config, with `first: null` or `second: null`"
        )

    def test_one_that_publishes_an_event_of_the_kernel(self):
        class Other:
            @hookspec
            def before_run(self, run: Any) -> None:
                """Another one."""

        @plugin(events=Other)
        class AlsoPublishes:
            """It publishes an event of the kernel's name."""

        assert refusal({"mine": AlsoPublishes()}) == (
            f"plugin 'mine' {named(AlsoPublishes())} publishes 'before_run', an event of the kernel; rename it, or "
            "remove the plugin with `mine: null`"
        )

    def test_distributions_are_named(self, plant: Plant, write: Write, detkernel: Detkernel):
        for letter in "ab":
            plant(f"dist-{letter}", {f"ev_{letter}.py": PUBLISHER}, plugins={f"ev_{letter}": f"ev_{letter}:Best"})
        plant("dist-c", {"ev_c.py": LISTENER}, plugins={"ev_c": "ev_c:Listener"}, version="3.0")
        write("two.yaml", "run: {until: 1 epoch}\nev_a: {}\nother: {use: ev_b}\n")
        result = detkernel("hooks", "two.yaml")
        assert (result.returncode, result.stderr.partition(";")[0]) == (
            2,
            "error: two.yaml:3:8: plugin 'other' of dist-b 1.0 (ev_b:Best) publishes 'new_best', "
            "an event of plugin 'ev_a' of dist-a 1.0 (ev_a:Best)",
        )
        assert result.stderr.endswith("with `ev_a: null` or `other: null`\n    other: {use: ev_b}\n           ^\n")
        write("none.yaml", "run: {until: 1 epoch}\nhears: {use: ev_c}\n")
        result = detkernel("hooks", "none.yaml")
        assert (result.returncode, result.stderr) == (
            2,
            "error: none.yaml:2:8: plugin 'hears' of dist-c 3.0 (ev_c:Listener) implements 'new_best', which is an "
            "event that no active plugin publishes; add one of these to the config: ev_a, ev_b\n"
            "    hears: {use: ev_c}\n           ^\n",
        )

    def test_a_broken_plugin_hides_no_publisher(self, plant: Plant):
        plant("broken", {"ev_broken.py": "1 / 0\n"}, plugins={"a_broken": "ev_broken:X"})
        plant("dist-d", {"ev_d.py": PUBLISHER}, plugins={"ev_d": "ev_d:Best"})

        @plugin
        class Listens:
            """It answers an event of a plugin that is not active."""

            @hookimpl
            def new_best(self) -> None: ...

        assert refusal({"mine": Listens()}).endswith("add one of these to the config: ev_d")


PUBLISHER = dedent("""
    from detkernel import hookspec, plugin

    class Events:
        @hookspec
        def new_best(self, loss):
            'A new low.'

    @plugin(events=Events)
    class Best:
        'Announces it.'
    """)
LISTENER = dedent("""
    from detkernel import hookimpl, plugin

    @plugin
    class Listener:
        'Hears it.'

        @hookimpl
        def new_best(self, loss): ...
    """)


class TestBareMethods:
    def test_one_called_like_an_event_of_the_kernel(self):
        @plugin
        class Forgot:
            """It has no decorator."""

            def after_train_iter(self) -> None: ...

        assert refusal({"mine": Forgot()}) == (
            f"plugin 'mine' {named(Forgot())}: `after_train_iter` is an event; decorate it with @hookimpl, or rename it"
        )

    def test_one_called_like_an_event_of_a_plugin(self):
        @plugin
        class Forgot:
            """It has no decorator."""

            def choose(self, name: str) -> str:
                return name

        Bus({"mine": Forgot()})
        assert "`choose` is an event" in refusal({"mine": Forgot(), "publishes": Publishes()})

    def test_one_that_takes_its_parents_out_of_the_event(self):
        @plugin
        class Child(Speaks):
            """It forgot to decorate what its parent did."""

            def setup(self) -> None: ...

        assert f"{named(Child())}: `setup` is an event" in refusal({"mine": Child()})

    def test_what_is_meant_as_it_is(self):
        class Library:
            def setup(self) -> None:
                """Nothing of detkernel's."""

        @plugin
        class Valid(Library, Speaks):
            """A base of another library, a name of its own, a field and a property."""

            summary: str = option(default="", help="a word")

            @hookimpl(wrapper=True, specname="after_run")
            def _around(self) -> Iterator[None]:
                yield

            @hookimpl(specname="before_run")
            def after_run(self) -> None: ...

            @property
            def on_error(self) -> None: ...

        Bus({"valid": Valid()})


@plugin
class Fails:
    """It fails."""

    error: Any = option(default=None, help="with this")

    @hookimpl
    def setup(self) -> None:
        self.helper()

    def helper(self) -> None:
        raise self.error

    @hookimpl
    def after_run(self) -> None:
        raise self.error


class TestFailures:
    def noted(self, plugins: Mapping[str, object], error: BaseException, place: str = "") -> list[str]:
        bus = Bus(plugins)
        with pytest.raises(type(error)) as caught:
            bus.events.setup(run=None)
        bus.attribute(caught.value, place)
        return getattr(caught.value, "__notes__", [])

    def test_they_name_plugin_class_event_and_iteration(self):
        said: list[str] = []
        plugins = {"w": Wraps(name="w", said=said), "a": Speaks(said=said), "mine": Fails(error=KeyError("x"))}
        notes = self.noted(plugins, KeyError(), ", iteration 7")
        assert notes == [f"raised in plugin 'mine' ({Fails.__module__}:Fails), event setup, iteration 7"]

    def test_of_two_of_one_class_the_right_one(self):
        @plugin
        class Counts:
            """Fails when its number comes up."""

            number: int = option(default=0, help="its number")

            @hookimpl
            def setup(self, run: Any) -> None:
                assert run != self.number

        bus = Bus({"one": Counts(number=1), "two": Counts(number=2), "three": Counts(number=3)})
        with pytest.raises(AssertionError) as caught:
            bus.events.setup(run=2)
        bus.attribute(caught.value)
        assert caught.value.__notes__[-1].startswith("raised in plugin 'two' (")

    def test_one_noted_already_is_left_alone(self):
        bus = Bus({"mine": Fails(error=KeyError("x"))})
        for _ in range(3):
            with pytest.raises(KeyError) as caught:
                bus.events.setup(run=None)
            bus.attribute(caught.value)
        assert len(caught.value.__notes__) == 1

    def test_a_users_mistake_needs_no_plugin(self):
        assert self.noted({"mine": Fails(error=UserError("your folder"))}, UserError()) == []

    def test_one_outside_of_all_plugins(self):
        error = KeyError("x")
        Bus({}).attribute(error, ", iteration 3")
        assert error.__notes__ == ["raised outside of any plugin's event, iteration 3"]


class TestEach:
    @pytest.mark.parametrize("event", ["on_error", "after_run"])
    def test_every_plugin_is_reached(self, event: str):
        reached: list[str] = []

        @plugin
        class Reached:
            """It is reached, and fails."""

            name: str = option(default="", help="its name")

            @hookimpl
            def on_error(self, error: BaseException) -> None:
                reached.append(self.name)
                raise RuntimeError(self.name)

            @hookimpl
            def after_run(self) -> None:
                reached.append(self.name)
                raise RuntimeError(self.name)

        bus = Bus({name: Reached(name=name) for name in "abc"}, {"c": "high"})
        arguments = {"run": None, "error": KeyError()} if event == "on_error" else {"run": None}
        failures = bus.each(event, **arguments)
        assert reached == [str(error) for error in failures] == ["c", "a", "b"]
        assert [error.__notes__[0].split(" (")[0] for error in failures] == [f"raised in plugin '{n}'" for n in "cab"]


class TestLookup:
    def test_plugins_by_key_and_by_kind(self):
        first, second = Builds(), Loads()
        bus = Bus({"a": first, "b": second})
        assert bus["a"] is first
        assert list(bus.find(Loads)) == [("b", second)]

    def test_those_with_state(self):
        @plugin
        class Keeps:
            """It has state."""

            def state_dict(self) -> dict[str, int]:
                return {}

            def load_state_dict(self, state: Mapping[str, int]) -> None: ...

        kept = Keeps()
        assert list(Bus({"a": Builds(), "k": kept}).stateful()) == [("k", kept)]

    def test_every_event_of_the_kernel_is_there(self):
        names = [name for name in vars(Events) if not name.startswith("_")]
        assert Bus({}).event_names() == names
        assert "on_error" in names


class TestIntercept:
    def test_calls_are_seen_and_let_go_again(self):
        said: list[str] = []
        seen: list[str] = []
        bus = Bus({name: Speaks(name=name, said=said) for name in "ab"} | {"w": Wraps(name="w", said=said)})

        from contextlib import contextmanager

        @contextmanager
        def event(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
            seen.append(f"{name} {sorted(arguments)}")
            yield
            seen.append(f"/{name}")

        def implementation(name: str, function: Any) -> Any:
            def call(*arguments: Any) -> Any:
                seen.append(name)
                return function(*arguments)

            return call

        undo = bus.intercept(event, implementation)
        bus.events.setup(run=None)
        undo()
        bus.events.setup(run=None)
        assert seen == ["setup ['run']", "w", "a", "b", "/setup"]
        assert said == ["w in", "a", "b", "w out"] * 2


class TestDeprecatedArguments:
    def test_one_who_takes_it_is_warned_with_the_place(self):
        class NewEvents:
            @hookspec(warn_on_impl_args={"loss": DeprecationWarning("`loss` of new_best goes with 0.2; take `value`")})
            def new_best(self, value, loss):
                """The loss has reached a new low."""

        @plugin(events=NewEvents)
        class Best:
            """Publishes it."""

        @plugin
        class Old:
            """Takes the argument of before."""

            @hookimpl
            def new_best(self, loss):
                return loss

        @plugin
        class Today:
            """Takes the one of today."""

            @hookimpl
            def new_best(self, value):
                return value

        with pytest.warns(DeprecationWarning, match="`loss` of new_best goes with 0.2; take `value`") as warned:
            bus = Bus({"best": Best(), "old": Old()})
        assert warned[0].filename == __file__
        assert bus.publish("new_best", value=1, loss=2) == [2]
        assert Bus({"best": Best(), "today": Today()}).publish("new_best", value=1, loss=2) == [1]
