"""What is installed: listed without being imported, loaded when named, and every way in which that goes wrong."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from detkernel import CatalogError, ConfigError
from detkernel.catalog import Catalog
from detkernel.config import load

Plant = Callable[..., Path]
Write = Callable[[str, str], Path]
Detkernel = Callable[..., subprocess.CompletedProcess[str]]

BODY = '''
from detkernel import plugin

@plugin
class {name}:
    """{line}

    More about it.
    """
'''
BOOM = "raise RuntimeError('this module was imported')\n"


def body(name: str, line: str = "What it does.") -> str:
    return BODY.format(name=name, line=line)


def _numbered(*cases: tuple[str, tuple[str, str]]) -> list[tuple[int, str, tuple[str, str]]]:
    """Each with a number, since what is read of a module is remembered by its name."""
    return [(number, *case) for number, case in enumerate(cases)]


def rows(table: str) -> list[str]:
    """The lines of a table, with single spaces."""
    return [" ".join(line.split()) for line in table.splitlines()]


def refusal(name: str) -> str:
    with pytest.raises(CatalogError) as caught:
        Catalog().load(name)
    return str(caught.value)


class TestListing:
    def test_nothing_is_imported(self, plant: Plant, detkernel: Detkernel):
        plant(
            "lists", {"lists/__init__.py": BOOM, "lists/a.py": BOOM + body("Alpha")}, plugins={"alpha": "lists.a:Alpha"}
        )
        result = detkernel("plugins")
        assert (result.returncode, result.stderr) == (0, "")
        assert "hook, of lists 1.0 alpha What it does." in " ".join(rows(result.stdout))

    def test_the_kind_follows_the_base_classes(self, plant: Plant):
        plant(
            "kinds",
            {
                "kinds/__init__.py": "from ._base import Body, Deep\n" + BOOM,
                "kinds/_base.py": "from detkernel import Part\nclass Body(Part): ...\nclass Deep(Body): ...\n",
                "kinds/a.py": "from . import Deep as D\nclass A(D, list):\n    'It is a body.'\n",
                "kinds/b.py": "from ._base import Body as Dataset\nclass B(Dataset):\n    'It is data.'\n",
                "kinds/c.py": "from kinds.c import C\nclass C(C):\n    'It goes in a circle.'\n",
                "kinds/d.py": "from ... import E\nimport abc\nclass D(abc.ABC, E):\n    r'''It is a plugin.'''\n",
                "kinds/e.py": "def e():\n    'It is a function.'\n",
            },
            plugins={name: f"kinds.{name}:{name.upper()}" for name in "abcd"} | {"e": "kinds.e:e"},
        )
        found = {name: offers[0].describe() for name, offers in Catalog().entries.items() if len(name) == 1}
        assert found == {
            "a": ("Body", "It is a body."),
            "b": ("Body", "It is data."),
            "c": ("", "It goes in a circle."),
            "d": ("", "It is a plugin."),
            "e": ("", "It is a function."),
        }

    @pytest.mark.parametrize(
        "source",
        ["def broken(:\n", "a = '\0'\n", "# coding: nonsense\n", "x = 'é'".encode("latin-1").decode("latin-1")],
    )
    def test_a_module_that_cannot_be_parsed_does_no_harm(self, plant: Plant, detkernel: Detkernel, source: str):
        plant("broken", {"broken_one.py": source}, plugins={"broken_one": "broken_one:X", "gone": "no_such_module:X"})
        result = detkernel("plugins")
        assert (result.returncode, result.stderr) == (0, "")
        assert "hook, of broken 1.0 broken_one gone" in " ".join(rows(result.stdout))

    @pytest.mark.parametrize(
        ("number", "source", "wanted"),
        _numbered(
            (
                "class X(\n    Part,\n):  # a comment\n    '''It is 'quoted'.\n\n    More.\n    '''\n",
                ("X", "It is 'quoted'."),
            ),
            ('class X(Part, metaclass=make("x")):\n    """It has an odd head."""\n', ("X", "It has an odd head.")),
            ('class X(Part):\n    a: int = 3\n\n    def f(self):\n        """Not this."""\n', ("X", "")),
            ('class XY(Part):\n    """Not this."""\nclass X(Part): ...\n', ("X", "")),
            ('class X:\n    """A first."""\nclass X(Part):\n    """A second."""\n', ("X", "A second.")),
            ('class X(Part): "In one line."\n', ("X", "In one line.")),
            (
                '@plugin(key="gait")\nclass Y: ...\n@plugin\nclass X(Y):\n    """In\n    two lines."""\n',
                ("gait", "In two lines."),
            ),
            ('@plugin(key="gait")\nclass Y: ...\nclass X:\n    """Another."""\n', ("", "Another.")),
            ('"""A module."""\nx = 1\n', ("", "")),
        ),
    )
    def test_the_line_is_the_docstrings_first(self, plant: Plant, number: int, source: str, wanted: tuple[str, str]):
        module = f"heads_{number}"
        plant("heads", {f"{module}.py": f"from detkernel import Part\n{source}"}, plugins={"x": f"{module}:X"})
        assert Catalog().entries["x"][0].describe() == wanted

    def test_what_is_installed_twice_on_the_path_is_one(
        self, plant: Plant, folder: Path, monkeypatch: pytest.MonkeyPatch
    ):
        plant("twice", {"twice_one.py": body("One")}, plugins={"one": "twice_one:One"})
        (folder / "site2").symlink_to(folder / "site")
        monkeypatch.syspath_prepend(folder / "site2")
        assert len(Catalog().entries["one"]) == 1

    def test_extras_and_spaces_of_an_entry_point(self, plant: Plant):
        plant("extra", {"extra_one.py": body("One")}, plugins={"one": "extra_one:One [fast, slow]"})
        assert Catalog().find("one").target == "extra_one:One"
        assert Catalog().load("one").__name__ == "One"


class TestLoading:
    def test_a_class_inside_a_class(self, plant: Plant):
        source = 'from detkernel import plugin\nclass Outer:\n    @plugin\n    class Inner:\n        "It nests."\n'
        plant("nests", {"nests_one.py": source}, plugins={"inner": "nests_one:Outer.Inner"})
        assert Catalog().load("inner").__name__ == "Inner"

    def test_an_unknown_name(self, plant: Plant):
        plant("some", {}, plugins={"resize": "some:Resize"})
        assert refusal("risize") == (
            "there is no plugin 'risize', did you mean 'resize'?; `detkernel plugins` lists what is installed"
        )

    def test_two_distributions_with_one_name_are_both_named(self, plant: Plant, detkernel: Detkernel, write: Write):
        plant("first-zoo", {"first_zoo.py": body("A")}, plugins={"net": "first_zoo:A"}, version="1.2")
        plant("second-zoo", {"second_zoo.py": body("B")}, plugins={"net": "second_zoo:B"}, version="3.4")
        message = refusal("net")
        assert message.startswith("'net' is offered by ")
        assert "first-zoo 1.2 (first_zoo:A)" in message
        assert "second-zoo 3.4 (second_zoo:B)" in message
        assert message.endswith("; uninstall one of them")
        listed = detkernel("plugins").stdout
        assert listed.count("(CONFLICT: offered twice)") == 2
        write("c.yaml", "run: {until: 1 epoch}\nx:\n  use: net\n")
        result = detkernel("check", "c.yaml")
        assert result.returncode == 2
        assert result.stderr.startswith("error: c.yaml:3:8: x.use: 'net' is offered by ")

    @pytest.mark.parametrize(
        ("source", "target", "message"),
        [
            ("import no_such_thing\n", "bad_a:X", "cannot be imported: No module named 'no_such_thing'; is everything"),
            ("from math import no_such\n", "bad_b:X", "cannot be imported: cannot import name 'no_such' from 'math'"),
            ("raise ImportError('broken\\nat length')\n", "bad_k:X", "cannot be imported: broken; is everything"),
            ("def f(:\n", "bad_c:X", "cannot be imported: invalid syntax"),
            ("", "bad_d:X", ": its module bad_d has no 'X'"),
            ("class X: ...\n", "bad_e:X.Y", ": its module bad_e has no 'X.Y'"),
            ("class X: ...\n", "bad_f:X", ": X is not a plugin class; decorate it with @plugin"),
            ("X = 3\n", "bad_g:X", ": 3 is not a plugin class; decorate it with @plugin"),
            (
                "from detkernel.testing import PlainData\nclass X(PlainData): ...\n",
                "bad_h:X",
                ": X is not a plugin class",
            ),
            ("", "bad_i", ": its entry point is 'bad_i', expected module:Class"),
            ("", "bad_j:", ": its entry point is 'bad_j:', expected module:Class"),
            ("", "no_such_module_at_all:X", "cannot be imported: No module named 'no_such_module_at_all'"),
        ],
    )
    def test_what_does_not_load_is_put_down_to_its_distribution(
        self, plant: Plant, source: str, target: str, message: str
    ):
        plant("bad-plugin", {f"{target.partition(':')[0]}.py": source}, plugins={"bad": target}, version="0.3")
        if target.startswith("no_such"):
            (Path("site") / "no_such_module_at_all.py").unlink()
        found = refusal("bad")
        assert found.startswith("plugin 'bad' of bad-plugin 0.3")
        assert message in found

    def test_an_invalid_class_is_its_distributions_mistake(self, plant: Plant, detkernel: Detkernel, write: Write):
        source = "from detkernel import plugin\n\n@plugin\nclass Bare: ...\n"
        plant("bare-plugin", {"bare_one.py": source}, plugins={"bare": "bare_one:Bare"}, version="0.3")
        problem = "bare_one.py:3: Bare: a plugin needs a docstring; its first line is what users are shown\n"
        write("c.yaml", "run: {until: 1 epoch}\nbare: {}\n")
        result = detkernel("check", "c.yaml")
        wanted = f"error: c.yaml:2:7: bare: plugin 'bare' of bare-plugin 0.3: site/{problem}"
        assert (result.returncode, result.stderr) == (2, f"{wanted}    bare: {{}}\n          ^\n")
        result = detkernel("plugins", "show", "bare")
        assert (result.returncode, result.stderr) == (2, f"error: plugin 'bare' of bare-plugin 0.3: site/{problem}")
        write("bare_one.py", source)
        write("d.yaml", "run: {until: 1 epoch}\nx: {use: ./bare_one.py:Bare}\n")
        result = detkernel("check", "d.yaml")
        assert (result.returncode, result.stderr.splitlines()[0] + "\n") == (2, f"error: d.yaml:2:10: x.use: {problem}")

    def test_a_bug_in_a_module_keeps_its_traceback_and_names_the_plugin(self, plant: Plant):
        plant("buggy", {"buggy_one.py": "1 / 0\n"}, plugins={"buggy": "buggy_one:X"})
        with pytest.raises(ZeroDivisionError) as caught:
            Catalog().load("buggy")
        assert caught.value.__notes__ == ["raised while plugin 'buggy' of buggy 1.0 was imported"]

    def test_the_name_of_a_class(self, plant: Plant):
        plant(
            "named",
            {"named_one/__init__.py": "from ._a import A, B\n", "named_one/_a.py": body("A") + body("B") + body("C")},
            plugins={"a": "named_one:A", "b": "named_one._a:B"},
        )
        catalog = Catalog()
        assert [catalog.name_of(catalog.load(name)) for name in "ab"] == ["a", "b"]
        import named_one._a

        with pytest.raises(
            CatalogError, match=r"^named_one\._a:C is not installed under any name; offer it as an entry"
        ):
            catalog.name_of(named_one._a.C)


class TestVersions:
    @pytest.mark.parametrize("need", ["detkernel-kernel>=9", "detkernel_kernel (<0.1)", "Detkernel.Kernel~=1.0"])
    def test_a_plugin_for_another_kernel(self, plant: Plant, detkernel: Detkernel, write: Write, need: str):
        plant("from-the-future", {"future.py": BOOM}, plugins={"future": "future:X"}, version="7.1", requires=(need,))
        message = refusal("future")
        assert message.startswith("plugin 'future' of from-the-future 7.1 needs ")
        assert message.endswith("0.1.0 is installed; install versions that fit each other")
        listed = detkernel("plugins")
        assert "(DOES NOT FIT: needs " in listed.stdout
        assert listed.returncode == 0
        write("c.yaml", "run: {until: 1 epoch}\nfuture: {}\n")
        result = detkernel("run", "c.yaml")
        assert result.returncode == 2
        assert result.stderr.startswith("error: c.yaml:2:9: future: plugin 'future' of from-the-future 7.1 needs ")

    def test_a_plugin_for_another_version_of_a_third(self, plant: Plant):
        plant("base-zoo", {"base_zoo.py": body("A")}, plugins={"a": "base_zoo:A"}, version="1.5")
        plant("more-zoo", {"more_zoo.py": body("B")}, plugins={"b": "more_zoo:B"}, requires=("Base_Zoo<1,>=0.5",))
        assert refusal("b") == (
            "plugin 'b' of more-zoo 1.0 needs Base_Zoo<1,>=0.5, but Base_Zoo 1.5 is installed; "
            "install versions that fit each other"
        )
        assert Catalog().load("a")

    @pytest.mark.parametrize(
        "need",
        [
            "detkernel-kernel",
            "detkernel-kernel>=0.1,<0.2",
            "detkernel-kernel>=9; extra == 'future'",
            "detkernel-kernel>=9; python_version < '3'",
            "detkernel-kernel @ file:///somewhere/kernel",
            "something-else>=9",
            "!! not a requirement",
        ],
    )
    def test_what_fits(self, plant: Plant, need: str):
        plant("fits", {"fits_one.py": body("One")}, plugins={"fits": "fits_one:One"}, requires=(need,))
        assert Catalog().load("fits").__name__ == "One"
        assert "fits" not in Catalog().misfits


REQUIRES = """
from detkernel import plugin


