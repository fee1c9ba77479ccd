"""Whatever a config holds, it loads or is refused with clear messages: never a traceback, never a silent change.

DETKERNEL_FUZZ=5000 tries as many examples of each kind, anew each time; without it, the same 200 are tried.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from detkernel import ConfigError, UserError
from detkernel.catalog import Catalog
from detkernel.config import load
from detkernel.config.compose import compose
from detkernel.config.dump import dump
from detkernel.config.read import read_text, scalar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

fuzz = settings(
    max_examples=int(os.environ.get("DETKERNEL_FUZZ", "200")),
    derandomize="DETKERNEL_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

FARM = '''
from __future__ import annotations
from pathlib import Path
from typing import Any, Literal
from detkernel import Part, Span, option, plugin

class Animal(Part): ...

@plugin
class Legs:
    """Of an animal."""
    count: int = option(default=4, at_least=0, help="h")
    long: bool = option(default=False, help="h")

@plugin
class Cow(Animal):
    """A cow."""
    name: str = option(default="", choices=("", "Bella"), help="h")
    legs: Legs = option(factory=Legs, help="h")

@plugin
class Herd(Animal):
    """Several."""
    animals: list[Animal] = option(help="h")

@plugin
class Farm:
    """A farm."""
    animals: list[Animal] = option(factory=list, help="h")
    named: dict[str, Animal | int] = option(factory=dict, help="h")
    first: Animal | Literal["none"] | None = option(default=None, help="h")
    size: tuple[float, float] = option(default=(1.0, 2.0), above=0, help="h")
    years: tuple[int, ...] = option(default=(), help="h")
    every: Span | None = option(default=None, help="h")
    gate: Path | bool | None = option(default=None, help="h")
    extra: Any = option(default=None, help="h")
'''
BASE = """
run: {until: 3 epochs, validate: every 1 epoch, seed: 3}
farm:
  animals: [cow, {use: cow, name: Bella, legs: {count: 3}}]
  every: 5 iters
"""
GOOD = """\
# A config with one of everything.
base: base.yaml
run:
  seed: 0x1F
  work_dir: runs/${run.seed}
  workflow: null
farm:
  priority: low
  animals:
    - cow
    - use: herd
      animals: [cow, {use: cow, legs: {count: 2, long: true}}]
  named: {a: {use: cow}, b: 3}
  first: &first
    use: cow
    name: 'Bella'
  size: [1.5, 2e3]
  years: [1999, 0o17, -3]
  every: every 1 epoch
  gate: "a/b \\u00e9.txt"
  extra: {deep: [[1, null, ~], {x: .inf, y: "text: with # marks"}], again: *first}
second:
  use: farm
  gate: true
  size:
    - ${farm.size.0}
    - 7
  extra: |
    some ${env:NOTHING,lines} of
    text
