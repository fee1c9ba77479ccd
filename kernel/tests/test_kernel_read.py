"""YAML 1.2, strictly: what text becomes, and where each mistake is said to be."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
from detkernel import ConfigError, UserError
from detkernel.config.read import MAX_NODES, read_file, read_text, scalar


def value(text: str) -> object:
    return read_text(text, "c.yaml").plain()


def refusal(text: str) -> str:
    """The message for a text that cannot be read: its first line."""
    with pytest.raises(ConfigError) as caught:
        read_text(text, "c.yaml")
    assert len(caught.value.problems) == 1
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1e-3", 0.001),
        ("1E+2", 100.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-0.25", -0.25),
        ("6.02e23", 6.02e23),
        (".inf", math.inf),
        ("+.INF", math.inf),
        ("-.inf", -math.inf),
        ("010", 10),
        ("-7", -7),
        ("+7", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("true", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("None", "None"),
        ("nan", "nan"),
        ("2024-01-31", "2024-01-31"),
        ("2024-01-31T10:00:00Z", "2024-01-31T10:00:00Z"),
        ("=", "="),
        ("1.2.3", "1.2.3"),
        ("0x", "0x"),
        ("１２", "１２"),
        ("e5", "e5"),
        ("every 1 epoch", "every 1 epoch"),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("'null'", "null"),
        ('"a\\tb\\u00e9"', "a\tbé"),
    ],
)
def test_a_scalar_follows_the_core_schema_of_yaml_1_2(text: str, wanted: object):
    found = value(f"a: {text}")
    assert found == {"a": wanted}
    assert type(found["a"]) is type(wanted)


def test_nan_is_a_number():
    assert math.isnan(value("a: .nan")["a"])


def test_numbers_too_long_to_be_meant_are_text():
    digits = "9" * 251
    assert value(f"a: {digits}") == {"a": digits}
    assert float(value(f"a: {digits[:250]}")["a"]) > 1e249
    assert scalar("0x" + "f" * 5000) == "0x" + "f" * 5000


def test_maps_lists_and_text_blocks():
    text = """
list:
  - 1
  - {a: b}
  -
    - x
folded: >-
  one
  two
literal: |
  one
  two
