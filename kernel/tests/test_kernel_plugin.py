"""What `@plugin` makes of a class, and what it refuses to make one of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from detkernel import ConfigError, Part, RunOptions, Span, UserError, declared, hookimpl, option, plugin, state, wrong
from detkernel.errors import DefinitionError
from detkernel.plugin import PRIORITIES, Declared, bound_problem, is_plugin


@plugin(priority="low")
class Example:
    """It shows options and state.

    At length.
    """

    count: int = option(default=3, at_least=1, help="how many")
    name: str = option(help="which")
    items: list[int] = option(factory=list, at_most=9, help="some")
    _seen: int = state(default=0)
    _kept: list[int] = state(factory=list)

    @hookimpl
    def setup(self) -> None: ...


class TestGood:
    def test_options_are_given_by_keyword_and_state_is_not(self):
        made = Example(name="a")
        assert (made.count, made.items, made._seen) == (3, [], 0)
        with pytest.raises(TypeError):
            Example("a")
        with pytest.raises(TypeError):
            Example(name="a", seen=3)

    def test_factories_make_a_new_object_each_time(self):
        first, second = Example(name="a"), Example(name="a")
        first.items.append(1)
        first._kept.append(1)
        assert (second.items, second._kept) == ([], [])

    def test_two_of_the_same_options_are_two(self):
        assert Example(name="a") != Example(name="a")
        assert len({Example(name="a"), Example(name="a")}) == 2

    def test_its_text_shows_options_only(self):
        assert repr(Example(name="a")) == "Example(count=3, name='a', items=[])"

    def test_it_takes_attributes_that_it_did_not_declare(self):
        made = Example(name="a")
        made.later = 3
        assert made.later == 3

    def test_a_child_must_be_made_one_again(self):
        class Child(Example):
            """A child."""

        assert is_plugin(Example)
        assert not is_plugin(Child)
        assert is_plugin(plugin(Child))
        assert not is_plugin(Example(name="a"))

    def test_a_required_option_may_follow_one_with_a_default(self):
        assert [field.default is attrs.NOTHING for field in attrs.fields(Example)][:2] == [False, True]


class TestRefused:
    def test_one_without_a_docstring(self):
        with pytest.raises(
            TypeError, match=r"^Bare: a plugin needs a docstring; its first line is what users are shown$"
        ):

            @plugin
            class Bare: ...

    def test_one_with_its_parents_docstring_only(self):
        with pytest.raises(TypeError, match="needs a docstring"):

            @plugin
            class Child(Example):
                more: int = option(default=1, help="more")

    @pytest.mark.parametrize("name", ["width", "_width"])
    def test_a_field_that_is_neither_option_nor_state(self, name: str):
        cls = type("Loose", (), {"__doc__": "Loose.", "__annotations__": {name: int}, name: 3})
        with pytest.raises(TypeError, match=rf"^Loose\.{name}: write it as option\(\.\.\., help='\.\.\.'\)"):
            plugin(cls)

    def test_an_attrs_field(self):
        with pytest.raises(TypeError, match=r"Loose\.width: write it as option"):

            @plugin
            class Loose:
                """It has a field of attrs."""

                width: int = attrs.field(default=3)

    @pytest.mark.parametrize("name", ["use", "priority", "_hidden"])
    def test_an_option_that_no_config_could_set(self, name: str):
        members = {"__doc__": "Taken.", "__annotations__": {name: str}, name: option(default="", help="h")}
        with pytest.raises(TypeError, match=rf"^Taken\.{name}: no option may have this name; choose another$"):
            plugin(type("Taken", (), members))

    def test_an_unknown_priority(self):
        with pytest.raises(TypeError, match=r"^Hasty: priority: expected one of highest, .* lowest, got 'first'$"):

            @plugin(priority="first")
            class Hasty:
                """It is in a hurry."""

    def test_an_option_without_a_type(self):
        with pytest.raises(
            TypeError, match=r"^Bare\.width: an option needs a type, such as `width: int = option\(...\)`$"
        ):

            @plugin
            class Bare:
                """Its option has none."""

                width = option(default=1, help="how wide")

    @pytest.mark.parametrize("name", ["requires", "needs", "provides"])
    def test_one_name_in_place_of_a_tuple(self, name: str):
        with pytest.raises(
            DefinitionError, match=rf"^Alone: {name}: expected a tuple of names, got 'ema'; write \('ema',\)$"
        ):
            plugin(**{name: "ema"})(type("Alone", (), {"__doc__": "Alone."}))

    @pytest.mark.parametrize(
        ("said", "problem"),
        [
            ({"resume_neutral": ("widht",)}, r"resume_neutral: there is no 'widht', did you mean 'width'\?"),
            ({"resume_neutral": "*"}, r"resume_neutral: expected a tuple of names, got '\*'; write \('\*',\)"),
            ({"loaders": 3}, "loaders: expected a tuple of names, got 3$"),
            ({"resume_netural": ("*",)}, r"@plugin has no argument 'resume_netural', did you mean 'resume_neutral'\?"),
            ({"Priority": "high"}, r"@plugin has no argument 'Priority', did you mean 'priority'\?"),
            ({"state_per_rank": 1}, "state_per_rank: expected True or False, got 1"),
            ({"key": ("model",)}, r"key: expected text, got \('model',\)"),
            ({"events": "Own"}, "events: expected a class of @hookspec methods, got 'Own'"),
        ],
    )
    def test_an_argument_that_is_wrong(self, said: dict[str, Any], problem: str):
        members = {"__doc__": "Odd.", "__annotations__": {"width": int}, "width": option(default=1, help="h")}
        with pytest.raises(DefinitionError, match=rf"^Odd: {problem}"):
            plugin(**said)(type("Odd", (), members))

    def test_an_attribute_says_the_same_as_an_argument(self):
        base = type("Base", (Part,), {"__doc__": "A kind.", "priority": "low", "loaders": ("more",)})
        child = plugin(type("Child", (base,), {"__doc__": "A child.", "priority": "high", "needs": ["masks"]}))
        assert declared(child) == Declared(priority="high", needs=("masks",), loaders=("more",))
        grandchild = plugin(type("Grandchild", (child,), {"__doc__": "A grandchild.", "state_per_rank": True}))
        assert declared(grandchild) == attrs.evolve(declared(child), state_per_rank=True)

    @pytest.mark.parametrize(
        ("members", "problem"),
        [
            ({"priority": "first"}, ": priority: expected one of highest, .*, got 'first'"),
            ({"needs": "masks"}, r": needs: expected a tuple of names, got 'masks'; write \('masks',\)"),
            ({"key": "model"}, r"\.key: is said twice, with @plugin\(key=\.\.\.\) too"),
        ],
    )
    def test_an_attribute_that_is_wrong(self, members: dict[str, Any], problem: str):
        with pytest.raises(DefinitionError, match=f"^Odd{problem}"):
            plugin(key="optimizer")(type("Odd", (), {"__doc__": "Odd.", **members}))

    def test_a_subclass_has_what_its_base_declared(self):
        @plugin(priority="low", needs=("masks",))
        class Base:
            """A base."""

        @plugin(priority="high", resume_neutral=["width"])
        class Child(Base):
            """A child."""

            width: int = option(default=1, help="how wide")

        assert declared(Child()) == Declared(priority="high", needs=("masks",), resume_neutral=("width",))
        assert declared(Base) == Declared(priority="low", needs=("masks",))
        assert declared(object()) == Declared()

    @pytest.mark.parametrize(
        ("members", "said"),
        [
            ({"resume_netural": ("*",)}, r"resume_netural: is @plugin\(resume_neutral=\('\*',\)\) meant"),
            ({"need": ("masks",)}, r"need: is @plugin\(needs=\('masks',\)\) meant"),
            ({"scale_only": True}, "scale_only: is `scales_only` meant"),
        ],
    )  # fmt: skip
    def test_a_name_that_nobody_would_read(self, members: dict[str, object], said: str):
        class Kind(Part):
            """A kind."""

            scales_only = False

        given = {"__doc__": "Odd.", "__annotations__": {"width": int}, "width": option(default=1, help="h"), **members}
        with pytest.raises(DefinitionError, match=rf"^Odd\.{said}"):
            plugin(type("Odd", (Kind,), given))

    @pytest.mark.parametrize(
        ("default", "said"),
        [
            ({"default": []}, r"a default of \[\] would be one list for all; write factory=list"),
            ({"default": {"a": 1}}, r"a default of {'a': 1} would be one dict for all; write factory=lambda: {'a': 1}"),
            ({"default": 0, "at_least": 1}, "its own default is refused: expected at least 1, got 0"),
            ({"default": "c", "choices": ("a", "b")}, "its own default is refused: expected one of a, b, got 'c'"),
        ],
    )
    def test_a_default_that_would_surprise(self, default: dict[str, object], said: str):
        members = {"__doc__": "Odd.", "__annotations__": {"x": Any}, "x": option(help="h", **default)}
        with pytest.raises(DefinitionError, match=rf"^Odd\.x: {said}$"):
            plugin(type("Odd", (), members))

    @pytest.mark.parametrize("more", [{"default": 3, "factory": int}, {"factory": []}])
    def test_a_factory_that_is_none(self, more: dict[str, Any]):
        with pytest.raises(DefinitionError, match=r"option\(\): give either a `default` or a `factory`"):
            option(help="h", **more)

    def test_attributes_of_its_own(self):
        @plugin(resume_neutral=("*",), needs=("masks", "boxes"))
        class Own:
            """It has some."""

            background: ClassVar[bool] = True
            keys = (1, 2)

            @property
            def need(self) -> int:
                return 3

        assert Own().need == 3

    def test_it_is_a_users_mistake_and_a_type_error(self):
        assert issubclass(DefinitionError, UserError)
        assert issubclass(DefinitionError, TypeError)

    def test_an_option_needs_help(self):
        with pytest.raises(TypeError):
            option(default=3)  # type: ignore[call-arg]


class TestText:
    """Paths and spans are given as text in a config, and may be in Python."""

    @pytest.mark.parametrize("future", [True, False])
    def test_it_becomes_what_the_option_is(self, future: bool):
        types = {
            "path": Path, "maybe": Path | None, "many": list[Path], "named": dict[str, int], "text": str,
            "either": Path | str, "length": Span, "pair": tuple[Path, Path] | None,
        }  # fmt: skip
        shown = {name: getattr(kind, "__name__", str(kind)) for name, kind in types.items()}
        written = {name: str(kind).replace("pathlib.", "") for name, kind in types.items()}
        written |= {name: shown[name] for name in ("path", "length", "text")}
        options = {name: option(default=None, help="h") for name in types}
        members = {"__doc__": "Odd.", "__annotations__": written if future else types, **options}
        made = plugin(type("Odd", (), members))(
            path="~/a", maybe="b", many=["c"], text="d", either="e", length="3 epochs", pair=("f", "g")
        )
        assert (made.path, made.maybe, made.many) == (Path.home() / "a", Path("b"), [Path("c")])
        assert (made.text, made.either, made.length) == ("d", "e", Span(3, "epochs"))
        assert made.pair == (Path("f"), Path("g"))
        assert made.named is None
        made.maybe = "later"
        assert made.maybe == Path("later")

    def test_a_span_that_is_none(self):
        with pytest.raises(ValueError, match="expected a length with its unit"):
            RunOptions(until="12")
        assert RunOptions(until="12 epochs").until == Span(12, "epochs")


class TestBounds:
    @pytest.mark.parametrize(
        ("bounds", "good", "bad", "words"),
        [
            ({"at_least": 1}, [1, 2, 1.5], [0, -1, 0.99, float("nan")], "at least 1"),
            ({"at_most": 1}, [1, 0, -5.5], [2, float("inf"), float("nan")], "at most 1"),
            ({"above": 0}, [1, 1e-9], [0, 0.0, -1, float("nan")], "more than 0"),
            ({"below": 1}, [0.999, -1], [1, 1.0, float("nan")], "less than 1"),
            ({"choices": ("a", "b")}, ["a"], ["c", 3, ""], "one of a, b"),
            ({"at_least": 0, "at_most": 1}, [0, 1, 0.5], [-0.1, 1.1], "at"),
        ],
    )
    def test_they_hold_for_values_and_for_each_of_a_list(self, bounds, good, bad, words):
        field = attrs.fields(attrs.make_class("C", {"x": option(default=None, help="h", **bounds)})).x
        for value in good:
            assert bound_problem(field.metadata, value) is None
            assert bound_problem(field.metadata, [value, [value]]) is None
        for value in bad:
            problem = bound_problem(field.metadata, value)
            assert problem is not None
            assert problem.startswith(f"expected {words}")
            assert problem.endswith(f"got {value!r}")
            assert bound_problem(field.metadata, (good[0], [value])) == problem

    def test_null_text_and_maps_pass_them(self):
        metadata = {"at_least": 1, "choices": None}
        assert [bound_problem(metadata, value) for value in (None, "a", {"a": 0}, True)] == [None] * 4

    def test_they_hold_in_python_too(self):
        with pytest.raises(ValueError, match=r"^count: expected at least 1, got 0$"):
            Example(name="a", count=0)
        with pytest.raises(ValueError, match=r"^items: expected at most 9, got 10$"):
            Example(name="a", items=[1, 10])


def test_a_late_error_without_a_config_names_the_class():
    error = wrong(Example(name="a"), "count", "too many")
    assert isinstance(error, ConfigError)
    assert str(error) == "Example: count: too many"


def test_priorities_run_from_low_numbers_to_high():
    assert list(PRIORITIES.values()) == sorted(PRIORITIES.values())
    assert PRIORITIES["normal"] == 50


def test_a_part_is_a_plugin_that_derives_from_a_kind():
    class Body(Part):
        """A kind."""

    @plugin
    class Thin(Body):
        """A thin one."""

    assert issubclass(Thin, Part)
    assert is_plugin(Thin)
    assert not is_plugin(Body)


class TestSpan:
    @pytest.mark.parametrize(
        ("text", "count", "unit"),
        [
            ("12 epochs", 12, "epochs"),
            ("1 epoch", 1, "epochs"),
            ("1epoch", 1, "epochs"),
            ("500 iters", 500, "iters"),
            ("1 iter", 1, "iters"),
            ("90_000 iterations", 90_000, "iters"),
            ("1 iteration", 1, "iters"),
            ("every 5 epochs", 5, "epochs"),
        ],
    )
    def test_reading(self, text: str, count: int, unit: str):
        assert Span.parse(text) == Span(count, unit)
        assert Span.parse(str(Span.parse(text))) == Span(count, unit)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "12",
            "epochs",
            "12 weeks",
            "-1 epochs",
            "1.5 epochs",
            "12 epochs.",
            "twelve epochs",
            "1e3 iters",
            "every epoch",
            "12 epochs 3 iters",
            "9" * 16 + " iters",
            "1__0 iters",
            "１ epoch",
            "12 EPOCHS",
            "12 epochs\n",
        ],
    )
    def test_what_is_none(self, text: str):
        with pytest.raises(ValueError, match="expected a length with its unit, such as '12 epochs' or '500 iters'"):
            Span.parse(text)

    def test_iterations(self):
        assert Span(3, "epochs").iters(7) == 21
        assert Span(3, "iters").iters(7) == 3

    def test_when_it_is_due(self):
        assert [n for n in range(10) if Span(3, "iters").due(n, 4)] == [3, 6, 9]
        assert [n for n in range(10) if Span(1, "epochs").due(n, 4)] == [4, 8]
        assert not any(Span(0, "iters").due(n, 4) for n in range(10))

    def test_in_words(self):
        assert [str(Span(n, "epochs")) for n in (0, 1, 2)] == ["0 epochs", "1 epoch", "2 epochs"]
        assert str(Span(1, "iters")) == "1 iter"


def test_an_option_cannot_have_been_what_another_is():
    with pytest.raises(DefinitionError, match=r"Odd\.new: was='old' is an option today"):

        @plugin
        class Odd:
            """Has both."""

            old: int = option(default=1, help="one")
            new: int = option(default=1, was="old", help="another")
