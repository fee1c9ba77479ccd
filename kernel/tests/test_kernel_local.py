"""Plugins from a local file: found beside the config, the same in every process, their mistakes with their lines."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from detkernel import ConfigError
from detkernel.catalog import Catalog
from detkernel.config import load
from detkernel.config.dump import dump
from detkernel.local import file_of, source_of

Write = Callable[[str, str], Path]

MINE = """
from detkernel import hookimpl, option, plugin

@plugin
class Mine:
    "It is mine."
    words: str = option(default="{words}", help="what it says")

    @hookimpl
    def setup(self, run):
        print(self.words)
"""


@pytest.fixture
def mine(write: Write) -> Path:
    return write("plugins/mine.py", MINE.format(words="one"))


def refusal(source: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert len(caught.value.problems) == 1
    return str(caught.value).splitlines()[0]


def test_the_path_is_relative_to_the_file_that_names_it(write: Write, mine: Path, monkeypatch: pytest.MonkeyPatch):
    write("configs/base.yaml", "run: {until: 1 epoch}\nfirst: {use: ../plugins/mine.py:Mine}\n")
    write("c.yaml", "base: configs/base.yaml\nsecond: {use: ./plugins/mine.py:Mine}\n")
    config = load("c.yaml", [f"third.use={mine}:Mine"])
    assert [type(config.plugins[name]) for name in ("first", "second", "third")] == [type(config.plugins["first"])] * 3
    monkeypatch.chdir("plugins")
    assert load("../c.yaml", ["fourth={use: mine.py:Mine}"]).plugins["fourth"].words == "one"


def test_the_dumped_config_runs_from_anywhere(write: Write, mine: Path, monkeypatch: pytest.MonkeyPatch):
    write("c.yaml", "run: {until: 1 epoch}\nm: {use: plugins/mine.py:Mine}\n")
    plain = load("c.yaml").plain
    assert plain["m"]["use"] == f"{mine}:Mine"
    write("elsewhere/again.yaml", dump(plain))
    monkeypatch.chdir("elsewhere")
    assert load("again.yaml").plain == plain


def test_two_files_of_one_name_are_two_modules(write: Write, mine: Path):
    write("other/mine.py", MINE.format(words="two"))
    write("c.yaml", "run: {until: 1 epoch}\na: {use: plugins/mine.py:Mine}\nb: {use: other/mine.py:Mine}\n")
    plugins = load("c.yaml").plugins
    assert [plugins[name].words for name in "ab"] == ["one", "two"]


def test_an_object_of_such_a_class_travels_to_another_process(mine: Path):
    made = Catalog().load(f"{mine}:Mine")(words="traveller")
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).words)"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(made), capture_output=True, check=False)
    assert (result.stdout, result.stderr) == (b"traveller\n", b"")


def test_its_name_is_its_file(mine: Path):
    cls = Catalog().load(f"{mine}:Mine")
    assert Catalog().name_of(cls) == f"{mine}:Mine"
    assert (file_of(cls.__module__), source_of(cls.__module__)) == (str(mine), "plugins/mine.py")
    assert (file_of("detkernel.run"), source_of("detkernel.run")) == ("", "detkernel.run")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("nowhere.py:Mine", "nowhere.py: no such file"),
        ("no/folder/at.py:Mine", "no/folder/at.py: no such file"),
        ("plugins.py:Mine", "plugins.py: no such file"),
        ("x" * 300 + ".py:Mine", "x" * 300 + ".py: no such file"),
        ("loop.py:Mine", "loop.py: no such file"),
        ("plugins/mine.py:Mime", "plugins/mine.py has no class 'Mime', did you mean 'Mine'?"),
        ("plugins/mine.py:option", "plugins/mine.py: option is not a plugin class; decorate it with @plugin"),
        ("broken.py:Mine", "broken.py:2:5: invalid syntax"),
        ("needs.py:Mine", "needs.py cannot be imported: No module named 'no_such_thing'"),
    ],
)
def test_what_does_not_load_is_one_line(write: Write, mine: Path, use: str, message: str):
    write("broken.py", "x = 1\nx = = 2\n")
    write("needs.py", "import no_such_thing\n")
    Path("loop.py").symlink_to("loop.py")
    write("c.yaml", f"run: {{until: 1 epoch}}\nm:\n  use: {use}\n")
    assert refusal("c.yaml") == f"c.yaml:3:8: m.use: {message}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x: int = option(default=3)", "mine.py:6: option() missing 1 required keyword-only argument: 'help'"),
        ("x: int = option(3, help='h')", "mine.py:6: option() takes 0 positional arguments but 1 positional argument"),
        ("x: int = option(defualt=3, help='h')", "mine.py:6: option() got an unexpected keyword argument 'defualt'"),
        ("x: int = state(help='h')", "mine.py:6: state() got an unexpected keyword argument 'help'"),
        (
            "@hookimpl(tryfrist=True)\n    def setup(self): ...",
            "mine.py:6: HookimplMarker.__call__() got an unexpected",
        ),
        ("x: list = option(default=[], help='h')", "mine.py:3: Mine.x: a default of [] would be one list for all"),
        ("needs = 'mask'", "mine.py:3: Mine: needs: expected a tuple of names, got 'mask'; write ('mask',)"),
        ("x: int = option(factory=3, help='h')", "mine.py:6: option(): give either a `default` or a `factory`"),
    ],
)
@pytest.mark.parametrize("installed", [False, True])
def test_what_its_author_wrote_wrong_is_one_line(
    write: Write, plant: Callable[..., Path], line: str, said: str, installed: bool
):
    source = (
        "from detkernel import hookimpl, option, plugin, state\n\n@plugin\nclass Mine:\n"
        f"    '''Its author slipped.'''\n    {line}\n"
    )
    if installed:
        plant("fake", {"mine.py": source}, plugins={"m": "mine:Mine"})
        write("c.yaml", "run: {until: 1 epoch}\nm: {}\n")
        assert f"m: plugin 'm' of fake 1.0: site/{said}" in refusal("c.yaml")
    else:
        write("mine.py", source)
        write("c.yaml", "run: {until: 1 epoch}\nm: {use: ./mine.py:Mine}\n")
        assert f"m.use: {said}" in refusal("c.yaml")


def test_a_folder_is_no_file(write: Write, folder: Path):
    (folder / "plugins.py").mkdir()
    write("c.yaml", "run: {until: 1 epoch}\nm: {use: plugins.py:Mine}\n")
    assert refusal("c.yaml") == "c.yaml:2:10: m.use: plugins.py: no such file"


def test_a_bug_in_it_keeps_its_traceback(write: Write):
    write("buggy.py", "1 / 0\n")
    write("c.yaml", "run: {until: 1 epoch}\nm: {use: buggy.py:Mine}\n")
    with pytest.raises(ZeroDivisionError) as caught:
        load("c.yaml")
    assert caught.traceback[-1].path.name == "buggy.py"
