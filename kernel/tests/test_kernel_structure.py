"""From a composed config to plugin objects: nothing coerced, everything reported at once, each with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detkernel import ConfigError, Span, wrong
from detkernel.config import Config, load
from detkernel.config.types import expected, short

Write = Callable[[str, str], Path]
Plant = Callable[..., Path]

ZOO = '''
from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Optional

from detkernel import Part, Span, hookimpl, option, plugin


class Body(Part):
    """What a network stands on."""


class Step(Part):
    """What is done to an image."""


@plugin
class Norm:
    """Options of a normalisation."""

    kind: Literal["bn", "gn"] = option(default="bn", help="which")
    eps: float = option(default=1e-5, above=0, help="added to the variance")


@plugin
class Net(Body):
    """A network."""

    depth: int = option(default=18, choices=(18, 50), help="layers")
    norm: Norm = option(factory=Norm, help="its normalisation")


@plugin
class Turn(Step):
    """Mirror some images."""

    prob: float = option(default=0.5, at_least=0, at_most=1, help="how many")


@plugin
class Shrink(Step):
    """Change the size."""

    side: int = option(above=0, help="the new side")


@plugin
class Each(Step):
    """Steps in turn."""

    steps: list[Step] = option(help="the steps")


@plugin
class Sag:
    """Gradient descent."""

    lr: float = option(above=0, help="learning rate")
    momentum: float = option(default=0.0, at_least=0, below=1, help="momentum")
    nesterov: bool = option(default=False, help="Nesterov's momentum")

    def __attrs_post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")


@plugin
class Types:
    """One option of every type."""

    flag: bool = option(default=False, help="h")
    whole: int = option(default=0, help="h")
    number: float = option(default=0.0, help="h")
    text: str = option(default="", help="h")
    path: Path = option(default=Path("."), help="h")
    length: Span | None = option(default=None, help="h")
    choice: Literal["a", "b", 3] = option(default="a", help="h")
    maybe: Optional[int] = option(default=None, help="h")
    either: Literal["auto"] | float | list[int] = option(default="auto", help="h")
    anything: Any = option(default=None, help="h")
    numbers: list[float] = option(factory=list, at_least=0, help="h")
    pair: tuple[int, str] = option(default=(0, ""), help="h")
    many: tuple[int, ...] = option(default=(), help="h")
    named: dict[str, float] = option(factory=dict, help="h")
    norm: Norm | None = option(default=None, help="h")
    body: Body | None = option(default=None, help="h")
    step: Step | str | None = option(default=None, help="h")
    steps: list[Step] = option(factory=list, help="h")
    parts: dict[str, Step] = option(factory=dict, help="h")


@plugin
class Silent:
    """It has no options."""

    @hookimpl
    def setup(self) -> None: ...


@plugin
class Refuses:
    """It finds its options wrong as a whole."""

    a: int = option(default=0, help="h")

    def __attrs_post_init__(self) -> None:
        raise ValueError("these options do not go together: at all")
'''
NAMES = {
    name: f"zoo:{name.capitalize()}"
    for name in ("net", "turn", "shrink", "each", "sag", "types", "silent", "refuses", "norm")
}
RUN = "run: {until: 1 epoch}\n"


@pytest.fixture(autouse=True)
def zoo(plant: Plant) -> None:
    plant("zoo", {"zoo.py": ZOO}, plugins=NAMES)


@pytest.fixture
def config(write: Write) -> Callable[..., Config]:
    """`config("sag: {lr: 1}", "sag.lr=2")`: a config with a `run` before it."""

    def make(text: str, *overrides: str) -> Config:
        write("c.yaml", RUN + text)
        return load("c.yaml", overrides)

    return make


@pytest.fixture
def problems(config: Callable[..., Config]) -> Callable[..., list[str]]:
    """The problems of such a config, one line each; line 1 of its text is line 2 of the file."""

    def find(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            config(text, *overrides)
        return [str(problem).splitlines()[0] for problem in caught.value.problems]

    return find


class TestValues:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("flag: true", True),
            ("whole: -3", -3),
            ("number: 3", 3.0),
            ("number: 1e-3", 0.001),
            ("text: yes", "yes"),
            ("text: '12'", "12"),
            ("path: a/b", Path("a/b")),
            ("length: every 5 iters", Span(5, "iters")),
            ("length: 90_000 iters", Span(90000, "iters")),
            ("length: null", None),
            ("choice: b", "b"),
            ("choice: 3", 3),
            ("maybe: 4", 4),
            ("maybe: null", None),
            ("either: auto", "auto"),
            ("either: 2", 2.0),
            ("either: [2]", [2]),
            ("anything: {a: [1, null, x]}", {"a": [1, None, "x"]}),
            ("numbers: [1, 2.5]", [1.0, 2.5]),
            ("pair: [1, x]", (1, "x")),
            ("many: [1, 2, 3]", (1, 2, 3)),
            ("many: []", ()),
            ("named: {a: 1}", {"a": 1.0}),
        ],
    )
    def test_they_are_taken_as_they_are_written(self, config: Any, text: str, wanted: object):
        name = text.partition(":")[0]
        found = getattr(config(f"types: {{{text}}}").plugins["types"], name)
        assert found == wanted
        assert type(found) is type(wanted)

    def test_a_home_folder_is_expanded(self, config: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("HOME", "/home/me")
        assert config("types: {path: ~/data}").plugins["types"].path == Path("/home/me/data")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("flag: yes", "expected true or false, got the text 'yes'; write true"),
            ("flag: Off", "expected true or false, got the text 'Off'; write false"),
            ("flag: 1", "expected true or false, got the number 1"),
            ("flag: null", "expected true or false, got nothing (null)"),
            ("whole: 3.0", "expected a whole number, got the number 3.0"),
            ("whole: true", "expected a whole number, got the boolean true"),
            ("whole: '3'", "expected a whole number, got the text '3'; leave out the quotes"),
            ("whole: three", "expected a whole number, got the text 'three'"),
            ("number: true", "expected a number, got the boolean true"),
            ("number: '1e-3'", "expected a number, got the text '1e-3'; leave out the quotes"),
            ("number: [1]", "expected a number, got a list"),
            ("text: 12", "expected text, got the number 12; put it in quotes if it is meant as text"),
            ("text: true", "expected text, got the boolean true; put it in quotes if it is meant as text"),
            ("text: {a: b}", "expected text, got a map"),
            ("path: 3", "expected a path, got the number 3"),
            ("path: ~no-such-user/x", "Could not determine home directory."),
            ("length: 12", "expected a length such as '12 epochs' or '500 iters', got the number 12"),
            ("choice: c", "expected 'a' or 'b' or 3, got the text 'c'"),
            ("choice: '3'", "expected 'a' or 'b' or 3, got the text '3', did you mean '3'?"),
            ("maybe: 1.5", "expected a whole number, got the number 1.5"),
            ("maybe: [1]", "expected a whole number or null, got a list"),
            ("either: b", "expected 'auto' or a number or a list, each a whole number, got the text 'b'"),
            ("either: {}", "expected 'auto' or a number or a list, each a whole number, got a map"),
            ("numbers: 3", "expected a list, each a number, got the number 3"),
            ("numbers: {a: 1}", "expected a list, each a number, got a map"),
            ("pair: [1]", "expected a list of 2: a whole number, text; got 1 values"),
            ("pair: x", "expected a list of 2: a whole number, text, got the text 'x'"),
            ("named: [1]", "expected a map to a number, got a list"),
            ("body: 3", "expected a body, such as {use: NAME, ...} or null, got the number 3"),
            ("steps: turn", "expected a list, each a step, such as {use: NAME, ...}, got the text 'turn'"),
        ],
    )
    def test_none_is_made_to_fit(self, problems: Any, text: str, message: str):
        name = text.partition(":")[0]
        found = problems(f"types:\n  {text}")
        assert len(found) == 1
        place, _, rest = found[0].partition(f": types.{name}: ")
        assert place == f"c.yaml:3:{len(name) + 5}"
        assert rest == message

    @pytest.mark.parametrize(
        ("text", "path", "message"),
        [
            ("numbers: [1, a]", "numbers.1", "expected a number, got the text 'a'"),
            ("either: [1, a]", "either.1", "expected a whole number, got the text 'a'"),
            ("pair: [a, x]", "pair.0", "expected a whole number, got the text 'a'"),
            ("many: [1, 2.5]", "many.1", "expected a whole number, got the number 2.5"),
            ("named: {a: b}", "named.a", "expected a number, got the text 'b'"),
            ("norm: {eps: x}", "norm.eps", "expected a number, got the text 'x'"),
            ("body: {use: net, norm: {kind: b}}", "body.norm.kind", "expected 'bn' or 'gn', got the text 'b'"),
            ("parts: {a: {use: shrink}}", "parts.a.side", "missing: the new side (a whole number)"),
            ("length: 12 weeks", "length", "expected a length with its unit"),
            ("length: ' 1 epoch'", "length", "expected a length with its unit"),
            ("length: 1_0 epochs", "length", "expected a length with its unit"),
        ],
    )
    def test_a_problem_inside_a_value_has_its_own_path(self, problems: Any, text: str, path: str, message: str):
        found = problems(f"types: {{{text}}}")
        assert len(found) == 1
        assert f": types.{path}: {message}" in found[0]


class TestMessages:
    def test_text_in_them_stays_on_one_line_and_short(self, problems: Any):
        assert problems('types: {whole: "a\\nb", "x\\ty": 1, named: {"a\\nb": c}}') == [
            "c.yaml:2:16: types.whole: expected a whole number, got the text 'a\\nb'",
            "c.yaml:2:24: types.x\\ty: there is no option 'x\\ty'",
            "c.yaml:2:51: types.named.a\\nb: expected a number, got the text 'c'",
        ]
        found = problems(f"types: {{whole: {'x' * 500}}}")
        assert found == [f"c.yaml:2:16: types.whole: expected a whole number, got the text '{'x' * 77}...'"]


class TestOptions:
    def test_an_unknown_one_gets_a_suggestion(self, problems: Any):
        assert problems("sag: {lr: 1, momentun: 0.9}") == [
            "c.yaml:2:14: sag.momentun: there is no option 'momentun', did you mean 'momentum'?"
        ]

    def test_or_the_choices_where_nothing_is_near(self, problems: Any):
        assert problems("sag: {lr: 1, zzz: 0.9}") == [
            "c.yaml:2:14: sag.zzz: there is no option 'zzz' (expected one of: lr, momentum, nesterov)"
        ]

    def test_the_case_of_letters_matters_but_is_understood(self, problems: Any):
        assert problems("sag: {LR: 1, lr: 1}") == ["c.yaml:2:7: sag.LR: there is no option 'LR', did you mean 'lr'?"]

    def test_state_is_no_option(self, problems: Any, write: Write):
        write(
            "mine.py",
            """
            from detkernel import option, plugin, state
            @plugin
            class Mine:
                "It counts."
                _count: int = state(default=0)
            """,
        )
        assert problems("mine: {use: mine.py:Mine, _count: 3}") == [
            "c.yaml:2:27: mine._count: there is no option '_count'"
        ]

    def test_a_type_that_its_author_did_not_import_is_a_mistake_with_a_place(self, problems: Any, write: Write):
        write(
            "mine.py",
            """
            from __future__ import annotations
            from typing import TYPE_CHECKING
            from detkernel import option, plugin
            if TYPE_CHECKING:
                from fractions import Fraction
            @plugin
            class Mine:
                "It shares."
                share: Fraction | None = option(default=None, help="how much")
            """,
        )
        assert problems("mine: {use: mine.py:Mine}") == [
            "c.yaml:2:13: mine.use: mine.py:Mine.share is annotated with `Fraction | None`, which gives "
            "'name 'Fraction' is not defined'; what an option's type names must be imported, and not for type "
            "checkers only"
        ]

    def test_a_missing_one_says_what_it_is_for(self, problems: Any):
        assert problems("sag: {}") == ["c.yaml:2:6: sag.lr: missing: learning rate (a number)"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("sag: {lr: 0}", "sag.lr: expected more than 0, got 0.0"),
            ("sag: {lr: .nan}", "sag.lr: expected more than 0, got nan"),
            ("sag: {lr: 1, momentum: 1}", "sag.momentum: expected less than 1, got 1.0"),
            ("sag: {lr: 1, momentum: -.1}", "sag.momentum: expected at least 0, got -0.1"),
            ("types: {step: {use: turn, prob: 1.5}}", "types.step.prob: expected at most 1, got 1.5"),
            ("types: {numbers: [1, -2]}", "types.numbers: expected at least 0, got -2.0"),
            ("types: {body: {use: net, depth: 34}}", "types.body.depth: expected one of 18, 50, got 34"),
        ],
    )
    def test_bounds_and_choices(self, problems: Any, text: str, message: str):
        assert [line.partition(": ")[2] for line in problems(text)] == [message]

    def test_a_check_over_several_points_to_the_one_it_names(self, problems: Any):
        assert problems("sag: {lr: 1, nesterov: true}") == ["c.yaml:2:24: sag.nesterov: needs a momentum above 0"]

    def test_one_that_names_none_points_to_the_plugin(self, problems: Any):
        assert problems("refuses: {a: 1}") == ["c.yaml:2:10: refuses: these options do not go together: at all"]

    def test_the_parent_gives_options_too(self, config: Any, write: Write):
        write(
            "mine.py",
            """
            from zoo import Sag
            from detkernel import option, plugin
            @plugin
            class Mine(Sag):
                "More of it."
                extra: int = option(default=1, help="more")
            """,
        )
        made = config("mine: {use: mine.py:Mine, lr: 1, extra: 2}").plugins["mine"]
        assert (made.lr, made.extra) == (1.0, 2)


class TestPlugins:
    def test_the_key_says_which_where_use_does_not(self, config: Any):
        made = config("sag: {lr: 1}\nsecond: {use: sag, lr: 2}").plugins
        assert list(made) == ["sag", "second"]
        assert [type(part).__name__ for part in made.values()] == ["Sag", "Sag"]

    @pytest.mark.parametrize("value", ["true", "1", "sag", "[sag]", "''"])
    def test_its_value_is_a_map_of_options(self, problems: Any, value: str):
        assert problems(f"silent: {value}")[0].startswith("c.yaml:2:9: silent: expected a map of options, got ")
        assert problems(f"silent: {value}")[0].endswith("; write `silent: {}` for none")

    def test_an_unknown_one(self, problems: Any):
        assert problems("saag: {lr: 1}\nx: {use: neat}") == [
            "c.yaml:2:7: saag: there is no plugin 'saag', did you mean 'sag'?; "
            "`detkernel plugins` lists what is installed",
            "c.yaml:3:10: x.use: there is no plugin 'neat', did you mean 'net'?; "
            "`detkernel plugins` lists what is installed",
        ]

    @pytest.mark.parametrize("use", ["3", "[a]", "{a: b}", "null", "true"])
    def test_use_is_a_name(self, problems: Any, use: str):
        assert problems(f"x: {{use: {use}}}")[0].startswith("c.yaml:2:10: x.use: expected a plugin's name, got ")

    def test_a_part_is_no_plugin(self, problems: Any):
        assert problems("turn: {}") == [
            "c.yaml:2:7: turn: 'turn' is a part, not a plugin: it belongs inside another one"
        ]

    def test_a_priority(self, config: Any):
        made = config("sag: {lr: 1, priority: low}")
        assert made.priorities == {"sag": "low"}
        assert made.plain["sag"]["priority"] == "low"

    @pytest.mark.parametrize(
        ("value", "rest"), [("lo", "the text 'lo', did you mean 'low'?"), ("3", "the number 3"), ("[low]", "a list")]
    )
    def test_an_unknown_priority(self, problems: Any, value: str, rest: str):
        found = problems(f"sag: {{lr: 1, priority: {value}}}")
        assert found == [
            "c.yaml:2:24: sag.priority: expected one of highest, very_high, high, above_normal, normal, below_normal, "
            f"low, very_low, lowest, got {rest}"
        ]


class TestParts:
    def test_by_map_or_by_name_alone(self, config: Any):
        made = config("types: {body: {use: net, depth: 50}, steps: [turn, {use: turn, prob: 1}]}").plugins["types"]
        assert made.body.depth == 50
        assert [step.prob for step in made.steps] == [0.5, 1.0]

    def test_they_nest(self, config: Any):
        made = config("types: {steps: [{use: each, steps: [turn, {use: each, steps: []}]}]}").plugins["types"]
        assert [type(step).__name__ for step in made.steps[0].steps] == ["Turn", "Each"]

    def test_an_option_below_a_name_alone(self, config: Any, write: Write):
        text = "types: {body: net, steps: [turn, turn]}"
        made = config(text, "types.steps.1.prob=1", "types.body.norm.kind=gn").plugins["types"]
        assert [step.prob for step in made.steps] == [0.5, 1.0]
        assert made.body.norm.kind == "gn"
        write("base.yaml", RUN + text)
        write("child.yaml", "base: base.yaml\ntypes: {body: {depth: 50}}\n")
        assert load("child.yaml").plugins["types"].body.depth == 50
        assert load("child.yaml").plain["types"]["body"]["use"] == "net"

    def test_a_missing_use(self, problems: Any):
        assert problems("types: {body: {depth: 50}}") == [
            "c.yaml:2:15: types.body: `use` is missing: which body? Write {use: NAME, ...}"
        ]

    def test_one_of_the_wrong_kind(self, problems: Any):
        assert problems("types: {body: turn, steps: [{use: net}, sag]}") == [
            "c.yaml:2:15: types.body.use: 'turn' is a Step, not a Body",
            "c.yaml:2:35: types.steps.0.use: 'net' is a Body, not a Step",
            "c.yaml:2:41: types.steps.1.use: 'sag' is a plugin for events, not a Step",
        ]

    def test_an_unknown_one(self, problems: Any):
        assert problems("types: {steps: [turnp]}")[0].startswith(
            "c.yaml:2:17: types.steps.0.use: there is no plugin 'turnp', did you mean 'turn'?"
        )

    def test_it_has_no_priority(self, problems: Any):
        assert problems("types: {steps: [{use: turn, priority: low}]}") == [
            "c.yaml:2:39: types.steps.0.priority: only plugins on the top level have a priority"
        ]

    def test_in_a_union_with_text(self, config: Any):
        assert type(config("types: {step: {use: turn}}").plugins["types"].step).__name__ == "Turn"
        assert type(config("types: {step: turn}").plugins["types"].step).__name__ == "Turn"
        assert config("types: {step: other}").plugins["types"].step == "other"

    def test_in_a_union_the_part_that_was_meant_is_reported(self, problems: Any):
        assert problems("types: {step: {use: turn, prop: 1}}") == [
            "c.yaml:2:27: types.step.prop: there is no option 'prop', did you mean 'prob'?"
        ]

    @pytest.mark.parametrize("key", ["use", "priority"])
    def test_a_group_of_options_takes_no_reserved_key(self, problems: Any, key: str):
        assert problems(f"types: {{norm: {{{key}: norm}}}}") == [
            f"c.yaml:2:16: types.norm.{key}: this map takes no `{key}`"
        ]

    def test_a_group_is_a_map(self, problems: Any):
        assert problems("types: {body: {use: net, norm: gn}}") == [
            "c.yaml:2:32: types.body.norm: expected a map of kind, eps, got the text 'gn'"
        ]


class TestAllAtOnce:
    def test_every_problem_of_a_config_is_reported(self, problems: Any):
        text = """
        sag: {momentum: x, nestrov: true}
        types:
          pair: [x, 1]
          steps: [turnp, {use: shrink, side: 0}]
          parts: {a: 3}
        unknown: {}
        run2: 3
        """
        found = problems("\n".join(line[8:] for line in text.strip("\n").splitlines()))
        assert [line.split(": ")[1] for line in found] == [
            "sag.lr",
            "sag.momentum",
            "sag.nestrov",
            "types.pair.0",
            "types.pair.1",
            "types.steps.0.use",
            "types.steps.1.side",
            "types.parts.a",
            "unknown",
            "run2",
        ]

    def test_each_has_its_line_and_caret(self, config: Any):
        with pytest.raises(ConfigError) as caught:
            config("sag:\n  lr: fast\n")
        assert str(caught.value) == (
            "c.yaml:3:7: sag.lr: expected a number, got the text 'fast'\n      lr: fast\n          ^"
        )

    def test_a_value_is_reported_in_the_file_where_it_was_written(self, write: Write):
        write("bases/a.yaml", "sag: {lr: 1, momentum: fast}\ntypes: {whole: x}\n")
        write("c.yaml", "base: bases/a.yaml\n" + RUN + "sag: {lr: slow}\n")
        with pytest.raises(ConfigError) as caught:
            load("c.yaml", ["types.flag=3"])
        places = {problem.path: str(problem.where) for problem in caught.value.problems}
        assert places == {
            "sag.lr": "c.yaml:3:11",
            "sag.momentum": "bases/a.yaml:1:24",
            "types.whole": "bases/a.yaml:2:16",
            "types.flag": "command line:1:12",
        }

    def test_what_is_missing_is_missing_where_its_plugin_was_written(self, config: Any):
        with pytest.raises(ConfigError) as caught:
            config("sag: {}", "sag.momentum=0.5")
        assert str(caught.value).startswith("c.yaml:2:6: sag.lr: missing: learning rate")

    def test_the_command_line_is_shown_like_a_line_of_a_file(self, config: Any):
        with pytest.raises(ConfigError) as caught:
            config("sag: {lr: 1}", "sag.lr=fast")
        assert str(caught.value) == (
            "command line:1:8: sag.lr: expected a number, got the text 'fast'\n    sag.lr=fast\n           ^"
        )


class TestRun:
    def test_it_is_needed(self, write: Write):
        write("c.yaml", "sag: {lr: 1}\n")
        with pytest.raises(ConfigError, match=r"c\.yaml:1:1: run: missing: how long to train, such as `run:"):
            load("c.yaml")

    @pytest.mark.parametrize(
        ("run", "message"),
        [
            ("{}", "run.until: missing: how long to train: '12 epochs' or '90000 iters'"),
            ("{until: 12}", "run.until: expected a length such as '12 epochs' or '500 iters', got the number 12"),
            ("{until: 0 epochs}", "run.until: expected at least 1 epoch or iteration, got '0 epochs'"),
            ("{until: 1 epoch, seed: -1}", "run.seed: expected at least 0, got -1"),
            ("{until: 1 epoch, seed: 9223372036854775808}", "run.seed: expected less than 9223372036854775808"),
            ("{until: 1 epoch, sed: 1}", "run.sed: there is no option 'sed', did you mean 'seed'?"),
            ("{until: 1 epoch, use: sag}", "run.use: this map takes no `use`"),
            ("[a]", "run: expected a map of until, validate,"),
            ("{until: 1 epoch, workflow: [[train, 1], [test, 1]]}", "run.workflow.1.0: expected 'train' or 'val'"),
            ("{until: 1 epoch, workflow: [[val, 1]]}", "run.workflow: expected [[train, N]] or [[train, N], [val, 1]]"),
            ("{until: 1 epoch, workflow: [[train, 1], [val, 2]]}", "run.workflow: a validation runs once"),
            (
                "{until: 1 epoch, validate: 1 epoch, workflow: [[train, 1], [val, 1]]}",
                "run.workflow: give either `workflow` or `validate`, not both",
            ),
        ],
    )
    def test_its_options_are_checked_like_any(self, write: Write, run: str, message: str):
        write("c.yaml", f"run: {run}\nsilent: {{}}\n")
        with pytest.raises(ConfigError) as caught:
            load("c.yaml")
        assert str(caught.value).splitlines()[0].partition(": ")[2].startswith(message)


class TestPlainValues:
    def test_every_default_is_filled_in(self, config: Any):
        made = config("sag: {lr: 1}\nx: {use: types, body: net, steps: [turn]}").plain
        assert made["run"] == {
            "until": "1 epoch",
            "validate": None,
            "validate_at_start": False,
            "validate_at_end": True,
            "workflow": None,
            "seed": 0,
            "work_dir": "runs/default",
        }
        assert made["sag"] == {"use": "sag", "lr": 1.0, "momentum": 0.0, "nesterov": False}
        assert made["x"]["body"] == {"use": "net", "depth": 18, "norm": {"kind": "bn", "eps": 1e-05}}
        assert made["x"]["steps"] == [{"use": "turn", "prob": 0.5}]

    @pytest.mark.parametrize(
        "text",
        [
            "sag: {lr: 1e-5, priority: high}\nx: {use: types, body: net, steps: [turn], choice: 3, named: {a: .inf}}",
            "x: {use: types, text: '$${x} \\u2028 # no', anything: {'a b': ['- x', '~', 'null', '']}, length: 3 iters}",
        ],
    )
    def test_they_are_a_config_of_the_same_run(self, config: Any, write: Write, text: str):
        from detkernel.config.dump import dump

        made = config(text)
        write("again.yaml", dump(made.plain))
        again = load("again.yaml")
        assert again.plain == made.plain
        assert again.priorities == made.priorities
        assert dump(again.plain) == dump(made.plain)

    def test_a_workflow_is_written_as_what_it_stands_for(self, write: Write):
        from detkernel.config.dump import dump

        write("c.yaml", "run: {until: 4 epochs, workflow: [[train, 2], [val, 1]]}\n")
        made = load("c.yaml")
        assert made.options.validate == Span(2, "epochs")
        write("again.yaml", dump(made.plain))
        assert load("again.yaml").options.validate == Span(2, "epochs")

    def test_the_versions_of_what_is_used(self, config: Any, plant: Plant):
        plant("unused", {}, plugins={"other": "other:Other"}, version="9.9")
        assert config("sag: {lr: 1}").versions == {"detkernel-kernel": "0.1.0", "zoo": "1.0"}


class TestLateErrors:
    def test_they_point_to_where_the_option_was_written(self, config: Any):
        made = config("sag:\n  lr: 1\ntypes: {steps: [{use: turn, prob: 1}]}").plugins
        assert str(wrong(made["sag"], "lr", "too fast")).splitlines()[0] == "c.yaml:3:7: sag.lr: too fast"
        step = made["types"].steps[0]
        assert str(wrong(step, "prob", "no")).splitlines()[0] == "c.yaml:4:35: types.steps.0.prob: no"

    def test_or_to_the_plugin_where_it_was_not_written(self, config: Any):
        made = config("sag:\n  lr: 1").plugins["sag"]
        assert str(wrong(made, "momentum", "no")).splitlines()[0] == "c.yaml:3:3: sag.momentum: no"

    def test_or_to_the_class_where_there_was_no_config(self, config: Any):
        made = type(config("sag: {lr: 1}").plugins["sag"])(lr=1.0)
        assert str(wrong(made, "lr", "no")) == "Sag: lr: no"


def test_types_in_words_and_in_short():
    assert expected(int | None) == "a whole number or null"
    assert short(dict[str, list[float | None]]) == "dict[str, list[float | null]]"
    assert short(tuple[int, ...]) == "tuple[int, ...]"