? long key
: 3
"""
    assert value(text) == {
        "list": [1, {"a": "b"}, ["x"]],
        "folded": "one two",
        "literal": "one\ntwo\n",
        "long key": 3,
    }


def test_a_key_may_be_any_text_in_quotes():
    assert value("'1': a\n\"true\": b\n'<<': c") == {"1": "a", "true": "b", "<<": "c"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "c.yaml:3:1: 'a' is given twice (first in line 1)"),
        ("a: {b: 1, c: 2, b: 3}", "c.yaml:1:17: 'b' is given twice (first in line 1)"),
        ("a: 1\n'a': 2", "c.yaml:2:1: 'a' is given twice (first in line 1)"),
        ('"a\\nb": 1\n"a\\nb": 2', "c.yaml:2:1: 'a\\nb' is given twice (first in line 1)"),
        ("1: a", "c.yaml:1:1: a key must be text; put it in quotes if it is meant as one"),
        ("true: a", "c.yaml:1:1: a key must be text; put it in quotes if it is meant as one"),
        ("null: a", "c.yaml:1:1: a key must be text; put it in quotes if it is meant as one"),
        ("[a, b]: c", "c.yaml:1:1: a key must be text; put it in quotes if it is meant as one"),
        ("x: &x {a: 1}\ny:\n  <<: *x", "c.yaml:3:3: merge keys (<<) are not YAML 1.2; use `base:` to build on a file"),
    ],
)
def test_keys_are_text_and_stand_once(text: str, message: str):
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "place", "tag"),
    [
        ("a: !!python/object/apply:os.system ['true']", "1:4", "!!python/object/apply:os.system"),
        ("a: !include x.yaml", "1:4", "!include"),
        ("a:\n  - !!int 3", "2:5", "!!int"),
        ("a: !!str 12", "1:4", "!!str"),
        ("a: !!map {b: 1}", "1:4", "!!map"),
        ("a: ! 12", "1:4", "!"),
        ("!key a: 1", "1:1", "!key"),
        ("!!omap\na: 1", "1:1", "!!omap"),
    ],
)
def test_tags_are_refused_everywhere(text: str, place: str, tag: str):
    assert refusal(text) == f"c.yaml:{place}: tags such as {tag} are not allowed; write the value itself"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: [1, 2", "1:9", "while parsing a flow"),
        ("a:\n\tb: 1", "2:1", "indent with spaces, not tabs"),
        ("a: b: c", "1:5", "put its text in quotes"),
        ("a: 1\n b: 2", "2:3", "wrong indentation"),
        ("a: 'open", "1:9", "while scanning a quoted scalar"),
        ("a: *nowhere", "1:4", "undefined alias 'nowhere'"),
        ("a: 1\n---\nb: 2", "2:1", "expected a single document"),
        ("a: |\n   x\n y", "3:2", "while parsing a block mapping"),
        ("a: @home", "1:4", "cannot start any token"),
        ("a: 1\n}", "2:1", "found '}'"),
        ("%YAML 9.9\n---\na: 1", "1:1", "incompatible YAML document"),
        ("a: {b: ${run.seed}}", "1:9", "give this option a line of its own"),
        ("a: {b: ]", "1:8", "while parsing a flow"),
    ],
)
def test_broken_syntax_is_one_line_with_its_place(text: str, place: str, words: str):
    message = refusal(text)
    assert message.startswith(f"c.yaml:{place}: not valid YAML: ")
    assert words in message


def test_the_line_is_shown_with_a_caret():
    with pytest.raises(ConfigError) as caught:
        read_text("a: 1\nbé:\n  c: {d: 1, d: 2}\n", "c.yaml")
    assert str(caught.value).splitlines()[1:] == [
        "      c: {d: 1, d: 2}",
        "                ^",
    ]


def test_a_caret_below_tabs_stands_where_the_line_does():
    with pytest.raises(ConfigError) as caught:
        read_text("a:\n \tb: 1", "c.yaml")
    line, caret = str(caught.value).splitlines()[1:]
    assert (line, caret) == ("     \tb: 1", "     ^")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: x\x07y", "c.yaml:2:5: not valid YAML: the character U+0007 may not stand in a config"),
        ('a: "\\0"', "c.yaml:1:4: text may not hold the character U+0000"),
        ('"\\0": a', "c.yaml:1:1: text may not hold the character U+0000"),
        (
            'a: "\\ud83d\\ude00"',
            "c.yaml:1:4: text may not hold the character U+D83D; a character past U+FFFF is written as in \\U0001F600",
        ),
    ],
)
def test_characters_that_no_file_can_hold_are_refused(text: str, message: str):
    assert refusal(text) == message


def test_text_of_all_the_world_is_kept():
    assert value('a: "\\U0001F600"\nb: 日本 😀 ñ') == {"a": "😀", "b": "日本 😀 ñ"}


def test_an_alias_stands_for_its_anchor():
    assert value("a: &x {b: [1, 2]}\nc: *x") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_an_alias_bomb_is_refused():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert refusal("\n".join(rows)).endswith(f"more than {MAX_NODES} values (aliases count each time)")


def test_an_anchor_inside_itself_is_refused():
    assert refusal("a: &x [*x, *x]") == "c.yaml:1:4: nested more than 50 deep"


def test_depth_has_a_limit():
    assert value("[" * 50 + "]" * 50)
    assert refusal("[" * 52 + "]" * 52).startswith("c.yaml:1:52: nested more than 50 deep")
    assert refusal("[" * 20_000) == "c.yaml: nested too deeply"
    assert refusal("{a: " * 20_000) == "c.yaml: nested too deeply"


def test_many_values_in_one_file_are_fine():
    assert len(value("a: [" + "1, " * 20_000 + "]")["a"]) == 20_000


class TestFiles:
    @pytest.mark.parametrize("content", [b"", b"\n\n", b"# nothing\n", b"---\n", b"null\n", b"\xef\xbb\xbf"])
    def test_an_empty_one(self, folder: Path, content: bytes):
        (folder / "c.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"^c\.yaml:\d:1: the config is empty"):
            read_file(folder / "c.yaml")

    def test_one_with_a_byte_order_mark(self, folder: Path):
        (folder / "c.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
        root = read_file(folder / "c.yaml")
        assert root.plain() == {"a": 1}
        assert root.keys["a"].column == 1

    def test_windows_line_ends(self, folder: Path):
        (folder / "c.yaml").write_bytes(b"a: 1\r\nb: [\r\n  2]\r\n")
        assert read_file(folder / "c.yaml").plain() == {"a": 1, "b": [2]}

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
    def test_one_that_is_not_utf_8(self, folder: Path, encoding: str):
        (folder / "c.yaml").write_bytes("a: é\n".encode(encoding))
        with pytest.raises(UserError, match=r"^c\.yaml: not UTF-8 text \(byte \d\)$"):
            read_file(folder / "c.yaml")

    def test_a_missing_one_names_its_neighbours(self, folder: Path):
        (folder / "voc.yaml").touch()
        (folder / "coco.yml").touch()
        with pytest.raises(UserError, match=r"^lvis\.yaml: no such file; its folder has coco\.yml, voc\.yaml$"):
            read_file(folder / "lvis.yaml")
        for number in range(9):
            (folder / f"more_{number}.yaml").touch()
        with pytest.raises(UserError, match=r"coco\.yml, more_0\.yaml, .*, more_6\.yaml and 3 more$"):
            read_file(folder / "lvis.yaml")

    @pytest.mark.parametrize("typed", ["cocoa.yaml", "coco", "coco.yaml"])
    def test_a_missing_one_that_is_nearly_another(self, folder: Path, typed: str):
        (folder / "coco.yml").touch()
        with pytest.raises(UserError, match=rf"^{re.escape(typed)}: no such file, did you mean 'coco\.yml'\?$"):
            read_file(folder / typed)

    def test_a_missing_folder(self, folder: Path):
        with pytest.raises(UserError, match=r"^no/c\.yaml: no such file \(there is no folder no\)$"):
            read_file(folder / "no" / "c.yaml")

    def test_a_folder(self, folder: Path):
        with pytest.raises(UserError, match=r": is a folder, expected a config file"):
            read_file(folder)

    def test_a_name_too_long(self, folder: Path):
        with pytest.raises(UserError, match="cannot be read: File name too long"):
            read_file(folder / ("x" * 300))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_one_that_may_not_be_read(self, folder: Path):
        (folder / "c.yaml").touch(mode=0)
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            read_file(folder / "c.yaml")

    def test_a_file_below_a_file(self, folder: Path):
        (folder / "c.yaml").touch()
        with pytest.raises(UserError, match=r"c\.yaml/d\.yaml: cannot be read: Not a directory"):
            read_file(folder / "c.yaml" / "d.yaml")


def test_every_value_and_key_knows_its_place():
    root = read_text("a:\n  b: [1, {c: d}]\n", "c.yaml")
    inner = root.child("a").child("b")
    assert str(root.child("a").keys["b"]) == "c.yaml:2:3"
    assert str(inner.where) == "c.yaml:2:6"
    assert str(inner.value[1].child("c").where) == "c.yaml:2:14"
    assert inner.value[1].child("c").where.text == "  b: [1, {c: d}]"


def test_more_than_any_config_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("detkernel.config.read.MAX_NODES", 500)
    assert refusal("[" + "1," * 1000 + "]") == "c.yaml: more than 500 values"
    (tmp_path / "c.yaml").write_text("#" * 1_000_001)
    with pytest.raises(UserError, match=r"c\.yaml: cannot be read: it has more than 1,000,000 bytes"):
        read_file(tmp_path / "c.yaml")


def test_of_a_long_line_only_what_is_around_the_column_is_shown():
    with pytest.raises(ConfigError) as caught:
        read_text(f"a: '{'x' * 5000}'\nb: {{{'k: 1, ' * 3000}k: 2}}", "c.yaml")
    shown, caret = str(caught.value).splitlines()[1:]
    assert len(shown) < 220
    assert shown[caret.index("^")] == "k"


def test_a_number_may_have_250_characters():
    """One that is longer stays text."""
    assert scalar("9" * 250) == 10**250 - 1
    assert scalar("9" * 251) == "9" * 251