"""
NASTY = [
    *(
        "{",
        "}",
        "[",
        "]",
        ":",
        ": ",
        "- ",
        "#",
        "&a",
        "*a",
        "*first",
        "!x ",
        "!!int ",
        "|",
        ">",
        "'",
        '"',
        "?",
        "@",
        "%",
    ),
    *("\t", "\n", "\r", "\0", "\x85", "\u2028", "\ufeff", "é", "😀", "---\n", "...\n", "<<: *first", "~", ".nan"),
    *("null", "true", "yes", "1e-3", "-1", "1e999", "9" * 400, "0x" + "f" * 400, "''", "[]", "{}", "use", "use: cow"),
    *(
        "priority",
        "base",
        "base: c.yaml",
        "base: x",
        "run",
        "${",
        "${}",
        "${run.seed}",
        "${farm}",
        "${env:HOME}",
        "$${",
    ),
    *(
        "second: null\n",
        "animals",
        "cow",
        "herd",
        "farm",
        "count",
        "12 epochs",
        "./x.py:X",
        "/",
        "~nobody/x",
        "\\ud800",
    ),
]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """The catalogue of an installed distribution, in a folder with a base file."""
    folder = tmp_path_factory.mktemp("farm")
    info = folder / "site" / "farm-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: farm\nVersion: 1.0\n")
    points = [f"{name} = farm_one:{name.capitalize()}\n" for name in ("farm", "cow", "herd")]
    (info / "entry_points.txt").write_text("[detkernel.plugins]\n" + "".join(points))
    (folder / "site" / "farm_one.py").write_text(FARM)
    (folder / "base.yaml").write_text(BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder / "site")
        patch.delenv("NOTHING", raising=False)
        yield Catalog()


def refusal(attempt: Callable[[], Any]) -> UserError | None:
    """What the user is told, if it is refused; nothing else than that or success can come of a config."""
    try:
        attempt()
    except UserError as error:
        return error
    return None


def outcome(catalog: Catalog, text: str, *overrides: str) -> str:
    """Load a config: "refused", with messages that a user can read, or "loaded", and what it writes is the same."""
    Path("c.yaml").write_text(text, encoding="utf-8", newline="")
    error = refusal(lambda: load("c.yaml", overrides, catalog))
    if error is not None:
        assert str(error).encode().strip()
        for problem in error.problems if isinstance(error, ConfigError) else []:
            assert problem.message
            assert "\n" not in problem.message
            assert re.match(r"[^:]+(:\d+:\d+)?: ", str(problem))
        return "refused"
    written = dump(load("c.yaml", overrides, catalog).plain)
    Path("again.yaml").write_text(written, encoding="utf-8")
    assert dump(load("again.yaml", (), catalog).plain) == written
    return "loaded"


@st.composite
def mutated(draw: st.DrawFn, source: str) -> str:
    """A text with a few things cut out, put in, moved or doubled."""
    text = source
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(text)))
        end = begin + draw(st.integers(0, 12))
        how = draw(st.sampled_from(["cut", "put", "change", "double", "move", "any"]))
        piece = draw(st.sampled_from(NASTY))
        if how == "any":
            piece = draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=4))
        if how == "cut":
            piece = ""
        if how == "double":
            piece = text[begin:end] * 2
        if how == "move":
            piece, text = text[begin:end], text[:begin] + text[end:]
            begin = end = draw(st.integers(0, len(text)))
        text = text[:begin] + piece + text[begin if how == "put" else end :]
    return text


def test_the_good_one_loads(farm: Catalog):
    assert outcome(farm, GOOD) == "loaded"
    assert outcome(farm, BASE) == "loaded"


@fuzz
@given(text=mutated(GOOD))
def test_a_config_with_mistakes(farm: Catalog, text: str):
    outcome(farm, text)


@fuzz
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text(farm: Catalog, text: str):
    outcome(farm, text)


@fuzz
@given(pieces=st.lists(st.sampled_from([*NASTY, " ", "\n  ", "\n", "a", ": "]), max_size=14))
def test_any_pieces(farm: Catalog, pieces: list[str]):
    outcome(farm, BASE + "".join(pieces))


@fuzz
@given(content=st.binary(max_size=60))
def test_any_bytes(farm: Catalog, content: bytes):
    Path("b.yaml").write_bytes(content)
    with pytest.raises(UserError):
        load("b.yaml", (), farm)


PATHS = st.sampled_from(
    [
        *(
            "farm",
            "farm.first",
            "farm.first.name",
            "farm.animals.0",
            "farm.animals.1.legs.count",
            "farm.extra.deep.0.1",
        ),
        *(
            "run",
            "run.seed",
            "second",
            "new",
            "base",
            "farm.animals.-1",
            "farm.animals.9",
            "farm.size.0.x",
            "",
            ".",
            "a..b",
        ),
    ]
)


@fuzz
@given(
    overrides=st.lists(
        st.tuples(PATHS, st.sampled_from(["=", "=", "=", ""]), st.sampled_from(NASTY) | st.text(max_size=5)), max_size=3
    )
)
def test_any_overrides(farm: Catalog, overrides: list[tuple[str, str, str]]):
    outcome(farm, GOOD, *("".join(parts) for parts in overrides))


@fuzz
@given(values=st.lists(st.text("${}run.abx:,env ", max_size=12), min_size=1, max_size=4))
def test_any_references(farm: Catalog, values: list[str]):
    rows = "".join(f"  {name}: '{value}'\n" for name, value in zip("abcd", values, strict=False))
    Path("c.yaml").write_text(f"run:\n{rows}", encoding="utf-8")
    error = refusal(lambda: compose("c.yaml"))
    assert error is None or (isinstance(error, ConfigError) and len(error.problems) == 1)


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | TEXT
    | st.sampled_from(NASTY),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def _valid(value: Any) -> bool:
    if isinstance(value, dict):
        return all("\0" not in key and _valid(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_valid, value))
    return not isinstance(value, str) or "\0" not in value


@fuzz
@given(value=st.dictionaries(TEXT, PLAIN, min_size=1, max_size=4).filter(_valid))
def test_what_is_written_is_read_again(farm: Catalog, value: dict[str, Any]):
    Path("c.yaml").write_text(dump(value), encoding="utf-8")
    found = compose("c.yaml").plain() if "base" not in value else value
    wanted = {key: item for key, item in value.items() if item is not None} if "base" not in value else value
    assert found == wanted
    assert _types(found) == _types(wanted)


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _types(item) for key, item in value.items()}
    return [_types(item) for item in value] if isinstance(value, list) else type(value)


@fuzz
@given(text=st.from_regex(r"[-+.0-9a-zA-Z_~:]{0,12}", fullmatch=True))
def test_a_plain_scalar_is_what_its_text_says(text: str):
    value = scalar(text)
    if isinstance(value, str):
        assert value == text
    elif value is None:
        assert text in ("", "~", "null", "Null", "NULL")
    elif isinstance(value, bool):
        assert text.lower() == str(value).lower()
    elif text.startswith(("0x", "0o")):
        assert value == int(text, 0)
    elif text.lower().endswith((".inf", ".nan")):
        assert not math.isfinite(value)
    else:
        assert value == float(text)
        assert isinstance(value, int) == text.lstrip("+-").isdecimal()


@fuzz
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
def test_places_lie_inside_the_text(text: str):
    error = refusal(lambda: read_text(text, "c.yaml"))
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text)
    for problem in error.problems if isinstance(error, ConfigError) else []:
        assert 1 <= problem.where.line <= len(lines)
        assert 1 <= problem.where.column <= len(lines[problem.where.line - 1]) + 1
