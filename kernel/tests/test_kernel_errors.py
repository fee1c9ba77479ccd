"""What is shown of text that a file or a user gave: in one line, and a terminal obeys nothing in it."""

from __future__ import annotations

import logging
from pathlib import Path

import click
import pytest
from detkernel import RunOptions, Span, UserError
from detkernel.bus import Bus
from detkernel.cli import rendered
from detkernel.errors import ConfigError, Problem, Where, printable, relative
from detkernel.run import Run

NASTY = {
    "line break": ("a\nb", r"a\nb"),
    "carriage return": ("a\rb", r"a\rb"),
    "another line break": ("a\u2028b", r"a\u2028b"),
    "escape sequence": ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
    "one-byte escape": ("\x9b31m", r"\x9b31m"),
    "half a surrogate pair": ("\ud800x", r"\ud800x"),
    "a byte of a file name": ("\udcff", r"\udcff"),
    "other direction": ("\u202egnp.exe", r"\u202egnp.exe"),
    "unseen": ("a\u200bb", r"a\u200bb"),
    "backspace": ("ab\b\bcd", r"ab\x08\x08cd"),
}


@pytest.mark.parametrize(("text", "shown"), NASTY.values(), ids=NASTY)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_what_people_write_stays():
    text = "Ümläut 犬 😀 naïve [red] 100 % \\n"
    assert printable(text) == text
    assert printable("a\tb\nc\r", keep="\n\t") == "a\tb\nc\\r"


@pytest.mark.parametrize(("text", "shown"), NASTY.values(), ids=NASTY)
def test_paths_problems_and_errors_show_it_escaped(text: str, shown: str):
    assert relative(Path(f"/x/{text}")) == f"/x/{shown}"
    problem = Problem(Where(f"{text}.yaml", 3, 1, f"{text}: 1"), text, "wrong")
    assert str(problem).splitlines()[0] == f"{shown}.yaml:3:1: {shown}: wrong"
    assert shown in str(problem).splitlines()[1]
    for error in (ConfigError([problem]), UserError(f"no {text}")):
        error.add_note(f"note {text}")
        said = click.unstyle(rendered(error)) if "\x1b" not in text else rendered(error).partition("error:")[2][4:]
        assert all(char.isprintable() or char in "\n\t" for char in said)


def test_the_caret_stands_under_the_column_that_is_meant():
    where = Where("a.yaml", 1, 4, "\x1b\tab: 1")
    shown, caret = where.caret().splitlines()
    assert shown == "    \\x1b\tab: 1"
    assert caret == "        \t ^"


def test_records_are_escaped_before_any_handler_has_them_and_tables_keep_their_lines(caplog: pytest.LogCaptureFixture):
    run = Run(options=RunOptions(until=Span(1, "iters")), bus=Bus({}))
    with caplog.at_level(logging.INFO):
        run.log.info("%s: %d\n%s", "\x1b[31mevil", 3, "a\n\ud800b")
    assert caplog.messages == ["\\x1b[31mevil: 3\na\n\\ud800b"]