@plugin(requires=("cook", "table"))
class Eater:
    '''Needs others to be active.'''


@plugin
class Cook:
    '''Cooks.'''
"""


def test_a_plugin_that_requires_others(plant: Plant, write: Write):
    plant("meal", {"meal_parts.py": REQUIRES}, plugins={"eater": "meal_parts:Eater", "cook": "meal_parts:Cook"})
    write("c.yaml", "run: {until: 1 epoch}\neater: {}\n")
    with pytest.raises(ConfigError) as caught:
        load("c.yaml")
    assert [str(problem).splitlines()[0] for problem in caught.value.problems] == [
        "c.yaml:2:8: eater: requires the plugin 'cook': add `cook: {}` to the config",
        "c.yaml:2:8: eater: requires the plugin 'table': install it, and add `table: {}` to the config; "
        "no installed plugin has that name",
    ]
    write("d.yaml", "run: {until: 1 epoch}\neater: {}\nchef: {use: cook}\n")
    with pytest.raises(ConfigError) as caught:
        load("d.yaml")
    assert len(caught.value.problems) == 1


NEEDS = """
from detkernel import plugin


@plugin(needs=("water", "slat"))
class Soup:
    '''Needs what is in it.'''


@plugin(provides=("salt", "water"))
class Larder:
    '''Has it.'''
"""


def test_a_plugin_that_needs_what_no_other_provides(plant: Plant, write: Write):
    plant("meal", {"meal_needs.py": NEEDS}, plugins={"soup": "meal_needs:Soup", "larder": "meal_needs:Larder"})
    write("c.yaml", "run: {until: 1 epoch}\nsoup: {}\nlarder: {}\n")
    with pytest.raises(ConfigError) as caught:
        load("c.yaml")
    assert [str(problem).splitlines()[0] for problem in caught.value.problems] == [
        "c.yaml:2:7: soup: needs 'slat', which no active plugin provides, did you mean 'salt'?"
    ]
    write("d.yaml", "run: {until: 1 epoch}\nsoup: {}\n")  # nobody says what there is, so nothing is known to lack
    load("d.yaml")
