"""Who starts several processes: an extension point of the command line. A real one: `tests/test_launch.py`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from detkernel import UserError, launchers
from detkernel.cli import cli
from detkernel.processes import Launch

Plant = Callable[..., Path]
Write = Callable[[str, str], Path]
Detkernel = Callable[..., subprocess.CompletedProcess[str]]

TWINS = """
import click
from detkernel.processes import Launch

class Twins:
    def options(self, command):
        return [click.Option(["--twins"], type=int, help="so many of them")] if command == "run" else []

    def take_over(self, given, arguments):
        print("twins", given, arguments)
        return given["twins"] if given.get("twins") else None

    def launch(self):
        return Launch(2, "twins")

    def report(self, status, error, text):
        print("report", status, type(error).__name__, text)
        return True

launcher = Twins()
"""
CONFIG = """
run: {until: 1 iters, work_dir: work}
model: {use: ./plain.py:PlainModel}
data: {use: ./plain.py:PlainData}
started: {use: ./plain.py:Started}
"""
PLAIN = """
from detkernel import hookimpl, plugin
from detkernel.testing import PlainData, PlainModel

@plugin
class Started:
    '''Prints how the process was started.'''

    @hookimpl
    def before_run(self, run):
        print(run.launch)
        if run.launch.identity:
            run.stop("seen", exit_status=9)
"""


@pytest.fixture
def twins(plant: Plant, write: Write) -> None:
    plant("twins", {"twins.py": TWINS}, launchers={"twins": "twins:launcher"})
    write("c.yaml", CONFIG)
    write("plain.py", PLAIN)


@pytest.mark.usefixtures("twins")
def test_it_adds_options_and_takes_over_before_anything_is_built(detkernel: Detkernel, folder: Path):
    assert "--twins" in detkernel("run", "--help").stdout
    assert "--twins" not in detkernel("test", "--help").stdout
    result = detkernel("run", "c.yaml", "--twins", "7")
    assert (result.returncode, result.stderr) == (7, "")
    assert result.stdout == "twins {'twins': 7} ['run', 'c.yaml', '--twins', '7']\n"
    assert not (folder / "work").exists()


@pytest.mark.usefixtures("twins")
def test_the_run_knows_how_it_was_started_and_the_launcher_how_it_ended(detkernel: Detkernel):
    result = detkernel("run", "c.yaml")
    assert result.returncode == 9, result.stderr
    assert "Launch(restarts=2, identity='twins')" in result.stdout
    assert "report 9 NoneType" in result.stdout
    result = detkernel("run", "c.yaml", "data.sise=3")
    assert (result.returncode, result.stderr) == (2, ""), "it is the launcher who tells"
    assert "report 2 ConfigError" in result.stdout


def test_one_that_cannot_be_imported_leaves_the_other_commands_alone(detkernel: Detkernel, plant: Plant, write: Write):
    plant("broken", {"broken.py": "import nothing_of_the_kind"}, launchers={"broken": "broken:launcher"})
    result = detkernel("run", "c.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: launcher 'broken' of broken 1.0 cannot be imported: No module named")
    assert detkernel("plugins").returncode == 0
    assert "no such file" in detkernel("config", "none.yaml").stderr


@pytest.fixture
def none(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launchers, "installed", lambda: ())
    for name in ("run", "test"):
        monkeypatch.delitem(cli.commands[name].__dict__, "_added", raising=False)
    yield
    for name in ("run", "test"):
        cli.commands[name].__dict__.pop("_added", None)


@pytest.mark.usefixtures("none")
@pytest.mark.parametrize("option", ["--nproc-per-node=2", "--max-restarts=1"])
def test_without_one_its_options_say_what_to_install(option: str):
    with pytest.raises(UserError, match=rf"{option.partition('=')[0]}: what starts several .* pip install detkernel-"):
        CliRunner().invoke(cli, ["run", "c.yaml", option], catch_exceptions=False, standalone_mode=False)


@pytest.mark.usefixtures("none")
def test_without_one_nobody_reads_a_report():
    assert not launchers.report(1)
    assert Launch() == Launch(0, "")
